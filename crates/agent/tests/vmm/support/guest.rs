//! The guests: a few instructions of 64-bit code each, assembled with the test.

use std::arch::global_asm;
use std::collections::HashMap;

/// Where the code lies.
pub(crate) const CODE: u64 = 0x8000;
/// Counters: 64 bytes for each vCPU.
pub(crate) const RESULTS: u64 = 0x1_0000;
/// What the VMM's port got and gave: the sum of all that was written.
pub(crate) const PORT: u64 = 0x1_2018;
/// What memory hooks watch.
pub(crate) const WATCHED: u64 = 0x1_1000;
/// The guest waits until this is not 0.
pub(crate) const START: u64 = 0x1_2000;
/// How many vCPUs are done.
pub(crate) const DONE: u64 = 0x1_2008;
/// Guests that run for ever end when this is not 0.
pub(crate) const END: u64 = 0x1_2010;

// RDI is the vCPU's number, RSI the place of its counters, RBX 1000.
global_asm!(
    ".global vmsight_guest_start, vmsight_guest_end",
    ".global vmsight_calls, vmsight_many, vmsight_msr, vmsight_writes, vmsight_reads, vmsight_ports, vmsight_gp",
    ".global vmsight_faults, vmsight_ud, vmsight_wrmsr, vmsight_load, vmsight_div",
    ".global vmsight_on_ud, vmsight_on_pf, vmsight_on_de",
    ".global vmsight_function, vmsight_nop, vmsight_push, vmsight_inc, vmsight_pushf, vmsight_inc_again",
    "vmsight_guest_start:",
    "vmsight_calls:",
    "2: pause",
    "cmp qword ptr [0x12000], 0",
    "je 2b",
    "3: call vmsight_function",
    "dec rbx",
    "jnz 3b",
    "jmp 9f",
    "vmsight_many:",
    "2: pause",
    "cmp qword ptr [0x12000], 0",
    "je 2b",
    "3: inc qword ptr [rsi + 24]",
    "call vmsight_function",
    "cmp qword ptr [0x12010], 0",
    "je 3b",
    "jmp 9f",
    "vmsight_function:",
    // NOP DWORD PTR [RAX + RAX + 0] in 5 bytes, as a kernel has it.
    ".byte 0x0f, 0x1f, 0x44, 0, 0",
    "vmsight_nop:",
    "xchg ax, ax",
    "vmsight_push:",
    "push rbp",
    "vmsight_inc:",
    "inc qword ptr [rsi]",
    "vmsight_pushf:",
    "pushfq",
    "pop rax",
    "vmsight_inc_again:",
    "inc qword ptr [rsi + 8]",
    "test eax, 0x100",
    "jz 4f",
    "inc qword ptr [rsi + 16]",
    "4: pop rbp",
    "ret",
    "vmsight_msr:",
    "2: pause",
    "cmp qword ptr [0x12000], 0",
    "je 2b",
    "xor ebx, ebx",
    "3: mov ecx, 0xc0000082",
    "lea eax, [rbx + 1]",
    "xor edx, edx",
    "wrmsr",
    "rdmsr",
    "mov [rsi + rbx * 8], rax",
    "inc ebx",
    "cmp ebx, 4",
    "jne 3b",
    "jmp 9f",
    "vmsight_gp:",
    "inc qword ptr [rsi + 32]",
    "add qword ptr [rsp + 8], 2",
    "add rsp, 8",
    "iretq",
    "vmsight_on_pf:",
    "inc qword ptr [rsi + 56]",
    "add qword ptr [rsp + 8], 2",
    "add rsp, 8",
    "iretq",
    "vmsight_on_ud:",
    "inc qword ptr [rsi + 40]",
    "add qword ptr [rsp], 2",
    "iretq",
    "vmsight_on_de:",
    "inc qword ptr [rsi + 48]",
    "add qword ptr [rsp], 2",
    "iretq",
    "vmsight_faults:",
    "2: pause",
    "cmp qword ptr [0x12000], 0",
    "je 2b",
    "mov ebx, 100",
    "3: mov ecx, 0xffffffff",
    "mov edx, 0x40000000",
    "vmsight_ud: ud2",
    "vmsight_wrmsr: wrmsr",
    "vmsight_load: mov al, [rdx]",
    "xor ecx, ecx",
    "vmsight_div: div ecx",
    "dec ebx",
    "jnz 3b",
    "jmp 9f",
    "vmsight_writes:",
    "2: pause",
    "cmp qword ptr [0x12000], 0",
    "je 2b",
    "xor ecx, ecx",
    "3: inc ecx",
    "mov [0x11000 + rdi * 8], rcx",
    "mov [0x11040 + rdi * 8], rcx",
    "cmp ecx, 1000",
    "jne 3b",
    "jmp 9f",
    "vmsight_reads:",
    "2: pause",
    "cmp qword ptr [0x12000], 0",
    "je 2b",
    "xor ecx, ecx",
    "xor eax, eax",
    "3: mov [0x11000], rcx",
    "add rax, [0x11000]",
    "inc ecx",
    "cmp ecx, 100",
    "jne 3b",
    "mov [rsi], rax",
    "jmp 9f",
    "vmsight_ports:",
    "2: pause",
    "cmp qword ptr [0x12000], 0",
    "je 2b",
    "xor ecx, ecx",
    "mov edx, 0x500",
    "3: inc ecx",
    "mov eax, ecx",
    "out dx, al",
    "xor eax, eax",
    "in al, dx",
    "add [rsi], rax",
    "cmp ecx, 10",
    "jne 3b",
    "9: lock inc qword ptr [0x12008]",
    // A HLT that is stepped is no exit: again.
    "8: hlt",
    "jmp 8b",
    "vmsight_guest_end:",
);

