//! The registers of the vCPU whose thread this is, as QEMU gives them to its debugger.

use std::cell::Cell;
use std::ffi::CStr;
use std::ptr;
use std::sync::OnceLock;

use vmsight_arch::Registers;
use vmsight_arch::registers::GPR_NAMES;
use vmsight_hooks::{Field, Looks, Register, Scope};

use super::api::{self, Array, RegisterDescriptor, RegisterHandle};

/// EFER.LMA: the vCPU is in long mode.
const EFER_LMA: u64 = 1 << 10;
/// Most registers that are looked through.
const MOST: usize = 1024;
/// Places in [`Wanted`].
const PLACES: usize = u32::BITS as usize;

thread_local! {
    /// What registers are read into: made once for each thread.
    static BYTES: Cell<*mut Array> = const { Cell::new(ptr::null_mut()) };
}

/// Which register a handle is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    Gpr(usize),
    Rip,
    Flags,
    Cs,
    Ss,
    Ds,
    Es,
    Fs,
    Gs,
    FsBase,
    GsBase,
    KernelGsBase,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Efer,
}

/// Registers that are to be read: each costs a call into QEMU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wanted(u32);

impl Wanted {
    const ALL: Self = Self(u32::MAX);

    /// What it takes to say whether a hook with this scope, and a filter that looks at this, wants an event.
    pub(crate) fn to_judge(scope: Scope, looks: Looks) -> Self {
        let mut wanted = Self(0);
        for n in (0..16).filter(|n| looks.at(Field::Register(Register::Gpr(*n)))) {
            wanted = wanted.and(Self::of(&[Which::Gpr(n.into())]));
        }
        for (field, which) in FIELDS {
            if looks.at(*field) {
                wanted = wanted.and(Self::of(which));
            }
        }
        match scope {
            Scope::All => wanted,
            Scope::Dtb(_) => wanted.and(Self::of(&[Which::Cr3])),
        }
    }

    /// These.
    pub(super) fn of(which: &[Which]) -> Self {
        Self(which.iter().fold(0, |bits, which| bits | which.bit()))
    }

    /// These and those.
    pub(super) const fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    const fn has(self, which: Which) -> bool {
        self.0 & which.bit() != 0
    }

    /// Whether all of `others` are among them.
    pub(super) const fn covers(self, others: Self) -> bool {
        others.0 & !self.0 == 0
    }
}

/// Where a filter finds its fields; those that are not here have no register.
const FIELDS: &[(Field, &[Which])] = &[
    // Where an instruction is executed is told from both (see `Reader::read`).
    (Field::Register(Register::Rip), &[Which::Rip, Which::Efer]),
    (Field::Register(Register::Rflags), &[Which::Flags]),
    (Field::Cr0, &[Which::Cr0]),
    (Field::Cr2, &[Which::Cr2]),
    (Field::Cr3, &[Which::Cr3]),
    (Field::Cr4, &[Which::Cr4]),
    (Field::Efer, &[Which::Efer]),
    (Field::Cpl, &[Which::Cs]),
    (Field::FsBase, &[Which::FsBase]),
    (Field::GsBase, &[Which::GsBase]),
    (Field::PerCpu, &[Which::Cs, Which::GsBase, Which::KernelGsBase]),
];

impl Which {
    /// Its place among [`Wanted`].
    const fn bit(self) -> u32 {
        1 << self.place()
    }

    const fn place(self) -> u32 {
        match self {
            Self::Gpr(n) => n as u32 & 15,
            Self::Rip => 16,
            Self::Flags => 17,
            Self::Cs => 18,
            Self::Ss => 19,
            Self::Ds => 20,
            Self::Es => 21,
            Self::Fs => 22,
            Self::Gs => 23,
            Self::FsBase => 24,
            Self::GsBase => 25,
            Self::KernelGsBase => 26,
            Self::Cr0 => 27,
            Self::Cr2 => 28,
            Self::Cr3 => 29,
            Self::Cr4 => 30,
            Self::Efer => 31,
        }
    }

