//! Perf events: what is counted, of whom, and what is called when a count is full (kernel/events/core.c).
//!
//! Tracing tools, profilers and debuggers have them, BPF programs hang on them, and so can what wants to be called whenever an address is
//! touched.

mod contexts;
mod names;

use std::sync::Arc;

use rustc_hash::FxHashSet;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

pub use contexts::{PerfContext, PerfContexts, Watched};

use crate::budget::{Budget, NO_ROOM};
use crate::file::holder::Owner;
use crate::file::private::PrivateOwners;
use crate::layout::{Field, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::{Kernel, LinuxError};

/// Events of one context.
const MAX_EVENTS: usize = 1 << 14;
/// Bytes of names of sources, tracepoints and their systems.
const MAX_NAME: usize = 128;

layout! {
    struct EventLayout = "perf_event" {
        source: Field<Gva> = "pmu",
        state: Field<i64> = "state",
        kind: Field<u32> = "attr.type",
        config: Field<u64> = "attr.config",
        period: Field<u64> = "attr.sample_period",
        is_frequency: Field<bool> = "attr.freq",
        access: Field<u32> = "attr.bp_type",
        watched: Field<Gva> = "attr.bp_addr",
        cpu: Field<i32> = "cpu",
        owner: Field<Gva> = "owner",
        id: Field<u64> = "id",
        handler: Field<Gva> = "overflow_handler",
        tracepoint: Option<Field<Gva>> = "tp_event",               // CONFIG_EVENT_TRACING
    }
}

layout! {
    struct SourceNameLayout = "pmu" {
        name: Field<Gva> = "name",
    }
}

layout! {
    struct CallLayout = "trace_event_call" {
        class: Field<Gva> = "class",
        name: Field<Gva> = "name",
        flags: Field<u32> = "flags",
    }
}

layout! {
    struct ClassLayout = "trace_event_class" {
        system: Field<Gva> = "system",
    }
}

layout! {
    struct PointLayout = "tracepoint" {
        name: Field<Gva> = "name",
    }
}

layout! {
    struct OpenerLayout = "task_struct" {
        tgid: Field<i32> = "tgid",
    }
}

/// A perf event. `None` is what it does not have, or what could not be read: then `problems` says so.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PerfEvent {
    /// Its number, as `PERF_EVENT_IOC_ID` tells it.
    pub id: u64,
    /// `hardware`, `software`, `tracepoint`, `hw_cache`, `raw`, `breakpoint`; else the name of its source: `kprobe`, `uprobe`, `msr`, … .
    #[serde(rename = "type")]
    pub type_name: String,
    /// What is counted: `task-clock`, `sched:sched_switch`, `mem:0xffff…:w`.
    pub event: Option<String>,
    /// What its opener asked the source for (`perf_event_attr.config`).
    #[serde(serialize_with = "address::hex")]
    pub config: u64,
    /// Name of its source, where that has one.
    pub source: Option<String>,
    /// `active`, `inactive`, `off`, `error`, `exit`, `dead`.
    pub state: String,
    /// The process that is watched; `None` where all are.
    pub pid: Option<i32>,
    /// The thread.
    pub tid: Option<i32>,
    /// Its name.
    pub name: Option<String>,
    /// The CPU that is watched; `None` where all are.
    pub cpu: Option<u32>,
    /// After how many counts there is a sample.
    pub sample_period: Option<u64>,
    /// How many samples a second are wanted.
    pub sample_frequency: Option<u64>,
    /// What is called when a count is full: a function of the kernel's, which writes a sample, unless somebody put another there.
    pub handler: Option<String>,
    /// Where that lies.
    #[serde(serialize_with = "address::gva_opt")]
    pub handler_address: Option<Gva>,
    /// The process that opened it; `None` for the kernel's own, and once that process is gone.
    pub opened_by: Option<i32>,
    /// Who has it open.
    pub owners: Vec<Owner>,
    /// The `struct perf_event`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Kernel {
    /// The perf events of all CPUs and threads, by rising number.
    ///
    /// # Errors
    /// If the kernel's symbols or types lack what is needed, or threads cannot be listed.
    pub fn perf_events(&self) -> Result<Listing<PerfEvent>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &PerfEvent| row.problems.len(),
            || self.list_perf_events(),
        )
    }

    fn list_perf_events(&self) -> Result<Listing<PerfEvent>, LinuxError> {
        let mut listing = Listing::default();
        let contexts = self.perf_contexts()?;
        for warning in contexts.warnings {
            listing.warn(warning);
        }
        let budget = Budget::default();
        let mut found: Vec<(Gva, Watched)> = Vec::new();
        let mut seen = FxHashSet::default();
        for context in contexts.rows {
            let walk = self.perf_events_of(context.address, budget.limit(MAX_EVENTS))?;
            budget.walked(walk.items.len() + 1);
            walk.end
                .warning("perf events of a context")
                .into_iter()
                .for_each(|warning| listing.warn(warning));
            for at in walk.items {
                if seen.insert(at) {
                    found.push((at, context.watched.clone()));
                }
            }
        }
        let mut owners = PrivateOwners::read(self, &seen)?;
        for warning in std::mem::take(&mut owners.warnings).into_vec() {
            listing.warn(warning);
        }
        let reader = Reader::new(self)?;
        for (at, watched) in found {
            let row = reader.row(at, watched, &owners, &budget);
            let texts = [&row.event, &row.source, &row.name, &row.handler];
            let bytes = texts.into_iter().flatten().map(String::len).sum();
            if !budget.row(bytes) {
                break;
            }
            listing.rows.push(row);
        }
        budget
            .warning("perf events")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        listing.rows.sort_by_key(|row| (row.id, row.address));
        Ok(listing)
    }
}

