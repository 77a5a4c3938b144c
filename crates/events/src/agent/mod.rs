//! The backend over the agent in a VMM: [`AgentBackend`].
//!
//! Events come through shared memory, with their registers; what is rare goes over the agent's socket. A thread of its own
//! reads that socket, so that the end of the VM is noticed at once, whoever waits for what.

mod events;
mod link;

use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use vmsight_arch::Registers;
use vmsight_channel::{Reply, Request, VerdictWords};
use vmsight_hooks::{
    BackendKind, Capability, Counts, Detail, Event, Feature, Hook, HookId, HookKind, Lack, Tallied, Vectors,
    Verdict, VerdictKind,
};
use vmsight_target::Target;

use crate::{Backend, EventError};
use events::Events;
use link::Link;

/// The variable by which `vmsight launch` tells the agent where to listen.
pub const SOCKET_VARIABLE: &str = "VMSIGHT_AGENT";
/// How many events of a vCPU can wait for a monitor to take them.
pub const MOST_WAITING: usize = vmsight_channel::RING_ENTRIES;

/// Hooks by the agent in the VMM.
pub struct AgentBackend {
    link: Link,
    events: Events,
    kind: BackendKind,
    capabilities: Vec<Capability>,
    lacks: Vec<Lack>,
}

impl AgentBackend {
    /// Connects to the agent that listens at `socket`.
    ///
    /// # Errors
    /// [`EventError::Busy`] where too many monitors are connected; others where nobody listens there, or somebody
    /// who may not.
    pub fn open(socket: &Path) -> Result<Self, EventError> {
        let (link, shared, hello) = Link::open(socket)?;
        let (capabilities, lacks) = match link.ask(&Request::Capabilities)? {
            Reply::Capabilities { capabilities, lacks } => (capabilities, lacks),
            other => return Err(link.surprised(&other)),
        };
        if hello.paused {
            tracing::warn!("the VM stands still: an earlier monitor, or its end, paused it");
        }
        Ok(Self {
            events: Events::new(shared, Arc::clone(link.gone())),
            link,
            kind: hello.backend,
            capabilities,
            lacks,
        })
    }

    /// Connects to the agent in a VM's VMM.
    ///
    /// # Errors
    /// [`EventError::NoBackend`] where there is none; otherwise as [`Self::open`].
    pub fn of(target: &Target) -> Result<Self, EventError> {
        let none = |why: String| EventError::NoBackend {
            target: target.name.clone(),
            why,
        };
        let Some(info) = &target.info else {
            return Err(none("it is no VM of this host".to_owned()));
        };
        match socket_of(info.pid) {
            Ok(Some(socket)) => Self::open(&socket),
            Ok(None) => Err(none(
                "there is no agent in its VMM: start it with `vmsight launch -- …`".to_owned(),
            )),
            Err(error) => Err(none(format!(
                "whether there is an agent in its VMM cannot be seen ({error}): try as root or as the VMM's user"
            ))),
        }
    }

    /// Lets a VM go on that a verdict, or the end of a monitor, has paused. A QEMU that was paused by `vmsight` can be
    /// resumed by its own monitor as well.
    ///
    /// # Errors
    /// Where the VM could not be reached.
    pub fn resume(&self) -> Result<(), EventError> {
        match self.link.ask(&Request::Resume)? {
            Reply::Done => Ok(()),
            other => Err(self.link.surprised(&other)),
        }
    }

    /// Whether events come with registers. A QEMU before version 9 gives its plugins none.
    pub fn gives_registers(&self) -> bool {
        // What takes registers to tell, which index it is, is claimed by an agent that has them.
        self.kind != BackendKind::AgentTcg || self.capabilities.iter().any(|c| c.feature == Feature::MsrWrite)
    }

    /// Whether the backend takes this verdict on this event.
    fn takes(&self, event: &Event, verdict: VerdictKind) -> bool {
        if verdict == VerdictKind::Continue {
            return true;
        }
        let Some(feature) = feature(&event.detail) else {
            return false;
        };
        let mut those = self.capabilities.iter().filter(|c| c.feature == feature);
        those.any(|c| c.verdicts.contains(&verdict))
    }
}

/// Where the agent in the process `pid` listens: as the process was told when it was started.
fn socket_of(pid: u32) -> std::io::Result<Option<PathBuf>> {
    let environment = fs::read(format!("/proc/{pid}/environ"))?;
    let prefix = format!("{SOCKET_VARIABLE}=");
    let mut words = environment.split(|b| *b == 0);
    let value = words.find_map(|word| word.strip_prefix(prefix.as_bytes()));
    Ok(value.map(|path| PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()))))
}

