//! What an instruction is, as far as a hook needs to know it.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register,
};
use vmsight_arch::Registers;
use vmsight_hooks::Access;

/// RFLAGS.DF: string instructions go down.
const RFLAGS_DF: u64 = 1 << 10;
/// Longest instruction there is.
pub(super) const MAX_LEN: usize = 15;

/// An access to memory that an instruction made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Accessed {
    /// Where it begins.
    pub(super) address: u64,
    /// Bytes.
    pub(super) len: u64,
    /// How.
    pub(super) access: Access,
}

/// The instruction at the beginning of `code`; `None` where it is none, or not whole.
pub(super) fn decode(code: &[u8], bits: u32, rip: u64) -> Option<Instruction> {
    if !matches!(bits, 16 | 32 | 64) {
        return None;
    }
    let mut decoder = Decoder::with_ip(bits, code, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// PAUSE. TCG steps over it and the instruction behind it at once.
pub(super) const PAUSE: [u8; 2] = [0xf3, 0x90];

/// What it means that a vCPU stepped and is where it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Still {
    /// A string instruction that is repeated: one of its rounds was made.
    Repeats,
    /// A jump to itself: it was executed.
    Jumped,
    /// It was not executed.
    NotExecuted,
}

/// Whether an instruction is a string instruction with a repeat prefix.
fn repeats(instruction: &Instruction) -> bool {
    (instruction.has_rep_prefix() || instruction.has_repne_prefix()) && instruction.is_string_instruction()
}

/// That, for the instruction at the beginning of `code`; `moved` says whether another register than the instruction pointer changed: a
/// CALL or RET that led to itself moves the stack pointer, a LOOP counts.
///
/// A stub tells a stop more often than it stepped: that of another vCPU may come in between. So a branch that did not move has only
/// been executed where it leads to itself.
pub(super) fn still(code: &[u8], bits: u32, rip: u64, moved: bool) -> Still {
    let Some(instruction) = decode(code, bits, rip) else {
        return Still::NotExecuted;
    };
    if repeats(&instruction) {
        return Still::Repeats;
    }
    let is_direct = matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    );
    let to_itself = is_direct && instruction.near_branch_target() == rip;
    match instruction.flow_control() {
        FlowControl::Next => Still::NotExecuted,
        _ if to_itself || moved => Still::Jumped,
        _ => Still::NotExecuted,
    }
}

/// The access by which the instruction that a vCPU has just executed touched `len` bytes from `start` on. `behind`
/// is the code up to where it stands, `ahead` the code from there on: a repeated string instruction is not behind
/// it until its last round.
///
/// Instructions cannot be decoded backwards: every length is tried, and the answer is `None` unless those that
/// decode to such an access agree on where it was. Of two sizes it is the larger: without its prefix an instruction
/// is one of fewer bytes.
pub(super) fn accessed(
    (behind, ahead): (&[u8], &[u8]),
    registers: &Registers,
    bits: u32,
    (start, len): (u64, u64),
    access: Access,
) -> Option<Accessed> {
    let mut found: Option<Accessed> = None;
    let ended = (1..=behind.len().min(MAX_LEN)).filter_map(|length| {
        let code = behind.get(behind.len() - length..)?;
        let rip = registers.rip.wrapping_sub(length as u64);
        decode(code, bits, rip).filter(|instruction| instruction.len() == length)
    });
    let repeats = decode(ahead, bits, registers.rip).filter(repeats);
    for instruction in ended.chain(repeats) {
        match (touched(&instruction, registers, (start, len), access), found) {
            (Some(one), Some(other)) if one.address != other.address => return None,
            (Some(one), Some(other)) if one.len <= other.len => {}
            (Some(one), _) => found = Some(one),
            (None, _) => {}
        }
    }
    found
}

/// What an instruction that was executed accessed of these bytes in this way.
fn touched(
    instruction: &Instruction,
    after: &Registers,
    (start, len): (u64, u64),
    access: Access,
) -> Option<Accessed> {
    let registers = before(instruction, after);
    let mut factory = InstructionInfoFactory::new();
    let all = factory.info(instruction).used_memory();
    all.iter().find_map(|memory| {
        let wanted = match memory.access() {
            OpAccess::Read | OpAccess::CondRead => Access::READ,
            OpAccess::Write | OpAccess::CondWrite => Access::WRITE,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => Access::READ | Access::WRITE,
            _ => return None,
        };
        // One round's, where there are several.
        let size = match memory.memory_size().size() {
            0 => instruction.memory_size().size() as u64,
            size => size as u64,
        };
        let address = memory.virtual_address(0, |register, _, _| value(&registers, register))?;
        let touches = address.wrapping_sub(start) < len || start.wrapping_sub(address) < size;
        (wanted.contains(access) && size > 0 && touches).then_some(Accessed {
            address,
            len: size,
            access,
        })
    })
}

/// The registers that an instruction used for its addresses, of those after it: what pushes, pops and string
/// instructions move is moved back.
fn before(instruction: &Instruction, after: &Registers) -> Registers {
    const RSP: usize = 4;
    const STRING: [usize; 2] = [6, 7]; // RSI, RDI
    let mut registers = *after;
    let mut move_back = |number: usize, by: i64| {
        if let Some(register) = registers.gprs.get_mut(number) {
            *register = register.wrapping_sub(by.cast_unsigned());
        }
    };
    if instruction.is_stack_instruction() {
        move_back(RSP, instruction.stack_pointer_increment().into());
    }
    if instruction.is_string_instruction() {
        let size = i64::try_from(instruction.memory_size().size()).unwrap_or_default();
        let down = after.rflags & RFLAGS_DF != 0;
        for number in STRING {
            move_back(number, if down { -size } else { size });
        }
    }
    registers
}

