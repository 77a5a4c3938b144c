//! The command line's definition, with help texts that fit any terminal.

use clap::{Command, CommandFactory};

use crate::args::Cli;

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
