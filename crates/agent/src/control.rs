//! The threads that listen to monitors: one for those who come, and one for each who is there.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fs, process};

use rustix::event::{PollFd, PollFlags, poll};
use vmsight_channel::{
    ChannelError, MAX_REPLY, MAX_REQUEST, Refusal, Reply, Request, VERSION, accept, listen, read,
    send_descriptor, write,
};
use vmsight_hooks::BackendKind;

use crate::session::Session;
use crate::signal;

/// Most monitors at a time.
const MOST_MONITORS: usize = 16;
/// How long it takes until a connection that could not be taken is tried again.
const AGAIN: Duration = Duration::from_millis(10);

/// What monitors are served by: an agent, of whatever VMM.
pub(crate) trait Serve: Sync {
    /// By what events come.
    fn kind(&self) -> BackendKind;
    /// Where it listens.
    fn socket(&self) -> &Path;
    /// How many vCPUs there are.
    fn vcpus(&self) -> u32;
    /// Whether a monitor, or its end, has paused the VM.
    fn is_paused(&self) -> bool;
    /// A monitor is there.
    fn begin_session(&self, session: Arc<Session>);
    /// It is gone: each of its hooks comes out. Without a good-bye the VM stands still where one of them asks for that.
    fn end_session(&self, session: &Session, in_good_order: bool);
    /// What a monitor asked for.
    fn answer(&'static self, session: &Arc<Session>, request: Request) -> Reply;
}

/// Starts the thread.
pub(crate) fn start(agent: &'static dyn Serve) {
    let started = signal::kept_out(|| {
        std::thread::Builder::new()
            .name("vmsight-agent".to_owned())
            .spawn(move || run(agent))
    });
    if let Err(error) = started {
        complain(agent, &error);
    }
}

/// The VMM's standard error is the only place where somebody who started it may look.
fn complain(agent: &dyn Serve, error: &dyn std::error::Error) {
    use std::io::Write;
    let cause = error.source().map(|s| format!(": {s}")).unwrap_or_default();
    let socket = agent.socket().display();
    let _ = writeln!(
        std::io::stderr(),
        "vmsight agent: cannot listen at {socket}: {error}{cause}; the VM runs without it"
    );
}

/// Whose process has the socket: what a fork of it does at its end is not the VMM's end.
static OWNER: AtomicI32 = AtomicI32::new(0);
static SOCKET: OnceLock<&'static Path> = OnceLock::new();

extern "C" fn at_exit() {
    if OWNER.load(Ordering::Relaxed) == process::id() as i32
        && let Some(socket) = SOCKET.get()
    {
        let _ = fs::remove_file(socket);
    }
}

fn run(agent: &'static dyn Serve) {
    let listener = match listen(agent.socket()) {
        Ok(listener) => listener,
        Err(error) => return complain(agent, &error),
    };
    OWNER.store(process::id() as i32, Ordering::Relaxed);
    let _ = SOCKET.set(agent.socket());
    // SAFETY: a plain function that lives as long as the process.
    unsafe { libc::atexit(at_exit) };
    for id in 1.. {
        match accept(&listener) {
            Ok(monitor) => begin(agent, monitor, id),
            // Somebody else's connection, or one that ended at once, is no reason to stop listening; a system that
            // has no descriptor left is one to wait.
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
}

/// Monitors that are connected, or about to be.
static MONITORS: AtomicUsize = AtomicUsize::new(0);

/// One of them, until this is dropped.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let place = Self;
        // Given back by the drop where it is one too many.
        (MONITORS.fetch_add(1, Ordering::SeqCst) < MOST_MONITORS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        MONITORS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Starts a thread for a monitor: each has its own, so that none waits for another. No signal reaches it, as none reaches this one.
fn begin(agent: &'static dyn Serve, monitor: UnixStream, id: u64) {
    let Some(place) = Place::take() else {
        let why = format!("{MOST_MONITORS} monitors are connected");
        let _ = write(&monitor, &Reply::Refused(Refusal::Busy { why }), MAX_REPLY);
        return;
    };
    let _ = std::thread::Builder::new()
        .name("vmsight-agent".to_owned())
        .spawn(move || {
            // Whatever ends it is the end of this monitor only.
            let _ = serve(agent, &monitor, id);
            drop(place);
        });
}

/// The end of a session, also where its thread fails.
struct Ending {
    agent: &'static dyn Serve,
    session: Arc<Session>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.agent.end_session(&self.session, false);
    }
}

/// Serves one monitor until it goes.
fn serve(agent: &'static dyn Serve, monitor: &UnixStream, id: u64) -> Result<(), ChannelError> {
    let Request::Hello { version } = read(monitor, MAX_REQUEST)? else {
        return Err(ChannelError::Closed);
    };
    let reply = |reply: &Reply| write(monitor, reply, MAX_REPLY);
    if version != VERSION {
        let why = format!("the agent speaks version {VERSION}, the monitor version {version}");
        return reply(&Reply::Refused(Refusal::Failed { why }));
    }
    let (session, file) = Session::new(id)?;
    let session = Arc::new(session);
    agent.begin_session(Arc::clone(&session));
    let ending = Ending {
        agent,
        session: Arc::clone(&session),
    };
    reply(&Reply::Hello {
        version: VERSION,
        backend: agent.kind(),
        pid: process::id(),
        vcpus: agent.vcpus(),
        paused: agent.is_paused(),
    })?;
    send_descriptor(monitor, &file)?;
    drop(file);
    loop {
        let mut waiting = [
            PollFd::new(monitor, PollFlags::IN),
            PollFd::from_borrowed_fd(session.bell.as_fd(), PollFlags::IN),
        ];
        if poll(&mut waiting, None).is_err() {
            continue;
        }
        let [said, rung] = waiting.each_ref().map(|fd| !fd.revents().is_empty());
        if rung {
            let mut count = [0; 8];
            let _ = rustix::io::read(&session.bell, &mut count);
            while let Some(notice) = session.take_notice() {
                reply(&notice)?;
            }
        }
        if !said {
            continue;
        }
        match read(monitor, MAX_REQUEST)? {
            Request::Bye => {
                agent.end_session(&session, true);
                drop(ending);
                // Who said good-bye need not wait for the answer.
                let _ = reply(&Reply::Done);
                return Ok(());
            }
            request => reply(&agent.answer(&session, request))?,
        }
    }
}