    /// By the name of QEMU's `gdb-xml/i386-64bit.xml`.
    fn named(name: &str) -> Option<Self> {
        if let Some(n) = GPR_NAMES.iter().position(|gpr| *gpr == name) {
            return Some(Self::Gpr(n));
        }
        Some(match name {
            "rip" => Self::Rip,
            "eflags" => Self::Flags,
            "cs" => Self::Cs,
            "ss" => Self::Ss,
            "ds" => Self::Ds,
            "es" => Self::Es,
            "fs" => Self::Fs,
            "gs" => Self::Gs,
            "fs_base" => Self::FsBase,
            "gs_base" => Self::GsBase,
            "k_gs_base" => Self::KernelGsBase,
            "cr0" => Self::Cr0,
            "cr2" => Self::Cr2,
            "cr3" => Self::Cr3,
            "cr4" => Self::Cr4,
            "efer" => Self::Efer,
            _ => return None,
        })
    }
}

/// Handles of all registers, each in its place; the same for all vCPUs.
#[derive(Debug, Default)]
struct Handles([Option<(Which, RegisterHandle)>; PLACES]);

// SAFETY: numbers in the shape of pointers, which only QEMU looks into.
unsafe impl Send for Handles {}
// SAFETY: as above.
unsafe impl Sync for Handles {}

/// How registers are read.
#[derive(Debug)]
pub(super) struct Reader {
    api: api::Registers,
    handles: OnceLock<Handles>,
}

impl Reader {
    /// `None` where this QEMU gives none.
    pub(super) fn find() -> Option<Self> {
        Some(Self {
            api: api::Registers::find()?,
            handles: OnceLock::new(),
        })
    }

    /// On a vCPU's thread.
    fn handles(&self) -> &[Option<(Which, RegisterHandle)>; PLACES] {
        let handles = self.handles.get_or_init(|| {
            // SAFETY: called on a vCPU's thread, as QEMU wants it.
            let list = unsafe { (self.api.list)() };
            let mut found = Handles::default();
            if list.is_null() {
                return found;
            }
            // SAFETY: an array of descriptors that QEMU made and leaves to its caller; their names live as long
            // as QEMU.
            unsafe {
                let (data, len) = ((*list).data.cast::<RegisterDescriptor>(), (*list).len as usize);
                for n in 0..len.min(MOST) {
                    let descriptor = data.add(n).read_unaligned();
                    if descriptor.name.is_null() {
                        continue;
                    }
                    let name = CStr::from_ptr(descriptor.name).to_str().unwrap_or_default();
                    if let Some(which) = Which::named(name)
                        && let Some(place) = found.0.get_mut(which.place() as usize)
                    {
                        *place = Some((which, descriptor.handle));
                    }
                }
                (self.api.free_list)(list, 1);
            }
            found
        });
        &handles.0
    }

    fn value(&self, handle: RegisterHandle) -> Option<u64> {
        let mut bytes = BYTES.get();
        if bytes.is_null() {
            // SAFETY: GLib makes one or ends the process.
            bytes = unsafe { (self.api.new_bytes)() };
            BYTES.set(bytes);
        }
        // SAFETY: this thread's own array; QEMU appends the register's bytes to it.
        unsafe {
            (self.api.set_size)(bytes, 0);
            (self.api.read)(handle, bytes);
            let (data, len) = ((*bytes).data.cast::<u8>(), (*bytes).len as usize);
            if data.is_null() || !(1..=8).contains(&len) {
                return None;
            }
            let mut value = [0; 8];
            ptr::copy_nonoverlapping(data, value.as_mut_ptr(), len);
            Some(u64::from_le_bytes(value))
        }
    }

    fn one(&self, which: Which) -> Option<u64> {
        let (_, handle) = (*self.handles().get(which.place() as usize)?)?;
        self.value(handle)
    }