/// Whether an instruction that ends where `code` ends is a call.
pub(super) fn ends_with_call(code: &[u8], bits: u32) -> bool {
    (1..=code.len().min(MAX_LEN)).any(|length| {
        let tail = code.get(code.len() - length..).unwrap_or_default();
        decode(tail, bits, 0).is_some_and(|instruction| {
            let calls = matches!(
                instruction.flow_control(),
                FlowControl::Call | FlowControl::IndirectCall
            );
            calls && instruction.len() == length
        })
    })
}

/// The value of a register of an address, or the base of a segment register.
fn value(registers: &Registers, register: Register) -> Option<u64> {
    match register {
        Register::FS => return Some(registers.fs.base),
        Register::GS => return Some(registers.gs.base),
        // Flat in every 64-bit code, and in what runs under the systems of our time else.
        Register::ES | Register::CS | Register::SS | Register::DS => return Some(0),
        Register::RIP => return Some(registers.rip),
        _ => {}
    }
    let full = register.full_register();
    if !full.is_gpr64() {
        return None;
    }
    let value = *registers.gprs.get(full.number())?;
    match register.size() {
        8 => Some(value),
        4 => Some(value & 0xffff_ffff),
        2 => Some(value & 0xffff),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_step_did_not_move() {
        let unmoved = |code: &[u8]| still(code, 64, 0x1000, false);
        assert_eq!(unmoved(&[0xf3, 0xa4]), Still::Repeats, "rep movsb");
        assert_eq!(unmoved(&[0xeb, 0xfe]), Still::Jumped, "jmp to itself");
        assert_eq!(unmoved(&[0x90]), Still::NotExecuted);
        assert_eq!(unmoved(&[0xf3, 0x90]), Still::NotExecuted, "pause");
        assert_eq!(unmoved(&[0x06]), Still::NotExecuted, "no instruction");
        assert_eq!(unmoved(&[]), Still::NotExecuted);
        // Branches that lead elsewhere, and did not move.
        for code in [
            &[0xe8, 0x10, 0, 0, 0][..],
            &[0xeb, 0x10],
            &[0x74, 0x10],
            &[0xc3],
            &[0xff, 0xe0],
        ] {
            assert_eq!(unmoved(code), Still::NotExecuted, "{code:x?}");
        }
        // A call and a return that led to themselves; what else moves did not do it by this instruction.
        for code in [&[0xe8, 0xfb, 0xff, 0xff, 0xff][..], &[0xc3]] {
            assert_eq!(still(code, 64, 0x1000, true), Still::Jumped, "{code:x?}");
        }
        assert_eq!(still(&[0x90], 64, 0x1000, true), Still::NotExecuted);
    }

    #[test]
    fn the_access_behind_us() {
        let mut registers = Registers {
            rip: 0x1004,
            ..Registers::default()
        };
        registers.gprs[3] = 0x5000; // rbx
        let writes = |behind: &[u8], ahead: &[u8], registers: &Registers, start, len| {
            let found = accessed((behind, ahead), registers, 64, (start, len), Access::WRITE);
            found.map(|a| (a.address, a.len))
        };
        // mov [rbx+8], rax
        let code = [0x90, 0x90, 0x48, 0x89, 0x43, 0x08];
        assert_eq!(writes(&code, &[], &registers, 0x5000, 0x40), Some((0x5008, 8)));
        assert_eq!(writes(&code, &[], &registers, 0x6000, 0x40), None, "elsewhere");
        assert_eq!(writes(&[], &[], &registers, 0, u64::MAX), None);
        let reads = accessed((&code, &[]), &registers, 64, (0x5000, 0x40), Access::READ);
        assert_eq!(reads, None);
        // inc dword [rbx]: both.
        assert_eq!(
            writes(&[0xff, 0x03], &[], &registers, 0x5000, 8),
            Some((0x5000, 4))
        );
        let reads = accessed((&[0xff, 0x03], &[]), &registers, 64, (0x5000, 8), Access::READ).unwrap();
        assert_eq!(
            (reads.address, reads.len, reads.access),
            (0x5000, 4, Access::READ)
        );
        // push rax and stosd, whose registers have moved meanwhile.
        registers.gprs[4] = 0x7000;
        assert_eq!(writes(&[0x50], &[], &registers, 0x7000, 8), Some((0x7000, 8)));
        registers.gprs[7] = 0x7004;
        assert_eq!(writes(&[0xab], &[], &registers, 0x7000, 4), Some((0x7000, 4)));
        // rep stosd, done and in its midst.
        assert_eq!(
            writes(&[0xf3, 0xab], &[], &registers, 0x7000, 4),
            Some((0x7000, 4))
        );
        assert_eq!(
            writes(&[0x90], &[0xf3, 0xab], &registers, 0x7000, 4),
            Some((0x7000, 4))
        );
        assert_eq!(
            writes(&[0x90], &[0xab], &registers, 0x7000, 4),
            None,
            "it comes yet"
        );
        assert!(ends_with_call(&[0x90, 0xff, 0xd0], 64), "call rax");
        assert!(!ends_with_call(&[0x90, 0x90], 64));
    }
}
