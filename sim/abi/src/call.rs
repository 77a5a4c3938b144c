//! Calls to the hypervisor.
//!
//! A call is VMCALL with RAX = the call, arguments in RDI and RSI. It returns RAX = a [`Status`] and RDX = a value where
//! the call has one; all other registers are kept. VMCALL outside kernel mode gets #UD, but for [`Call::Version`] and,
//! until the lockdown, [`Call::Report`].

/// Version of everything in this crate. A monitor or guest of another one is refused.
pub const VERSION: u64 = 2;

/// The CPUID leaf where hypervisors say who they are.
pub const SIGNATURE_LEAF: u32 = 0x4000_0000;
/// What that leaf gives in EBX, ECX, EDX.
pub const SIGNATURE: [u8; 12] = *b"vmsight-sim\0";

macro_rules! numbered {
    ($(#[$outer:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u64)]
        pub enum $name { $($(#[$doc])* $variant = $number,)* }

        impl $name {
            /// The one with this number.
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

numbered! {
    /// What can be asked of the hypervisor. The numbers begin where no other hypervisor's calls are.
    Call {
        /// RDX = [`VERSION`].
        Version = 0x7369_6d00,
        /// RDI = a basic exit reason (SDM vol. 3, appendix C); RDX = how often it has occurred.
        Exits = 0x7369_6d01,
        /// Writes the exits by reason to the serial port.
        Report = 0x7369_6d02,
        /// Puts the monitor that was booted along into the guest. RDI = guest-virtual address of the two pages of the
        /// stub, the second of which lies where the gate will be; they are read-only from then on.
        LoadMonitor = 0x7369_6d03,
        /// RDI = the address to which a hook's call of the stub returns; RSI = a [`crate::Handler`].
        RegisterHook = 0x7369_6d04,
        /// Makes the guest's page at guest-physical address RDI read-only and executable.
        Protect = 0x7369_6d05,
        /// No monitor, hook or protection can be changed after this.
        Lockdown = 0x7369_6d06,
        /// Calls the monitor's handler from the hypervisor: what a hook costs with exits. RDI = the return address of
        /// a registered hook.
        Invoke = 0x7369_6d07,
        /// RDI = 0 to 3: RDX = that quarter, little-endian, of the SHA-256 over all that the guest must not change:
        /// the monitor's text, the gates, the monitor's page tables.
        MonitorHash = 0x7369_6d08,
        /// RDX = how many hooks the monitor has handled, on all processors.
        Handled = 0x7369_6d09,
        /// RDX = physical address of page RDI of [`Part`] RSI of what the monitor consists of: for those who want to
        /// attack it. [`Status::Argument`] past the last.
        MonitorPage = 0x7369_6d0a,
        /// From within the monitor alone: its ring of events is to be emptied, and it goes on after the call.
        Drain = 0x7369_6d0b,
        /// RDX = how many calls of the monitor were ended since they took too long.
        Ended = 0x7369_6d10,
    }
}

numbered! {
    /// Parts of what a monitor consists of.
    Part {
        /// Gates, landing, page tables.
        Fixed = 0,
        /// The image's code and constants.
        Text = 1,
        /// Lists of EPT pointers, one to each processor.
        Lists = 2,
        /// Data and stack: all pages of the first processor, then of the next.
        Data = 3,
    }
}

numbered! {
    /// How a call ended.
    Status {
        /// Done.
        Done = 0,
        /// There is no such call.
        Unknown = 1,
        /// Not after the lockdown.
        Locked = 2,
        /// No monitor was booted along, or none is loaded yet, or one already is.
        Monitor = 3,
        /// An argument is not what it must be.
        Argument = 4,
        /// The hook's return address shares its last byte with that of another hook, which the checker's table cannot hold.
        Collision = 5,
        /// There is no memory left for page tables.
        Memory = 6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_again() {
        assert_eq!(Call::from_number(Call::Lockdown as u64), Some(Call::Lockdown));
        assert_eq!(Call::from_number(0), None);
        assert_eq!(Status::from_number(2), Some(Status::Locked));
        assert_eq!(Status::from_number(7), None);
    }
}
