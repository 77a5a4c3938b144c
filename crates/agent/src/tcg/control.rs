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

use super::front::{self, Front, Session};
use super::{complain, guarded};
use crate::signal;

/// Starts the thread.
pub(super) fn start(front: &'static Front) {
    let started = signal::kept_out(|| {
        std::thread::Builder::new()
            .name("vmsight-agent".to_owned())
            .spawn(move || guarded(|| run(front)))
    });
    if let Err(error) = started {
        complain(&error.to_string());
    }
}

/// Whose process has the socket: what a fork of it does at its end is not QEMU's end.
static OWNER: AtomicI32 = AtomicI32::new(0);

extern "C" fn at_exit() {
    if OWNER.load(Ordering::Relaxed) == process::id() as i32
        && let Some(front) = front::get()
    {
        let _ = fs::remove_file(&front.socket);
    }
}

fn run(front: &'static Front) {
    let listener = match listen(&front.socket) {
        Ok(listener) => listener,
        Err(error) => {
            use std::error::Error;
            let cause = error.source().map(|s| format!(": {s}")).unwrap_or_default();
            return complain(&format!(
                "cannot listen at {}: {error}{cause}",
                front.socket.display()
            ));
        }
    };
    OWNER.store(process::id() as i32, Ordering::Relaxed);
    // SAFETY: a plain function that lives as long as the process.
    unsafe { libc::atexit(at_exit) };
    for id in 1.. {
        // Somebody else's connection, or one that ended at once, is no reason to stop listening.
        let served = accept(&listener).and_then(|monitor| serve(front, &listener, &monitor, id));
        front.end_session(served.unwrap_or(false));
    }
}

/// Serves one monitor until it goes; whether it said good-bye.
fn serve(
    front: &'static Front,
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
    front.begin_session(Arc::new(Session::new(id, shared)));
    reply(&Reply::Hello {
        version: VERSION,
        backend: BackendKind::AgentTcg,
        pid: process::id(),
        vcpus: front.vcpus(),
        paused: front.is_paused(),
    })?;
    send_descriptor(monitor, &file)?;
    drop(file);
    loop {
        let mut waiting = [
            PollFd::new(monitor, PollFlags::IN),
            PollFd::from_borrowed_fd(front.bell.as_fd(), PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        if poll(&mut waiting, None).is_err() {
            continue;
        }
        let [said, rung, other] = waiting.each_ref().map(|fd| !fd.revents().is_empty());
        if rung {
            let mut count = [0; 8];
            let _ = rustix::io::read(&front.bell, &mut count);
            while let Some(notice) = front.take_notice() {
                reply(&notice)?;
            }
        }
        if said {
            let request = read(monitor, MAX_REQUEST)?;
            if request == Request::Bye {
                front.end_session(true);
                // Who said good-bye need not wait for the answer.
                let _ = reply(&Reply::Done);
                return Ok(true);
            }
            reply(&answer(front, request))?;
        }
        if other && let Ok(second) = accept(listener) {
            let why = "another monitor is connected".to_owned();
            let _ = write(&second, &Reply::Refused(Refusal::Busy { why }), MAX_REPLY);
        }
    }
}

fn answer(front: &Front, request: Request) -> Reply {
    match request {
        Request::Hello { .. } | Request::Bye => Reply::Done,
        Request::Capabilities => Reply::Capabilities {
            capabilities: front.capabilities(),
        },
        Request::Arm { hook } => match front.arm(&hook) {
            Ok(id) => Reply::Armed { id },
            Err(refusal) => Reply::Refused(refusal),
        },
        Request::Disarm { id } => {
            front.disarm(id);
            front.forget(id);
            Reply::Done
        }
        Request::Counts { id } => Reply::Counts(front.counts(id)),
        Request::Resume => {
            let why = "it is QEMU's own pause: QEMU's monitor resumes it (cont)".to_owned();
            match front.is_paused() {
                true => Reply::Refused(Refusal::Failed { why }),
                false => Reply::Done,
            }
        }
    }
}
