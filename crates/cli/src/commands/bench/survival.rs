//! How long a guest stands still when the monitor that holds it fails it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Pid, Signal, kill_process};
use vmsight_arch::Gva;
use vmsight_events::{agent, gdb};
use vmsight_gauge::image::WATCHED;
use vmsight_gauge::{Operation, Summary};
use vmsight_hooks::{Delivery, Expiry, Hook, Overflow};

use super::connection;
use super::machine::{self, Machine};

/// Most tries of one row: each takes a process.
const TRIES: u64 = 20;
/// The same where each takes thousands of stops of the machine, too.
const LONG_TRIES: u64 = 5;
/// The longest wait for the guest to go on, and half the deadline of the event with which it is held where that must not be what
/// lets it go.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether the guest has gone on.
const LOOK: Duration = Duration::from_micros(100);

/// The deadline of a monitor that hangs: long enough for it to be stopped before.
const DEADLINE: Duration = Duration::from_millis(100);
/// From the last event for which there was room until the guest stands at the next one. A vCPU waits a second for room.
const NEXT: Duration = Duration::from_millis(20);

/// What the monitor says when its hook is armed, and when the guest stands at it: with the time of the event, if it holds one, in
/// nanoseconds since 1970.
const ARMED: &str = "armed";
const HELD: &str = "held";

/// How a monitor fails its guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// It holds the guest, and is killed with -9.
    Killed,
    /// It holds the guest, and its connection is shut while it lives.
    Cut,
    /// It holds the guest, and gives no verdict. By an agent it is stopped besides; deadlines of the stub's backend are kept by the
    /// monitor's own process, which has to live for that.
    Hung,
    /// It is told of what holds nobody and takes none of it, until there is no room for more; then it is killed with -9.
    Full,
}

/// All of them.
pub(super) const END: [End; 4] = [End::Killed, End::Cut, End::Hung, End::Full];

impl End {
    /// The name of its rows.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Cut => "cut",
            Self::Hung => "hung",
            Self::Full => "full",
        }
    }
}

/// A monitor that holds the guest at its first event, or takes none, and does nothing more.
#[derive(Args, Debug)]
pub(super) struct Cmd {
    /// Where the agent in the VMM listens
    #[arg(long)]
    agent: Option<PathBuf>,
    /// The QEMU whose gdb stub it is by
    #[arg(long, conflicts_with = "agent", required_unless_present = "agent")]
    pid: Option<u32>,
    /// The address of the instruction, or of the word
    #[arg(long)]
    at: u64,
    /// It is a word that is written
    #[arg(long)]
    write: bool,
    /// How long the guest is held, in milliseconds
    #[arg(long)]
    deadline: u64,
    /// Hold nobody, and wait until so many events were told
    #[arg(long, value_name = "EVENTS")]
    fill: Option<u64>,
}

impl Cmd {
    pub(super) fn run(&self) -> Result<()> {
        let monitor = match (&self.agent, self.pid) {
            (Some(socket), _) => machine::by_agent(socket)?,
            (None, Some(pid)) => machine::by_stub(pid)?,
            (None, None) => bail!("a monitor of nothing"),
        };
        let delivery = match self.fill {
            None => Delivery::Held {
                deadline: Duration::from_millis(self.deadline),
                expiry: Expiry::Open,
            },
            Some(_) => Delivery::Told {
                overflow: Overflow::Block,
            },
        };
        let hook = match self.write {
            true => Hook::write(Gva(self.at), 8),
            false => Hook::execute(Gva(self.at)),
        };
        let guard = monitor.hook(&hook.delivered(delivery))?;
        say(ARMED)?;
        let held = match self.fill {
            None => Some(monitor.next(PATIENCE)?.context("nothing happened")?),
            Some(events) => {
                // Thousands of stops, each of which takes its time where many want the processors.
                let end = Instant::now() + 4 * PATIENCE;
                while guard.counts()?.told < events {
                    ensure!(Instant::now() < end, "too little happened");
                    std::thread::sleep(Duration::from_millis(1));
                }
                None
            }
        };
        match &held {
            Some(held) => {
                let since = held.event().time.duration_since(UNIX_EPOCH);
                say(&format!(
                    "{HELD} {}",
                    since.context("asking the time")?.as_nanos()
                ))?;
            }
            None => say(HELD)?,
        }
        // Until it is killed.
        std::thread::sleep(4 * PATIENCE);
        drop((held, guard));
        Ok(())
    }
}

