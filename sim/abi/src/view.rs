//! The views: one set of extended page tables each, and the index in the list of EPT pointers by which VMFUNC 0 finds it.

/// The guest as it would be without us, less what is protected.
pub const GUEST: usize = 0;
/// The gate: one page of code, and the list of EPT pointers.
pub const GATE: usize = 1;
/// The monitor. This entry of the list is empty but for the few instructions between gate and monitor.
pub const SIM: usize = 2;
