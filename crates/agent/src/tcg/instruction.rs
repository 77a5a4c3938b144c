//! Which instructions do what can be hooked, told when they are translated, and with which values, told when
//! they are executed.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use vmsight_arch::Registers;
use vmsight_arch::registers::msr;
use vmsight_hooks::{Access, ControlRegister, Detail, HookKind};

use super::registers::{Wanted, Which};

/// The longest instruction (SDM vol. 2A 2.3.11).
pub(super) const LONGEST: usize = 15;
/// CR0.TS, which CLTS clears.
const CR0_TS: u64 = 1 << 3;
/// What LMSW writes: PE, MP, EM and TS.
const CR0_LMSW: u64 = 0xf;

/// Where a value comes from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Source {
    /// A general-purpose register, by the number of its encoding.
    Gpr(u8),
    /// The register itself without these bits.
    Without(u64),
    /// EDX:EAX.
    EdxEax,
    /// Low bits of a register, which cannot clear PE (LMSW).
    Lmsw(u8),
    /// Memory, which is not looked into.
    Unknown,
}

/// The port of an access.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum PortNumber {
    Fixed(u8),
    Dx,
}

/// What an instruction does that can be hooked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Act {
    Write(ControlRegister, Source),
    Read(ControlRegister),
    WriteMsr,
    ReadMsr,
    Port {
        out: bool,
        len: u8,
        port: PortNumber,
        /// Whether the value is in AL, AX or EAX: of INS and OUTS it is in memory.
        in_rax: bool,
    },
    Cpuid,
    Hypercall,
    DescriptorTable,
}

/// What the instruction in these bytes does. QEMU says how long it is, which tells in which mode it was translated.
pub(super) fn act(bytes: &[u8]) -> Option<Act> {
    let decoded = [64, 32, 16].into_iter().find_map(|bits| {
        let instruction = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
        (!instruction.is_invalid() && instruction.len() == bytes.len()).then_some(instruction)
    })?;
    Some(match decoded.mnemonic() {
        Mnemonic::Mov => return control(&decoded),
        Mnemonic::Clts => Act::Write(ControlRegister::Cr0, Source::Without(CR0_TS)),
        Mnemonic::Lmsw => {
            let source = gpr(&decoded, 0).map_or(Source::Unknown, Source::Lmsw);
            Act::Write(ControlRegister::Cr0, source)
        }
        Mnemonic::Xsetbv => Act::Write(ControlRegister::Xcr0, Source::EdxEax),
        Mnemonic::Xgetbv => Act::Read(ControlRegister::Xcr0),
        Mnemonic::Wrmsr => Act::WriteMsr,
        Mnemonic::Rdmsr => Act::ReadMsr,
        Mnemonic::Cpuid => Act::Cpuid,
        Mnemonic::Vmcall | Mnemonic::Vmmcall => Act::Hypercall,
        Mnemonic::Lgdt | Mnemonic::Lidt | Mnemonic::Lldt | Mnemonic::Ltr => Act::DescriptorTable,
        Mnemonic::In => port(&decoded, false, 0, 1),
        Mnemonic::Out => port(&decoded, true, 1, 0),
        Mnemonic::Insb => string(false, 1),
        Mnemonic::Insw => string(false, 2),
        Mnemonic::Insd => string(false, 4),
        Mnemonic::Outsb => string(true, 1),
        Mnemonic::Outsw => string(true, 2),
        Mnemonic::Outsd => string(true, 4),
        _ => return None,
    })
}

/// A MOV to or from a control or debug register.
fn control(instruction: &Instruction) -> Option<Act> {
    if let Some(register) = special(instruction.op0_register()) {
        return Some(Act::Write(register, Source::Gpr(gpr(instruction, 1)?)));
    }
    Some(Act::Read(special(instruction.op1_register())?))
}

fn special(register: Register) -> Option<ControlRegister> {
    Some(match register {
        Register::CR0 => ControlRegister::Cr0,
        Register::CR3 => ControlRegister::Cr3,
        Register::CR4 => ControlRegister::Cr4,
        Register::CR8 => ControlRegister::Cr8,
        Register::DR0 => ControlRegister::Dr(0),
        Register::DR1 => ControlRegister::Dr(1),
        Register::DR2 => ControlRegister::Dr(2),
        Register::DR3 => ControlRegister::Dr(3),
        // DR4 and DR5 are other names of these (SDM vol. 3B 18.2.2).
        Register::DR4 | Register::DR6 => ControlRegister::Dr6,
        Register::DR5 | Register::DR7 => ControlRegister::Dr7,
        _ => return None,
    })
}

