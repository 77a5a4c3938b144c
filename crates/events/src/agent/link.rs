//! The control connection: questions with their answers, and what the agent says unasked.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmsight_channel::{
    ChannelError, MAX_REPLY, MAX_REQUEST, Refusal, Reply, Request, Shared, VERSION, connect, read,
    receive_descriptor, write,
};
use vmsight_hooks::{BackendKind, Feature};

use crate::EventError;

/// How long an answer may take: the agent brings all vCPUs out of the guest for some.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the agent said of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hello {
    pub(super) backend: BackendKind,
    pub(super) paused: bool,
}

/// The connection. Dropped, it says good-bye.
#[derive(Debug)]
pub(super) struct Link {
    socket: PathBuf,
    stream: UnixStream,
    /// One question at a time.
    answers: Mutex<Receiver<Reply>>,
    gone: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Link {
    /// Connects and says hello.
    pub(super) fn open(socket: &Path) -> Result<(Self, Arc<Shared>, Hello), EventError> {
        let at = |error| failed(socket, error);
        let stream = connect(socket).map_err(at)?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .map_err(|e| at(ChannelError::io("set up the connection")(e)))?;
        // An agent that has too many monitors says so and closes at once: its answer is there although ours was not
        // taken.
        let said = write(&stream, &Request::Hello { version: VERSION }, MAX_REQUEST);
        let hello = match read(&stream, MAX_REPLY)
            .map_err(|e| said.err().unwrap_or(e))
            .map_err(at)?
        {
            Reply::Hello {
                version: VERSION,
                backend,
                paused,
                ..
            } => Hello { backend, paused },
            Reply::Refused(refusal) => return Err(refused(socket, BackendKind::AgentKvm, refusal)),
            other => return Err(surprised(socket, &other)),
        };
        let memory = receive_descriptor(&stream).map_err(at)?;
        let shared = Arc::new(Shared::open(&memory).map_err(at)?);
        let io = |e| at(ChannelError::io("set up the connection")(e));
        stream.set_read_timeout(None).map_err(io)?;
        let gone = Arc::new(AtomicBool::new(false));
        let (sender, answers) = channel();
        let reader = {
            let (stream, gone, shared) = (
                stream.try_clone().map_err(io)?,
                Arc::clone(&gone),
                Arc::clone(&shared),
            );
            std::thread::Builder::new()
                .name("vmsight-link".to_owned())
                .spawn(move || {
                    listen(&stream, &sender);
                    gone.store(true, Ordering::SeqCst);
                    // Those who wait for events learn of it.
                    shared.ring_bell();
                })
                .map_err(io)?
        };
        let link = Self {
            socket: socket.to_owned(),
            stream,
            answers: Mutex::new(answers),
            gone,
            reader: Some(reader),
        };
        Ok((link, shared, hello))
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Set when the agent is gone.
    pub(super) fn gone(&self) -> &Arc<AtomicBool> {
        &self.gone
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    /// Asks, and waits for the answer.
    pub(super) fn ask(&self, request: &Request) -> Result<Reply, EventError> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_gone() {
            return Err(EventError::Gone);
        }
        write(&self.stream, request, MAX_REQUEST).map_err(|e| failed(&self.socket, e))?;
        match answers.recv_timeout(PATIENCE) {
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Disconnected) => Err(EventError::Gone),
            Err(RecvTimeoutError::Timeout) => {
                // An answer that came now would be taken for that to the next question.
                let _ = self.stream.shutdown(Shutdown::Both);
                Err(EventError::Io {
                    doing: format!("wait for the agent at {}", self.socket.display()),
                    source: io::ErrorKind::TimedOut.into(),
                })
            }
        }
    }

    pub(super) fn refused(&self, backend: BackendKind, refusal: Refusal) -> EventError {
        refused(&self.socket, backend, refusal)
    }

    pub(super) fn surprised(&self, reply: &Reply) -> EventError {
        surprised(&self.socket, reply)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.ask(&Request::Bye);
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Reads until the agent is gone.
fn listen(stream: &UnixStream, answers: &Sender<Reply>) {
    loop {
        match read(stream, MAX_REPLY) {
            Ok(Reply::Notice { hook, text }) => match hook {
                Some(hook) => tracing::warn!("{hook}: {text}"),
                None => tracing::warn!("{text}"),
            },
            Ok(reply) => {
                if answers.send(reply).is_err() {
                    return;
                }
            }
            Err(ChannelError::Closed) => return,
            Err(error) => {
                tracing::debug!(%error, "the agent's connection ends");
                return;
            }
        }
    }
}

fn failed(socket: &Path, error: ChannelError) -> EventError {
    let at = socket.display();
    match error {
        ChannelError::Closed => EventError::Gone,
        ChannelError::Io { doing, source } => EventError::Io {
            doing: format!("{doing} at {at}"),
            source,
        },
        other => EventError::Protocol {
            what: format!("the agent at {at}: {other}"),
        },
    }
}

fn refused(socket: &Path, backend: BackendKind, refusal: Refusal) -> EventError {
    match refusal {
        Refusal::Unsupported { feature } => EventError::Unsupported {
            backend,
            feature,
            can: others(backend, feature),
        },
        Refusal::Limit { what, why } => EventError::Limit { backend, what, why },
        Refusal::Busy { why } => EventError::Busy {
            target: socket.display().to_string(),
            why,
        },
        Refusal::Failed { why } => EventError::Protocol {
            what: format!("the agent at {} could not: {why}", socket.display()),
        },
    }
}

/// Backends that can hook what an agent cannot.
fn others(backend: BackendKind, feature: Feature) -> &'static [BackendKind] {
    match (backend, feature) {
        (BackendKind::AgentTcg, Feature::Step | Feature::StepUntil) => &[BackendKind::GdbStub],
        (
            BackendKind::AgentTcg,
            Feature::MsrRead | Feature::MsrWrite | Feature::Port | Feature::Interrupt | Feature::Inside,
        ) => &[BackendKind::AgentKvm],
        // A newer QEMU's can more: see its capabilities.
        (BackendKind::AgentTcg, _) => &[],
        (
            _,
            Feature::Cpuid
            | Feature::Hypercall
            | Feature::DescriptorTable
            | Feature::ControlWrite
            | Feature::ControlRead
            | Feature::Cr8Write
            | Feature::Xcr0Write
            | Feature::DebugWrite
            | Feature::Interrupt
            | Feature::VirtualExecute,
        ) => &[BackendKind::AgentTcg],
        (
            _,
            Feature::Execute
            | Feature::VirtualWrite
            | Feature::VirtualRead
            | Feature::Step
            | Feature::StepUntil,
        ) => &[BackendKind::GdbStub],
        _ => &[],
    }
}

fn surprised(socket: &Path, reply: &Reply) -> EventError {
    EventError::Protocol {
        what: format!(
            "the agent at {} gave an answer to another question: {reply:?}",
            socket.display()
        ),
    }
}
