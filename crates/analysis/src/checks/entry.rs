//! Where the processor enters the kernel: system calls, interrupts, segments.

use iced_x86::{Mnemonic, OpKind, Register};
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use crate::code;
use crate::{Check, Context, Evidence, Finding, Findings, Owner, Severity, Technique};

pub(super) const ENTRY: Check = Check {
    name: "entry",
    summary: "System calls enter the kernel where they must",
    compares: "LSTAR, CSTAR and SYSENTER_EIP of each vCPU, where the target gives them, with the kernel's entry points; the \
               addresses that syscall_init writes there; and the way on from the entry points to the tables and switches of \
               system calls",
    why: "Whoever has the entry point sees every system call before the kernel does, with its tables unchanged.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &[
        "QEMU's monitor and its ELF dumps do not give these MSRs: an entry point that was written to the register only is not \
         seen there. A gdb server of the VMM's or a VirtualBox core gives them.",
        "FRED, by which the newest processors enter the kernel, has registers that no target gives.",
    ],
    run: entry,
};

/// Names of entry points begin with one of these.
const LSTAR: &[&str] = &["entry_SYSCALL_64"];
const CSTAR: &[&str] = &["entry_SYSCALL_compat", "entry_SYSCALL32_ignore", "ignore_sysret"];
const SYSENTER: &[&str] = &["entry_SYSENTER_compat"];

fn entry(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    registers(context, findings);
    // What it does was moved to another function where FRED is known (6.9).
    let writer = ["idt_syscall_init", "syscall_init"];
    let writer = writer.into_iter().find(|name| context.symbol(&[*name]).is_ok());
    match writer {
        Some(name) => leads_to(context, findings, name, None, "entry_SYSCALL_64"),
        None => findings.note("the kernel has no function syscall_init"),
    }
    // Labels inside it part it into several for who goes by symbols.
    leads_to(
        context,
        findings,
        "entry_SYSCALL_64",
        Some(ENTRY_CODE),
        "do_syscall_64",
    );
    for function in [
        "do_syscall_64",
        "do_int80_syscall_32",
        "do_fast_syscall_32",
        "__do_fast_syscall_32",
    ] {
        if let Some(at) = context.kernel().find_symbol(&[function]) {
            tables(context, findings, function, at);
        }
    }
    Ok(())
}

/// Bytes of the way from an entry point to C.
const ENTRY_CODE: usize = 512;

/// The function must jump to, call or load the address of another.
fn leads_to(context: &Context, findings: &mut Findings, name: &str, length: Option<usize>, must: &str) {
    let (at, target) = match (context.symbol(&[name]), context.symbol(&[must])) {
        (Ok(at), Ok(target)) => (at, target),
        (Err(why), _) | (_, Err(why)) => return findings.note(format!("{name}: {why}")),
    };
    let read = match length {
        None => code::function(context, at),
        Some(length) => code::read(context, at, length),
    };
    let Some(bytes) = findings.or_note(name, read) else {
        return;
    };
    findings.looked_at(1);
    if !mentions(&bytes, at, target) {
        let explanation = format!("the function does not lead to {must} as it must");
        let finding = Finding::new(Severity::Critical, name, explanation)
            .at(at)
            .with(context.code("its begin", at, 16));
        findings.report(finding);
    }
}

fn registers(context: &Context, findings: &mut Findings) {
    let vcpus = match context.registers() {
        Ok(vcpus) => vcpus,
        Err(why) => {
            findings.note(format!("the vCPUs' entry points: {why}"));
            return;
        }
    };
    let mut missing = false;
    for vcpu in vcpus {
        for (name, value, expected) in [
            ("LSTAR", vcpu.lstar, LSTAR),
            ("CSTAR", vcpu.cstar, CSTAR),
            ("SYSENTER_EIP", vcpu.sysenter_eip, SYSENTER),
        ] {
            let Some(value) = value.map(Gva) else {
                missing = true;
                continue;
            };
            findings.looked_at(1);
            // Not set where the processor or the kernel has no such way in; it must have the first.
            if value.is_null() && name != "LSTAR" {
                continue;
            }
            let ours = context.owner(value) == Owner::Kernel
                && context
                    .symbols_at(value)
                    .any(|symbol| expected.iter().any(|e| symbol.starts_with(e)));
            if ours {
                continue;
            }
            let owner = context.owner(value);
            let subject = format!("{name} of vCPU {}", vcpu.vcpu);
            let finding = Finding::new(
                Severity::Critical,
                subject,
                "system calls enter the kernel at a place that is no entry point of its own",
            )
            .at(value)
            .by(owner.module().map(str::to_owned))
            .with(context.evidence(name, value))
            .with(context.code("code there", value, 4));
            findings.report(finding);
        }
    }
    if missing && !vcpus.is_empty() {
        findings.note("the target does not give all MSRs of the entry points; what the kernel writes there was looked at");
    }
}

