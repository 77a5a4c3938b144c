//! The monitor's image: a flat file that begins with a header and is mapped as it is.

/// How many hooks the checker's table has room for: one for each last byte of a return address.
pub const SITES: usize = 256;

/// The first bytes of a monitor's image: a jump over the header, as flat images begin, and a name.
pub const MAGIC: u64 = u64::from_le_bytes(*b"\xeb\x36vmsim\0");

/// Begin of a monitor's image. The image is laid at `base` in the SIM address space: `text` bytes of code and constants,
/// not writable, then zeroed data and the stack, not executable. All are multiples of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`]
    pub magic: u64,
    /// [`crate::VERSION`]
    pub version: u64,
    /// Virtual address of the image.
    pub base: u64,
    /// Bytes of code and constants, this header included.
    pub text: u64,
    /// Bytes of data after them.
    pub data: u64,
    /// Virtual address of the entry, to which the gate jumps.
    pub entry: u64,
    /// Virtual address, at the begin of a page of the data, of the [`State`].
    pub state: u64,
}

/// What monitor and hypervisor both use.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct State {
    /// The monitor's stack pointer; while it runs, the guest's.
    pub stack: u64,
    /// How many hooks were handled.
    pub handled: u64,
    /// The guest's IDTR while the monitor runs, as SIDT stores it.
    pub idtr: [u64; 2],
    /// An IDTR of zeros: no exception can be delivered while the monitor runs, and so each of them leaves the guest.
    pub no_idt: [u64; 2],
    /// Guest-physical addresses that the monitor may touch are below this.
    pub memory_end: u64,
    /// Among them are not those from here on: they are the hypervisor's.
    pub own_start: u64,
    /// And they end here.
    pub own_end: u64,
    /// Where to go when done: [`Header`] does not know, the hypervisor does.
    pub leave: u64,
    /// Return addresses of the registered hooks, each at the place of its last byte; 0 where there is none.
    pub sites: [u64; SITES],
    /// What each of them calls: a [`Handler`] at the same place.
    pub handlers: [u8; SITES],
}

/// What a hook calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Handler {
    /// Counts.
    Null = 0,
    /// Counts, and copies the word at its first argument to its second, both guest-virtual addresses: it shows that the
    /// monitor reads and writes the guest's memory.
    Copy = 1,
}

impl Handler {
    /// The one with this number.
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Null),
            1 => Some(Self::Copy),
            _ => None,
        }
    }
}

/// Where the monitor finds the guest's memory in its own address space: guest-physical address 0.
pub const WINDOW: u64 = 1 << 46;

impl State {
    /// Before the hypervisor fills it.
    pub const EMPTY: Self = Self {
        stack: 0,
        handled: 0,
        idtr: [0; 2],
        no_idt: [0; 2],
        memory_end: 0,
        own_start: 0,
        own_end: 0,
        leave: 0,
        sites: [0; SITES],
        handlers: [0; SITES],
    };
}
