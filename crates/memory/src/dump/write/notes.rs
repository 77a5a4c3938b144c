//! The ELF notes of a dump: registers as QEMU writes them, and VMCOREINFO.
//!
//! Sources: QEMU `target/i386/arch_dump.c` (QEMUCPUState, x86_64_elf_prstatus), Linux `kernel/vmcore_info.c`.

use vmsight_arch::{Registers, Segment, TableRegister};

use super::Contents;

const NT_PRSTATUS: u32 = 1;

/// All notes, one after the other.
pub(super) fn all(contents: &Contents<'_>) -> Vec<u8> {
    let mut notes = Vec::new();
    for registers in contents.registers {
        note(&mut notes, b"CORE\0", NT_PRSTATUS, &prstatus(registers));
    }
    for registers in contents.registers {
        note(&mut notes, b"QEMU\0", 0, &qemu(registers));
    }
    if let Some(text) = contents.vmcoreinfo {
        note(&mut notes, b"VMCOREINFO\0", 0, text.as_bytes());
    }
    notes
}

fn note(notes: &mut Vec<u8>, name: &[u8], kind: u32, body: &[u8]) {
    notes.extend((name.len() as u32).to_le_bytes());
    notes.extend((body.len() as u32).to_le_bytes());
    notes.extend(kind.to_le_bytes());
    for part in [name, body] {
        notes.extend(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// elf_prstatus of x86-64.
fn prstatus(registers: &Registers) -> Vec<u8> {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = registers.gprs;
    let selector = |segment: Segment| u64::from(segment.selector);
    let mut body = vec![0; 112];
    // pr_pid: QEMU counts vCPUs from 1 here.
    if let Some(field) = body.get_mut(32..36) {
        field.copy_from_slice(&registers.vcpu.saturating_add(1).to_le_bytes());
    }
    let words = [
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        // orig_rax
        0,
        registers.rip,
        selector(registers.cs),
        registers.rflags,
        rsp,
        selector(registers.ss),
        registers.fs.base,
        registers.gs.base,
        selector(registers.ds),
        selector(registers.es),
        selector(registers.fs),
        selector(registers.gs),
        // pr_fpvalid
        0,
    ];
    words.iter().for_each(|word| body.extend(word.to_le_bytes()));
    body
}

/// QEMUCPUState, version 1, with kernel_gs_base where it is known.
fn qemu(registers: &Registers) -> Vec<u8> {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, high @ ..] = registers.gprs;
    let mut body = vec![0; 8];
    let first = [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp];
    let words = first
        .into_iter()
        .chain(high)
        .chain([registers.rip, registers.rflags]);
    words.for_each(|word| body.extend(word.to_le_bytes()));
    let table = |table: TableRegister| Segment {
        base: table.base.0,
        limit: u32::from(table.limit),
        ..Segment::default()
    };
    let segments = [
        registers.cs,
        registers.ds,
        registers.es,
        registers.fs,
        registers.gs,
        registers.ss,
        registers.ldt,
        registers.tr,
        table(registers.gdt),
        table(registers.idt),
    ];
    for segment in segments {
        body.extend(u32::from(segment.selector).to_le_bytes());
        body.extend(segment.limit.to_le_bytes());
        body.extend((u32::from(segment.attributes) << 8).to_le_bytes());
        body.extend([0; 4]);
        body.extend(segment.base.to_le_bytes());
    }
    for word in [registers.cr0, 0, registers.cr2, registers.cr3, registers.cr4] {
        body.extend(word.to_le_bytes());
    }
    if let Some(base) = registers.kernel_gs_base {
        body.extend(base.to_le_bytes());
    }
    let len = body.len() as u32;
    if let Some(head) = body.get_mut(..8) {
        let (version, size) = head.split_at_mut(4);
        version.copy_from_slice(&1u32.to_le_bytes());
        size.copy_from_slice(&len.to_le_bytes());
    }
    body
}
