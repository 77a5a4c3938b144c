//! Filters made of any bytes: a program that is accepted ends, in bounds, says the same twice and the contrary when
//! negated, and is the same after a round trip.
#![no_main]

use std::cell::Cell;

use libfuzzer_sys::fuzz_target;
use vmsight_arch::paging::TableMemory;
use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_hooks::{Access, Detail, FilterMemory, MOST_READS, Moment, Program};

/// The input, over and over, as page tables and as data, up to 64 KiB.
struct Memory<'d> {
    data: &'d [u8],
    read: Cell<usize>,
}

impl Memory<'_> {
    fn bytes<const N: usize>(&self, gpa: Gpa) -> Option<[u8; N]> {
        let mut out = [0; N];
        self.copy(gpa, &mut out).then_some(out)
    }

    fn copy(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        if gpa.0 >= 1 << 16 || self.data.is_empty() {
            return false;
        }
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = self.data[(gpa.0 as usize + i) % self.data.len()];
        }
        true
    }
}

impl TableMemory for Memory<'_> {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        self.bytes(gpa).map(u64::from_le_bytes)
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        self.bytes(gpa).map(u32::from_le_bytes)
    }
}

impl FilterMemory for Memory<'_> {
    fn read_physical(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        self.read.set(self.read.get() + out.len());
        self.copy(gpa, out)
    }
}

fuzz_target!(|data: &[u8]| {
    // How long the program is, how the vCPU translates, and a seed of its registers.
    let Some((&[len, paging, seed], rest)) = data.split_first_chunk::<3>() else {
        return;
    };
    let (program, memory) = rest.split_at(usize::from(len).min(rest.len()));
    let Ok(program) = Program::from_bytes(program) else {
        return;
    };
    let again = Program::from_bytes(&program.to_bytes()).expect("what was accepted is accepted");
    assert_eq!(again, program);
    let mut registers = Registers {
        cr0: u64::from(paging & 1) << 31 | 1,
        cr3: u64::from(paging & 0xf0) << 8,
        cr4: u64::from(paging & 2) << 4,
        efer: u64::from(paging & 4) << 8,
        ..Registers::default()
    };
    for (i, gpr) in registers.gprs.iter_mut().enumerate() {
        *gpr = u64::from(seed).wrapping_mul(i as u64 + 1);
    }
    registers.gs.base = u64::from(seed) << 8;
    let detail = Detail::Memory {
        gva: Some(Gva(seed.into())),
        gpa: None,
        len: 8,
        access: Access::WRITE,
        old: None,
        new: Some(seed.into()),
        done: false,
    };
    let moment = Moment {
        registers: &registers,
        detail: &detail,
    };
    let memory = Memory {
        data: memory,
        read: Cell::new(0),
    };
    let (truth, number) = (program.truth(moment, &memory), program.number(moment, &memory));
    assert!(memory.read.get() <= 2 * 2 * MOST_READS * 256, "reads are bounded");
    assert_eq!(program.truth(moment, &memory), truth);
    assert_eq!(program.number(moment, &memory), number);
    let mut negated = program.to_bytes();
    negated.push(10);
    if let Ok(negated) = Program::from_bytes(&negated) {
        assert_eq!(negated.truth(moment, &memory), !truth);
    }
});
