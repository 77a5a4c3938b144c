//! Where in a kernel's code a hook goes.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register as Operand};
use vmsight_arch::Gva;
use vmsight_linux::Kernel;
use vmsight_linux::syscall::Abi;

use super::TraceError;

/// Bytes of an entry point's code that are searched.
const ENTRY_CODE: usize = 1024;

/// Entry points and what they call with the saved registers on the stack (arch/x86/entry/entry_64.S, entry_64_compat.S).
const ENTRIES: [(&str, &str, Abi); 5] = [
    ("entry_SYSCALL_64", "do_syscall_64", Abi::X64),
    ("entry_SYSCALL_compat", "do_fast_syscall_32", Abi::Ia32),
    ("entry_SYSENTER_compat", "do_SYSENTER_32", Abi::Ia32),
    ("entry_INT80_compat", "do_int80_syscall_32", Abi::Ia32),
    (INT80_GATE, "int80_emulation", Abi::Ia32),
];

/// INT 0x80 is entered like an exception, and the work is done in C, since 6.7 and in stable kernels since 6.1.68 and 6.6.7
/// (`DEFINE_IDTENTRY_RAW(int80_emulation)`, later `do_int80_emulation`, to which the function of the old name jumps). What enters
/// exceptions puts -1 into `orig_ax`: the number is where the program had it until the C code moves it.
const INT80_GATE: &str = "asm_int80_emulation";

/// One way into the kernel's system calls. At `entry` the call is about to be made, at `exit` it has returned; at both,
/// RSP is the address of the caller's `struct pt_regs`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyscallSite {
    /// Whose calls come this way.
    pub abi: Abi,
    /// The CALL instruction in the entry code.
    pub entry: Gva,
    /// The instruction after it.
    pub exit: Gva,
    /// Which register holds the number: RSI since 5.14, RDI before (`do_syscall_64`); `None` where it is passed in
    /// `pt_regs.orig_ax` alone.
    pub number: Option<vmsight_hooks::Register>,
    /// Whether the number is still in `pt_regs.ax` at `entry`, and not in `pt_regs.orig_ax` yet.
    pub is_in_ax: bool,
}

/// Every way into system calls that this kernel has; the one of 64-bit code first. Never empty.
///
/// # Errors
/// If the 64-bit entry point cannot be found or read.
pub fn syscall_sites(kernel: &Kernel) -> Result<Vec<SyscallSite>, TraceError> {
    let mut sites = Vec::new();
    for (entry, callee, abi) in ENTRIES {
        match find(kernel, entry, callee, abi) {
            Ok(site) => sites.push(site),
            // A kernel without IA32 emulation has none of these.
            Err(error) if abi == Abi::Ia32 => tracing::debug!(%error, "not there"),
            Err(error) => return Err(error),
        }
    }
    Ok(sites)
}

fn find(kernel: &Kernel, entry: &str, callee: &str, abi: Abi) -> Result<SyscallSite, TraceError> {
    let start = kernel.symbol(entry)?;
    let target = kernel.symbol(callee)?;
    let mut code = vec![0; ENTRY_CODE];
    kernel
        .space()
        .read(start, &mut code)
        .map_err(TraceError::read("an entry point", start))?;
    let mut number = None;
    let mut decoder = Decoder::with_ip(64, &code, start.0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        match instruction.code() {
            Code::Call_rel32_64 if instruction.near_branch_target() == target.0 => {
                return Ok(SyscallSite {
                    abi,
                    entry: Gva(instruction.ip()),
                    exit: Gva(instruction.next_ip()),
                    number: number.filter(|_| abi == Abi::X64),
                    is_in_ax: entry == INT80_GATE,
                });
            }
            // movslq %eax, %rsi since 5.14; movq %rax, %rdi before.
            Code::Movsxd_r64_rm32 if instruction.op1_register() == Operand::EAX => {
                number = named(instruction.op0_register());
            }
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 if instruction.op1_register() == Operand::RAX => {
                number = named(instruction.op0_register());
            }
            _ => {}
        }
    }
    Err(TraceError::NoSite {
        what: "system calls".to_owned(),
        why: format!("{entry} does not call {callee} within {ENTRY_CODE} bytes"),
    })
}

fn named(operand: Operand) -> Option<vmsight_hooks::Register> {
    match operand {
        Operand::RSI => Some(vmsight_hooks::Register::RSI),
        Operand::RDI => Some(vmsight_hooks::Register::RDI),
        _ => None,
    }
}

/// The address of a function by its name, also where the compiler has given it a suffix (`.isra.0`, `.constprop.0`).
pub(crate) fn function(kernel: &Kernel, names: &[&str]) -> Result<Gva, TraceError> {
    if let Some(at) = kernel.find_symbol(names) {
        return Ok(at);
    }
    let suffixed = kernel.profile().symbols.iter().find(|symbol| {
        names.iter().any(|name| {
            symbol.name.strip_prefix(name).is_some_and(|suffix| {
                suffix.starts_with(".isra.") || suffix.starts_with(".constprop.") && !suffix.contains(".cold")
            })
        })
    });
    match suffixed {
        Some(symbol) => Ok(kernel.image().runtime(symbol.address)),
        None => Err(TraceError::NoSite {
            what: names.first().copied().unwrap_or_default().to_owned(),
            why: format!(
                "kernel {} has no function {}",
                kernel.release(),
                names.join(" or ")
            ),
        }),
    }
}
