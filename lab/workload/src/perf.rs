//! Perf events that the workload has opened: what it asked for, and the number that the kernel gave each.

use serde::{Deserialize, Serialize};

/// Where the workload writes them down, as JSON.
pub const FILE: &str = "/run/perf-events";

/// An event.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PerfEvent {
    /// Its number (`PERF_EVENT_IOC_ID`).
    pub id: u64,
    /// `PERF_TYPE_*`.
    pub kind: u32,
    /// As in `struct perf_event_attr`.
    pub config: u64,
    /// What that is, as perf calls it.
    pub event: String,
    /// The process that is watched.
    pub pid: Option<u32>,
    /// The CPU that is watched.
    pub cpu: Option<u32>,
    /// Counts between two samples, 0 for none.
    pub period: u64,
    /// Whether those are samples a second.
    pub is_frequency: bool,
    /// Whether it counts.
    pub enabled: bool,
    /// The process that opened it, and the descriptor that it has.
    pub owner: (u32, u32),
}
