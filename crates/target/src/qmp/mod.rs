//! A small QMP client: one connection, one command at a time, a deadline on everything.
//!
//! A QMP socket serves one client. Whoever is second is put in a queue: its `connect` succeeds and then
//! nothing comes. So a socket that does not greet in time is either in use or its QEMU hangs; [`QmpError`]
//! says which, and names the client that holds it where the kernel tells. Connections are closed as soon as
//! the answer is there, for the same reason.
//!
//! Why not the `qapi` crate: it brings types for the whole QMP schema (minutes of compiling for a dozen
//! commands) and leaves deadlines to the stream.

mod connect;
mod error;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use error::QmpError;

use crate::host::peers;
use crate::host::process::{Identity, Process};

pub(crate) use connect::{connect_socket, connect_unix, unix_socket};

/// The longest answer taken. `info mtree -f` of a machine with hundreds of devices has about a megabyte.
const MAX_ANSWER: usize = 32 << 20;

/// The command that runs one of the human monitor.
const HUMAN: &str = "human-monitor-command";

/// The command that lists the memory backends.
const MEMORY_BACKENDS: &str = "query-memdev";

/// The command that every session begins with.
const CAPABILITIES: &str = "qmp_capabilities";

/// Most commands that are sent before the first is answered: they must fit into the socket's buffer.
const AT_ONCE: usize = 64;

/// How long a process that this one has just made may take until it runs its program.
const STARTING: Duration = Duration::from_secs(10);

/// A line that asks for a command.
fn request(command: &str, arguments: Value) -> String {
    let mut request = json!({ "execute": command });
    if !arguments.is_null()
        && let Some(object) = request.as_object_mut()
    {
        object.insert("arguments".into(), arguments);
    }
    format!("{request}\n")
}

/// The same for a line of the human monitor.
fn human(line: &str) -> String {
    request(HUMAN, json!({ "command-line": line }))
}

/// A connection to a QMP monitor, past the greeting.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    path: PathBuf,
    timeout: Duration,
    server: Option<u32>,
    version: (u32, u32),
    /// The commands that were sent ahead and are not answered yet.
    ahead: VecDeque<String>,
}

/// Whether a machine runs, as `query-status` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// Its vCPUs run.
    pub running: bool,
    /// QEMU's word for it: `running`, `paused`, `prelaunch`, `suspended`, …
    pub name: String,
}

