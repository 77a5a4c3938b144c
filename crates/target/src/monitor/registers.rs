//! `info registers -a`: the registers of every vCPU, printed while the machine runs.
//!
//! The form is that of `x86_cpu_dump_state` (QEMU target/i386/cpu-dump.c): 64-bit names where the vCPU is in
//! 64-bit mode, 32-bit ones elsewhere.

use vmsight_arch::Gva;
use vmsight_arch::registers::{Registers, Segment, TableRegister};

/// Most vCPUs taken from one text: QEMU's x86 machines allow 4096.
const MAX_VCPUS: usize = 4096;

/// Parses the text. vCPUs that lack RIP, CR0, CR3 or CR4 (another architecture, a cut text) are left out.
pub(crate) fn parse_registers(text: &str) -> Vec<Registers> {
    let mut all = Vec::new();
    // Without -a, and in QEMU before 2.12, the text is of one vCPU and has no heading.
    let sections = text.split("CPU#");
    for section in sections.take(MAX_VCPUS + 1) {
        let digits = section
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(section.len());
        let (number, body) = section.split_at(digits);
        if let Some(registers) = parse_vcpu(number.parse().unwrap_or(0), body) {
            all.push(registers);
        }
    }
    all
}

fn parse_vcpu(vcpu: u32, body: &str) -> Option<Registers> {
    let mut r = Registers {
        vcpu,
        ..Registers::default()
    };
    let (mut rip, mut cr0, mut cr3, mut cr4) = (None, None, None, None);
    for line in body.lines() {
        if let Some((name, rest)) = line
            .split_once('=')
            .filter(|(name, _)| name.trim_end().len() <= 3)
        {
            let segment = match name.trim_end() {
                "ES" => Some(&mut r.es),
                "CS" => Some(&mut r.cs),
                "SS" => Some(&mut r.ss),
                "DS" => Some(&mut r.ds),
                "FS" => Some(&mut r.fs),
                "GS" => Some(&mut r.gs),
                "LDT" => Some(&mut r.ldt),
                "TR" => Some(&mut r.tr),
                _ => None,
            };
            if let Some(segment) = segment {
                *segment = parse_segment(rest)?;
                continue;
            }
            match name {
                "GDT" => r.gdt = parse_table(rest)?,
                "IDT" => r.idt = parse_table(rest)?,
                _ => {}
            }
        }
        // `RAX=… RBX=…`, with `R8 =…` for the short names.
        let line = line.replace(" =", "=");
        for word in line.split_ascii_whitespace() {
            let Some((name, value)) = word.split_once('=') else {
                continue;
            };
            let Ok(value) = u64::from_str_radix(value, 16) else {
                continue;
            };
            if let Some(slot) = gpr_index(name).and_then(|i| r.gprs.get_mut(i)) {
                *slot = value;
                continue;
            }
            match name {
                "RIP" | "EIP" => rip = Some(value),
                "RFL" | "EFL" => r.rflags = value,
                "CR0" => cr0 = Some(value),
                "CR2" => r.cr2 = value,
                "CR3" => cr3 = Some(value),
                "CR4" => cr4 = Some(value),
                "EFER" => r.efer = value,
                _ => {}
            }
        }
    }
    (r.rip, r.cr0, r.cr3, r.cr4) = (rip?, cr0?, cr3?, cr4?);
    Some(r)
}

/// The encoding's number of a register: RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15.
fn gpr_index(name: &str) -> Option<usize> {
    const NAMES: [&str; 8] = ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"];
    let rest = name.strip_prefix('R').or_else(|| name.strip_prefix('E'))?;
    NAMES.iter().position(|n| *n == rest).or_else(|| {
        name.strip_prefix('R')?
            .parse()
            .ok()
            .filter(|n| (8..16).contains(n))
    })
}

