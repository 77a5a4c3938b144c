//! How long a guest stands still when the monitor that holds it is killed.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use vmsight_arch::Gva;
use vmsight_gauge::{Operation, Summary};
use vmsight_hooks::{Delivery, Expiry, Hook};

use super::machine::{self, Machine};

/// Most tries of one row: each takes a process.
const TRIES: u64 = 20;
/// The longest wait for the guest to go on, and the deadline of the event with which it is held: it must not be what lets it go.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether the guest has gone on.
const LOOK: Duration = Duration::from_micros(100);

/// What the monitor says when its hook is armed, and when the guest stands at it.
const ARMED: &str = "armed";
const HELD: &str = "held";

/// A monitor that holds the guest at its first event and does nothing more.
#[derive(Args, Debug)]
pub(super) struct Cmd {
    /// Where the agent in the VMM listens
    #[arg(long)]
    agent: Option<PathBuf>,
    /// The QEMU whose gdb stub it is by
    #[arg(long, conflicts_with = "agent", required_unless_present = "agent")]
    pid: Option<u32>,
    /// The address of the instruction
    #[arg(long)]
    at: u64,
}

impl Cmd {
    pub(super) fn run(&self) -> Result<()> {
        let monitor = match (&self.agent, self.pid) {
            (Some(socket), _) => machine::by_agent(socket)?,
            (None, Some(pid)) => machine::by_stub(pid)?,
            (None, None) => bail!("a monitor of nothing"),
        };
        let hook = Hook::execute(Gva(self.at)).delivered(Delivery::Held {
            deadline: 2 * PATIENCE,
            expiry: Expiry::Open,
        });
        let _guard = monitor.hook(&hook)?;
        say(ARMED)?;
        let held = monitor.next(PATIENCE)?.context("nothing happened")?;
        say(HELD)?;
        // Until it is killed.
        std::thread::sleep(4 * PATIENCE);
        drop(held);
        Ok(())
    }
}

fn say(word: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word}")?;
    out.flush().context("saying how far it is")
}

/// What it takes from kill -9 of a monitor that holds the guest until the guest has gone on, by the clock of the host. By the
/// agent in the VMM, or by the gdb stub.
pub(super) fn killed(machine: &Machine, agent: bool, samples: u64) -> Result<Summary> {
    let tries = 0..samples.min(TRIES);
    let took = tries.map(|_| one(machine, agent)).collect::<Result<Vec<_>>>()?;
    Summary::of(&took).context("nothing was tried")
}

fn one(machine: &Machine, agent: bool) -> Result<f64> {
    let mut monitor = Victim::start(machine, agent)?;
    monitor.until(ARMED)?;
    machine.timer.begin(Operation::Call, 1)?;
    monitor.until(HELD)?;
    ensure!(!machine.timer.is_through()?, "the guest did not stand still");
    let begin = Instant::now();
    monitor.child.kill().context("killing the monitor")?;
    while !machine.timer.is_through()? {
        ensure!(begin.elapsed() < PATIENCE, "the guest did not go on");
        std::thread::sleep(LOOK);
    }
    Ok(begin.elapsed().as_nanos() as f64)
}

/// The monitor that is to be killed. It is, at the latest when this is dropped.
struct Victim {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Victim {
    fn start(machine: &Machine, agent: bool) -> Result<Self> {
        let own = std::env::current_exe().context("finding this program")?;
        let reach: [OsString; 2] = match agent {
            true => ["--agent".into(), machine.socket().into()],
            false => ["--pid".into(), machine.pid().to_string().into()],
        };
        let mut child = Command::new(&own)
            .args(["bench", "child", "--"])
            .arg(&own)
            .args(["bench", "hold", "--at"])
            .arg(machine.timer.image().function.to_string())
            .args(reach)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting a monitor")?;
        let said = child.stdout.take().context("a monitor that says nothing")?;
        Ok(Self {
            child,
            said: BufReader::new(said),
        })
    }

    /// Waits until it says so; it ends where it cannot.
    fn until(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.said.read_line(&mut line).context("listening to a monitor")?;
        if line.trim_end() == word {
            return Ok(());
        }
        let _ = self.child.kill();
        let mut why = String::new();
        if let Some(errors) = &mut self.child.stderr {
            errors.read_to_string(&mut why)?;
        }
        bail!("a monitor was not {word}: {}", why.trim())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
