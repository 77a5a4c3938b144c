//! What a check is.

use serde::Serialize;
use vmsight_linux::LinuxError;

use crate::{Context, Findings};

/// A technique of MITRE ATT&CK.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Technique {
    /// Its id: `T1014`.
    pub id: &'static str,
    /// Its name.
    pub name: &'static str,
}

impl Technique {
    /// Hides what it does from the system it runs on.
    pub const ROOTKIT: Self = Self::new("T1014", "Rootkit");
    /// Stays by a kernel module.
    pub const KERNEL_MODULE: Self = Self::new(
        "T1547.006",
        "Boot or Logon Autostart Execution: Kernel Modules and Extensions",
    );
    /// Turns off what would notice it.
    pub const IMPAIR_DEFENSES: Self = Self::new("T1562.001", "Impair Defenses: Disable or Modify Tools");
    /// Reads what is typed.
    pub const KEYLOGGING: Self = Self::new("T1056.001", "Input Capture: Keylogging");
    /// Waits for a packet that wakes it.
    pub const TRAFFIC_SIGNALING: Self = Self::new("T1205", "Traffic Signaling");
    /// Changes what the system says of itself.
    pub const HIDE_ARTIFACTS: Self = Self::new("T1564", "Hide Artifacts");
    /// Puts its code into another process.
    pub const PROCESS_INJECTION: Self = Self::new("T1055", "Process Injection");
    /// Gets rights by a fault of the kernel.
    pub const PRIVILEGE_ESCALATION: Self = Self::new("T1068", "Exploitation for Privilege Escalation");

    /// A technique by its id and name.
    pub const fn new(id: &'static str, name: &'static str) -> Self {
        Self { id, name }
    }
}

/// One check: what it is for people, and what does it.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Its name on the command line and in results: lower case, words joined by `-`. Never changed once it is out.
    pub name: &'static str,
    /// What it is about, in a line.
    pub summary: &'static str,
    /// What is held against what.
    pub compares: &'static str,
    /// Why somebody would do what it finds.
    pub why: &'static str,
    /// The techniques that it finds.
    pub techniques: &'static [Technique],
    /// What it cannot see, a sentence each.
    pub blind_spots: &'static [&'static str],
    /// Does it. What is looked at is counted with [`Findings::looked_at`]; what cannot be looked at is noted. An error
    /// means that nothing could be checked; what was found before it is kept.
    pub run: fn(&Context, &mut Findings) -> Result<(), LinuxError>,
}