    /// Where the instruction that was translated at `translated` is being executed: see [`Self::read`].
    pub(super) fn rip(&self, translated: u64) -> u64 {
        let Some(rip) = self.one(Which::Rip) else {
            return translated;
        };
        let at = executed_at(translated, rip);
        // Mostly the page is mapped in one place only, and then the mode does not matter: one register less to read.
        let is_elsewhere = at != translated;
        match is_elsewhere && self.one(Which::Efer).is_some_and(|efer| efer & EFER_LMA != 0) {
            true => at,
            false => translated,
        }
    }

    /// All of them: see [`Self::read`].
    pub(super) fn all(&self, vcpu: u32, translated: Option<u64>) -> Registers {
        self.read(vcpu, translated, Wanted::ALL)
    }

    /// Some of them, the others 0, on the thread of `vcpu`. QEMU translates the code of a page once, wherever the page is
    /// mapped, and keeps RIP only at the beginning of a block and at a few places in it: where the instruction
    /// is, is told from both.
    pub(super) fn read(&self, vcpu: u32, translated: Option<u64>, wanted: Wanted) -> Registers {
        let mut registers = Registers {
            vcpu,
            ..Registers::default()
        };
        let r = &mut registers;
        let handles = self.handles();
        let mut left = wanted.0;
        while left != 0 {
            let place = left.trailing_zeros() as usize;
            left &= left - 1;
            let Some((which, handle)) = handles.get(place).copied().flatten() else {
                continue;
            };
            let Some(value) = self.value(handle) else {
                continue;
            };
            match which {
                Which::Gpr(n) => {
                    if let Some(gpr) = r.gprs.get_mut(n) {
                        *gpr = value;
                    }
                }
                Which::Rip => r.rip = value,
                Which::Flags => r.rflags = value,
                Which::Cs => r.cs.selector = value as u16,
                Which::Ss => r.ss.selector = value as u16,
                Which::Ds => r.ds.selector = value as u16,
                Which::Es => r.es.selector = value as u16,
                Which::Fs => r.fs.selector = value as u16,
                Which::Gs => r.gs.selector = value as u16,
                Which::FsBase => r.fs.base = value,
                Which::GsBase => r.gs.base = value,
                Which::KernelGsBase => r.kernel_gs_base = Some(value),
                Which::Cr0 => r.cr0 = value,
                Which::Cr2 => r.cr2 = value,
                Which::Cr3 => r.cr3 = value,
                Which::Cr4 => r.cr4 = value,
                Which::Efer => r.efer = value,
            }
        }
        if let Some(translated) = translated.filter(|_| wanted.has(Which::Rip)) {
            r.rip = match r.efer & EFER_LMA {
                0 => translated,
                _ => executed_at(translated, r.rip),
            };
        }
        registers
    }
}

