//! The kernel's own tables for unwinding (arch/x86/include/asm/orc_types.h, arch/x86/kernel/unwind_orc.c): for each stretch of
//! code, where the frame before lies.

use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, ReadError};

use crate::Kernel;

/// Bytes of an entry: two offsets of 16 bits, and 16 bits of registers and kinds.
const ENTRY: u64 = 6;
/// Entries of a table. A distribution's kernel has about a million.
const MAX_ENTRIES: u64 = 1 << 24;

/// What an entry counts from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Base {
    /// Nothing: the register is what it was.
    Undefined,
    /// Where the frame ends.
    PreviousSp,
    Ax,
    Dx,
    Di,
    Bp,
    Sp,
    R10,
    R13,
    /// What stands at that offset from it.
    BpIndirect,
    /// What stands where it points to, and the offset from there.
    SpIndirect,
    /// None that is known.
    Unknown,
}

/// How entries number what they count from. The types do not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Numbers {
    /// Since 4.14.
    First,
    /// In order of the processor's numbers, what is no register behind them: seen in 7.2, not in 6.12.
    Second,
}

impl Numbers {
    /// By the number of the stack pointer.
    fn by_sp(number: u8) -> Option<Self> {
        [Numbers::First, Numbers::Second]
            .into_iter()
            .find(|numbers| numbers.base(number) == Base::Sp)
    }

    fn base(self, number: u8) -> Base {
        match (self, number) {
            (_, 0) => Base::Undefined,
            (Numbers::First, 1) | (Numbers::Second, 8) => Base::PreviousSp,
            (Numbers::First, 10) | (Numbers::Second, 1) => Base::Ax,
            (_, 2) => Base::Dx,
            (Numbers::First, 3) | (Numbers::Second, 5) => Base::Di,
            (_, 4) => Base::Bp,
            (Numbers::First, 5) | (Numbers::Second, 3) => Base::Sp,
            (_, 6) => Base::R10,
            (_, 7) => Base::R13,
            (Numbers::First, 8) | (Numbers::Second, 10) => Base::BpIndirect,
            (_, 9) => Base::SpIndirect,
            _ => Base::Unknown,
        }
    }
}

/// What lies at the end of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Nobody can unwind here.
    Undefined,
    /// The stack ends here.
    End,
    /// A return address.
    Call,
    /// All registers (`pt_regs`).
    Registers,
    /// What the processor pushes: the last five words of `pt_regs`.
    Partial,
}

/// One entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) sp_offset: i16,
    pub(super) bp_offset: i16,
    pub(super) sp: Base,
    pub(super) bp: Base,
    pub(super) kind: Kind,
    /// Whether the address found is that of an instruction, and not that behind a call.
    pub(super) signal: bool,
}

impl Entry {
    /// What code has that keeps a frame pointer: what the kernel takes where it has no entry (`orc_fp_entry`).
    pub(super) const FRAME_POINTER: Entry = Entry {
        sp_offset: 16,
        bp_offset: -16,
        sp: Base::Bp,
        bp: Base::PreviousSp,
        kind: Kind::Call,
        signal: false,
    };
}

/// What the upper eight of an entry's last 16 bits mean. The lower are two registers, always.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Bits {
    /// Up to 6.2: two bits of kind (call, registers, part of them), and at this bit whether the stack ends. The bit before it, where
    /// there is one (6.3, and taken over by stable kernels), says whether the address is that of an instruction.
    Ends {
        /// Its place in the upper eight bits: 2, or 3 behind the other.
        end: u8,
    },
    /// Since 6.4: three bits of kind (undefined, end, call, registers, part of them), and one for the address.
    Kinds,
}