/// The number of the general-purpose register that an operand is.
fn gpr(instruction: &Instruction, operand: u32) -> Option<u8> {
    if instruction.op_kind(operand) != OpKind::Register {
        return None;
    }
    let register = instruction.op_register(operand);
    register
        .is_gpr()
        .then(|| u8::try_from(register.full_register().number()).ok())?
}

fn port(instruction: &Instruction, out: bool, value: u32, number: u32) -> Act {
    Act::Port {
        out,
        len: u8::try_from(instruction.op_register(value).size()).unwrap_or(1),
        port: match instruction.op_kind(number) {
            OpKind::Immediate8 => PortNumber::Fixed(instruction.immediate8()),
            _ => PortNumber::Dx,
        },
        in_rax: true,
    }
}

fn string(out: bool, len: u8) -> Act {
    Act::Port {
        out,
        len,
        port: PortNumber::Dx,
        in_rax: false,
    }
}

impl Act {
    /// The registers that it takes to say what it is as an event.
    pub(super) fn wants(self) -> Wanted {
        const RAX: Which = Which::Gpr(0);
        const RCX: Which = Which::Gpr(1);
        const RDX: Which = Which::Gpr(2);
        let control = |register| match register {
            ControlRegister::Cr0 => Wanted::of(&[Which::Cr0]),
            ControlRegister::Cr3 => Wanted::of(&[Which::Cr3]),
            ControlRegister::Cr4 => Wanted::of(&[Which::Cr4]),
            _ => Wanted::of(&[]),
        };
        let msrs = [Which::Efer, Which::FsBase, Which::GsBase, Which::KernelGsBase];
        match self {
            Self::Write(register, source) => control(register).and(match source {
                Source::Gpr(n) | Source::Lmsw(n) => Wanted::of(&[Which::Gpr(n.into())]),
                Source::EdxEax => Wanted::of(&[RAX, RDX]),
                Source::Without(_) | Source::Unknown => Wanted::of(&[]),
            }),
            Self::Read(register) => control(register),
            Self::WriteMsr => Wanted::of(&msrs).and(Wanted::of(&[RAX, RCX, RDX])),
            Self::ReadMsr => Wanted::of(&msrs).and(Wanted::of(&[RCX])),
            Self::Port { .. } => Wanted::of(&[RAX, RDX]),
            Self::Cpuid => Wanted::of(&[RAX, RCX]),
            Self::Hypercall => Wanted::of(&[RAX]),
            Self::DescriptorTable => Wanted::of(&[Which::Rip, Which::Efer]),
        }
    }

    /// What it is as an event; `None` where it takes registers to say, and there are none.
    pub(super) fn detail(self, rip: u64, registers: Option<&Registers>) -> Option<Detail> {
        Some(match self {
            Self::Write(register, source) => {
                let old = registers.and_then(|r| held(register, r));
                Detail::ControlRegister {
                    register,
                    access: Access::WRITE,
                    old,
                    new: registers.and_then(|r| source.value(old, r)),
                }
            }
            Self::Read(register) => {
                let value = registers.and_then(|r| held(register, r));
                Detail::ControlRegister {
                    register,
                    access: Access::READ,
                    old: value,
                    new: value,
                }
            }
            Self::WriteMsr => {
                let registers = registers?;
                let index = registers.rcx() as u32;
                Detail::Msr {
                    index,
                    access: Access::WRITE,
                    old: msr_held(index, registers),
                    new: Some(edx_eax(registers)),
                }
            }
            Self::ReadMsr => {
                let registers = registers?;
                let index = registers.rcx() as u32;
                let value = msr_held(index, registers);
                Detail::Msr {
                    index,
                    access: Access::READ,
                    old: value,
                    new: value,
                }
            }
            Self::Port {
                out,
                len,
                port,
                in_rax,
            } => Detail::Port {
                port: match port {
                    PortNumber::Fixed(port) => port.into(),
                    PortNumber::Dx => registers?.rdx() as u16,
                },
                access: if out { Access::WRITE } else { Access::READ },
                len,
                value: match registers {
                    Some(r) if out && in_rax => {
                        Some(r.rax() as u32 & (u32::MAX >> (32 - 8 * u32::from(len.clamp(1, 4)))))
                    }
                    _ => None,
                },
            },
            Self::Cpuid => Detail::Cpuid {
                leaf: registers?.rax() as u32,
                subleaf: registers?.rcx() as u32,
            },
            Self::Hypercall => Detail::Hypercall {
                number: registers?.rax(),
            },
            Self::DescriptorTable => Detail::DescriptorTable {
                rip: vmsight_arch::Gva(rip),
            },
        })
    }
}

