//! What types and numbers of perf events are called (include/uapi/linux/perf_event.h).

/// `PERF_TYPE_*`; those of other sources are numbers that the kernel gives out.
pub(super) const TRACEPOINT: u32 = 2;
pub(super) const BREAKPOINT: u32 = 5;

/// The type's name; `None` for one that a source has of its own.
pub(super) fn kind(number: u32) -> Option<&'static str> {
    Some(match number {
        0 => "hardware",
        1 => "software",
        TRACEPOINT => "tracepoint",
        3 => "hw_cache",
        4 => "raw",
        BREAKPOINT => "breakpoint",
        _ => return None,
    })
}

/// What is counted, as `perf list` calls it, where the type and a number say so.
pub(super) fn counted(kind: u32, config: u64) -> Option<&'static str> {
    let names: &[&str] = match kind {
        0 => &[
            "cpu-cycles",
            "instructions",
            "cache-references",
            "cache-misses",
            "branch-instructions",
            "branch-misses",
            "bus-cycles",
            "stalled-cycles-frontend",
            "stalled-cycles-backend",
            "ref-cycles",
        ],
        1 => &[
            "cpu-clock",
            "task-clock",
            "page-faults",
            "context-switches",
            "cpu-migrations",
            "minor-faults",
            "major-faults",
            "alignment-faults",
            "emulation-faults",
            "dummy",
            "bpf-output",
            "cgroup-switches",
        ],
        _ => return None,
    };
    names.get(usize::try_from(config).ok()?).copied()
}

/// What a source counts that is one of the two clocks: newer kernels (6.12 does, 6.1 does not) give their events its type in place of
/// that of software.
pub(super) fn clock(source: &str) -> Option<&'static str> {
    match source {
        "cpu_clock" => Some("cpu-clock"),
        "task_clock" => Some("task-clock"),
        _ => None,
    }
}

/// `HW_BREAKPOINT_*` (include/uapi/linux/hw_breakpoint.h), in the letters of perf's own syntax.
pub(super) fn access(kind: u32) -> &'static str {
    match kind {
        1 => "r",
        2 => "w",
        3 => "rw",
        4 => "x",
        _ => "?",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_without_a_name_have_none() {
        assert_eq!(counted(1, 1), Some("task-clock"));
        for (kind, config) in [(0, 10), (1, 12), (1, u64::MAX), (2, 0), (77, 0)] {
            assert_eq!(counted(kind, config), None);
        }
        assert_eq!(kind(6), None);
        assert_eq!(access(0), "?");
    }
}