unsafe extern "C" {
    static vmsight_guest_start: u8;
    static vmsight_guest_end: u8;
    static vmsight_calls: u8;
    static vmsight_many: u8;
    static vmsight_msr: u8;
    static vmsight_writes: u8;
    static vmsight_reads: u8;
    static vmsight_ports: u8;
    static vmsight_gp: u8;
    static vmsight_faults: u8;
    static vmsight_ud: u8;
    static vmsight_wrmsr: u8;
    static vmsight_load: u8;
    static vmsight_div: u8;
    static vmsight_on_ud: u8;
    static vmsight_on_pf: u8;
    static vmsight_on_de: u8;
    static vmsight_function: u8;
    static vmsight_nop: u8;
    static vmsight_push: u8;
    static vmsight_inc: u8;
    static vmsight_pushf: u8;
    static vmsight_inc_again: u8;
}

/// Where a label lies in the guest.
fn place(label: &'static u8) -> u64 {
    CODE + (&raw const *label as u64 - &raw const vmsight_guest_start as u64)
}

/// The bytes of all guests.
pub(crate) fn code() -> &'static [u8] {
    let len = (&raw const vmsight_guest_end as usize) - (&raw const vmsight_guest_start as usize);
    // SAFETY: both labels are in one piece of this program's code, the first before the second.
    unsafe { std::slice::from_raw_parts(&raw const vmsight_guest_start, len) }
}

/// Places to hook.
pub(crate) fn labels() -> HashMap<&'static str, u64> {
    // SAFETY: labels are never written.
    unsafe {
        HashMap::from([
            ("function", place(&vmsight_function)),
            ("nop", place(&vmsight_nop)),
            ("push", place(&vmsight_push)),
            ("inc", place(&vmsight_inc)),
            ("pushf", place(&vmsight_pushf)),
            ("inc_again", place(&vmsight_inc_again)),
            ("ud", place(&vmsight_ud)),
            ("wrmsr", place(&vmsight_wrmsr)),
            ("load", place(&vmsight_load)),
            ("div", place(&vmsight_div)),
        ])
    }
}

/// Vectors and their handlers. Each counts, and passes over the two bytes that faulted.
pub(crate) fn handlers() -> [(u64, u64); 4] {
    // SAFETY: as above.
    unsafe {
        [
            (6, place(&vmsight_on_ud)),
            (13, place(&vmsight_gp)),
            (14, place(&vmsight_on_pf)),
            (0, place(&vmsight_on_de)),
        ]
    }
}

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum GuestKind {
    /// Calls a function 1000 times.
    Calls,
    /// Calls it until it is told to end.
    Many,
    /// Writes and reads LSTAR.
    Msr,
    /// Writes a word 1000 times, and its neighbour.
    Writes,
    /// Writes and reads a word 100 times.
    Reads,
    /// Meets four kinds of exceptions 100 times: #UD, #GP, #PF, #DE.
    Faults,
    /// Writes 1 to 10 to a port, and reads it after each.
    Ports,
}

impl GuestKind {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Faults, "faults"),
        (Self::Calls, "calls"),
        (Self::Many, "many"),
        (Self::Msr, "msr"),
        (Self::Writes, "writes"),
        (Self::Reads, "reads"),
        (Self::Ports, "ports"),
    ];

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).unwrap().1
    }

    pub(crate) fn by_name(name: &str) -> Self {
        Self::ALL.iter().find(|(_, n)| *n == name).unwrap().0
    }

    /// Where it begins.
    pub(crate) fn entry(self) -> u64 {
        // SAFETY: labels are never written.
        place(unsafe {
            match self {
                Self::Calls => &vmsight_calls,
                Self::Faults => &vmsight_faults,
                Self::Many => &vmsight_many,
                Self::Msr => &vmsight_msr,
                Self::Writes => &vmsight_writes,
                Self::Reads => &vmsight_reads,
                Self::Ports => &vmsight_ports,
            }
        })
    }
}
