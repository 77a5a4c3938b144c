//! The code of the kernel and its modules.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};
use rayon::prelude::*;
use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use super::sites;
use crate::code;
use crate::known::{Code, Stretch, Surroundings};
use crate::text::{self, Region};
use crate::{Check, Context, Evidence, Finding, Findings, Owner, Severity, Technique};

pub(super) const TEXT: Check = Check {
    name: "text",
    summary: "Code of the kernel and of modules leads nowhere else",
    compares: "every direct call and jump in the text of the kernel and of each module with the code that the kernel knows; the \
               begin of every function also with the ways in which hooks jump (through a register, a pointer, PUSH and RET, INT3). \
               Static calls, function tracing, kprobes, alternatives and thunks are known as what they are",
    why: "A jump patched over a function's begin sees and changes what the function does, with every table unchanged.",
    techniques: &[Technique::ROOTKIT, Technique::IMPAIR_DEFENSES],
    blind_spots: &[
        "Patches that stay within the kernel's text, such as a function that is made to return at once: --golden finds those.",
        "An indirect jump in the middle of a function, unless an absolute address is loaded for it.",
        "Functions without a symbol are decoded with the one before them, as far as that makes sense.",
    ],
    run: check,
};

/// Functions that one thread decodes in one go.
const TOGETHER: usize = 512;
/// Instructions at a function's begin in which a hook may jump by other means than a direct jump.
const HEAD: usize = 5;

/// The first address of the kernel's half.
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;

/// Places that the kernel patches.
struct Patched {
    calls: FxHashSet<u64>,
    probes: FxHashSet<u64>,
    /// What the kernel copies into the code of modules, first byte and the one past the last.
    replacements: Vec<(u64, u64)>,
}

/// A place where code leads away.
struct Suspicion {
    at: u64,
    to: Gva,
    how: &'static str,
}

/// What came out of decoding some functions.
#[derive(Default)]
struct Decoded {
    suspicions: Vec<Suspicion>,
    /// Pointers that were looked through, and where they led.
    pointers: Vec<(Gva, Gva)>,
    /// It was judged by page tables as they are now.
    by_page_tables: bool,
}

fn check(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let patched = Patched {
        calls: sites::static_calls(context, findings).sites,
        probes: sites::probed(context, findings)?
            .into_iter()
            .map(|(at, _)| at.0)
            .collect(),
        replacements: sites::replacements(context),
    };
    kernel(context, findings, text::kernel(context)?, &patched);
    for (module, region) in text::modules(context) {
        match region {
            Ok(region) => {
                let stretches = decode(context, &region, &patched, None);
                conclude(context, findings, &region, stretches);
            }
            Err(why) => findings.note(format!("module {}: {why}", module.name)),
        }
    }
    Ok(())
}

/// The kernel's own code; of what an earlier look found right, only what has changed since.
fn kernel(context: &Context, findings: &mut Findings, region: Region, patched: &Patched) {
    let Some(known) = context.known() else {
        let stretches = decode(context, &region, patched, None);
        conclude(context, findings, &region, stretches);
        return;
    };
    let sorted = |places: &FxHashSet<u64>| {
        let mut places: Vec<u64> = places.iter().copied().collect();
        places.sort_unstable();
        places
    };
    let surroundings = Surroundings {
        owners: context.owners().ranges().to_vec(),
        calls: sorted(&patched.calls),
        probes: sorted(&patched.probes),
    };
    let before = known.take_code(&surroundings, &region);
    let decoded = decode(context, &region, patched, before.as_ref());
    let stretches = decoded.iter().enumerate().map(|(number, decoded)| match decoded {
        Some(decoded) => Stretch {
            right: decoded.suspicions.is_empty() && !decoded.by_page_tables,
            pointers: decoded.pointers.clone(),
        },
        None => before
            .as_ref()
            .and_then(|before| before.stretches.get(number).cloned())
            .unwrap_or_default(),
    });
    let stretches = stretches.collect();
    let as_before = decoded.iter().filter(|decoded| decoded.is_none()).count();
    let unchanged = (as_before * TOGETHER).min(region.functions.len());
    conclude(context, findings, &region, decoded);
    let code = Code {
        surroundings,
        region,
        stretches,
    };
    known.keep_code(code, unchanged);
}

