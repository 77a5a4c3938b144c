//! Hooks in the guest's kernel, put in and taken out from here, with the guest stopped and no help of it.
//!
//! The kernel tells where it is when it writes LSTAR. Its text is as it will be once a program runs in user mode: what the
//! kernel patches at boot is patched, what it frees of itself is free. Programs execute CPUID as they start, which leaves.

use core::fmt;
use core::mem::offset_of;

use vmsight_sim_abi::{FENTRY_NOP, FULL, Handler, Malformed, Policy, SIGNATURE_LEAF, State, Watch};
use vmsight_sim_hypervisor::attempt::Attempt;
use vmsight_sim_hypervisor::ept::{ENTRIES, Exhausted, MemoryType, Permissions};
use vmsight_sim_hypervisor::place::{self, CALL, Place};
use vmsight_sim_hypervisor::{PAGE, gate};

use crate::channel::Channel;
use crate::guest::{GuestTables, Hypervisor};
use crate::processor::Processor;
use crate::stepping::Step;
use crate::{calls, exits, stop, vmcs};

/// As many as a policy has.
const MOST: usize = vmsight_sim_abi::HOOKS;

/// What the module's command line may say.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    /// The handlers run in the hypervisor, which each hook leaves to: what the gate is compared with.
    pub(crate) exits: bool,
    /// A kernel that the policy is not for does not go on.
    pub(crate) fail_closed: bool,
    /// A program has the hypervisor say how things are, by CPUID's leaf of its signature. Events are told then, or when there
    /// is room for few more: what lies between two such accounts has no output in it.
    pub(crate) account: bool,
}

impl Options {
    /// Words, blanks between them; those that are not known are left out.
    pub(crate) fn parse(line: &str) -> Self {
        let has = |word: &str| line.split_whitespace().any(|w| w == word);
        Self {
            exits: has("exits"),
            fail_closed: has("fail-closed"),
            account: has("account"),
        }
    }
}

/// Why there are no hooks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Refused {
    Policy(Malformed),
    /// The kernel that runs is not the policy's: it is not where it can be.
    Slide(u64),
    /// There is another thing than a NOP at this hook.
    Bytes(u64),
    /// The hook is not in memory.
    Absent(u64),
    /// There is no room for the stub in the kernel's address space.
    NoPlace,
    NoMonitor,
    /// 5-level paging.
    Paging,
    Memory,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(why) => write!(f, "the module is no policy: {why:?}"),
            Self::Slide(at) => write!(f, "the kernel is another one, which is entered at {at:#x}"),
            Self::Bytes(at) => write!(f, "there is no NOP at the hook linked at {at:#x}"),
            Self::Absent(at) => write!(f, "the hook linked at {at:#x} is not in memory"),
            Self::NoPlace => f.write_str("there is no room for the stub beside the kernel"),
            Self::NoMonitor => f.write_str("there is no monitor, or none that fits"),
            Self::Paging => f.write_str("the guest's page tables do not have four levels"),
            Self::Memory => f.write_str("there are too few pages for page tables"),
        }
    }
}

impl From<Exhausted> for Refused {
    fn from(_: Exhausted) -> Self {
        Self::Memory
    }
}

/// A hook that is in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patch {
    /// Guest-virtual address.
    pub(crate) address: u64,
    /// Guest-physical.
    pub(crate) gpa: u64,
    /// What is there when it is in.
    bytes: [u8; CALL],
    pub(crate) handler: Handler,
}

/// The policy, and what has come of it.
#[derive(Debug)]
pub(crate) struct Hooks {
    pub(crate) policy: Policy,
    options: Options,
    pub(crate) channel: Channel,
    /// Where the kernel was moved, and the CR3 under which it said so, which is the kernel's own for all time.
    kernel: Option<(u64, u64)>,
    /// Nothing more is tried.
    over: bool,
    patches: [Option<Patch>; MOST],
    /// Whether they are in.
    pub(crate) active: bool,
    pub(crate) attempt: Option<Attempt>,
    pub(crate) step: Option<Step>,
    /// Writes that would have changed a hook.
    pub(crate) tampered: u64,
    /// What the handlers know that run out here, and how often one was called.
    pub(crate) watch: Watch,
    pub(crate) handled: u64,
}

impl Hooks {
    /// What there is before anything is known. The policy is read in place, as large as it is.
    pub(crate) const NONE: Self = Self {
        policy: Policy::EMPTY,
        options: Options {
            exits: false,
            fail_closed: false,
            account: false,
        },
        channel: Channel::NONE,
        kernel: None,
        over: true,
        patches: [None; MOST],
        active: false,
        attempt: None,
        step: None,
        tampered: 0,
        watch: Watch::EMPTY,
        handled: 0,
    };

