//! What a debugger is told of the machine: its registers, in what order, and how large each is.
//!
//! The features and the order in the first one are gdb's own (gdb/features/i386/64bit-core.xml,
//! 64bit-segments.xml), which knows what each register is for by them; the last one is ours. Of the
//! floating-point registers, which gdb insists on, nothing is known: they are there and have no value.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::LazyLock;

use gdbstub::arch::{Arch, RegId, Registers as GdbRegisters};
use vmsight_arch::Registers;
use vmsight_hooks::Register;

/// An x86-64 vCPU.
#[derive(Debug)]
pub(super) enum Vcpu {}

impl Arch for Vcpu {
    type Usize = u64;
    type Registers = Values;
    type BreakpointKind = usize;
    type RegId = Number;

    fn target_description_xml() -> Option<&'static str> {
        Some(&DESCRIPTION)
    }
}

/// Where a register's value is.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// One that a verdict can change.
    Changeable(Register),
    /// Any other that is known.
    Known(fn(&Registers) -> Option<u64>),
    /// Of which nothing is known.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    name: &'static str,
    bytes: usize,
    /// Type in the description.
    kind: &'static str,
    source: Source,
}

const fn gpr(name: &'static str, number: u8, kind: &'static str) -> Entry {
    Entry {
        name,
        bytes: 8,
        kind,
        source: Source::Changeable(Register::Gpr(number)),
    }
}

const fn known(
    name: &'static str,
    bytes: usize,
    kind: &'static str,
    value: fn(&Registers) -> Option<u64>,
) -> Entry {
    Entry {
        name,
        bytes,
        kind,
        source: Source::Known(value),
    }
}

const fn float(name: &'static str, bytes: usize, kind: &'static str) -> Entry {
    Entry {
        name,
        bytes,
        kind,
        source: Source::Unknown,
    }
}

const CORE: &[Entry] = &[
    gpr("rax", 0, "int64"),
    gpr("rbx", 3, "int64"),
    gpr("rcx", 1, "int64"),
    gpr("rdx", 2, "int64"),
    gpr("rsi", 6, "int64"),
    gpr("rdi", 7, "int64"),
    gpr("rbp", 5, "data_ptr"),
    gpr("rsp", 4, "data_ptr"),
    gpr("r8", 8, "int64"),
    gpr("r9", 9, "int64"),
    gpr("r10", 10, "int64"),
    gpr("r11", 11, "int64"),
    gpr("r12", 12, "int64"),
    gpr("r13", 13, "int64"),
    gpr("r14", 14, "int64"),
    gpr("r15", 15, "int64"),
    Entry {
        name: "rip",
        bytes: 8,
        kind: "code_ptr",
        source: Source::Changeable(Register::Rip),
    },
    Entry {
        name: "eflags",
        bytes: 4,
        kind: "i386_eflags",
        source: Source::Changeable(Register::Rflags),
    },
    known("cs", 4, "int32", |r| Some(r.cs.selector.into())),
    known("ss", 4, "int32", |r| Some(r.ss.selector.into())),
    known("ds", 4, "int32", |r| Some(r.ds.selector.into())),
    known("es", 4, "int32", |r| Some(r.es.selector.into())),
    known("fs", 4, "int32", |r| Some(r.fs.selector.into())),
    known("gs", 4, "int32", |r| Some(r.gs.selector.into())),
    float("st0", 10, "i387_ext"),
    float("st1", 10, "i387_ext"),
    float("st2", 10, "i387_ext"),
    float("st3", 10, "i387_ext"),
    float("st4", 10, "i387_ext"),
    float("st5", 10, "i387_ext"),
    float("st6", 10, "i387_ext"),
    float("st7", 10, "i387_ext"),
    float("fctrl", 4, "int"),
    float("fstat", 4, "int"),
    float("ftag", 4, "int"),
    float("fiseg", 4, "int"),
    float("fioff", 4, "int"),
    float("foseg", 4, "int"),
    float("fooff", 4, "int"),
    float("fop", 4, "int"),
];

const SEGMENTS: &[Entry] = &[
    known("fs_base", 8, "int64", |r| Some(r.fs.base)),
    known("gs_base", 8, "int64", |r| Some(r.gs.base)),
];

