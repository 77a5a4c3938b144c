//! `vmsight`: virtual machine monitoring for security.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod help;
mod output;
mod place;
mod session;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use tracing_subscriber::EnvFilter;
use vmsight_linux::LinuxError;
use vmsight_target::TargetError;

use args::{Cli, Command};
use session::Missing;

/// How a run ends when nothing went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// All is well.
    Fine,
    /// What was asked for is not there.
    Nothing,
    /// A check found something.
    Found,
    /// A check could not be made; what and why has been said.
    Failed,
}

fn main() -> ExitCode {
    let cli = help::parse();
    log_to_stderr(cli.global.verbose, cli.global.quiet);
    match run(&cli) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Nothing | Outcome::Found) => ExitCode::from(1),
        Ok(Outcome::Failed) => ExitCode::from(2),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(if is_missing(&error) { 1 } else { 2 })
        }
    }
}

fn run(cli: &Cli) -> Result<Outcome> {
    anyhow::ensure!(
        cli.global.output != output::Format::Sarif || cli.command.has_sarif(),
        "-o sarif is for findings: vmsight check TARGET"
    );
    anyhow::ensure!(
        cli.global.output != output::Format::Html || matches!(cli.command, Command::Report(_)),
        "-o html is for reports: vmsight report TARGET"
    );
    let Some(seconds) = cli.global.watch else {
        return once(cli);
    };
    anyhow::ensure!(
        seconds.is_finite() && (0.05..=86_400.0).contains(&seconds),
        "--watch takes 0.05 to 86400 seconds"
    );
    anyhow::ensure!(
        cli.command.can_repeat(),
        "--watch repeats what only shows something; this command writes or makes files"
    );
    // What fails at once would fail for ever.
    once(cli)?;
    loop {
        std::thread::sleep(Duration::from_secs_f64(seconds));
        match once(cli) {
            Ok(_) => {}
            Err(error) if is_broken_pipe(&error) || is_over(&error) => return Err(error),
            // A guest in the middle of something: the next look may show it whole.
            Err(error) => complain(&error),
        }
    }
}

fn once(cli: &Cli) -> Result<Outcome> {
    let global = &cli.global;
    match &cli.command {
        Command::List(c) => c.run(global),
        Command::Info(c) => c.run(global),
        Command::Ps(c) => c.run(global),
        Command::Pstree(c) => c.run(global),
        Command::Threads(c) => c.run(global),
        Command::Stacks(c) => c.run(global),
        Command::Maps(c) => c.run(global),
        Command::Lsof(c) => c.run(global),
        Command::Lsmod(c) => c.run(global),
        Command::Net(c) => c.run(global),
        Command::Unix(c) => c.run(global),
        Command::Mounts(c) => c.run(global),
        Command::Kmsg(c) => c.run(global),
        Command::Env(c) => c.run(global),
        Command::Cgroups(c) => c.run(global),
        Command::Ifaces(c) => c.run(global),
        Command::Iomem(c) => c.run(global),
        Command::Slabs(c) => c.run(global),
        Command::Bpf(c) => c.run(global),
        Command::Perf(c) => c.run(global),
        Command::Regs(c) => c.run(global),
        Command::Read(c) => c.run(global),
        Command::Write(c) => c.run(global),
        Command::Dump(c) => c.run(global),
        Command::Translate(c) => c.run(global),
        Command::Disas(c) => c.run(global),
        Command::Strings(c) => c.run(global),
        Command::Symbols(c) => c.run(global),
        Command::Types(c) => c.run(global),
        Command::Check(c) => c.run(global),
        Command::Baseline(c) => c.run(global),
        Command::Recover(c) => c.run(global),
        Command::Scan(c) => c.run(global),
        Command::Timeline(c) => c.run(global),
        Command::Report(c) => c.run(global),
        Command::Hooks(c) => c.run(global),
        Command::Trace(c) => c.run(global),
        Command::Guard(c) => c.run(global),
        Command::Launch(c) => c.run(),
        Command::Debug(c) => c.run(global),
        Command::Bench(c) => c.run(global),
        Command::Sim(c) => c.run(global),
        Command::Completions(c) => c.run(),
        Command::Man(c) => c.run(),
    }
}

fn log_to_stderr(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, 2) => "debug",
        (false, _) => "trace",
    };
    let filter = EnvFilter::try_from_env("VMSIGHT_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .without_time()
        .init();
}

/// `vmsight ps T | head` is no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = |cause: &(dyn std::error::Error + 'static)| {
        let csv = || match cause.downcast_ref::<csv::Error>()?.kind() {
            csv::ErrorKind::Io(error) => Some(error.kind()),
            _ => None,
        };
        let json = || cause.downcast_ref::<serde_json::Error>()?.io_error_kind();
        let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        io.or_else(json).or_else(csv)
    };
    error
        .chain()
        .any(|cause| io(cause) == Some(io::ErrorKind::BrokenPipe))
}

/// What was asked for by name or number is not in the guest.
fn is_missing(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.is::<Missing>() || matches!(cause.downcast_ref(), Some(LinuxError::NotFound(_))))
}

/// There is no VM any more that the next look could see.
fn is_over(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| match cause.downcast_ref::<TargetError>() {
            Some(
                TargetError::NotFound { .. } | TargetError::NoProcess { .. } | TargetError::NotAVm { .. },
            ) => true,
            Some(error) => error.is_exit(),
            None => false,
        })
}

/// What was being done, then each cause on a line of its own.
fn complain(error: &anyhow::Error) {
    let mut text = format!("vmsight: {}", output::escape(&error.to_string()));
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Many errors print their source already; saying it twice helps nobody.
        if !last.contains(&cause) {
            text.push_str("\n  because ");
            text.push_str(&output::escape(&cause));
        }
        last = cause;
    }
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    fn pipe() -> io::Error {
        io::Error::from(io::ErrorKind::BrokenPipe)
    }

    #[test]
    fn a_reader_that_went_away_whatever_was_written() {
        assert!(is_broken_pipe(&anyhow::Error::from(pipe())));
        assert!(is_broken_pipe(&anyhow::Error::from(csv::Error::from(pipe()))));
        assert!(is_broken_pipe(&anyhow::Error::from(
            serde_json::Error::io(pipe())
        )));
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert!(!is_broken_pipe(&anyhow::Error::from(csv::Error::from(full))));
    }

    #[test]
    fn what_is_not_in_the_guest_is_no_failure() {
        let missing = Err::<(), _>(LinuxError::NotFound("no process 7".into())).context("listing threads");
        assert!(is_missing(&missing.unwrap_err()));
        assert!(is_missing(&Missing("no type x".into()).into()));
        assert!(!is_missing(&anyhow!("no process 7")));
    }

    #[test]
    fn watching_ends_with_the_vm_and_not_with_an_error() {
        let over = |error: TargetError| is_over(&anyhow::Error::from(error).context("attaching to x"));
        assert!(over(TargetError::Exited { pid: 7 }));
        assert!(over(TargetError::NoProcess { pid: 7 }));
        assert!(!over(TargetError::NoLayout {
            pid: 7,
            reason: "it moved".into(),
            monitor: None,
        }));
        assert!(!is_over(&anyhow!("cannot read init_task")));
    }
}
