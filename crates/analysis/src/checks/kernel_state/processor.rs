//! What protects the kernel in the processor's registers.

use vmsight_linux::LinuxError;

use crate::{Check, Context, Evidence, Finding, Findings, Object, Severity, Technique};

/// See [`Check`].
pub(crate) const PROCESSOR: Check = Check {
    name: "processor",
    summary: "Write protection, SMEP, SMAP, UMIP and NX are on in every vCPU that the kernel has turned them on for",
    compares: "CR0, CR4 and EFER of each vCPU with the features that the kernel uses; without registers, what \
               the kernel has written to CR4 last (cpu_tlbstate)",
    why: "With write protection off the kernel's code and tables can be written to; with SMEP and SMAP off, a \
          pointer into a program is enough to take the kernel over.",
    techniques: &[Technique::PRIVILEGE_ESCALATION, Technique::IMPAIR_DEFENSES],
    blind_spots: &[
        "A bit that is off for a moment only.",
        "In a dump without registers, bits that were changed past the kernel.",
    ],
    run,
};

const CR0_PG: u64 = 1 << 31;
const CR0_WP: u64 = 1 << 16;
const EFER_NXE: u64 = 1 << 11;
const EFER_LMA: u64 = 1 << 10;
/// The bit of CR4, its name, and the feature: word and bit of `x86_capability` (arch/x86/include/asm/cpufeatures.h).
const CR4: [(u64, &str, u32, u32); 3] = [
    (1 << 20, "SMEP", 9, 7),
    (1 << 21, "SMAP", 9, 20),
    (1 << 11, "UMIP", 16, 2),
];
const NX: (u32, u32) = (1, 20);

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let processor = context.object("cpuinfo_x86", context.symbol(&["boot_cpu_data"])?)?;
    let uses = |word: u32, bit: u32| -> Result<bool, LinuxError> {
        Ok(processor.number(&format!("x86_capability[{word}]"))? >> bit & 1 == 1)
    };
    let mut wanted = Vec::new();
    for (mask, name, word, bit) in CR4 {
        if uses(word, bit)? {
            wanted.push((mask, name));
        }
    }
    // Dumps do not hold EFER: of what they give for it not all is true.
    let nx = context.is_live() && uses(NX.0, NX.1)?;
    match context.registers() {
        Ok(vcpus) => {
            // One without paging was not started.
            for vcpu in vcpus.iter().filter(|v| v.cr0 & CR0_PG != 0) {
                findings.looked_at(1);
                let of = |name: &str| format!("{name} of vCPU {}", vcpu.vcpu);
                if vcpu.cr0 & CR0_WP == 0 {
                    off(findings, of("CR0.WP"), "CR0", vcpu.cr0);
                }
                for (_, name) in wanted.iter().filter(|(mask, _)| vcpu.cr4 & mask == 0) {
                    off(findings, of(&format!("CR4.{name}")), "CR4", vcpu.cr4);
                }
                if nx && vcpu.efer & EFER_LMA != 0 && vcpu.efer & EFER_NXE == 0 {
                    off(findings, of("EFER.NXE"), "EFER", vcpu.efer);
                }
            }
        }
        Err(why) => findings.note(format!("the vCPUs' registers: {why}")),
    }
    written(context, findings, &wanted)
}

/// What the kernel remembers of what it wrote to CR4 of each CPU that is online.
fn written(context: &Context, findings: &mut Findings, wanted: &[(u64, &str)]) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let online = context.symbol(&["__cpu_online_mask"])?;
    let state = kernel.per_cpu_symbol("cpu_tlbstate")?;
    let empty = context.object("tlb_state", state)?;
    for (cpu, at) in kernel.per_cpu()?.copies(state) {
        let bits = context.pointer("__cpu_online_mask", online.wrapping_add(u64::from(cpu / 64) * 8))?;
        if bits.0 >> (cpu % 64) & 1 == 0 {
            continue;
        }
        findings.looked_at(1);
        let state: Object<'_> = empty.moved(at);
        let cr4 = state.number("cr4")?;
        for (_, name) in wanted.iter().filter(|(mask, _)| cr4 & mask == 0) {
            off(
                findings,
                format!("CR4.{name} of CPU {cpu}, as written"),
                "cpu_tlbstate.cr4",
                cr4,
            );
        }
    }
    Ok(())
}

fn off(findings: &mut Findings, subject: String, register: &str, value: u64) {
    let finding = Finding::new(
        Severity::Critical,
        subject,
        "the kernel has turned it on, and it is off",
    );
    findings.report(finding.with(Evidence::value(register, format_args!("{value:#x}"))));
}