const SYSTEM: &[Entry] = &[
    known("k_gs_base", 8, "int64", |r| r.kernel_gs_base),
    known("cr0", 8, "int64", |r| (r.cr0 != 0).then_some(r.cr0)),
    known("cr2", 8, "int64", |r| (r.cr0 != 0).then_some(r.cr2)),
    known("cr3", 8, "int64", |r| (r.cr0 != 0).then_some(r.cr3)),
    known("cr4", 8, "int64", |r| (r.cr0 != 0).then_some(r.cr4)),
    known("efer", 8, "int64", |r| (r.cr0 != 0).then_some(r.efer)),
];

const FEATURES: [(&str, &[Entry]); 3] = [
    ("org.gnu.gdb.i386.core", CORE),
    ("org.gnu.gdb.i386.segments", SEGMENTS),
    ("vmsight.system", SYSTEM),
];

/// Bits of EFLAGS that have a name (SDM vol. 1 figure 3-8).
const FLAGS: [(&str, u8); 15] = [
    ("CF", 0),
    ("PF", 2),
    ("AF", 4),
    ("ZF", 6),
    ("SF", 7),
    ("TF", 8),
    ("IF", 9),
    ("DF", 10),
    ("OF", 11),
    ("NT", 14),
    ("RF", 16),
    ("AC", 18),
    ("VIF", 19),
    ("VIP", 20),
    ("ID", 21),
];

fn entries() -> impl Iterator<Item = &'static Entry> {
    FEATURES.iter().flat_map(|(_, entries)| entries.iter())
}

static DESCRIPTION: LazyLock<String> = LazyLock::new(|| {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">\
         <architecture>i386:x86-64</architecture>",
    );
    for (feature, entries) in FEATURES {
        let _ = write!(xml, "<feature name=\"{feature}\">");
        if entries.iter().any(|e| e.kind == "i386_eflags") {
            xml.push_str("<flags id=\"i386_eflags\" size=\"4\">");
            for (name, bit) in FLAGS {
                let _ = write!(xml, "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>");
            }
            xml.push_str("</flags>");
        }
        for entry in entries {
            let group = match entry.source {
                Source::Unknown => " group=\"float\"",
                _ => "",
            };
            let (name, bits, kind) = (entry.name, entry.bytes * 8, entry.kind);
            let _ = write!(
                xml,
                "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"{group}/>"
            );
        }
        xml.push_str("</feature>");
    }
    xml.push_str("</target>");
    xml
});

impl Entry {
    fn value(&self, registers: &Registers) -> Option<u64> {
        match self.source {
            Source::Changeable(register) => get(registers, register),
            Source::Known(value) => value(registers),
            Source::Unknown => None,
        }
    }
}

fn get(registers: &Registers, register: Register) -> Option<u64> {
    match register {
        Register::Gpr(n) => registers.gprs.get(usize::from(n)).copied(),
        Register::Rip => Some(registers.rip),
        Register::Rflags => Some(registers.rflags),
    }
}

fn set(registers: &mut Registers, register: Register, value: u64) {
    let place = match register {
        Register::Gpr(n) => registers.gprs.get_mut(usize::from(n)),
        Register::Rip => Some(&mut registers.rip),
        Register::Rflags => Some(&mut registers.rflags),
    };
    if let Some(place) = place {
        *place = value;
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// A register by its place in the description.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number(Entry);

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let entry = entries().nth(id)?;
        Some((Self(*entry), NonZeroUsize::new(entry.bytes)))
    }
}

impl Number {
    /// Writes its value; how many bytes, 0 where there is none.
    pub(super) fn read(self, registers: &Registers, to: &mut [u8]) -> usize {
        let Some(value) = self.0.value(registers) else {
            return 0;
        };
        let bytes = value.to_le_bytes();
        match (to.get_mut(..self.0.bytes), bytes.get(..self.0.bytes)) {
            (Some(to), Some(from)) => {
                to.copy_from_slice(from);
                self.0.bytes
            }
            _ => 0,
        }
    }

    /// What writing it means; `None` where it cannot be written.
    pub(super) fn change(self, value: &[u8]) -> Option<(Register, u64)> {
        match self.0.source {
            Source::Changeable(register) => Some((register, number(value))),
            _ => None,
        }
    }
}