impl Source {
    fn value(self, old: Option<u64>, registers: &Registers) -> Option<u64> {
        let gpr = |n: u8| registers.gprs.get(usize::from(n)).copied();
        Some(match self {
            Self::Gpr(n) => gpr(n)?,
            Self::Without(bits) => old? & !bits,
            Self::EdxEax => edx_eax(registers),
            Self::Lmsw(n) => {
                let old = old?;
                let kept = old & !CR0_LMSW | old & 1;
                kept | gpr(n)? & CR0_LMSW
            }
            Self::Unknown => return None,
        })
    }
}

fn edx_eax(registers: &Registers) -> u64 {
    registers.rdx() << 32 | registers.rax() & 0xffff_ffff
}

/// What a control register holds, of those that QEMU gives.
fn held(register: ControlRegister, registers: &Registers) -> Option<u64> {
    match register {
        ControlRegister::Cr0 => Some(registers.cr0),
        ControlRegister::Cr3 => Some(registers.cr3),
        ControlRegister::Cr4 => Some(registers.cr4),
        _ => None,
    }
}

/// What an MSR holds, of those that QEMU gives.
fn msr_held(index: u32, registers: &Registers) -> Option<u64> {
    match index {
        msr::EFER => Some(registers.efer),
        msr::FS_BASE => Some(registers.fs.base),
        msr::GS_BASE => Some(registers.gs.base),
        msr::KERNEL_GS_BASE => registers.kernel_gs_base,
        _ => None,
    }
}