/// Whether an instruction jumps to, calls or loads the address `target`.
fn mentions(bytes: &[u8], at: Gva, target: Gva) -> bool {
    let half = |value: u64| value & 0xffff_ffff;
    code::instructions(bytes, at).any(|instruction| {
        let loads = (0..instruction.op_count())
            .filter_map(|i| instruction.try_immediate(i).ok())
            // WRMSR takes its value in two halves.
            .any(|value| value == target.0 || half(value) == half(target.0));
        loads
            || code::branch(&instruction) == Some(target)
            || instruction.is_ip_rel_memory_operand() && instruction.ip_rel_memory_address() == target.0
    })
}

/// Every table of pointers that the function indexes must be one of the tables of system calls.
fn tables(context: &Context, findings: &mut Findings, name: &str, at: Gva) {
    let Some(bytes) = findings.or_note(name, code::function(context, at)) else {
        return;
    };
    const KNOWN: &[&str] = &["sys_call_table", "ia32_sys_call_table", "x32_sys_call_table"];
    const SWITCHES: &[&str] = &["x64_sys_call", "ia32_sys_call", "x32_sys_call"];
    for instruction in code::instructions(&bytes, at) {
        findings.looked_at(1);
        let called = code::branch(&instruction).filter(|_| instruction.mnemonic() == Mnemonic::Call);
        if let Some(to) = called.filter(|to| !context.owner(*to).is_code()) {
            report(
                context,
                findings,
                name,
                Gva(instruction.ip()),
                to,
                "calls what is no code of the kernel",
            );
        }
        let indexed = instruction.op1_kind() == OpKind::Memory
            && instruction.mnemonic() == Mnemonic::Mov
            && instruction.memory_index_scale() == 8
            && instruction.memory_base() == Register::None
            && instruction.memory_index() != Register::None;
        let table = Gva(instruction.memory_displacement64());
        if indexed
            && !context
                .symbols_at(table)
                .any(|symbol| KNOWN.contains(&symbol) || SWITCHES.contains(&symbol))
        {
            report(
                context,
                findings,
                name,
                Gva(instruction.ip()),
                table,
                "takes handlers from a table that is none of the kernel's",
            );
        }
    }
}

fn report(context: &Context, findings: &mut Findings, name: &str, at: Gva, leads: Gva, what: &str) {
    let finding = Finding::new(Severity::Critical, name, format!("the function {what}"))
        .at(at)
        .by(context.owner(leads).module().map(str::to_owned))
        .with(context.evidence("it leads to", leads))
        .with(context.code("the instruction", at, 1));
    findings.report(finding);
}

pub(super) const IDT: Check = Check {
    name: "idt",
    summary: "Interrupts and exceptions have the kernel's own handlers",
    compares: "each of the 256 gates with the symbol that its vector must have, its selector and who may call it; each vCPU's IDTR \
               with the kernel's table",
    why: "A gate of one's own is a way into the kernel that no table of system calls shows, or a keylogger below the driver.",
    techniques: &[
        Technique::ROOTKIT,
        Technique::KEYLOGGING,
        Technique::PRIVILEGE_ESCALATION,
    ],
    blind_spots: &[
        "A handler whose own code is patched: see the check text.",
        "That a vector of a device has the right one of the kernel's interrupt handlers behind its gate.",
        "With FRED the processor does not use the table.",
    ],
    run: idt,
};