    /// Whether there is a policy, whatever has come of it.
    pub(crate) fn is_wanted(&self) -> bool {
        self.policy.magic != 0
    }

    /// KASLR's slide.
    pub(crate) fn slide(&self) -> u64 {
        self.kernel.map_or(0, |(slide, _)| slide)
    }

    /// The hooks, where they are in.
    pub(crate) fn patches(&self) -> impl Iterator<Item = &Patch> {
        self.patches.iter().flatten()
    }

    /// Whether a page holds hooks, or has.
    pub(crate) fn is_hooked(&self, page: u64) -> bool {
        self.patches().any(|p| p.gpa & !(PAGE - 1) == page)
    }

    /// Whether a byte of a page is a hook's. Where they are out it is still none of the guest's: they may come back.
    pub(crate) fn is_hook(&self, page: u64, offset: usize) -> bool {
        let at = page + offset as u64;
        self.patches().any(|p| (p.gpa..p.gpa + CALL as u64).contains(&at))
    }

    /// The hook that leaves to the hypervisor at `address`.
    pub(crate) fn leaving(&self, address: u64) -> Option<Patch> {
        let exits = self.options.exits && self.active;
        self.patches().find(|p| exits && p.address == address).copied()
    }

    /// Whether the handlers run out here.
    pub(crate) fn out_of_guest(&self) -> bool {
        self.options.exits
    }

    /// Whether events wait for an account. Those in the guest do so in its monitor's ring, which asks to be emptied.
    pub(crate) fn hold_back(&self) -> bool {
        self.options.account && self.watch.ring.waiting() < FULL
    }
}

impl Hypervisor {
    /// Takes the policy that was booted along.
    pub(crate) fn take_policy(&mut self, bytes: &[u8], options: Options) {
        self.hooks.channel = Channel::open();
        self.hooks.options = options;
        match self.hooks.policy.read(bytes) {
            Ok(()) => self.hooks.over = false,
            Err(why) => self.refuse(Refused::Policy(why)),
        }
    }

    /// The kernel has said where it is entered by system calls.
    pub(crate) fn entry_known(&mut self, lstar: u64) {
        if self.hooks.over || self.hooks.kernel.is_some() {
            return;
        }
        match place::slide(lstar, self.hooks.policy.entry) {
            Some(slide) => self.hooks.kernel = Some((slide, vmcs::read(vmcs::GUEST_CR3))),
            None => self.refuse(Refused::Slide(lstar)),
        }
    }

    /// A program runs in user mode, and has executed CPUID for this leaf.
    pub(crate) fn user_mode(&mut self, processor: &Processor, leaf: u32) {
        if self.hooks.options.account && leaf == SIGNATURE_LEAF {
            self.drain();
            return self.say_stats("stats");
        }
        let Some((slide, cr3)) = self.hooks.kernel.filter(|_| !self.hooks.over) else {
            return;
        };
        match self.alone(processor, |hypervisor| hypervisor.install(slide, cr3)) {
            Ok(()) => {
                self.hooks.over = true;
                self.say_installed();
            }
            Err(why) => self.refuse(why),
        }
    }

    fn refuse(&mut self, why: Refused) {
        self.hooks.over = true;
        self.say_refused(why);
        if self.hooks.options.fail_closed {
            stop(format_args!("the policy does not fit: {why}"));
        }
    }

    fn install(&mut self, slide: u64, cr3: u64) -> Result<(), Refused> {
        if !exits::long_mode() || calls::five_levels() {
            return Err(Refused::Paging);
        }
        let mut found = [None; MOST];
        for ((_, hook), slot) in self.hooks.policy.hooks().zip(&mut found) {
            let address = hook.address.wrapping_add(slide);
            let handler = Handler::from_number(hook.handler).ok_or(Refused::NoMonitor)?;
            let gpa = place::physical(&GuestTables, cr3, address).ok_or(Refused::Absent(hook.address))?;
            if gpa % PAGE + CALL as u64 > PAGE || gpa >= self.ram_end {
                return Err(Refused::Absent(hook.address));
            }
            let bytes = text(gpa).ok_or(Refused::Absent(hook.address))?;
            if *bytes != FENTRY_NOP {
                return Err(Refused::Bytes(hook.address));
            }
            *slot = Some(Patch {
                address,
                gpa,
                bytes: place::EXIT,
                handler,
            });
        }
        let mut attempt = Attempt::new(&mut self.pool)?;
        attempt.end();
        if self.hooks.options.exits {
            self.hooks.watch.policy = self.hooks.policy.clone();
            self.hooks.watch.slide = slide;
        } else {
            self.place_stub(slide, cr3, &mut found)?;
        }
        for patch in found.iter().flatten() {
            let page = patch.gpa & !(PAGE - 1);
            let (r_x, kind) = (Permissions::READ_EXECUTE, MemoryType::WriteBack);
            self.guest.map(&mut self.pool, page, page, r_x, kind)?;
        }
        self.hooks.attempt = Some(attempt);
        self.hooks.patches = found;
        self.exchange(true);
        self.lock();
        Ok(())
    }