struct Reader {
    kernel: Kernel,
    event: Arc<EventLayout>,
    source: Arc<SourceNameLayout>,
    opener: Arc<OpenerLayout>,
    call: Option<Arc<CallLayout>>,
    class: Option<Arc<ClassLayout>>,
    point: Option<Arc<PointLayout>>,
    states: Vec<(i64, String)>,
    /// `TRACE_EVENT_FL_TRACEPOINT`: the call's name is that of a tracepoint.
    is_point: u32,
}

impl Reader {
    fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let types = kernel.types();
        let states = types.find_enum("perf_event_state").map(|id| {
            let names = types.enumerators(id).take(64);
            let named = names.filter_map(|e| Some((e.value, e.name.strip_prefix("PERF_EVENT_STATE_")?)));
            named
                .map(|(value, name)| (value, name.to_ascii_lowercase()))
                .collect()
        });
        Ok(Self {
            kernel: kernel.clone(),
            event: kernel.layout()?,
            source: kernel.layout()?,
            opener: kernel.layout()?,
            call: kernel.layout().ok(),
            class: kernel.layout().ok(),
            point: kernel.layout().ok(),
            states: states.unwrap_or_default(),
            is_point: types
                .enumerator("TRACE_EVENT_FL_TRACEPOINT")
                .and_then(|flag| u32::try_from(flag).ok())
                .unwrap_or(0),
        })
    }

    fn row(&self, at: Gva, watched: Watched, owners: &PrivateOwners, budget: &Budget) -> PerfEvent {
        let mut row = PerfEvent {
            address: at,
            ..PerfEvent::default()
        };
        match watched {
            Watched::Cpu(cpu) => row.cpu = Some(cpu),
            Watched::Thread { pid, tid, name } => {
                (row.pid, row.tid, row.name) = (Some(pid), Some(tid), Some(name));
            }
        }
        let held = owners.of(at);
        match budget.bytes(size_of_val(held)) {
            true => row.owners = held.to_vec(),
            false => row.problems.push(Problem::new("owners", NO_ROOM)),
        }
        if let Err(error) = self.fill(&mut row) {
            row.problems.push(Problem::read("type", &error));
        }
        row
    }

    fn fill(&self, row: &mut PerfEvent) -> Result<(), ReadError> {
        let (l, space, at) = (&self.event, self.kernel.space(), row.address);
        row.id = l.id.read(space, at)?;
        let state = l.state.read(space, at)?;
        let known = self.states.iter().find(|(value, _)| *value == state);
        row.state = known.map_or_else(|| format!("state-{state}"), |(_, name)| name.clone());
        let kind = l.kind.read(space, at)?;
        row.config = l.config.read(space, at)?;
        let source = l.source.read(space, at)?;
        match self.source.name.read(space, source) {
            // That of breakpoints has none in old kernels.
            Ok(Gva(0)) => {}
            Ok(name) => match self.kernel.text(name, MAX_NAME) {
                Ok(name) => row.source = Some(name),
                Err(error) => row.problems.push(Problem::read("source", &error)),
            },
            Err(error) => row.problems.push(Problem::read("source", &error)),
        }
        row.type_name = match (names::kind(kind), &row.source) {
            (Some(name), _) => name.to_owned(),
            (None, Some(source)) if names::clock(source).is_some() => "software".to_owned(),
            (None, Some(source)) => source.clone(),
            (None, None) => format!("type-{kind}"),
        };
        let period = l.period.read(space, at)?;
        match l.is_frequency.read(space, at)? {
            _ if period == 0 => {}
            true => row.sample_frequency = Some(period),
            false => row.sample_period = Some(period),
        }
        if row.pid.is_some() {
            // Of a thread's events those on any CPU say -1.
            row.cpu = u32::try_from(l.cpu.read(space, at)?).ok();
        }
        match self.event(row, kind) {
            Ok(event) => row.event = event,
            Err(error) => row.problems.push(Problem::read("event", &error)),
        }
        let handler = l.handler.read(space, at)?;
        if !handler.is_null() {
            row.handler_address = Some(handler);
            row.handler = self.name(handler);
        }
        let owner = l.owner.read(space, at)?;
        // -1 for the kernel's own (TASK_TOMBSTONE).
        if !owner.is_null() && owner.0 != u64::MAX {
            match self.opener.tgid.read(space, owner) {
                Ok(pid) => row.opened_by = Some(pid),
                Err(error) => row.problems.push(Problem::read("opened_by", &error)),
            }
        }
        Ok(())
    }

    /// What is counted, in words.
    fn event(&self, row: &PerfEvent, kind: u32) -> Result<Option<String>, ReadError> {
        let (l, space) = (&self.event, self.kernel.space());
        if kind == names::BREAKPOINT {
            let (watched, access) = (
                l.watched.read(space, row.address)?,
                l.access.read(space, row.address)?,
            );
            return Ok(Some(format!("mem:{watched}:{}", names::access(access))));
        }
        let clock = row.source.as_deref().and_then(names::clock);
        if let Some(name) = names::counted(kind, row.config).or(clock) {
            return Ok(Some(name.to_owned()));
        }
        let probe = matches!(row.source.as_deref(), Some("kprobe" | "uprobe"));
        if kind != names::TRACEPOINT && !probe {
            return Ok(None);
        }
        let layouts = (&l.tracepoint, &self.call, &self.class, &self.point);
        let (Some(field), Some(call), Some(class), Some(point)) = layouts else {
            return Ok(None);
        };
        let call_at = field.read(space, row.address)?;
        if call_at.is_null() {
            return Ok(None);
        }
        let named = call.name.read(space, call_at)?;
        let is_point = call.flags.read(space, call_at)? & self.is_point != 0;
        let name = match is_point {
            true => point.name.read(space, named)?,
            false => named,
        };
        let name = self.kernel.text(name, MAX_NAME)?;
        let system = class.system.read(space, call.class.read(space, call_at)?)?;
        Ok(Some(match system {
            // A probe of perf's own is of none.
            Gva(0) => name,
            system => format!("{}:{name}", self.kernel.text(system, MAX_NAME)?),
        }))
    }

    /// The kernel's function at an address.
    fn name(&self, at: Gva) -> Option<String> {
        let image = self.kernel.image();
        if !image.contains(at) {
            return None;
        }
        let symbols = &self.kernel.profile().symbols;
        let (symbol, offset) = symbols.nearest(image.link_time(at))?;
        Some(match offset {
            0 => symbol.name.to_owned(),
            offset => format!("{}+{offset:#x}", symbol.name),
        })
    }
}