/// What a backend had to be able to do for an event.
fn feature(detail: &Detail) -> Option<Feature> {
    let kind = match *detail {
        Detail::Execute { rip } => HookKind::Execute { at: rip },
        Detail::Memory { gva, gpa, access, .. } => HookKind::Memory {
            range: match (gva, gpa) {
                (Some(start), _) => vmsight_hooks::Range::Virtual { start, len: 1 },
                (None, Some(start)) => vmsight_hooks::Range::Physical { start, len: 1 },
                (None, None) => return None,
            },
            access,
        },
        Detail::ControlRegister { register, access, .. } => HookKind::ControlRegister { register, access },
        Detail::Msr { index, access, .. } => HookKind::Msr { index, access },
        Detail::Interrupt { vector, .. } => HookKind::Interrupt {
            vectors: Vectors {
                first: vector,
                last: vector,
            },
        },
        // Of both kinds of steps the same can be done about the end.
        Detail::Step { .. } => HookKind::Step { vcpu: 0, count: 1 },
        Detail::Port { port, access, .. } => HookKind::Port {
            first: port,
            last: port,
            access,
        },
        Detail::Cpuid { .. } => HookKind::Cpuid,
        Detail::Hypercall { .. } => HookKind::Hypercall,
        Detail::DescriptorTable { .. } => HookKind::DescriptorTable,
        _ => return None,
    };
    kind.features().first().copied()
}

impl fmt::Debug for AgentBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentBackend")
            .field("socket", &self.link.socket())
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl Backend for AgentBackend {
    fn kind(&self) -> BackendKind {
        self.kind
    }

    fn capabilities(&self) -> Vec<Capability> {
        self.capabilities.clone()
    }

    fn lacks(&self) -> Vec<Lack> {
        self.lacks.clone()
    }

    fn arm(&self, hook: &Hook) -> Result<HookId, EventError> {
        match self.link.ask(&Request::Arm { hook: hook.clone() })? {
            Reply::Armed { id } => Ok(id),
            Reply::Refused(refusal) => Err(self.link.refused(self.kind, refusal)),
            other => Err(self.link.surprised(&other)),
        }
    }

    fn disarm(&self, id: HookId) -> Result<(), EventError> {
        let answer = self.link.ask(&Request::Disarm { id })?;
        self.events.forget(id);
        match answer {
            Reply::Done => Ok(()),
            other => Err(self.link.surprised(&other)),
        }
    }

    fn next(&self, deadline: Instant) -> Result<Option<Event>, EventError> {
        self.events.next(deadline)
    }

    fn wake(&self) {
        self.events.wake();
    }

    fn registers(&self, event: &Event) -> Result<Registers, EventError> {
        if !self.gives_registers() {
            return Err(EventError::Limit {
                backend: self.kind,
                what: format!("the registers of event {}", event.sequence),
                why: "this QEMU gives its plugins none (QEMU 10 does); the gdb-stub backend has them"
                    .to_owned(),
            });
        }
        self.events.registers(event).ok_or_else(|| EventError::Limit {
            backend: self.kind,
            what: format!("the registers of event {}", event.sequence),
            why: "it is too long ago".to_owned(),
        })
    }

    fn answer(&self, event: &Event, verdict: &Verdict) -> Result<(), EventError> {
        if !event.held {
            return Ok(());
        }
        let kind = verdict.kind();
        let words = VerdictWords::new(verdict).filter(|_| self.takes(event, kind));
        let fits = words.is_some();
        let Some(words) = words.or_else(|| VerdictWords::new(&Verdict::Continue)) else {
            return Ok(());
        };
        let unfit = |why: &str| {
            Err(EventError::Verdict {
                verdict: kind,
                why: why.to_owned(),
            })
        };
        if !self.events.answer(event, &words) && kind != VerdictKind::Continue {
            return match self.link.is_gone() {
                true => Err(EventError::Gone),
                false => unfit("it came after the deadline, or the hook is out"),
            };
        }
        match (fits, self.kind) {
            (true, _) => Ok(()),
            (false, BackendKind::AgentTcg) => {
                unfit("a plugin of QEMU cannot do that; the gdb-stub backend can where it can hook that")
            }
            (false, _) => unfit("the agent does not take it for such an event"),
        }
    }

    fn counts(&self, id: HookId) -> Result<Counts, EventError> {
        match self.link.ask(&Request::Counts { id })? {
            Reply::Counts(counts) => Ok(counts),
            other => Err(self.link.surprised(&other)),
        }
    }

    fn tally(&self, id: HookId) -> Result<Tallied, EventError> {
        match self.link.ask(&Request::Tally { id })? {
            Reply::Tally(tallied) => Ok(tallied),
            other => Err(self.link.surprised(&other)),
        }
    }
}
