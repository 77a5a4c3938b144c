//! The switch by which newer kernels dispatch system calls: `x64_sys_call(regs, nr)` and its like (6.9, and stable releases
//! since 5.15 or so with the mitigation of branch history injection).
//!
//! The compiler makes a tree of comparisons of it, for jump tables are forbidden there. It is followed as the processor would,
//! once for each number.

use iced_x86::{
    ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};
use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use crate::{Kernel, LinuxError};

/// Steps that following one number may take: a tree over 500 leaves is some 20 deep.
const MAX_STEPS: usize = 512;

/// How far from a function's begin its call of function tracing stands: behind an ENDBR64 at most.
const HEAD: u64 = 5;

/// The longest switch, in bytes: one of 500 calls has some 12 KiB.
const MAX_CODE: u64 = 64 << 10;

/// The instructions of a switch by their addresses.
#[derive(Debug)]
pub struct Switch {
    start: u64,
    end: u64,
    instructions: FxHashMap<u64, Instruction>,
}

impl Switch {
    /// That of the kernel's function that begins at `at`.
    ///
    /// # Errors
    /// If it cannot be read, or no other function's symbol says where it ends.
    pub fn read(kernel: &Kernel, at: Gva) -> Result<Self, LinuxError> {
        let linked = kernel.image().link_time(at);
        let next = kernel.profile().symbols.after(linked);
        let len = next
            .map(|s| s.address.wrapping_sub(linked))
            .filter(|len| *len < MAX_CODE)
            .ok_or_else(|| LinuxError::NotFound(format!("the function at {at} has no end")))?;
        let mut bytes = vec![0; len as usize];
        let read = kernel.space().read(at, &mut bytes);
        read.map_err(LinuxError::read("a switch of system calls", at))?;
        Ok(Self::new(&bytes, at))
    }

    /// Of the function with these bytes at this address.
    pub fn new(bytes: &[u8], at: Gva) -> Self {
        let instructions = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).into_iter();
        Self {
            start: at.0,
            end: at.0.saturating_add(bytes.len() as u64),
            instructions: instructions.map(|i| (i.ip(), i)).collect(),
        }
    }

    /// Where the call with this number is sent, and the address of the jump. `Err` says why that cannot be told.
    ///
    /// # Errors
    /// What stands in the way, in words: a switch that somebody has changed, or that another compiler made.
    pub fn target(&self, number: u32) -> Result<(Gva, Gva), &'static str> {
        let mut at = self.start;
        // What the last comparison compared.
        let mut compared: Option<(u32, u32)> = None;
        for _ in 0..MAX_STEPS {
            let instruction = self
                .instructions
                .get(&at)
                .ok_or("it leads between instructions")?;
            at = instruction.next_ip();
            match (instruction.mnemonic(), instruction.flow_control()) {
                // The call of function tracing, which has a check of its own, stands at the head.
                (_, FlowControl::Call) if instruction.ip() - self.start < HEAD => {}
                // A handler that never returns is called.
                (_, FlowControl::UnconditionalBranch | FlowControl::Call) => {
                    let to = branch(instruction).ok_or("a jump is indirect")?;
                    if !(self.start..self.end).contains(&to.0) {
                        return Ok((to, Gva(instruction.ip())));
                    }
                    at = to.0;
                }
                (_, FlowControl::ConditionalBranch) => {
                    let (left, right) = compared.ok_or("a jump depends on nothing")?;
                    let taken =
                        holds(instruction.condition_code(), left, right).ok_or("a condition is unknown")?;
                    if taken {
                        let to = branch(instruction).ok_or("a jump is indirect")?;
                        if !(self.start..self.end).contains(&to.0) {
                            return Ok((to, Gva(instruction.ip())));
                        }
                        at = to.0;
                    }
                }
                (Mnemonic::Cmp, _)
                    if instruction.op0_register() == Register::ESI && instruction.op_count() == 2 =>
                {
                    let immediate = instruction
                        .try_immediate(1)
                        .map_err(|_| "it compares with no number")?;
                    compared = Some((number, immediate as u32));
                }
                (Mnemonic::Test, _)
                    if instruction.op0_register() == Register::ESI
                        && instruction.op1_kind() == OpKind::Register
                        && instruction.op1_register() == Register::ESI =>
                {
                    compared = Some((number, 0));
                }
                // XCHG AX,AX is the two-byte NOP.
                (Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Fnop, _) => {}
                (Mnemonic::Xchg, _) if instruction.op0_register() == instruction.op1_register() => {}
                _ => return Err("an instruction does more than a switch's do"),
            }
        }
        Err("it does not end")
    }
}

/// Where a direct call or jump leads.
fn branch(instruction: &Instruction) -> Option<Gva> {
    (instruction.op0_kind() == OpKind::NearBranch64).then(|| Gva(instruction.near_branch_target()))
}

fn holds(condition: ConditionCode, left: u32, right: u32) -> Option<bool> {
    Some(match condition {
        ConditionCode::e => left == right,
        ConditionCode::ne => left != right,
        ConditionCode::a => left > right,
        ConditionCode::ae => left >= right,
        ConditionCode::b => left < right,
        ConditionCode::be => left <= right,
        ConditionCode::g => (left as i32) > right as i32,
        ConditionCode::ge => left as i32 >= right as i32,
        ConditionCode::l => (left as i32) < right as i32,
        ConditionCode::le => left as i32 <= right as i32,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// cmp esi,2; je 0x2000; ja +5 (to the last jump); jmp 0x3000; jmp 0x4000
    fn bytes() -> Vec<u8> {
        let mut code = vec![0x0f, 0x1f, 0x44, 0, 0, 0x83, 0xfe, 2];
        let near = |code: &mut Vec<u8>, opcode: &[u8], to: u32| {
            code.extend_from_slice(opcode);
            let next = 0x1000 + code.len() as u32 + 4;
            code.extend_from_slice(&to.wrapping_sub(next).to_le_bytes());
        };
        near(&mut code, &[0x0f, 0x84], 0x2000);
        code.extend_from_slice(&[0x77, 5]);
        near(&mut code, &[0xe9], 0x3000);
        near(&mut code, &[0xe9], 0x4000);
        code
    }

    #[test]
    fn each_number_goes_its_way() {
        let switch = Switch::new(&bytes(), Gva(0x1000));
        let to = |number| switch.target(number).map(|(to, _)| to);
        assert_eq!(to(2), Ok(Gva(0x2000)));
        assert_eq!(to(1), Ok(Gva(0x3000)));
        assert_eq!(to(3), Ok(Gva(0x4000)));
        assert_eq!(to(u32::MAX), Ok(Gva(0x4000)));
    }

    #[test]
    fn what_is_no_switch_is_said_to_be_none() {
        let mut looping = bytes();
        looping[14] = 0xeb; // jmp to itself
        looping[15] = 0xfe;
        assert_eq!(
            Switch::new(&looping, Gva(0x1000)).target(1),
            Err("it does not end")
        );
        let patched = [0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 0xff, 0xe0];
        assert!(Switch::new(&patched, Gva(0x1000)).target(1).is_err());
        assert!(Switch::new(&[], Gva(0x1000)).target(1).is_err());
    }
}