fn say(word: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word}")?;
    out.flush().context("saying how far it is")
}

/// How long the guest stands still, by the clock of the host, when its monitor fails it: by the agent in the VMM, or by the gdb stub.
/// From what is done to the monitor until all rounds of the guest are done; where nothing but the deadline lets the guest go, from
/// the deadline.
pub(super) fn survived(
    machine: &Machine,
    agent: bool,
    operation: Operation,
    end: End,
    samples: u64,
) -> Result<Summary> {
    let most = match (end, agent) {
        (End::Full, false) => LONG_TRIES,
        _ => TRIES,
    };
    let tries = 0..samples.min(most);
    let took = tries
        .map(|_| one(machine, agent, operation, end))
        .collect::<Result<Vec<_>>>()?;
    Summary::of(&took).context("nothing was tried")
}

fn one(machine: &Machine, agent: bool, operation: Operation, end: End) -> Result<f64> {
    let room = if agent {
        agent::MOST_WAITING
    } else {
        gdb::MOST_WAITING
    } as u64;
    let mut monitor = Victim::start(machine, agent, operation, end, room)?;
    monitor.until(ARMED)?;
    let rounds = if end == End::Full { room + 1 } else { 1 };
    machine.timer.begin(operation, rounds)?;
    let since = monitor.until(HELD)?;
    if end == End::Full {
        std::thread::sleep(NEXT);
    }
    let stands = || -> Result<Instant> {
        ensure!(!machine.timer.is_through()?, "the guest did not stand still");
        Ok(Instant::now())
    };
    let begin = match end {
        End::Killed | End::Full => {
            let begin = stands()?;
            monitor.child.kill().context("killing the monitor")?;
            begin
        }
        End::Cut => {
            let connection = monitor.connection(machine, agent)?;
            let begin = stands()?;
            shutdown(&connection, Shutdown::Both).context("cutting a connection")?;
            begin
        }
        End::Hung => {
            if agent {
                kill_process(Pid::from_child(&monitor.child), Signal::STOP)
                    .context("stopping the monitor")?;
            }
            let now = stands()?;
            let since = since.parse().context("listening to a monitor")?;
            let held = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_nanos(since));
            // It may have passed by now.
            now + DEADLINE - held.context("asking the time")?
        }
    };
    while !machine.timer.is_through()? {
        ensure!(begin.elapsed() < PATIENCE, "the guest did not go on");
        std::thread::sleep(LOOK);
    }
    Ok(begin.elapsed().as_nanos() as f64)
}

/// The monitor that fails its guest. It is killed, at the latest when this is dropped.
struct Victim {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Victim {
    fn start(machine: &Machine, agent: bool, operation: Operation, end: End, room: u64) -> Result<Self> {
        let own = std::env::current_exe().context("finding this program")?;
        let reach: [OsString; 2] = match agent {
            true => ["--agent".into(), machine.socket().into()],
            false => ["--pid".into(), machine.pid().to_string().into()],
        };
        let write = operation == Operation::Write;
        let at = if write {
            WATCHED
        } else {
            machine.timer.image().function
        };
        let deadline = if end == End::Hung { DEADLINE } else { 2 * PATIENCE };
        let mut command = Command::new(&own);
        command
            .args(["bench", "child", "--"])
            .arg(&own)
            .args(["bench", "hold", "--at"])
            .arg(at.to_string())
            .args(["--deadline", &deadline.as_millis().to_string()])
            .args(reach);
        if write {
            command.arg("--write");
        }
        if end == End::Full {
            command.args(["--fill", &room.to_string()]);
        }
        let mut child = command
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

    /// Its connection to the agent, or to the stub that was opened for it.
    fn connection(&self, machine: &Machine, agent: bool) -> Result<OwnedFd> {
        let socket = machine.socket();
        let stub = format!("/vmsight-gdb-{}-", self.child.id());
        connection::of(&self.child, |path| match agent {
            true => path == socket.as_os_str().as_encoded_bytes(),
            false => String::from_utf8_lossy(path).contains(&stub),
        })
    }

    /// Waits until it says so, and gives what else it says; it ends where it cannot.
    fn until(&mut self, word: &str) -> Result<String> {
        let mut line = String::new();
        self.said.read_line(&mut line).context("listening to a monitor")?;
        if let Some(rest) = line.strip_prefix(word) {
            return Ok(rest.trim().to_owned());
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