/// All registers of a vCPU, as they go over the wire.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Values {
    pub(super) registers: Registers,
    /// A register that cannot be written was given another value.
    pub(super) refused: bool,
}

impl Values {
    /// What is different in these from others.
    pub(super) fn changes(&self, from: &Registers) -> Vec<(Register, u64)> {
        entries()
            .filter_map(|entry| match entry.source {
                Source::Changeable(register) => {
                    let new = get(&self.registers, register)?;
                    (get(from, register) != Some(new)).then_some((register, new))
                }
                _ => None,
            })
            .collect()
    }
}

/// Makes a change.
pub(super) fn apply(registers: &mut Registers, change: (Register, u64)) {
    set(registers, change.0, change.1);
}

impl GdbRegisters for Values {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.registers.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for entry in entries() {
            let value = entry.value(&self.registers).map(u64::to_le_bytes);
            for i in 0..entry.bytes {
                write_byte(value.and_then(|bytes| bytes.get(i).copied()));
            }
        }
    }

    fn gdb_deserialize(&mut self, mut bytes: &[u8]) -> Result<(), ()> {
        for entry in entries() {
            let (value, rest) = bytes.split_at_checked(entry.bytes).ok_or(())?;
            bytes = rest;
            match entry.source {
                Source::Changeable(register) => set(&mut self.registers, register, number(value)),
                Source::Known(known) => {
                    let now = known(&self.registers);
                    self.refused |= now.is_some_and(|now| now != number(value));
                }
                Source::Unknown => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(values: &Values) -> Vec<Option<u8>> {
        let mut bytes = Vec::new();
        values.gdb_serialize(|byte| bytes.push(byte));
        bytes
    }

    #[test]
    fn the_core_is_as_gdb_has_it() {
        // gdb's own numbers of an amd64 machine: rsp 7, rip 16, eflags 17, cs 18, st0 24.
        for (number, name) in [
            (0, "rax"),
            (1, "rbx"),
            (7, "rsp"),
            (16, "rip"),
            (17, "eflags"),
            (18, "cs"),
            (24, "st0"),
        ] {
            assert_eq!(entries().nth(number).unwrap().name, name);
        }
        let core: usize = CORE.iter().map(|e| e.bytes).sum();
        assert_eq!(core, 16 * 8 + 8 + 4 + 6 * 4 + 8 * 10 + 8 * 4);
    }

    #[test]
    fn what_goes_out_comes_back() {
        let mut registers = Registers {
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
            cr0: 1 << 31,
            cr3: 0x1000,
            ..Registers::default()
        };
        registers.gprs[3] = 0x1122_3344_5566_7788;
        let values = Values {
            registers,
            refused: false,
        };
        let bytes = wire(&values);
        assert_eq!(bytes[8], Some(0x88), "rbx follows rax");
        assert_eq!(bytes[164], None, "nothing is known of st0");
        let mut sent: Vec<u8> = bytes.iter().map(|b| b.unwrap_or(0)).collect();
        let mut back = values.clone();
        back.gdb_deserialize(&sent).unwrap();
        assert_eq!(back, values);
        sent[0] = 7;
        back.gdb_deserialize(&sent).unwrap();
        assert_eq!(back.changes(&registers), [(Register::RAX, 7)]);
        // CR3 is second but two from the end.
        let at = sent.len() - 3 * 8;
        sent[at] ^= 1;
        back.gdb_deserialize(&sent).unwrap();
        assert!(back.refused);
        assert!(back.gdb_deserialize(&sent[1..]).is_err());
    }

    #[test]
    fn one_register_at_a_time() {
        let registers = Registers {
            rip: 0x1234,
            ..Registers::default()
        };
        let mut buf = [0; 16];
        let (rip, size) = Number::from_raw_id(16).unwrap();
        assert_eq!(size.map(NonZeroUsize::get), Some(8));
        assert_eq!(rip.read(&registers, &mut buf), 8);
        assert_eq!(number(&buf), 0x1234);
        assert_eq!(
            rip.change(&[1, 2, 0, 0, 0, 0, 0, 0]),
            Some((Register::Rip, 0x201))
        );
        let (st0, _) = Number::from_raw_id(24).unwrap();
        assert_eq!((st0.read(&registers, &mut buf), st0.change(&[0; 10])), (0, None));
        assert!(Number::from_raw_id(1000).is_none());
    }
}
