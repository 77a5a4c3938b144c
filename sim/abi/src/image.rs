//! The monitor's image: a flat file that begins with a header and is mapped as it is.

use crate::{CALLS, Policy, Ring};

/// Bytes of the checker's table.
pub const SITES: usize = 0x1_0000 + SITE_STRIDE;
/// Sites that are registered lie this far from each other in the table, in bytes, at least. Functions of a kernel, which
/// are aligned so, do.
pub const SITE_STRIDE: usize = 16;

/// Where in the checker's table a site is: at its last two bytes, so that the monitor's entry finds it in two instructions.
/// There lies the site, in 8 bytes, and after it the [`Handler`]'s number in one.
pub const fn site_offset(site: u64) -> usize {
    site as usize & 0xffff
}

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
    /// Where in the guest a hooked function goes on that is refused: the value that it returns is in R10 then. 0 where the
    /// hypervisor has no such place.
    pub refuse: u64,
    /// 1 where the hypervisor serves [`crate::Call::Drain`].
    pub doorbell: u64,
    /// Counts up while a handler that takes long is getting on, as with a large module's hash: who bounds handlers in time
    /// can tell it from one that hangs, and must, for a call that is ended lets pass what it was to judge.
    pub progress: u64,
    /// What of the guest's registers is not in the processor but kept here: 0, [`KEPT_GENERAL`], [`KEPT_ALL`].
    pub kept: u64,
    /// RBX, RBP, R12 to R15.
    pub general: [u64; 6],
    /// Vector registers, as FXSAVE64 stores them: handlers that do more than count use vector registers.
    pub vectors: Vectors,
    /// Return addresses of the registered hooks and what they call, by [`site_offset`]; zeros where there is none.
    pub sites: [u8; SITES],
    /// What the handlers know and tell.
    pub watch: Watch,
}

/// Of [`State::kept`]: those general registers that functions keep, while a handler runs that is not the null one.
pub const KEPT_GENERAL: u64 = 1;
/// And the vector registers, while it does more than look at general ones.
pub const KEPT_ALL: u64 = 2;

/// What FXSAVE64 stores.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct Vectors(pub [u64; 64]);

/// What handlers know and tell. The monitor has one, and the hypervisor another for the handlers that it calls itself.
#[derive(Debug)]
#[repr(C)]
pub struct Watch {
    /// What is looked at.
    pub policy: Policy,
    /// KASLR's: run-time minus link-time address.
    pub slide: u64,
    /// System calls of 64 bits, by number.
    pub calls: [u64; CALLS],
    /// System calls of 32 bits, by number.
    pub compat_calls: [u64; CALLS],
    /// System calls of x32, all together.
    pub x32_calls: u64,
    /// Calls with numbers beyond those that are told apart, or of which nothing could be read.
    pub other_calls: u64,
    /// What happened.
    pub ring: Ring,
}

impl Watch {
    /// That looks at nothing.
    pub const EMPTY: Self = Self {
        policy: Policy::EMPTY,
        slide: 0,
        calls: [0; CALLS],
        compat_calls: [0; CALLS],
        x32_calls: 0,
        other_calls: 0,
        ring: Ring::EMPTY,
    };
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
    /// System calls of 64 bits, at `x64_sys_call(regs, number)`.
    Call = 2,
    /// Those of 32 bits, at `ia32_sys_call(regs, number)`.
    CompatCall = 3,
    /// Those of x32, at `x32_sys_call(regs, number)`.
    X32Call = 4,
    /// New processes and threads, at `wake_up_new_task(task)`.
    Process = 5,
    /// Programs that are executed, at `begin_new_exec(bprm)`.
    Exec = 6,
    /// Modules from files, at `security_kernel_post_read_file(file, bytes, length, id)`.
    ModuleFile = 7,
    /// Modules from memory, at `security_kernel_post_load_data(bytes, length, id, description)`.
    ModuleData = 8,
    /// Credentials, at `commit_creds(new)`.
    Credentials = 9,
}

impl Handler {
    /// The one with this number.
    pub const fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Null),
            1 => Some(Self::Copy),
            2 => Some(Self::Call),
            3 => Some(Self::CompatCall),
            4 => Some(Self::X32Call),
            5 => Some(Self::Process),
            6 => Some(Self::Exec),
            7 => Some(Self::ModuleFile),
            8 => Some(Self::ModuleData),
            9 => Some(Self::Credentials),
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
        refuse: 0,
        doorbell: 0,
        progress: 0,
        kept: 0,
        general: [0; 6],
        vectors: Vectors([0; 64]),
        sites: [0; SITES],
        watch: Watch::EMPTY,
    };
}
