//! A monitor that does no more than it is told to: it reads no events and answers none.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmsight_channel::{
    MAX_REPLY, MAX_REQUEST, Reply, Request, Shared, VERSION, connect, read, receive_descriptor, write,
};
use vmsight_hooks::{Counts, Hook, HookId};

use super::machine::Machine;

pub(crate) struct Bare {
    stream: UnixStream,
    shared: Shared,
}

impl Bare {
    pub(crate) fn connect(machine: &Machine) -> Self {
        // The agent listens from a moment after the VM is made.
        drop(machine.backend());
        let stream = connect(&machine.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write(&stream, &Request::Hello { version: VERSION }, MAX_REQUEST).unwrap();
        let hello: Reply = read(&stream, MAX_REPLY).unwrap();
        assert!(matches!(hello, Reply::Hello { .. }), "{hello:?}");
        let shared = Shared::open(&receive_descriptor(&stream).unwrap()).unwrap();
        Self { stream, shared }
    }

    fn ask(&self, request: &Request) -> Reply {
        write(&self.stream, request, MAX_REQUEST).unwrap();
        loop {
            match read(&self.stream, MAX_REPLY).unwrap() {
                Reply::Notice { .. } => {}
                reply => return reply,
            }
        }
    }

    pub(crate) fn arm(&self, hook: &Hook) -> HookId {
        match self.ask(&Request::Arm { hook: hook.clone() }) {
            Reply::Armed { id } => id,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn counts(&self, id: HookId) -> Counts {
        match self.ask(&Request::Counts { id }) {
            Reply::Counts(counts) => counts,
            other => panic!("{other:?}"),
        }
    }

    /// Whether a vCPU waits with one of the first events.
    pub(crate) fn is_held(&self, vcpu: u32) -> bool {
        let area = self.shared.area(vcpu).unwrap();
        (0..8).any(|sequence| area.is_open(sequence))
    }
}