/// Handlers of the processor's exceptions (arch/x86/include/asm/idtentry.h), by vector.
const EXCEPTIONS: &[(u64, &str)] = &[
    (0, "asm_exc_divide_error"),
    (1, "asm_exc_debug"),
    (2, "asm_exc_nmi"),
    (3, "asm_exc_int3"),
    (4, "asm_exc_overflow"),
    (5, "asm_exc_bounds"),
    (6, "asm_exc_invalid_op"),
    (7, "asm_exc_device_not_available"),
    (8, "asm_exc_double_fault"),
    (9, "asm_exc_coproc_segment_overrun"),
    (10, "asm_exc_invalid_tss"),
    (11, "asm_exc_segment_not_present"),
    (12, "asm_exc_stack_segment"),
    (13, "asm_exc_general_protection"),
    (14, "asm_exc_page_fault"),
    (15, "asm_exc_spurious_interrupt_bug"),
    (16, "asm_exc_coprocessor_error"),
    (17, "asm_exc_alignment_check"),
    (18, "asm_exc_machine_check"),
    (19, "asm_exc_simd_coprocessor_error"),
    (20, "asm_exc_virtualization_exception"),
    (21, "asm_exc_control_protection"),
    (29, "asm_exc_vmm_communication"),
];
/// The vector of INT 0x80.
const SYSCALL_VECTOR: u64 = 0x80;
/// Names that its handler has had.
const INT80: &[&str] = &["entry_INT80_compat", "asm_int80_emulation"];
/// The first vector that is no exception.
const FIRST_EXTERNAL: u64 = 32;
/// `__KERNEL_CS`.
const KERNEL_CS: u16 = 0x10;

/// A descriptor of the IDT (SDM vol. 3A 6.14.1).
#[derive(Clone, Copy)]
struct Gate {
    handler: Gva,
    selector: u16,
    rights: u8,
}

impl Gate {
    fn of(bytes: &[u8]) -> Self {
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
            u64::from(u16::from_le_bytes(bytes.unwrap_or_default()))
        };
        Self {
            handler: Gva(word(0) | word(6) << 16 | word(8) << 32 | word(10) << 48),
            selector: word(2) as u16,
            rights: (word(4) >> 8) as u8,
        }
    }

    fn is_present(self) -> bool {
        self.rights & 0x80 != 0
    }

    /// Interrupt (14) and trap gate (15).
    fn kind(self) -> u8 {
        self.rights & 0x1f
    }

    fn dpl(self) -> u8 {
        self.rights >> 5 & 3
    }
}

fn idt(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let table = context.symbol(&["idt_table"])?;
    let mut bytes = [0; 256 * 16];
    let read = context.space().read(table, &mut bytes);
    read.map_err(|source| LinuxError::Read {
        what: "idt_table".to_owned(),
        at: table,
        source,
    })?;
    for (vector, bytes) in bytes.chunks_exact(16).enumerate() {
        let vector = vector as u64;
        let at = table.wrapping_add(vector * 16);
        findings.looked_at(1);
        let gate = Gate::of(bytes);
        if !gate.is_present() {
            continue;
        }
        if let Some((severity, wrong)) = wrong(context, vector, gate) {
            let finding = Finding::new(severity, format!("idt_table[{vector}]"), wrong)
                .at(at)
                .by(context.owner(gate.handler).module().map(str::to_owned))
                .with(context.evidence("handler", gate.handler))
                .with(context.code("handler's code", gate.handler, 4))
                .with(context.bytes("gate", at, 16));
            findings.report(finding);
        }
    }
    idtr(context, findings, table);
    Ok(())
}

