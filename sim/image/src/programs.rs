//! The programs that run without an operating system. They are part of the library: its build script builds them.

use crate::Error;

/// A program, or why it could not be built.
type Built = Result<&'static [u8], &'static str>;

include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The hypervisor: an ELF file that GRUB loads.
    Hypervisor,
    /// The hypervisor without the view of the gate: VMFUNC leads into the monitor's view, where the guest's own page tables
    /// are used. A control: attacks succeed.
    TwoViews,
    /// The same, but that page tables of the monitor's are used whatever CR3 says.
    TwoViewsApt,
    /// The hypervisor with a gate that leaves the guest's page tables in use. A control likewise.
    GuestTables,
    /// The monitor: a flat image.
    Monitor,
    /// The monitor with a handler that does not end, for one argument.
    EndlessMonitor,
    /// The guest that attacks it: a bzImage.
    Trial,
    /// The first program of a Linux guest, which counts what it does: an ELF file.
    Witness,
}

impl Program {
    /// An ELF file for the hypervisor and the witness; for the others what of them lies in memory.
    ///
    /// # Errors
    /// [`Error::NotBuilt`] where the library had to be built without it.
    pub fn bytes(self) -> Result<Vec<u8>, Error> {
        let built = match self {
            Self::Hypervisor => HYPERVISOR,
            Self::TwoViews => TWO_VIEWS,
            Self::TwoViewsApt => TWO_VIEWS_APT,
            Self::GuestTables => GUEST_TABLES,
            Self::Monitor => MONITOR,
            Self::EndlessMonitor => ENDLESS_MONITOR,
            Self::Trial => TRIAL,
            Self::Witness => WITNESS,
        };
        built.map(<[u8]>::to_vec).map_err(|why| Error::NotBuilt {
            program: format!("{self:?}"),
            why: why.to_owned(),
        })
    }
}
