//! Instructions under a breakpoint: how long they are, and which are simple enough to be done here.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use vmsight_arch::Registers;

/// Most bytes of an instruction.
pub(crate) const LONGEST: usize = 15;

/// What an instruction does, as far as it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    /// Nothing: NOP of any length, ENDBR64.
    Nothing,
    /// PUSH of the general-purpose register with this number, in 64-bit mode.
    Push(usize),
    /// It stores RFLAGS on the stack.
    StoresFlags,
    /// SYSCALL: RFLAGS go to R11.
    Syscall,
    /// Anything else.
    Other,
}

/// An instruction's length and effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Decoded {
    pub(crate) len: u64,
    pub(crate) effect: Effect,
}

/// Bits of the code segment's mode: CS.L and CS.D (SDM vol. 3A 3.4.5).
fn bitness(registers: &Registers) -> u32 {
    const LONG: u16 = 1 << 13;
    const DEFAULT: u16 = 1 << 14;
    match registers.cs.attributes {
        a if a & LONG != 0 => 64,
        a if a & DEFAULT != 0 => 32,
        _ => 16,
    }
}

/// Decodes what `bytes` begins with; `None` where that is no instruction.
pub(crate) fn decode(bytes: &[u8], registers: &Registers) -> Option<Decoded> {
    let bits = bitness(registers);
    let mut decoder = Decoder::with_ip(bits, bytes, registers.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    Some(Decoded {
        len: instruction.len() as u64,
        effect: effect(&instruction, bits),
    })
}

fn effect(instruction: &Instruction, bits: u32) -> Effect {
    match instruction.mnemonic() {
        Mnemonic::Nop | Mnemonic::Endbr64 => Effect::Nothing,
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => Effect::StoresFlags,
        Mnemonic::Syscall => Effect::Syscall,
        Mnemonic::Push if bits == 64 && instruction.op0_kind() == OpKind::Register => {
            let register = instruction.op0_register();
            let number = (register as usize).checked_sub(Register::RAX as usize);
            match number {
                Some(n) if register.is_gpr64() && n < 16 => Effect::Push(n),
                _ => Effect::Other,
            }
        }
        _ => Effect::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsight_arch::Segment;

    fn long() -> Registers {
        Registers {
            cs: Segment {
                attributes: 0xa09b,
                ..Segment::default()
            },
            ..Registers::default()
        }
    }

    fn decoded(bytes: &[u8]) -> (u64, Effect) {
        let d = decode(bytes, &long()).unwrap();
        (d.len, d.effect)
    }

    #[test]
    fn what_functions_begin_with() {
        assert_eq!(decoded(&[0x0f, 0x1f, 0x44, 0, 0, 0x55]), (5, Effect::Nothing));
        assert_eq!(decoded(&[0xf3, 0x0f, 0x1e, 0xfa, 0x55]), (4, Effect::Nothing));
        assert_eq!(decoded(&[0x66, 0x90]), (2, Effect::Nothing));
        assert_eq!(decoded(&[0x55]), (1, Effect::Push(5)));
        assert_eq!(decoded(&[0x41, 0x57]), (2, Effect::Push(15)));
        assert_eq!(decoded(&[0x48, 0x89, 0xe5]), (3, Effect::Other));
        assert_eq!(decoded(&[0x9c]), (1, Effect::StoresFlags));
        assert_eq!(decoded(&[0x0f, 0x05]), (2, Effect::Syscall));
        // XCHG R8, RAX looks like a NOP with a prefix and is none.
        assert_eq!(decoded(&[0x49, 0x90]), (2, Effect::Other));
        // PAUSE is a hint to the hypervisor too.
        assert_eq!(decoded(&[0xf3, 0x90]), (2, Effect::Other));
        // PUSH of 16 bits, of a segment, of memory.
        assert_eq!(decoded(&[0x66, 0x55]).1, Effect::Other);
        assert_eq!(decoded(&[0x0f, 0xa0]).1, Effect::Other);
        assert_eq!(decoded(&[0xff, 0x30]).1, Effect::Other);
        assert_eq!(decode(&[0x48], &long()), None, "cut short");
        assert_eq!(
            decode(&[0x06], &long()),
            None,
            "no such instruction in 64-bit mode"
        );
    }

    #[test]
    fn other_modes_have_other_lengths() {
        let mut registers = long();
        registers.cs.attributes = 0x9b;
        // MOV AX, imm16 here, MOV EAX, imm32 there.
        let bytes = [0xb8, 1, 2, 3, 4];
        assert_eq!(decode(&bytes, &registers).unwrap().len, 3);
        registers.cs.attributes = 0xc09b;
        assert_eq!(decode(&bytes, &registers).unwrap().len, 5);
        assert_eq!(decode(&[0x55], &registers).unwrap().effect, Effect::Other);
    }
}