impl Bits {
    /// As the kernel's types have it; `None` where they have no such structure, or one that nobody knows.
    pub(super) fn of_types(kernel: &Kernel) -> Option<Bits> {
        let types = kernel.types();
        let id = types.find_struct("orc_entry")?;
        let bits = |name: &str| {
            let field = types.member_of(id, name)?;
            let width = field.bit_size.map_or(field.size * 8, u64::from);
            Some((field.offset * 8 + u64::from(field.bit_offset), width))
        };
        let known = types.size_of(id) == Some(ENTRY)
            && bits("sp_offset") == Some((0, 16))
            && bits("bp_offset") == Some((16, 16))
            && bits("sp_reg") == Some((32, 4))
            && bits("bp_reg") == Some((36, 4));
        match (bits("type")?, bits("signal"), bits("end")) {
            ((40, 2), None, Some((42, 1))) if known => Some(Bits::Ends { end: 2 }),
            ((40, 2), Some((42, 1)), Some((43, 1))) if known => Some(Bits::Ends { end: 3 }),
            ((40, 3), Some((43, 1)), None) if known => Some(Bits::Kinds),
            _ => None,
        }
    }
}

/// How the entries of a kernel and its modules are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Form {
    pub(super) bits: Bits,
    pub(super) numbers: Numbers,
}

impl Form {
    /// As the table itself shows it: at the first instruction of a C function there is a return address on the stack, and nothing
    /// above it, and where a new thread begins the stack ends.
    pub(super) fn of_table(kernel: &Kernel, table: &Table) -> Option<Form> {
        let raw = |name: &[&str]| table.raw(kernel.space(), kernel.find_symbol(name)?).ok()?;
        let [8, 0, _, _, registers, function] = raw(&["schedule"])? else {
            return None;
        };
        let [.., begin] = raw(&["ret_from_fork_asm", "ret_from_fork"])?;
        let bits = match (function, begin) {
            (2, 1) => Bits::Kinds,
            (0, 4) => Bits::Ends { end: 2 },
            (0, 8) => Bits::Ends { end: 3 },
            _ => return None,
        };
        let numbers = Numbers::by_sp(registers)?;
        Some(Form { bits, numbers })
    }

    fn decode(self, raw: [u8; ENTRY as usize]) -> Entry {
        let [s0, s1, b0, b1, registers, upper] = raw;
        let (sp, bp) = (
            self.numbers.base(registers & 15),
            self.numbers.base(registers >> 4),
        );
        let (kind, signal) = match self.bits {
            Bits::Ends { end } => {
                let kind = match upper & 3 {
                    _ if sp == Base::Undefined && upper >> end & 1 == 1 => Kind::End,
                    _ if sp == Base::Undefined => Kind::Undefined,
                    0 => Kind::Call,
                    1 => Kind::Registers,
                    2 => Kind::Partial,
                    _ => Kind::Undefined,
                };
                let signal = match end {
                    3 => upper & 4 != 0,
                    _ => matches!(kind, Kind::Registers | Kind::Partial),
                };
                (kind, signal)
            }
            Bits::Kinds => {
                let kind = match upper & 7 {
                    1 => Kind::End,
                    2 => Kind::Call,
                    3 => Kind::Registers,
                    4 => Kind::Partial,
                    _ => Kind::Undefined,
                };
                (kind, upper & 8 != 0)
            }
        };
        Entry {
            sp_offset: i16::from_le_bytes([s0, s1]),
            bp_offset: i16::from_le_bytes([b0, b1]),
            sp,
            bp,
            kind,
            signal,
        }
    }
}

/// A table: for each entry the address from which on it holds, as a distance from where that stands, ascending.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    addresses: Gva,
    entries: Gva,
    count: u64,
}

impl Table {
    /// A table of `count` entries; `None` for what cannot be one.
    pub(super) fn new(addresses: Gva, entries: Gva, count: u64) -> Option<Table> {
        let sane = (1..=MAX_ENTRIES).contains(&count) && !addresses.is_null() && !entries.is_null();
        sane.then_some(Table {
            addresses,
            entries,
            count,
        })
    }

