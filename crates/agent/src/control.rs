//! The threads that listen to monitors: one for those who come, and one for each who is there.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::Duration;
use std::{fs, process};

use rustix::event::{PollFd, PollFlags, poll};
use vmsight_channel::{
    ChannelError, MAX_REPLY, MAX_REQUEST, Refusal, Reply, Request, VERSION, accept, listen, read,
    send_descriptor, write,
};
use vmsight_hooks::{BackendKind, Counts, HookId, Tallied};

use crate::agent::Agent;
use crate::session::Session;
use crate::{agent, signal};

/// Most monitors at a time.
const MOST_MONITORS: usize = 16;
/// How long it takes until a connection that could not be taken is tried again.
const AGAIN: Duration = Duration::from_millis(10);

/// Starts the thread.
pub(crate) fn start(agent: &'static Agent) {
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
fn complain(agent: &Agent, error: &dyn std::error::Error) {
    use std::io::Write;
    let cause = error.source().map(|s| format!(": {s}")).unwrap_or_default();
    let socket = agent.socket.display();
    let _ = writeln!(
        std::io::stderr(),
        "vmsight agent: cannot listen at {socket}: {error}{cause}; the VM runs without it"
    );
}

/// Whose process has the socket: what a fork of it does at its end is not the VMM's end.
static OWNER: AtomicI32 = AtomicI32::new(0);

extern "C" fn at_exit() {
    if OWNER.load(Ordering::Relaxed) == process::id() as i32
        && let Some(agent) = agent::get()
    {
        let _ = fs::remove_file(&agent.socket);
    }
}

fn run(agent: &'static Agent) {
    let listener = match listen(&agent.socket) {
        Ok(listener) => listener,
        Err(error) => return complain(agent, &error),
    };
    OWNER.store(process::id() as i32, Ordering::Relaxed);
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

/// Starts a thread for a monitor: each has its own, so that none waits for another. No signal reaches it, as none
/// reaches this one.
fn begin(agent: &'static Agent, monitor: UnixStream, id: u64) {
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
    agent: &'static Agent,
    session: Arc<Session>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.agent.end_session(&self.session, false);
    }
}

/// Serves one monitor until it goes.
fn serve(agent: &'static Agent, monitor: &UnixStream, id: u64) -> Result<(), ChannelError> {
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
        backend: BackendKind::AgentKvm,
        pid: process::id(),
        vcpus: u32::try_from(agent.vcpus().len()).unwrap_or(u32::MAX),
        paused: agent.world.is_frozen(),
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
            request => reply(&answer(agent, &session, request))?,
        }
    }
}

fn answer(agent: &'static Agent, session: &Arc<Session>, request: Request) -> Reply {
    let own = |id: HookId| agent.state().find(session.id, id);
    match request {
        Request::Hello { .. } | Request::Bye => Reply::Done,
        Request::Capabilities => Reply::Capabilities {
            capabilities: agent.kernel.list(),
            lacks: agent.kernel.lacks(),
        },
        Request::Arm { hook } => match agent.state().arm(agent, session, &hook) {
            Ok(id) => Reply::Armed { id },
            Err(refusal) => Reply::Refused(refusal),
        },
        Request::Disarm { id } => {
            let armed = own(id);
            if let Some(armed) = armed {
                agent.disarm(&armed);
                agent.state().forget(id);
            }
            Reply::Done
        }
        Request::Counts { id } => Reply::Counts(own(id).map_or_else(Counts::default, |a| a.counts())),
        Request::Tally { id } => Reply::Tally(own(id).map_or_else(Tallied::default, |a| a.sieve.tallied())),
        Request::Resume => {
            agent.world.thaw();
            Reply::Done
        }
    }
}
