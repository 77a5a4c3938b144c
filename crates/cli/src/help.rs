//! The command line's definition, with help texts that fit any terminal.

use std::ffi::OsString;

use clap::{Args, Command, CommandFactory, FromArgMatches, Subcommand};

use crate::args::{Cli, Global, Lazy};

/// What is asked for. Ends the program where that is help, and where it is wrong.
///
/// To define the options of all commands takes longer than to list a guest's processes, so the command that is called is tried alone.
/// What that definition accepts, the whole one does too and in the same way: it has all words of this one and some more. What it
/// does not accept, the whole one is asked about.
pub(crate) fn parse() -> Cli {
    let words: Vec<OsString> = std::env::args_os().collect();
    called_alone(&words).unwrap_or_else(|| {
        let matches = command().get_matches_from(words);
        Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    })
}

/// What the definition of the called command, and of what all commands share, understands; `None` where it does not.
fn called_alone(words: &[OsString]) -> Option<Cli> {
    let mut commands = Lazy::augment_subcommands(Command::new("vmsight"));
    let mut candidates = words.iter().skip(1);
    let called = candidates.find_map(|word| commands.find_subcommand_mut(word).map(std::mem::take))?;
    let alone = Global::augment_args(Command::new("vmsight"))
        .disable_help_subcommand(true)
        .subcommand(called);
    let matches = alone.try_get_matches_from(words).ok()?;
    Cli::from_arg_matches(&matches).ok()
}

/// The definition of the command line. Its texts are written in lines; clap only breaks lines and never joins them, so
/// paragraphs are made one line each, to be broken where the terminal ends.
pub(crate) fn command() -> Command {
    flowing(Cli::command())
}

fn flowing(mut command: Command) -> Command {
    if let Some(text) = command.get_after_help().map(ToString::to_string) {
        command = command.after_help(joined(&text));
    }
    let names: Vec<String> = command
        .get_subcommands()
        .map(|c| c.get_name().to_owned())
        .collect();
    for name in names {
        command = command.mut_subcommand(name, flowing);
    }
    command
}

/// Joins the lines of each paragraph. Lines that are indented, or end in a colon, stand alone: lists and their headings.
fn joined(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut open = false;
    for line in text.lines() {
        let stands_alone = line.is_empty() || line.starts_with(' ');
        if !out.is_empty() {
            out.push(if open && !stands_alone { ' ' } else { '\n' });
        }
        out.push_str(line);
        open = !stands_alone && !line.ends_with(':');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_joined_and_lists_are_not() {
        assert_eq!(
            joined(
                "Rules:\n  one  first\n  two  second\n\nA paragraph\nof two lines.\nAnd a third:\nno more"
            ),
            "Rules:\n  one  first\n  two  second\n\nA paragraph of two lines. And a third:\nno more"
        );
        assert_eq!(joined(""), "");
    }

    /// What is tried first is understood as the whole definition understands it, and what it does not know is left to that one.
    #[test]
    fn one_command_alone_is_understood_in_the_same_way() {
        let words = |line: &str| -> Vec<OsString> {
            let words = line.split(' ').map(OsString::from);
            std::iter::once("vmsight".into()).chain(words).collect()
        };
        for line in [
            "ps dump",
            "ps -o json --columns pid,name dump",
            "-o json --watch 2 ps dump --no-cache",
            "list",
            "--columns ps list",
            "ps ps",
            "check dump text idt --symbols vmlinux",
            "recover files dump --all --into folder",
            "symbols dump init_task",
            "trace vm --syscalls openat,execve --pid 7 -c",
        ] {
            let whole = command().try_get_matches_from(words(line)).unwrap();
            let whole = Cli::from_arg_matches(&whole).unwrap();
            let alone = called_alone(&words(line));
            // Its first word that is a command's name is not the command.
            if line.starts_with("--columns ps") {
                assert!(alone.is_none(), "{line}");
            } else {
                assert_eq!(format!("{:?}", alone.unwrap()), format!("{whole:?}"), "{line}");
            }
        }
        for line in [
            "",
            "--help",
            "ps --help",
            "help ps",
            "ps",
            "ps --colums pid dump",
            "nothing dump",
            "ps -V",
        ] {
            assert!(called_alone(&words(line)).is_none(), "{line}");
        }
    }

    /// Lists are broken by hand: at the width that help has where its output is no terminal.
    #[test]
    fn what_is_not_joined_fits() {
        fn check(command: &Command) {
            let text = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            for line in text.lines().filter(|line| line.starts_with(' ')) {
                assert!(line.chars().count() <= 100, "{}: {line}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        let command = command();
        command.clone().debug_assert();
        check(&command);
    }
}
