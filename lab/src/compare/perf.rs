//! Perf events.

use std::collections::BTreeMap;

use anyhow::Result;
use vmsight_linux::Kernel;
use vmsight_linux::perf::PerfEvent;

use super::{Differences, spelt};
use crate::truth::Truth;

/// Compares `Kernel::perf_events` with the events that the workload opened. The kernel has some of its own.
pub fn perf(kernel: &Kernel, truth: &Truth) -> Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.perf_events()?;
    out.complaints("perf events", &listing.warnings);
    for row in &listing.rows {
        out.complaints(&format!("perf event {}", row.id), &row.problems);
    }
    let rows: BTreeMap<u64, &PerfEvent> = listing.rows.iter().map(|row| (row.id, row)).collect();
    out.same("numbers, each once", rows.len(), listing.rows.len());
    let opened = listing.rows.iter().filter(|row| row.opened_by.is_some());
    out.same("events of processes", opened.count(), truth.perf.len());
    for said in &truth.perf {
        let Some(row) = rows.get(&said.id) else {
            out.differs(format!("perf event {} ({}) is missing", said.id, said.event));
            continue;
        };
        let at = |what: &str| format!("{what} of perf event {} ({})", said.id, said.event);
        let kind = match said.kind {
            1 => "software",
            2 => "tracepoint",
            5 => "breakpoint",
            _ => "of a type that the workload does not open",
        };
        out.same(at("type"), row.type_name.as_str(), kind);
        out.same(at("config"), row.config, said.config);
        out.same(at("name"), row.event.as_deref(), Some(said.event.as_str()));
        out.same(at("process"), row.pid, said.pid.map(|pid| pid as i32));
        out.same(at("thread"), row.tid, said.pid.map(|pid| pid as i32));
        out.same(at("CPU"), row.cpu, said.cpu);
        let sampled = (said.period != 0).then_some(said.period);
        let (period, frequency) = match said.is_frequency {
            true => (None, sampled),
            false => (sampled, None),
        };
        out.same(at("period"), row.sample_period, period);
        out.same(at("frequency"), row.sample_frequency, frequency);
        // Events of a process that sleeps are not on a CPU.
        let states: &[&str] = match (said.enabled, said.pid) {
            (false, _) => &["off"],
            (true, None) => &["active"],
            (true, Some(_)) => &["inactive", "active"],
        };
        out.near(
            at("state"),
            states.contains(&row.state.as_str()),
            &row.state,
            states,
        );
        out.same(at("opener"), row.opened_by, Some(said.owner.0 as i32));
        let process = truth.process(said.owner.0);
        let owner = process.map(|p| format!("{}/{}/{}", p.pid, spelt(&p.comm), said.owner.1));
        let owners: Vec<String> = row.owners.iter().map(super::files::owner).collect();
        out.same(at("owners"), owners, Vec::from_iter(owner));
        // The kernel's own function, which writes a sample where there is a buffer for it.
        let handler = row.handler.as_deref().unwrap_or_default();
        out.near(
            at("handler"),
            handler.starts_with("perf_event_output"),
            handler,
            "perf_event_output",
        );
    }
    Ok(out)
}
