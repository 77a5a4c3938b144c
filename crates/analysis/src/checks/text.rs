//! The code of the kernel and its modules.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};
use rayon::prelude::*;
use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use super::sites;
use crate::code;
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
    run: text,
};

/// Text that is read of the kernel at most, and of all modules together.
const MAX_TEXT: u64 = 256 << 20;
/// Functions that one thread decodes in one go.
const TOGETHER: usize = 512;
/// Instructions at a function's begin in which a hook may jump by other means than a direct jump.
const HEAD: usize = 5;

/// The first address of the kernel's half.
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;

/// A stretch of code of one owner.
struct Region {
    owner: Owner,
    start: u64,
    bytes: Vec<u8>,
    /// Where functions begin, ascending, the end last.
    functions: Vec<u64>,
}

impl Region {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes.len() as u64)
    }

    fn slice(&self, from: u64, to: u64) -> &[u8] {
        let from = from.saturating_sub(self.start) as usize;
        let to = (to.saturating_sub(self.start) as usize).min(self.bytes.len());
        self.bytes.get(from..to).unwrap_or(&[])
    }
}

/// Places that the kernel patches.
struct Patched {
    calls: FxHashSet<u64>,
    probes: FxHashSet<u64>,
}

/// A place where code leads away.
struct Suspicion {
    at: u64,
    to: Gva,
    how: &'static str,
}

fn text(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let patched = Patched {
        calls: sites::static_calls(context, findings).sites,
        probes: sites::probed(context, findings)?
            .into_iter()
            .map(|(at, _)| at.0)
            .collect(),
    };
    let kernel = kernel(context)?;
    decode(context, findings, &kernel, &patched);
    let mut left = MAX_TEXT;
    for module in context.modules() {
        for range in code_of(context, &module.name, &module.ranges) {
            // Modules that all claim the same memory cost no more than honest ones.
            let Some(rest) = left.checked_sub(range.1) else {
                findings.note("modules claim more code than there can be: the rest was not looked at");
                return Ok(());
            };
            left = rest;
            match module_region(context, &module.name, range) {
                Ok(region) => decode(context, findings, &region, &patched),
                Err(why) => findings.note(format!("module {}: {why}", module.name)),
            }
        }
    }
    Ok(())
}

/// The ranges of a module's code: base and length.
fn code_of(context: &Context, name: &str, ranges: &[vmsight_linux::module::ModuleRange]) -> Vec<(u64, u64)> {
    let is_code =
        |at: u64| matches!(context.owner(Gva(at)), Owner::Module { name: n, code: true } if *n == *name);
    ranges
        .iter()
        .filter(|r| r.kind != "percpu" && is_code(r.base.0))
        .map(|r| {
            // Before 6.4 code and data are one range, the code first; pages are whole.
            let mut length = r.size.min(MAX_TEXT);
            while length > 4096 && !is_code(r.base.0.saturating_add(length - 1)) {
                length = (length - 1) / 4096 * 4096;
            }
            (r.base.0, length)
        })
        .collect()
}

fn kernel(context: &Context) -> Result<Region, LinuxError> {
    let start = context.symbol(&["_stext", "_text"])?.0;
    let end = context.symbol(&["_etext"])?.0;
    let length = end.saturating_sub(start).min(MAX_TEXT);
    let bytes = code::read(context, Gva(start), length as usize)?;
    let image = context.kernel().image();
    let linked = image.link_time(Gva(start));
    let mut functions: Vec<u64> = context
        .kernel()
        .profile()
        .symbols
        .range(linked..linked.saturating_add(length))
        .filter(|s| matches!(s.kind, b't' | b'T' | b'w' | b'W'))
        .map(|s| image.runtime(s.address).0)
        .collect();
    functions.dedup();
    functions.push(start.saturating_add(length));
    Ok(Region {
        owner: Owner::Kernel,
        start,
        bytes,
        functions,
    })
}

fn module_region(context: &Context, name: &str, (start, length): (u64, u64)) -> Result<Region, LinuxError> {
    let bytes = code::read(context, Gva(start), length as usize)?;
    let end = start.saturating_add(length);
    let symbols = context.module_symbols();
    let from = symbols.partition_point(|s| s.address.0 < start);
    let mut functions: Vec<u64> = symbols
        .get(from..)
        .unwrap_or(&[])
        .iter()
        .take_while(|s| s.address.0 < end)
        .filter(|s| matches!(s.kind, 't' | 'T' | 'w' | 'W'))
        .map(|s| s.address.0)
        .collect();
    functions.dedup();
    functions.push(end);
    Ok(Region {
        owner: Owner::Module {
            name: name.into(),
            code: true,
        },
        start,
        bytes,
        functions,
    })
}

fn decode(context: &Context, findings: &mut Findings, region: &Region, patched: &Patched) {
    findings.looked_at(region.functions.len().saturating_sub(1));
    let last = region.functions.len().saturating_sub(1);
    let found: Vec<Suspicion> = (0..last.div_ceil(TOGETHER))
        .into_par_iter()
        .flat_map_iter(|chunk| {
            let mut found = Vec::new();
            let from = chunk * TOGETHER;
            // One more than are decoded: where the last of them ends.
            let bounds = region.functions.get(from..(from + TOGETHER + 1).min(last + 1));
            for pair in bounds.unwrap_or(&[]).windows(2) {
                if let [start, end] = pair {
                    function(context, region, patched, (*start, *end), &mut found);
                }
            }
            found
        })
        .collect();
    for suspicion in found {
        report(context, findings, suspicion);
    }
}

fn function(
    context: &Context,
    region: &Region,
    patched: &Patched,
    (start, end): (u64, u64),
    found: &mut Vec<Suspicion>,
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
                && leaves(context, region, patched, &instruction, to)
            {
                found.push(Suspicion {
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
            && leads_to_code(context, to)
        {
            found.push(Suspicion {
                at,
                to,
                how: "an absolute address is loaded and jumped to",
            });
        } else if index < HEAD && at_head {
            if let Some(to) = through_pointer(context, &instruction)
                && strange(context, region, to)
            {
                found.push(Suspicion {
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
                found.push(Suspicion {
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
fn leaves(context: &Context, region: &Region, patched: &Patched, instruction: &Instruction, to: Gva) -> bool {
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
        // What one module exports to another begins a function there.
        (Owner::Module { .. }, Owner::Module { code: true, .. }) => context
            .module_symbols()
            .binary_search_by_key(&to, |s| s.address)
            .is_err(),
        _ => leads_to_code(context, to),
    }
}

/// Whether the processor would run what lies there: what was not decoded at an instruction's begin leads anywhere.
fn leads_to_code(context: &Context, to: Gva) -> bool {
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
fn through_pointer(context: &Context, instruction: &Instruction) -> Option<Gva> {
    let indirect = matches!(
        instruction.flow_control(),
        FlowControl::IndirectBranch | FlowControl::IndirectCall
    );
    if !indirect || !instruction.is_ip_rel_memory_operand() {
        return None;
    }
    let slot = Gva(instruction.ip_rel_memory_address());
    context.space().read_u64(slot).ok().map(Gva)
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