/// Decodes a region's functions, some together; `None` for those that are known to be right as they are.
fn decode(
    context: &Context,
    region: &Region,
    patched: &Patched,
    before: Option<&Code>,
) -> Vec<Option<Decoded>> {
    let last = region.functions.len().saturating_sub(1);
    let stretch = |number: usize| {
        let from = number * TOGETHER;
        // One more than are decoded: where the last of them ends.
        let bounds = region.functions.get(from..(from + TOGETHER + 1).min(last + 1));
        let bounds = bounds.unwrap_or(&[]);
        if let (Some(before), [start, .., end]) = (before, bounds)
            && before.is_right(context, number, region, (*start, *end))
        {
            return None;
        }
        let mut decoded = Decoded::default();
        for pair in bounds.windows(2) {
            if let [start, end] = pair {
                function(context, region, patched, (*start, *end), &mut decoded);
            }
        }
        Some(decoded)
    };
    (0..last.div_ceil(TOGETHER))
        .into_par_iter()
        .map(stretch)
        .collect()
}

fn conclude(context: &Context, findings: &mut Findings, region: &Region, decoded: Vec<Option<Decoded>>) {
    findings.looked_at(region.functions.len().saturating_sub(1));
    for suspicion in decoded
        .into_iter()
        .flatten()
        .flat_map(|decoded| decoded.suspicions)
    {
        report(context, findings, suspicion);
    }
}

fn function(
    context: &Context,
    region: &Region,
    patched: &Patched,
    (start, end): (u64, u64),
    decoded: &mut Decoded,
) {
    let bytes = region.slice(start, end);
    let mut loaded = None;
    let mut at_head = true;
    for (index, instruction) in code::instructions(bytes, Gva(start)).enumerate() {
        if instruction.is_invalid() {
            // Padding or data; what follows cannot be told apart from it.
            break;
        }
        let at = instruction.ip();
        if let Some(to) = code::branch(&instruction) {
            if !(region.start..region.end()).contains(&to.0)
                && leaves(context, region, patched, &instruction, to, decoded)
            {
                decoded.suspicions.push(Suspicion {
                    at,
                    to,
                    how: "a direct call or jump leads out",
                });
            }
        } else if let Some((register, to)) = absolute(&instruction) {
            loaded = Some((index, register, to));
        } else if let Some((when, register, to)) = loaded
            && index - when <= 2
            && goes_to(&instruction, register)
            && strange(context, region, to)
            && leads_to_code(context, to, decoded)
        {
            decoded.suspicions.push(Suspicion {
                at,
                to,
                how: "an absolute address is loaded and jumped to",
            });
        } else if index < HEAD && at_head {
            if let Some(to) = through_pointer(context, &instruction, decoded)
                && strange(context, region, to)
            {
                decoded.suspicions.push(Suspicion {
                    at,
                    to,
                    how: "the function's begin jumps through a pointer",
                });
            }
            if index == 0
                && instruction.mnemonic() == Mnemonic::Int3
                && !patched.probes.contains(&at)
                && !padding(context, Gva(at), bytes)
            {
                decoded.suspicions.push(Suspicion {
                    at,
                    to: Gva(at),
                    how: "the function begins with a breakpoint that is no kprobe's",
                });
            }
        }
        at_head &= !matches!(
            instruction.flow_control(),
            FlowControl::Return | FlowControl::UnconditionalBranch | FlowControl::IndirectBranch
        );
    }
}

/// A stretch of nothing but INT3 is what fills gaps; labels at a function's end (`entry_SYSRETQ_end`) stand before one.
fn padding(context: &Context, at: Gva, bytes: &[u8]) -> bool {
    bytes.iter().take(16).all(|b| *b == 0xcc) || context.symbols_at(at).any(|name| name.ends_with("_end"))
}