impl Qmp {
    /// Connects to the socket at `path` and waits for the greeting. `timeout` holds for this and for each
    /// command after it.
    ///
    /// # Errors
    /// [`QmpError::Busy`] where another client holds the socket, [`QmpError::Silent`] where nothing is heard.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let mut qmp = Self::greeted(path, timeout)?;
        qmp.settle()?;
        Ok(qmp)
    }

    /// Connects, reads the greeting and does not wait for what follows it: the first command does.
    pub(crate) fn greeted(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        // Whoever holds it now would be waited for in vain; a holder we may not see is found out by waiting.
        let deadline = Instant::now() + timeout;
        if let Some(busy) = QmpError::held(path, deadline.min(Instant::now() + STARTING)) {
            return Err(busy);
        }
        let stream = match connect_unix(path, deadline) {
            Ok(stream) => stream,
            // The queue of clients that wait is full: others wait too.
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                return Err(QmpError::silent(path, None, timeout));
            }
            Err(source) => {
                return Err(QmpError::Connect {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let server = peers::listener_pid(&stream);
        let mut qmp = Self {
            stream,
            buffer: Vec::new(),
            path: path.to_owned(),
            timeout,
            server,
            version: (0, 0),
            ahead: VecDeque::new(),
        };
        let greeting = match qmp.message(deadline, "the greeting") {
            Err(QmpError::Timeout { .. }) => return Err(QmpError::silent(path, Some(&qmp.stream), timeout)),
            other => other?,
        };
        let Some(version) = greeting.pointer("/QMP/version/qemu") else {
            return Err(qmp.protocol("it does not greet as QMP does"));
        };
        let number = |key| {
            version
                .get(key)
                .and_then(Value::as_u64)
                .and_then(|n| u32::try_from(n).ok())
        };
        qmp.version = (number("major").unwrap_or(0), number("minor").unwrap_or(0));
        qmp.send_ahead(vec![request(CAPABILITIES, Value::Null)])?;
        Ok(qmp)
    }

    /// QEMU's version, major and minor.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The process that listens on the socket, as the kernel recorded it; `None` where it is none that we can
    /// see (another pid namespace).
    #[must_use]
    pub fn server_pid(&self) -> Option<u32> {
        self.server
    }

    /// Whether the process at the other end is `pid`: it made the socket, or was given it and accepted us.
    pub(crate) fn is_of(&self, pid: u32) -> bool {
        self.server == Some(pid) || peers::holds_other_end(Process { pid }, &self.stream)
    }

    /// An error where the process at the other end is not `vm`, or `vm` is gone.
    pub(crate) fn refuse_another(self, vm: Identity) -> Result<Self, QmpError> {
        if vm.runs() && self.is_of(vm.pid) {
            return Ok(self);
        }
        Err(QmpError::AnotherVm {
            path: self.path,
            pid: vm.pid,
            server: self.server.filter(|server| *server != vm.pid),
        })
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command and waits for its answer. Events that come meanwhile are passed over.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let request = request(command, arguments);
        let sent = self.was_sent(&request)?;
        let deadline = Instant::now() + self.timeout;
        if !sent {
            self.send(request.as_bytes(), deadline, command)?;
        }
        self.answer(deadline, command)
    }

    /// Asks for the memory backends and for what lines of the human monitor say, without waiting. Whoever asks for the same, in
    /// this order, has the answer as soon as it is there; other commands drop what was not asked for by then.
    ///
    /// QEMU takes about half a millisecond for each, in which the caller has other things to look at.
    pub(crate) fn ask_ahead(&mut self, lines: &[String]) -> Result<(), QmpError> {
        let human = lines.iter().take(AT_ONCE).map(|line| human(line));
        let requests = std::iter::once(request(MEMORY_BACKENDS, Value::Null)).chain(human);
        self.send_ahead(requests.collect())
    }

    fn send_ahead(&mut self, requests: Vec<String>) -> Result<(), QmpError> {
        let deadline = Instant::now() + self.timeout;
        self.send(requests.concat().as_bytes(), deadline, CAPABILITIES)?;
        self.ahead.extend(requests);
        Ok(())
    }

    /// Whether a command was sent ahead, and its answer comes next.
    fn was_sent(&mut self, request: &str) -> Result<bool, QmpError> {
        while let Some(next) = self.ahead.pop_front() {
            if next == request {
                return Ok(true);
            }
            self.skip(&next)?;
        }
        Ok(false)
    }

    /// Waits until the session has begun, if it has not: QEMU is at work on what was sent ahead then. A thread of it that was woken
    /// by us waits for our processor as long as we do not sleep.
    pub(crate) fn begin(&mut self) -> Result<(), QmpError> {
        let first = request(CAPABILITIES, Value::Null);
        if self.ahead.front() == Some(&first) {
            self.ahead.pop_front();
            self.skip(&first)?;
        }
        Ok(())
    }

    /// Waits until nothing that was sent ahead is without an answer.
    fn settle(&mut self) -> Result<(), QmpError> {
        while let Some(next) = self.ahead.pop_front() {
            self.skip(&next)?;
        }
        Ok(())
    }

    /// Passes over the answer to a command that was sent ahead. Only that the session has begun matters to everybody.
    fn skip(&mut self, sent: &str) -> Result<(), QmpError> {
        let begins = sent == request(CAPABILITIES, Value::Null);
        match self.answer(Instant::now() + self.timeout, CAPABILITIES) {
            Err(QmpError::Command { .. }) if !begins => Ok(()),
            other => other.map(drop),
        }
    }

    /// Waits for the answer to a command that was sent.
    fn answer(&mut self, deadline: Instant, command: &str) -> Result<Value, QmpError> {
        loop {
            let mut answer = self.message(deadline, command)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = |key| {
                    error
                        .get(key)
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned()
                };
                return Err(QmpError::Command {
                    path: self.path.clone(),
                    command: command.to_owned(),
                    class: text("class"),
                    reason: text("desc"),
                });
            }
            if answer.get("event").is_none() {
                return Err(self.protocol("an answer that is neither result nor error nor event"));
            }
        }
    }

    /// Runs a command of the human monitor and gives its text, lines ended by `\n`.
    pub fn hmp(&mut self, line: &str) -> Result<String, QmpError> {
        let value = self.execute(HUMAN, json!({ "command-line": line }))?;
        self.human_text(value)
    }

    /// Runs commands of the human monitor in their order and gives the text of each. They are sent at once: a busy QEMU lets
    /// each that is sent alone wait for its turn.
    ///
    /// # Errors
    /// The first that occurs. Where a command failed, those behind it have been run too.
    pub fn hmp_all(&mut self, lines: &[String]) -> Result<Vec<String>, QmpError> {
        let mut texts = Vec::with_capacity(lines.len());
        let mut failed = None;
        let mut rest = lines;
        while let Some((line, behind)) = rest.split_first() {
            if !self.was_sent(&human(line))? {
                break;
            }
            self.human_answer(&mut texts, &mut failed)?;
            rest = behind;
        }
        for lines in rest.chunks(AT_ONCE) {
            if failed.is_some() {
                break;
            }
            let requests: String = lines.iter().map(|line| human(line)).collect();
            self.send(requests.as_bytes(), Instant::now() + self.timeout, HUMAN)?;
            for _ in lines {
                self.human_answer(&mut texts, &mut failed)?;
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(texts),
        }
    }

    /// Takes one of several answers; `failed` is the first command that failed.
    fn human_answer(
        &mut self,
        texts: &mut Vec<String>,
        failed: &mut Option<QmpError>,
    ) -> Result<(), QmpError> {
        // As if each had been sent when the one before it was answered.
        match self.answer(Instant::now() + self.timeout, HUMAN) {
            Ok(value) => texts.push(self.human_text(value)?),
            Err(error @ QmpError::Command { .. }) => *failed = failed.take().or(Some(error)),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn human_text(&self, value: Value) -> Result<String, QmpError> {
        match value {
            Value::String(text) => Ok(text.replace("\r\n", "\n")),
            _ => Err(self.protocol("human-monitor-command gave no text")),
        }
    }

    /// Whether the machine runs.
    pub fn status(&mut self) -> Result<Status, QmpError> {
        let value = self.execute("query-status", Value::Null)?;
        let running = value.get("running").and_then(Value::as_bool);
        let name = value.get("status").and_then(Value::as_str);
        match (running, name) {
            (Some(running), Some(name)) => Ok(Status {
                running,
                name: name.to_owned(),
            }),
            _ => Err(self.protocol("query-status gave no status")),
        }
    }

    /// Stops the vCPUs. Whoever does this must see to it that they go on: see [`crate::Target::pause`].
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.execute("stop", Value::Null).map(drop)
    }

    /// Lets the vCPUs go on.
    pub fn cont(&mut self) -> Result<(), QmpError> {
        self.execute("cont", Value::Null).map(drop)
    }

    /// The machine's name, where it has one.
    pub fn name(&mut self) -> Result<Option<String>, QmpError> {
        let value = self.execute("query-name", Value::Null)?;
        Ok(value.get("name").and_then(Value::as_str).map(str::to_owned))
    }

    /// The ids of the memory backends (`pc.ram`, `dimm0`, …).
    pub fn memory_backends(&mut self) -> Result<Vec<String>, QmpError> {
        let value = self.execute(MEMORY_BACKENDS, Value::Null)?;
        let all = value.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(all
            .iter()
            .filter_map(|m| m.get("id")?.as_str().map(str::to_owned))
            .collect())
    }

    /// A second handle on the connection, for the process that keeps watch over a pause.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant, doing: &str) -> Result<(), QmpError> {
        let left = self.left(deadline, doing)?;
        let sent = self
            .stream
            .set_write_timeout(Some(left))
            .and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|e| self.lost(e, doing))
    }

    /// The next message, whatever it is.
    fn message(&mut self, deadline: Instant, doing: &str) -> Result<Value, QmpError> {
        let mut searched = 0;
        loop {
            let unsearched = self.buffer.get(searched..).unwrap_or_default();
            if let Some(at) = unsearched.iter().position(|b| *b == b'\n') {
                let end = searched + at;
                let parsed = serde_json::from_slice(self.buffer.get(..end).unwrap_or_default());
                self.buffer.drain(..=end);
                return parsed.map_err(|_| self.protocol("a line that is no JSON"));
            }
            searched = self.buffer.len();
            if searched > MAX_ANSWER {
                return Err(self.protocol("an answer without end"));
            }
            let left = self.left(deadline, doing)?;
            let mut chunk = [0; 16 * 1024];
            let got = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut chunk));
            match got {
                Ok(0) => {
                    return Err(QmpError::Closed {
                        path: self.path.clone(),
                        doing: doing.to_owned(),
                    });
                }
                Ok(n) => self.buffer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(e, doing)),
            }
        }
    }

    fn left(&self, deadline: Instant, doing: &str) -> Result<Duration, QmpError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(self.timed_out(doing))
        } else {
            Ok(left)
        }
    }

    fn timed_out(&self, doing: &str) -> QmpError {
        QmpError::Timeout {
            path: self.path.clone(),
            doing: doing.to_owned(),
            after: self.timeout,
        }
    }

    fn lost(&self, error: io::Error, doing: &str) -> QmpError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.timed_out(doing),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed {
                path: self.path.clone(),
                doing: doing.to_owned(),
            },
            _ => QmpError::Connect {
                path: self.path.clone(),
                source: error,
            },
        }
    }

    fn protocol(&self, reason: &str) -> QmpError {
        QmpError::Protocol {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
