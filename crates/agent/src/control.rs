//! The thread that listens to the monitor.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::{fs, process};

use rustix::event::{PollFd, PollFlags, poll};
use vmsight_channel::{
    ChannelError, MAX_REPLY, MAX_REQUEST, Refusal, Reply, Request, Shared, VERSION, accept, listen, read,
    send_descriptor, write,
};
use vmsight_hooks::BackendKind;

use crate::agent::{Agent, Session};
use crate::{agent, signal};

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
        // Somebody else's connection, or one that ended at once, is no reason to stop listening.
        if let Ok(monitor) = accept(&listener)
            && let Ok(in_good_order) = serve(agent, &listener, &monitor, id)
        {
            agent.end_session(in_good_order);
        } else {
            agent.end_session(false);
        }
    }
}

/// Serves one monitor until it goes; whether it said good-bye.
fn serve(
    agent: &'static Agent,
    listener: &UnixListener,
    monitor: &UnixStream,
    id: u64,
) -> Result<bool, ChannelError> {
    let Request::Hello { version } = read(monitor, MAX_REQUEST)? else {
        return Err(ChannelError::Closed);
    };
    let reply = |reply: &Reply| write(monitor, reply, MAX_REPLY);
    if version != VERSION {
        let why = format!("the agent speaks version {VERSION}, the monitor version {version}");
        return reply(&Reply::Refused(Refusal::Failed { why })).map(|()| true);
    }
    let (shared, file) = Shared::create()?;
    agent.begin_session(Arc::new(Session::new(id, shared)));
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
            PollFd::from_borrowed_fd(agent.bell.as_fd(), PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        if poll(&mut waiting, None).is_err() {
            continue;
        }
        let [said, rung, other] = waiting.each_ref().map(|fd| !fd.revents().is_empty());
        if rung {
            let mut count = [0; 8];
            let _ = rustix::io::read(&agent.bell, &mut count);
            while let Some(notice) = agent.take_notice() {
                reply(&notice)?;
            }
        }
        if said {
            let request = read(monitor, MAX_REQUEST)?;
            let bye = request == Request::Bye;
            let answer = match bye {
                true => {
                    agent.end_session(true);
                    Reply::Done
                }
                false => answer(agent, request),
            };
            // Who said good-bye need not wait for the answer.
            match (reply(&answer), bye) {
                (_, true) => return Ok(true),
                (sent, false) => sent?,
            }
        }
        if other && let Ok(second) = accept(listener) {
            let why = "another monitor is connected".to_owned();
            let _ = write(&second, &Reply::Refused(Refusal::Busy { why }), MAX_REPLY);
        }
    }
}

fn answer(agent: &'static Agent, request: Request) -> Reply {
    match request {
        Request::Hello { .. } | Request::Bye => Reply::Done,
        Request::Capabilities => Reply::Capabilities {
            capabilities: agent.kernel.list(),
        },
        Request::Arm { hook } => match agent.state().arm(agent, &hook) {
            Ok(id) => Reply::Armed { id },
            Err(refusal) => Reply::Refused(refusal),
        },
        Request::Disarm { id } => {
            agent.disarm(id);
            agent.state().forget(id);
            Reply::Done
        }
        Request::Counts { id } => Reply::Counts(agent.state().counts(id)),
        Request::Tally { id } => Reply::Tally(agent.state().tallied(id)),
        Request::Resume => {
            agent.world.thaw();
            Reply::Done
        }
    }
}