/// Where an instruction is executed that was translated at `translated`, from a RIP of the same block that is
/// not past it: a block begins in the page in which its instructions begin.
fn executed_at(translated: u64, rip: u64) -> u64 {
    let pages = rip.wrapping_sub(translated).wrapping_add(0xfff) & !0xfff;
    translated.wrapping_add(pages)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::ffi::{c_char, c_int, c_uint};

    use vmsight_arch::registers::msr;
    use vmsight_arch::{Dtb, Gva};
    use vmsight_hooks::{Detail, Moment, Value};

    use super::super::instruction::act;
    use super::*;
    use crate::nothing::Nothing;

    const NAMES: [&CStr; 33] = [
        c"rax",
        c"rbx",
        c"rcx",
        c"rdx",
        c"rsi",
        c"rdi",
        c"rbp",
        c"rsp",
        c"r8",
        c"r9",
        c"r10",
        c"r11",
        c"r12",
        c"r13",
        c"r14",
        c"r15",
        c"rip",
        c"eflags",
        c"cs",
        c"ss",
        c"ds",
        c"es",
        c"fs",
        c"gs",
        c"fs_base",
        c"gs_base",
        c"k_gs_base",
        c"cr0",
        c"cr2",
        c"cr3",
        c"cr4",
        c"efer",
        c"st0",
    ];

    thread_local! {
        /// How many registers were read; the privilege level; and RCX, where it is to be something.
        static READS: Cell<usize> = const { Cell::new(0) };
        static CPL: Cell<u64> = const { Cell::new(0) };
        static RCX: Cell<u64> = const { Cell::new(0) };
    }

    unsafe extern "C" fn list() -> *mut Array {
        let descriptors: Vec<RegisterDescriptor> = (1..)
            .zip(NAMES)
            .map(|(n, name)| RegisterDescriptor {
                handle: ptr::without_provenance_mut(n),
                name: name.as_ptr(),
                feature: ptr::null(),
            })
            .collect();
        let array = Array {
            len: descriptors.len() as c_uint,
            data: Box::into_raw(descriptors.into_boxed_slice()).cast(),
        };
        Box::into_raw(Box::new(array))
    }

    unsafe extern "C" fn free_list(list: *mut Array, _: c_int) -> *mut c_char {
        // SAFETY: what `list` has made, once.
        unsafe {
            let list = Box::from_raw(list);
            let slice =
                ptr::slice_from_raw_parts_mut(list.data.cast::<RegisterDescriptor>(), list.len as usize);
            drop(Box::from_raw(slice));
        }
        ptr::null_mut()
    }

    unsafe extern "C" fn new_bytes() -> *mut Array {
        let array = Array {
            data: Box::into_raw(Box::new([0_u8; 8])).cast(),
            len: 0,
        };
        Box::into_raw(Box::new(array))
    }

    unsafe extern "C" fn set_size(bytes: *mut Array, len: c_uint) -> *mut Array {
        // SAFETY: what `new_bytes` has made.
        unsafe { (*bytes).len = len };
        bytes
    }

    /// Each register has a value of its own.
    unsafe extern "C" fn read(handle: RegisterHandle, bytes: *mut Array) -> c_int {
        READS.set(READS.get() + 1);
        let value = match NAMES.get(handle.addr() - 1).and_then(|name| name.to_str().ok()) {
            Some("cs") => 0x10 | CPL.get(),
            Some("efer") => EFER_LMA,
            Some("rcx") if RCX.get() != 0 => RCX.get(),
            _ => 0x1000 * handle.addr() as u64,
        };
        // SAFETY: what `new_bytes` has made, with room for 8 bytes.
        unsafe {
            (*bytes).data.cast::<u64>().write(value);
            (*bytes).len = 8;
        }
        8
    }

    fn reader() -> Reader {
        Reader {
            api: api::Registers {
                list,
                read,
                new_bytes,
                set_size,
                free_list,
            },
            handles: OnceLock::new(),
        }
    }

    #[test]
    fn what_is_read_to_judge_an_event_is_all_that_its_filter_sees() {
        let reader = reader();
        let detail = Detail::Execute { rip: Gva(0x11123) };
        let gprs = (0..16)
            .map(Register::Gpr)
            .chain([Register::Rip, Register::Rflags]);
        let fields: Vec<Field> = gprs
            .map(Field::Register)
            .chain(FIELDS.iter().map(|(field, _)| *field))
            .collect();
        for cpl in [0, 3] {
            CPL.set(cpl);
            let all = reader.all(0, Some(0x7fff_0000_0123));
            for field in &fields {
                let program = Value::from(*field).compile().unwrap();
                let wanted = Wanted::to_judge(Scope::All, program.looks());
                let few = reader.read(0, Some(0x7fff_0000_0123), wanted);
                let see = |registers| {
                    program.number(
                        Moment {
                            registers,
                            detail: &detail,
                        },
                        &Nothing,
                    )
                };
                assert!(
                    see(&all).is_some_and(|value| value != 0 || (*field, cpl) == (Field::Cpl, 0)),
                    "{field:?}"
                );
                assert_eq!(see(&few), see(&all), "{field:?} at level {cpl}");
            }
        }
    }

    #[test]
    fn no_more_registers_are_read_than_it_takes() {
        let reader = reader();
        let reads = |scope, value: Option<Value>| {
            let looks = value.map_or(Looks::default(), |value| value.compile().unwrap().looks());
            READS.set(0);
            reader.read(0, Some(0x1000), Wanted::to_judge(scope, looks));
            READS.take()
        };
        let rbx = Value::register(Register::Gpr(3));
        assert_eq!(reads(Scope::All, None), 0);
        assert_eq!(reads(Scope::All, Some(rbx.clone())), 1);
        assert_eq!(reads(Scope::Dtb(Dtb(0x1000)), None), 1);
        assert_eq!(reads(Scope::All, Some(rbx.clone().plus(Field::Vcpu))), 1);
        // CR0, CR3, CR4 and EFER say how an address is translated.
        assert_eq!(reads(Scope::All, Some(rbx.load(8))), 5);
        reader.all(0, Some(0x1000));
        assert_eq!(
            READS.take(),
            NAMES.len() - 1,
            "and all but those that no event has"
        );
    }

    #[test]
    fn an_instruction_needs_no_more_than_it_wants() {
        let reader = reader();
        let here = Some(0x7fff_0000_0123);
        let mut acts = HashSet::new();
        for [first, second] in (0..=u16::MAX).map(u16::to_le_bytes) {
            acts.extend(act(&[first, second]));
            acts.extend(act(&[0x0f, first, second]));
        }
        for special in [0, msr::EFER, msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE] {
            RCX.set(special.into());
            let all = reader.all(0, here);
            for act in &acts {
                let few = reader.read(0, here, act.wants());
                assert_eq!(
                    act.detail(few.rip, Some(&few)),
                    act.detail(all.rip, Some(&all)),
                    "{act:?}"
                );
            }
        }
        RCX.set(0);
        // Writes of CR0, CR3, CR4 and of six debug registers from eight registers each, and more.
        assert!(acts.len() > 9 * 8, "{}", acts.len());
    }

    #[test]
    fn the_mode_is_looked_at_only_where_it_matters() {
        let reader = reader();
        let rip = 0x1000 * (1 + NAMES.iter().position(|name| *name == c"rip").unwrap() as u64);
        for (translated, at, reads) in [
            (rip, rip, 1),
            (rip + 0x123, rip + 0x123, 1),
            (0x7fff_0000_0123, rip + 0x123, 2),
        ] {
            READS.set(0);
            assert_eq!(reader.rip(translated), at);
            assert_eq!(READS.take(), reads, "{translated:#x}");
        }
    }

    #[test]
    fn an_instruction_is_where_its_page_is_mapped() {
        let kernel = 0xffff_ffff_8100_0123;
        assert_eq!(executed_at(kernel, kernel), kernel);
        assert_eq!(
            executed_at(kernel, kernel - 0x123),
            kernel,
            "the block's beginning"
        );
        // The same page at another address, lower and higher.
        assert_eq!(executed_at(0x7fff_0000_1123, 0x5555_0000_4100), 0x5555_0000_4123);
        assert_eq!(executed_at(0x5555_0000_4123, 0x7fff_0000_1123), 0x7fff_0000_1123);
        // The last byte of a page, in a block that begins with it.
        assert_eq!(executed_at(0x1fff, 0x5000), 0x5fff);
        assert_eq!(executed_at(0, u64::MAX), 0);
    }

    #[test]
    fn every_register_that_an_event_has_is_known_by_its_name() {
        for name in GPR_NAMES.iter().chain(&[
            "rip",
            "eflags",
            "cs",
            "ss",
            "ds",
            "es",
            "fs",
            "gs",
            "fs_base",
            "gs_base",
            "k_gs_base",
            "cr0",
            "cr2",
            "cr3",
            "cr4",
            "efer",
        ]) {
            assert!(Which::named(name).is_some(), "{name}");
        }
        assert_eq!(Which::named("xmm0"), None);
    }
}