/// Whether a direct branch leads where code of this region does not lead by itself.
fn leaves(
    context: &Context,
    region: &Region,
    patched: &Patched,
    instruction: &Instruction,
    to: Gva,
    decoded: &mut Decoded,
) -> bool {
    let owner = context.owner(to);
    match (&region.owner, &owner) {
        (_, Owner::Kernel | Owner::Generated(_)) => false,
        // Functions that may be called before and after boot call such that are only there before.
        (Owner::Kernel, Owner::KernelInit) => false,
        (Owner::Kernel, Owner::Module { code: true, .. }) => {
            let at = instruction.ip();
            !patched.calls.contains(&at)
                && !context.symbols_at(Gva(at)).any(|name| name.starts_with("__SCT__"))
                // A trampoline may begin with an ENDBR64.
                && !context.symbols_at(Gva(at.wrapping_sub(4))).any(|name| name.starts_with("__SCT__"))
        }
        // A replacement of code that ran once, as the module was loaded, leads back to where that was: by now another module's.
        (Owner::Module { .. }, Owner::Module { code: true, .. })
            if patched
                .replacements
                .iter()
                .any(|(start, end)| (*start..*end).contains(&instruction.ip())) =>
        {
            false
        }
        // What one module exports to another begins a function there.
        (Owner::Module { .. }, Owner::Module { code: true, .. }) => context
            .module_symbols()
            .binary_search_by_key(&to, |s| s.address)
            .is_err(),
        _ => leads_to_code(context, to, decoded),
    }
}

/// Whether the processor would run what lies there: what was not decoded at an instruction's begin leads anywhere.
fn leads_to_code(context: &Context, to: Gva, decoded: &mut Decoded) -> bool {
    decoded.by_page_tables = true;
    context
        .space()
        .translate(to)
        .is_ok_and(|page| page.access.execute)
}

/// `MOV r64, imm` with an address of the kernel's half, and the register; or `PUSH imm32` of one, and none.
fn absolute(instruction: &Instruction) -> Option<(Register, Gva)> {
    let (register, value) = match (
        instruction.mnemonic(),
        instruction.op0_kind(),
        instruction.op1_kind(),
    ) {
        (Mnemonic::Mov, OpKind::Register, OpKind::Immediate64) => {
            (instruction.op0_register(), instruction.immediate64())
        }
        (Mnemonic::Mov, OpKind::Register, OpKind::Immediate32to64) => {
            (instruction.op0_register(), instruction.immediate32to64() as u64)
        }
        (Mnemonic::Push, OpKind::Immediate32to64, _) => {
            (Register::None, instruction.immediate32to64() as u64)
        }
        _ => return None,
    };
    (value >= KERNEL_HALF).then_some((register, Gva(value)))
}

/// Whether it jumps to what the register holds, or, where there is none, to what was pushed.
fn goes_to(instruction: &Instruction, register: Register) -> bool {
    match instruction.flow_control() {
        FlowControl::IndirectBranch | FlowControl::IndirectCall => instruction.op0_register() == register,
        FlowControl::Return => register == Register::None,
        _ => false,
    }
}

/// Where `JMP [rip+x]` or `CALL [rip+x]` leads now.
fn through_pointer(context: &Context, instruction: &Instruction, decoded: &mut Decoded) -> Option<Gva> {
    let indirect = matches!(
        instruction.flow_control(),
        FlowControl::IndirectBranch | FlowControl::IndirectCall
    );
    if !indirect || !instruction.is_ip_rel_memory_operand() {
        return None;
    }
    let slot = Gva(instruction.ip_rel_memory_address());
    match context.space().read_u64(slot) {
        Ok(to) => {
            decoded.pointers.push((slot, Gva(to)));
            Some(Gva(to))
        }
        Err(_) => {
            decoded.by_page_tables = true;
            None
        }
    }
}

fn strange(context: &Context, region: &Region, to: Gva) -> bool {
    match (&region.owner, context.owner(to)) {
        (_, Owner::Null) => false,
        (Owner::Kernel, Owner::Module { .. }) => true,
        (_, owner) => !owner.is_code(),
    }
}

fn report(context: &Context, findings: &mut Findings, suspicion: Suspicion) {
    let at = Gva(suspicion.at);
    let name = context.name(at).unwrap_or_else(|| at.to_string());
    let function = name.split('+').next().unwrap_or(&name).to_owned();
    let owner = context.owner(suspicion.to);
    let severity = match owner {
        Owner::Module { code: true, .. } => Severity::High,
        _ => Severity::Critical,
    };
    let explanation = format!("{}: to {}", suspicion.how, context.describe(suspicion.to));
    let finding = Finding::new(severity, name, explanation)
        .at(at)
        .by(owner.module().map(str::to_owned))
        .with(Evidence::value("function", function))
        .with(context.bytes("bytes", at, 16))
        .with(context.code("code", at, 4))
        .with(context.code("code that it leads to", suspicion.to, 4));
    findings.report(finding);
}