/// `0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]`: selector, base, limit, the descriptor's second word.
fn parse_segment(text: &str) -> Option<Segment> {
    let mut words = text
        .split_ascii_whitespace()
        .map(|w| u64::from_str_radix(w, 16).ok());
    let mut next = || words.next().flatten();
    let (selector, base, limit, flags) = (next()?, next()?, next()?, next()?);
    Some(Segment {
        selector: u16::try_from(selector).ok()?,
        base,
        limit: u32::try_from(limit).ok()?,
        // Bits 19:16 of the limit lie between the attributes.
        attributes: ((flags >> 8) & 0xf0ff) as u16,
    })
}

/// `     fffffe0000001000 0000007f`: base, limit.
fn parse_table(text: &str) -> Option<TableRegister> {
    let mut words = text.split_ascii_whitespace();
    let base = u64::from_str_radix(words.next()?, 16).ok()?;
    let limit = u32::from_str_radix(words.next()?, 16).ok()?;
    // GDTR's limit has 16 bits; QEMU prints 32.
    Some(TableRegister {
        base: Gva(base),
        limit: (limit & 0xffff) as u16,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsight_arch::paging::PagingMode;

    #[test]
    fn a_linux_guest_with_two_vcpus() {
        let all = parse_registers(include_str!("captured/qemu7.2-linux-6.1.registers"));
        assert_eq!(all.len(), 2);
        let r = &all[0];
        assert_eq!((r.vcpu, all[1].vcpu), (0, 1));
        assert_eq!(r.rax(), 0x1ad40);
        assert_eq!(r.rdx(), 0x4000_0000_0000_0000);
        assert_eq!(r.rsp(), 0xffff_ffff_8a60_3e98);
        assert_eq!(r.r9(), 0x314d_efe0);
        assert_eq!(r.r15(), 0x14790);
        assert_eq!((r.rip, r.rflags), (0xffff_ffff_8965_92eb, 0x246));
        assert_eq!(
            (r.cs.selector, r.cs.limit, r.cs.attributes),
            (0x10, 0xffff_ffff, 0xa09b)
        );
        assert_eq!(r.gs.base, 0xffff_8e5f_5f40_0000);
        assert_eq!(r.tr.base, 0xffff_fe00_0000_3000);
        assert_eq!((r.gdt.base, r.gdt.limit), (Gva(0xffff_fe00_0000_1000), 0x7f));
        assert_eq!((r.idt.base, r.idt.limit), (Gva(0xffff_fe00_0000_0000), 0xfff));
        assert_eq!((r.cr0, r.cr2, r.cr3), (0x8005_0033, 0x1484_7730, 0x110_4000));
        assert_eq!((r.cr4, r.efer), (0x6f0, 0xd01));
        assert_eq!(PagingMode::from_registers(r), Some(PagingMode::X86Level4));
        assert_eq!(r.cpl(), 0);
        assert_eq!(r.lstar, None, "the monitor does not print it");
    }

    #[test]
    fn real_mode_of_both_versions() {
        for text in [
            include_str!("captured/qemu7.2-pc-booted.registers"),
            include_str!("captured/qemu10.0-pc-booted.registers"),
        ] {
            let all = parse_registers(text);
            assert_eq!(all.len(), 2);
            assert_eq!(
                (all[0].cs.selector, all[0].cs.base, all[0].cs.limit),
                (0xf000, 0xf0000, 0xffff)
            );
            assert_eq!(all[0].cr0 & 1, 0);
            assert_eq!(PagingMode::from_registers(&all[0]), None);
        }
    }

    #[test]
    fn cut_and_foreign_texts_give_nothing() {
        assert!(parse_registers("").is_empty());
        assert!(parse_registers("CPU#0\nRAX=1 RIP=zz\nCR0=1").is_empty());
        assert!(parse_registers("CPU#0\nPC=0000 X0=1 CR0=1 CR3=1 CR4=1\n").is_empty());
        let text = include_str!("captured/qemu7.2-linux-6.1.registers");
        for end in (0..text.len()).step_by(7) {
            let _ = parse_registers(&text[..end]);
        }
    }
}