fn wrong(context: &Context, vector: u64, gate: Gate) -> Option<(Severity, &'static str)> {
    // INT3, INTO and INT 0x80 are for programs.
    let may_call = if [3, 4, SYSCALL_VECTOR].contains(&vector) {
        3
    } else {
        0
    };
    if gate.dpl() != may_call {
        return Some((
            Severity::Critical,
            "programs may call a gate that is not for them",
        ));
    }
    if gate.selector != KERNEL_CS || !matches!(gate.kind(), 14 | 15) {
        return Some((Severity::Critical, "the gate is of no kind that the kernel makes"));
    }
    let owner = context.owner(gate.handler);
    let from_start = |start: &str| {
        let start = context.kernel().find_symbol(&[start])?;
        gate.handler.0.checked_sub(start.0)
    };
    // Exceptions that the kernel does not know keep the handlers that it booted with, 9 or 13 bytes each.
    if vector < FIRST_EXTERNAL
        && let Some(offset) = from_start("early_idt_handler_array")
        && [9, 13].iter().any(|size| offset == vector * size)
    {
        return None;
    }
    if owner != Owner::Kernel {
        return Some((Severity::Critical, "the handler is none of the kernel's"));
    }
    let is = |names: &[&str]| {
        context
            .symbols_at(gate.handler)
            .any(|symbol| names.contains(&symbol))
    };
    let expected = if vector == SYSCALL_VECTOR {
        is(INT80)
    } else if let Some((_, name)) = EXCEPTIONS.iter().find(|(v, _)| *v == vector) {
        is(&[name])
    } else if vector < FIRST_EXTERNAL {
        false
    } else {
        // A device's vector: entry number so and so of an array, 8 or 16 bytes each. Spurious ones begin at the first of
        // the vectors that the system itself uses, 0xeb to 0xf0.
        let device = from_start("irq_entries_start").is_some_and(|offset| {
            [8, 16]
                .iter()
                .any(|size| offset == (vector - FIRST_EXTERNAL) * size)
        });
        let spurious = from_start("spurious_entries_start").is_some_and(|offset| {
            (0xe0..=0xf0)
                .any(|first| vector >= first && [8, 16].iter().any(|size| offset == (vector - first) * size))
        });
        device
            || spurious
            || context
                .symbols_at(gate.handler)
                .any(|symbol| symbol.starts_with("asm_sysvec_") || symbol == "asm_common_interrupt")
            // The processor's own exceptions of paravirtual guests.
            || context.symbols_at(gate.handler).any(|symbol| symbol.starts_with("xen_asm_"))
    };
    (!expected).then_some((
        Severity::High,
        "the handler is the kernel's, but not this vector's",
    ))
}

/// Each vCPU must use the table that was looked at: through the mapping for it that programs cannot write.
fn idtr(context: &Context, findings: &mut Findings, table: Gva) {
    let vcpus = match context.registers() {
        Ok(vcpus) => vcpus,
        Err(why) => return findings.note(format!("the vCPUs' IDTR: {why}")),
    };
    let place = |at: Gva| context.space().translate(at).ok().map(|page| page.gpa);
    for vcpu in vcpus.iter().filter(|vcpu| !vcpu.idt.base.is_null()) {
        findings.looked_at(1);
        let there = place(vcpu.idt.base);
        if there.is_some() && there == place(table) {
            continue;
        }
        let finding = Finding::new(
            Severity::Critical,
            format!("IDTR of vCPU {}", vcpu.vcpu),
            "the processor uses another table of interrupts than the kernel's",
        )
        .at(vcpu.idt.base)
        .with(context.evidence("its table", vcpu.idt.base))
        .with(context.evidence("the kernel's table", table));
        findings.report(finding);
    }
}

pub(super) const GDT: Check = Check {
    name: "gdt",
    summary: "Segment descriptors are those that the kernel makes",
    compares: "each CPU's descriptors with the kinds that Linux has: code and data of the kernel and of programs, the task state, a \
               local table; each vCPU's GDTR with the kernel's tables",
    why: "A call gate, or a code segment of the kernel's that programs may use, is a way into the kernel.",
    techniques: &[Technique::PRIVILEGE_ESCALATION, Technique::ROOTKIT],
    blind_spots: &["Local descriptor tables of processes (modify_ldt) are not looked at."],
    run: gdt,
};

fn gdt(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let page = context.kernel().per_cpu_symbol("gdt_page")?;
    let per_cpu = context.kernel().per_cpu()?;
    for (cpu, at) in per_cpu.copies(page) {
        let mut bytes = [0; 16 * 8];
        // A CPU that is possible only has no page yet.
        if context.space().read(at, &mut bytes).is_err() {
            findings.note(format!("CPU {cpu}: its descriptors cannot be read"));
            continue;
        }
        let mut upper = false;
        for (index, descriptor) in bytes.chunks_exact(8).enumerate() {
            let value = u64::from_le_bytes(descriptor.try_into().unwrap_or_default());
            findings.looked_at(1);
            // The upper half of a system descriptor is the rest of its address.
            if std::mem::take(&mut upper) {
                continue;
            }
            let system = value >> 44 & 1 == 0;
            upper = system && value != 0;
            if let Some(wrong) = wrong_descriptor(index, value) {
                let finding = Finding::new(
                    Severity::Critical,
                    format!("GDT of CPU {cpu}, entry {index}"),
                    wrong,
                )
                .at(at.wrapping_add(index as u64 * 8))
                .with(Evidence::value("descriptor", format_args!("{value:#018x}")));
                findings.report(finding);
            }
        }
    }
    gdtr(context, findings, page);
    Ok(())
}

