//! `vmsight`: virtual machine monitoring for security.

mod args;
mod commands;
mod output;
mod place;
mod session;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};

/// How a run ends when nothing went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// All is well.
    Fine,
    /// What was asked for is not there.
    Nothing,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.global.verbose, cli.global.quiet);
    match run(&cli) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Nothing) => ExitCode::from(1),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> Result<Outcome> {
    let Some(seconds) = cli.global.watch else {
        return once(cli);
    };
    anyhow::ensure!(
        seconds.is_finite() && (0.05..=86_400.0).contains(&seconds),
        "--watch takes 0.05 to 86400 seconds"
    );
    let clear = cli.global.output == output::Format::Table && io::IsTerminal::is_terminal(&io::stdout());
    loop {
        if clear {
            // Home and clear to the end: no flicker, and the scroll-back stays.
            print!("\x1b[H\x1b[2J");
            io::stdout().flush()?;
        }
        once(cli)?;
        std::thread::sleep(Duration::from_secs_f64(seconds));
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
        Command::Regs(c) => c.run(global),
        Command::Read(c) => c.run(global),
        Command::Write(c) => c.run(global),
        Command::Translate(c) => c.run(global),
        Command::Disas(c) => c.run(global),
        Command::Strings(c) => c.run(global),
        Command::Symbols(c) => c.run(global),
        Command::Types(c) => c.run(global),
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
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let json = cause
            .downcast_ref::<serde_json::Error>()
            .and_then(serde_json::Error::io_error_kind);
        io == Some(io::ErrorKind::BrokenPipe) || json == Some(io::ErrorKind::BrokenPipe)
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