/// Whether a hook of this kind is on that.
pub(super) fn is_hooked(kind: &HookKind, detail: &Detail) -> bool {
    match (kind, detail) {
        (
            HookKind::ControlRegister { register, access },
            Detail::ControlRegister {
                register: r,
                access: a,
                ..
            },
        ) => register == r && access.contains(*a),
        (
            HookKind::Msr { index, access },
            Detail::Msr {
                index: i, access: a, ..
            },
        ) => index == i && access.contains(*a),
        (
            HookKind::Port { first, last, access },
            Detail::Port {
                port, access: a, len, ..
            },
        ) => {
            let end = port.saturating_add(u16::from(*len).saturating_sub(1));
            first <= &end && port <= last && access.contains(*a)
        }
        (HookKind::Cpuid, Detail::Cpuid { .. })
        | (HookKind::Hypercall, Detail::Hypercall { .. })
        | (HookKind::DescriptorTable, Detail::DescriptorTable { .. }) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> Registers {
        let mut gprs = [0; 16];
        for (n, gpr) in (0..).zip(&mut gprs) {
            *gpr = 0xaaaa_0000_0000_0000 | n;
        }
        Registers {
            gprs,
            cr0: 0x8005_0033 | CR0_TS,
            cr3: 0x1000,
            cr4: 0x20,
            efer: 0xd01,
            ..Registers::default()
        }
    }

    fn of(bytes: &[u8]) -> Option<Detail> {
        act(bytes).and_then(|act| act.detail(0x5000, Some(&registers())))
    }

    fn write(register: ControlRegister, old: Option<u64>, new: u64) -> Option<Detail> {
        Some(Detail::ControlRegister {
            register,
            access: Access::WRITE,
            old,
            new: Some(new),
        })
    }

    #[test]
    fn writes_of_control_registers_have_their_values() {
        let r = registers();
        // mov cr0, rsi; mov cr3, r9; mov cr4, rax; mov cr8, rcx; mov dr7, rdx; mov dr3, rbx
        assert_eq!(
            of(&[0x0f, 0x22, 0xc6]),
            write(ControlRegister::Cr0, Some(r.cr0), r.gprs[6])
        );
        assert_eq!(
            of(&[0x41, 0x0f, 0x22, 0xd9]),
            write(ControlRegister::Cr3, Some(0x1000), r.gprs[9])
        );
        assert_eq!(
            of(&[0x0f, 0x22, 0xe0]),
            write(ControlRegister::Cr4, Some(0x20), r.gprs[0])
        );
        assert_eq!(
            of(&[0x44, 0x0f, 0x22, 0xc1]),
            write(ControlRegister::Cr8, None, r.gprs[1])
        );
        assert_eq!(
            of(&[0x0f, 0x23, 0xfa]),
            write(ControlRegister::Dr7, None, r.gprs[2])
        );
        assert_eq!(
            of(&[0x0f, 0x23, 0xdb]),
            write(ControlRegister::Dr(3), None, r.gprs[3])
        );
        // clts; xsetbv; lmsw ax, which can set PE and not clear it
        assert_eq!(
            of(&[0x0f, 0x06]),
            write(ControlRegister::Cr0, Some(r.cr0), r.cr0 & !CR0_TS)
        );
        assert_eq!(
            of(&[0x0f, 0x01, 0xd1]),
            write(ControlRegister::Xcr0, None, 2 << 32)
        );
        assert_eq!(
            of(&[0x66, 0x0f, 0x01, 0xf0]),
            write(ControlRegister::Cr0, Some(r.cr0), r.cr0 & !CR0_LMSW | 1)
        );
    }

    #[test]
    fn other_instructions_say_what_they_touch() {
        assert_eq!(act(&[0x0f, 0x30]), Some(Act::WriteMsr));
        assert_eq!(act(&[0x0f, 0x32]), Some(Act::ReadMsr));
        assert_eq!(act(&[0x0f, 0xa2]), Some(Act::Cpuid));
        assert_eq!(act(&[0x0f, 0x01, 0xc1]), Some(Act::Hypercall));
        assert_eq!(act(&[0x0f, 0x01, 0xd9]), Some(Act::Hypercall));
        // lidt [rax]; ltr ax
        assert_eq!(act(&[0x0f, 0x01, 0x18]), Some(Act::DescriptorTable));
        assert_eq!(act(&[0x0f, 0x00, 0xd8]), Some(Act::DescriptorTable));
        // mov rax, cr2 is no register that can be hooked; mov rax, cr3 is read
        assert_eq!(act(&[0x0f, 0x20, 0xd0]), None);
        assert_eq!(act(&[0x0f, 0x20, 0xd8]), Some(Act::Read(ControlRegister::Cr3)));
        // out 0x80, al; in eax, dx; rep outsw
        let port = |out, len, port, in_rax| Act::Port {
            out,
            len,
            port,
            in_rax,
        };
        assert_eq!(
            act(&[0xe6, 0x80]),
            Some(port(true, 1, PortNumber::Fixed(0x80), true))
        );
        assert_eq!(act(&[0xed]), Some(port(false, 4, PortNumber::Dx, true)));
        assert_eq!(
            act(&[0xf3, 0x66, 0x6f]),
            Some(port(true, 2, PortNumber::Dx, false))
        );
        // In 16-bit code: mov eax, cr0, and lgdt [bx]
        assert_eq!(act(&[0x0f, 0x20, 0xc0]), Some(Act::Read(ControlRegister::Cr0)));
        // push rbp; nothing; and what no instruction is
        assert_eq!(act(&[0x55]), None);
        assert_eq!(act(&[]), None);
        assert_eq!(act(&[0xff; LONGEST]), None);
    }

    #[test]
    fn what_takes_registers_is_not_made_up_without() {
        for bytes in [
            &[0x0f, 0x30][..],
            &[0x0f, 0x32],
            &[0x0f, 0xa2],
            &[0x0f, 0x01, 0xc1],
            &[0xed],
        ] {
            assert_eq!(act(bytes).unwrap().detail(0, None), None, "{bytes:x?}");
        }
        let cr3 = act(&[0x0f, 0x22, 0xd8]).unwrap().detail(0, None);
        assert!(matches!(
            cr3,
            Some(Detail::ControlRegister {
                register: ControlRegister::Cr3,
                old: None,
                new: None,
                ..
            })
        ));
    }

    #[test]
    fn every_byte_string_is_an_instruction_or_none() {
        for first in 0..=u8::MAX {
            for second in 0..=u8::MAX {
                for rest in [[0; 4], [0xff; 4], [0x0f, 0x22, 0xd8, 0x90]] {
                    let bytes = [&[first, second][..], &rest].concat();
                    for len in 1..=bytes.len() {
                        let Some(act) = act(&bytes[..len]) else { continue };
                        let detail = act.detail(0, Some(&Registers::default()));
                        assert!(
                            detail.is_some_and(|d| !is_hooked(&HookKind::Step { vcpu: 0, count: 1 }, &d))
                        );
                    }
                }
            }
        }
    }
}