    /// The table of the kernel proper.
    pub(super) fn of_kernel(kernel: &Kernel) -> Option<Table> {
        let symbol = |name: &str| kernel.find_symbol(&[name]);
        let (addresses, end) = (symbol("__start_orc_unwind_ip")?, symbol("__stop_orc_unwind_ip")?);
        let (entries, last) = (symbol("__start_orc_unwind")?, symbol("__stop_orc_unwind")?);
        let count = end.0.checked_sub(addresses.0)? / 4;
        // Both must be of the same number: else one of the symbols is not what it is called.
        let same = last.0.checked_sub(entries.0)? / ENTRY == count;
        Table::new(addresses, entries, count).filter(|_| same)
    }

    /// The entry for the instruction at `at`.
    pub(super) fn find(&self, space: &AddressSpace, form: Form, at: Gva) -> Result<Option<Entry>, ReadError> {
        Ok(self.raw(space, at)?.map(|raw| form.decode(raw)))
    }

    fn raw(&self, space: &AddressSpace, at: Gva) -> Result<Option<[u8; ENTRY as usize]>, ReadError> {
        // The number of entries that begin at or below it. A table that is not in order leads to a wrong entry, not on for ever.
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let here = self.addresses.wrapping_add(middle * 4);
            let distance = space.read_u32(here)? as i32;
            if here.0.wrapping_add(i64::from(distance) as u64) <= at.0 {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(index) = low.checked_sub(1) else {
            return Ok(None);
        };
        let mut raw = [0; ENTRY as usize];
        space.read(self.entries.wrapping_add(index * ENTRY), &mut raw)?;
        Ok(Some(raw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(bits: Bits, registers: u8, upper: u8) -> (Kind, bool) {
        let form = Form {
            bits,
            numbers: Numbers::First,
        };
        let entry = form.decode([8, 0, 0xf0, 0xff, registers, upper]);
        assert_eq!((entry.sp_offset, entry.bp_offset), (8, -16));
        (entry.kind, entry.signal)
    }

    #[test]
    fn each_form_has_its_kinds() {
        let old = Bits::Ends { end: 2 };
        assert_eq!(kind(old, 0x15, 0), (Kind::Call, false));
        assert_eq!(kind(old, 0x05, 1), (Kind::Registers, true));
        assert_eq!(kind(old, 0x05, 2), (Kind::Partial, true));
        assert_eq!(kind(old, 0, 4), (Kind::End, false));
        assert_eq!(kind(old, 0, 0), (Kind::Undefined, false));
        let between = Bits::Ends { end: 3 };
        assert_eq!(kind(between, 0x05, 1), (Kind::Registers, false));
        assert_eq!(kind(between, 0x05, 5), (Kind::Registers, true));
        assert_eq!(kind(between, 0, 8), (Kind::End, false));
        assert_eq!(kind(between, 0, 4), (Kind::Undefined, true));
        assert_eq!(kind(Bits::Kinds, 0x05, 0), (Kind::Undefined, false));
        assert_eq!(kind(Bits::Kinds, 0, 1), (Kind::End, false));
        assert_eq!(kind(Bits::Kinds, 0x45, 2), (Kind::Call, false));
        assert_eq!(kind(Bits::Kinds, 0x05, 11), (Kind::Registers, true));
        assert_eq!(kind(Bits::Kinds, 0x05, 4), (Kind::Partial, false));
        assert_eq!(kind(Bits::Kinds, 0x05, 7), (Kind::Undefined, false));
    }

    #[test]
    fn the_stack_pointers_number_tells_the_others() {
        assert_eq!(Numbers::by_sp(5), Some(Numbers::First));
        assert_eq!(Numbers::by_sp(3), Some(Numbers::Second));
        assert_eq!(Numbers::by_sp(4), None);
        for numbers in [Numbers::First, Numbers::Second] {
            let bases: Vec<Base> = (0..16).map(|number| numbers.base(number)).collect();
            // Each has one number, and what is left has none.
            for (index, base) in bases.iter().enumerate() {
                let same = bases.iter().position(|b| b == base);
                assert!(
                    *base == Base::Unknown || same == Some(index),
                    "{numbers:?} {index}"
                );
            }
            assert_eq!(bases.iter().filter(|base| **base == Base::Unknown).count(), 5);
        }
    }
}