    /// Loads the monitor, and puts the stub into the kernel's address space.
    fn place_stub(&mut self, slide: u64, cr3: u64, found: &mut [Option<Patch>]) -> Result<(), Refused> {
        let place = Place::find(&GuestTables, cr3).ok_or(Refused::NoPlace)?;
        self.make_views(place.stub).map_err(|_| Refused::NoMonitor)?;
        let [table, first, second] = [
            self.pool.allocate()?,
            self.pool.allocate()?,
            self.pool.allocate()?,
        ];
        place.fill(self.pool.page(table).ok_or(Exhausted)?, [first, second]);
        let (mut one, mut two) = ([0; 4096], [0; 4096]);
        gate::stub(&mut one, &mut two);
        for (page, bytes) in [(first, &one), (second, &two)] {
            let words = self.pool.page(page).ok_or(Exhausted)?;
            for (word, eight) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = eight.iter().rev().fold(0, |w, &byte| w << 8 | u64::from(byte));
            }
        }
        for (page, permissions) in [
            (table, Permissions::READ),
            (first, Permissions::READ_EXECUTE),
            (second, Permissions::READ_EXECUTE),
        ] {
            let kind = MemoryType::WriteBack;
            self.guest.map(&mut self.pool, page, page, permissions, kind)?;
        }
        for patch in found.iter_mut().flatten() {
            let target = place.stub + gate::STUB as u64;
            patch.bytes = place::call(patch.address, target).ok_or(Refused::NoPlace)?;
        }
        let views = self.views.as_ref().ok_or(Refused::NoMonitor)?;
        for patch in found.iter().flatten() {
            let site = patch.address + CALL as u64;
            if !views.register(&mut self.pool, site, patch.handler)? {
                return Err(Refused::NoMonitor);
            }
        }
        let watch = offset_of!(State, watch);
        views
            .write_state(
                &mut self.pool,
                watch + offset_of!(Watch, policy),
                &self.hooks.policy.to_bytes(),
            )
            .ok_or(Exhausted)?;
        for (offset, value) in [
            (watch + offset_of!(Watch, slide), slide),
            (offset_of!(State, doorbell), 1),
        ] {
            views.set(&mut self.pool, offset, value).ok_or(Exhausted)?;
        }
        // SAFETY: an entry of the guest's that says nothing, below the end of what is identity-mapped, as it was read there.
        // What is not present is in no cache of translations.
        unsafe { (place.entry as *mut u64).write_volatile(Place::link(table)) };
        Ok(())
    }

    /// Puts all hooks in, or takes them out, with all processors stopped. Which of the two the guest runs into is the same
    /// to it: its stub stays.
    pub(crate) fn exchange(&mut self, active: bool) {
        for patch in self.hooks.patches.iter().flatten() {
            if let Some(bytes) = text(patch.gpa) {
                *bytes = if active { patch.bytes } else { FENTRY_NOP };
            }
        }
        self.hooks.active = active;
    }
}

/// The bytes of a hook, which are in one page.
fn text(gpa: u64) -> Option<&'static mut [u8; CALL]> {
    let own = Hypervisor::own();
    let there = (PAGE..(1 << 32) - PAGE).contains(&gpa) && !own.contains(&gpa);
    // SAFETY: RAM of the guest, identity-mapped, to which nothing of ours refers; the guest is stopped.
    there.then(|| unsafe { &mut *(gpa as *mut [u8; CALL]) })
}

/// A page of the guest's text, in words.
pub(crate) fn page(gpa: u64) -> Option<&'static mut [u64; ENTRIES]> {
    let own = Hypervisor::own();
    let there = (PAGE..(1 << 32) - PAGE).contains(&gpa) && !own.contains(&gpa) && gpa.is_multiple_of(PAGE);
    // SAFETY: as above.
    there.then(|| unsafe { &mut *(gpa as *mut [u64; ENTRIES]) })
}
