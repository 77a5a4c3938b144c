//! Interrupts and exceptions: the first instruction of the handler that a vector's gate names.

use std::collections::{HashMap, HashSet};
use std::ffi::{c_int, c_void};
use std::ptr;

use vmsight_arch::{Gva, Registers};
use vmsight_hooks::{Detail, Vectors};

use super::api::Dump;

/// Bytes of a gate in long mode (SDM vol. 3A 7.14.1).
const GATE: usize = 16;
/// Gates of a table.
const GATES: usize = 256;
/// EFER.LMA: the vCPU is in long mode.
const EFER_LMA: u64 = 1 << 10;
/// Most bytes of what QEMU prints of a vCPU.
const MOST: usize = 1 << 16;

/// Exceptions that push an error code (SDM vol. 3A table 6-1; AMD's #VC and #SX).
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// Where the handlers are: for each, the vectors whose gates name it.
#[derive(Clone, Debug, Default)]
pub(super) struct Handlers(HashMap<u64, HashSet<u8>>);

impl Handlers {
    /// Adds those of a table's bytes.
    pub(super) fn add(&mut self, table: &[u8]) {
        for (vector, gate) in (0..=u8::MAX).zip(table.chunks_exact(GATE)) {
            if let Some(handler) = handler(gate) {
                self.0.entry(handler).or_default().insert(vector);
            }
        }
    }

    /// Handlers of these vectors. Those that other vectors have too do not tell which it was: `None` then.
    pub(super) fn of(&self, vectors: Vectors) -> Option<Vec<(u64, u8)>> {
        let mut found = Vec::new();
        for (handler, its) in &self.0 {
            let wanted = its.iter().find(|v| (vectors.first..=vectors.last).contains(*v));
            match wanted {
                Some(_) if its.len() > 1 => return None,
                Some(vector) => found.push((*handler, *vector)),
                None => {}
            }
        }
        Some(found)
    }
}

/// The handler of a gate that is present.
fn handler(gate: &[u8]) -> Option<u64> {
    let part = |at: usize, len: usize| {
        let bytes = gate.get(at..at + len)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        )
    };
    let present = gate.get(5)? & 0x80 != 0;
    present.then_some(part(0, 2)? | part(6, 2)? << 16 | part(8, 4)? << 32)
}

/// Where a vCPU's table of gates is, and how many bytes it has: as QEMU's monitor prints it (`info registers`),
/// for no interface gives it to a plugin. `None` outside of long mode.
pub(super) fn table(dump: &Dump, cpu: *mut c_void) -> Option<(u64, usize)> {
    let mut text: *mut libc::c_char = ptr::null_mut();
    let mut len = 0;
    // SAFETY: a stream of the C library into memory that it makes, which is freed below; QEMU prints one of its
    // vCPUs into it, while none is in the guest.
    let printed = unsafe {
        let stream = libc::open_memstream(&raw mut text, &raw mut len);
        if stream.is_null() {
            return None;
        }
        (dump.print)(cpu, stream.cast(), 0 as c_int);
        libc::fclose(stream);
        if text.is_null() {
            return None;
        }
        let bytes = std::slice::from_raw_parts(text.cast::<u8>(), len.min(MOST));
        let printed = String::from_utf8_lossy(bytes).into_owned();
        libc::free(text.cast());
        printed
    };
    parse(&printed)
}

fn parse(printed: &str) -> Option<(u64, usize)> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let after = |name: &str| printed.split_once(name).map(|(_, rest)| rest.split_whitespace());
    if hex(after("EFER=")?.next()?)? & EFER_LMA == 0 {
        return None;
    }
    let mut idt = after("IDT=")?;
    let base = hex(idt.next()?)?;
    let limit = usize::try_from(hex(idt.next()?)?).ok()?;
    Some((base, limit.saturating_add(1).min(GATES * GATE)))
}

/// The event at a handler's first instruction; `stack` reads 8 bytes of the guest's stack.
pub(super) fn detail(vector: u8, registers: &Registers, stack: impl Fn(u64) -> Option<u64>) -> Detail {
    let has_code = has_error_code(vector);
    let at = |n: u64| stack(registers.rsp().wrapping_add(8 * n));
    Detail::Interrupt {
        vector,
        error_code: match has_code {
            true => at(0).map(|code| code as u32),
            false => None,
        },
        cr2: (vector == 14).then_some(registers.cr2),
        rip: Gva(at(u64::from(has_code)).unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(handler: u64, present: bool) -> [u8; GATE] {
        let mut gate = [0; GATE];
        let bytes = handler.to_le_bytes();
        gate[0..2].copy_from_slice(&bytes[0..2]);
        gate[5] = if present { 0x8e } else { 0x0e };
        gate[6..12].copy_from_slice(&bytes[2..8]);
        gate
    }

    #[test]
    fn handlers_are_those_of_gates_that_are_present() {
        let base = 0xffff_ffff_8123_4560;
        let table: Vec<u8> = (0..32).flat_map(|n| gate(base + 16 * n, n != 9)).collect();
        let mut handlers = Handlers::default();
        handlers.add(&table);
        // The second vCPU has the same, and half a gate.
        handlers.add(&table[..GATE * 3 + 5]);
        let vectors = |first, last| Vectors { first, last };
        assert_eq!(handlers.of(vectors(14, 14)), Some(vec![(base + 16 * 14, 14)]));
        assert_eq!(handlers.of(vectors(9, 9)), Some(vec![]));
        assert_eq!(handlers.of(vectors(0, 255)).unwrap().len(), 31);
        // Another table in which two share one.
        handlers.add(&[gate(base, true), gate(base + 16 * 14, true)].concat());
        assert_eq!(handlers.of(vectors(14, 14)), None);
        assert_eq!(handlers.of(vectors(0, 0)), Some(vec![(base, 0)]));
    }

    #[test]
    fn the_table_is_where_qemu_says() {
        // The shape of QEMU's target/i386/cpu-dump.c.
        let long = "GDT=     fffffe0000001000 0000007f\nIDT=     fffffe0000000000 00000fff\nCR0=80050033 CR2=0\n\
                    EFER=0000000000000d01\n";
        assert_eq!(parse(long), Some((0xffff_fe00_0000_0000, 4096)));
        assert_eq!(parse(&long.replace("d01", "101")), None, "not in long mode");
        assert_eq!(
            parse(&long.replace("00000fff", "ffffffff")),
            Some((0xffff_fe00_0000_0000, 4096))
        );
        for broken in ["", "IDT=", "EFER=0000000000000d01\nIDT=     x", "EFER=d01 IDT= 1"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn what_is_on_the_stack_depends_on_the_vector() {
        let mut registers = Registers {
            cr2: 0x7777,
            ..Registers::default()
        };
        registers.gprs[4] = 0x1000;
        let stack = |at| Some(at | 0xff00_0000);
        let (vector, rip) = (14, Gva(0xff00_1008));
        let fault = Detail::Interrupt {
            vector,
            error_code: Some(0xff00_1000),
            cr2: Some(0x7777),
            rip,
        };
        assert_eq!(detail(14, &registers, stack), fault);
        let (vector, rip) = (0x20, Gva(0xff00_1000));
        let interrupt = Detail::Interrupt {
            vector,
            error_code: None,
            cr2: None,
            rip,
        };
        assert_eq!(detail(0x20, &registers, stack), interrupt);
        registers.gprs[4] = u64::MAX;
        assert!(matches!(
            detail(13, &registers, |_| None),
            Detail::Interrupt { error_code: None, .. }
        ));
    }
}