/// What a descriptor at this index of Linux's table (arch/x86/include/asm/segment.h) must not be.
fn wrong_descriptor(index: usize, value: u64) -> Option<&'static str> {
    if value == 0 || value >> 47 & 1 == 0 {
        return None; // not present
    }
    let kind = value >> 40 & 0xf;
    let dpl = value >> 45 & 3;
    if value >> 44 & 1 == 0 {
        return match kind {
            // Task state, free and busy; local table.
            9 | 11 if index == 8 => None,
            2 if index == 10 => None,
            12 => Some("a call gate: programs may enter the kernel through it"),
            _ => Some("a system descriptor where the kernel has none"),
        };
    }
    let is_code = kind & 8 != 0;
    match index {
        1 | 2 if is_code && dpl == 0 && kind & 4 == 0 => None,
        3 if !is_code && dpl == 0 => None,
        4 | 6 if is_code && dpl == 3 && kind & 4 == 0 => None,
        5 if !is_code && dpl == 3 => None,
        // Thread-local storage, and the CPU's number: what programs may use.
        12..=15 if dpl == 3 => None,
        _ => Some("a descriptor that the kernel does not make at this place"),
    }
}

fn gdtr(context: &Context, findings: &mut Findings, page: Gva) {
    let vcpus = match context.registers() {
        Ok(vcpus) => vcpus,
        Err(why) => return findings.note(format!("the vCPUs' GDTR: {why}")),
    };
    let place = |at: Gva| context.space().translate(at).ok().map(|page| page.gpa);
    let Ok(per_cpu) = context.kernel().per_cpu() else {
        return;
    };
    let known: Vec<_> = per_cpu.copies(page).filter_map(|(_, at)| place(at)).collect();
    for vcpu in vcpus.iter().filter(|vcpu| !vcpu.gdt.base.is_null()) {
        findings.looked_at(1);
        if place(vcpu.gdt.base).is_some_and(|there| known.contains(&there)) {
            continue;
        }
        let finding = Finding::new(
            Severity::Critical,
            format!("GDTR of vCPU {}", vcpu.vcpu),
            "the processor uses another table of segments than the kernel's",
        )
        .at(vcpu.gdt.base)
        .with(context.evidence("its table", vcpu.gdt.base));
        findings.report(finding);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_linux_are_fine_and_call_gates_are_not() {
        // As a 6.12 kernel has them.
        let fine = [
            (1, 0x00cf_9b00_0000_ffff),
            (2, 0x00af_9b00_0000_ffff),
            (3, 0x00cf_9300_0000_ffff),
            (4, 0x00cf_fb00_0000_ffff),
            (5, 0x00cf_f300_0000_ffff),
            (6, 0x00af_fb00_0000_ffff),
            (8, 0x0000_8b00_3000_4087),
            (15, 0x0040_f500_0000_0000),
            (0, 0),
        ];
        for (index, value) in fine {
            assert_eq!(wrong_descriptor(index, value), None, "{index}");
        }
        assert!(wrong_descriptor(7, 0xffff_ec00_0010_1234).is_some_and(|w| w.contains("call gate")));
        assert!(wrong_descriptor(12, 0x00af_9b00_0000_ffff).is_some());
        assert!(wrong_descriptor(2, 0x00af_fb00_0000_ffff).is_some());
    }

    #[test]
    fn a_gate_is_put_together() {
        let bytes = [
            0x30, 0x10, 0x10, 0, 3, 0x8e, 0xa0, 0x89, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0,
        ];
        let gate = Gate::of(&bytes);
        assert_eq!(gate.handler, Gva(0xffff_ffff_89a0_1030));
        assert_eq!((gate.selector, gate.kind(), gate.dpl()), (0x10, 14, 0));
        assert!(gate.is_present());
        assert!(!Gate::of(&[]).is_present());
    }
}
