//! The code that judges inside: the program of a filter in the processor's own instructions.

use iced_x86::code_asm::*;
use iced_x86::{
    BlockEncoderOptions, Code as Opcode, Decoder, DecoderOptions, IcedError, Instruction as Processors,
    MemoryOperand, Mnemonic, OpKind, Register as Name,
};
use vmsight_hooks::{Arithmetic, Comparison, Condition, Field, Instruction, Program, Register, Scope};

use super::JUMP;
use crate::guest::UPPER_HALF;

/// Bytes below the stack pointer that a program may use without moving it (System V ABI, x86-64).
const RED_ZONE: i32 = 128;
/// The farthest from a pointer that is followed: what lies there is the same structure.
const FARTHEST: u64 = 1 << 16;

/// The instruction that is replaced by a jump: one that can be done elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Displaced {
    /// A NOP, as the kernel has at the begin of each function that can be traced.
    Nothing { len: u64 },
    /// A call of this address.
    Call { to: u64 },
    /// A jump to this address.
    Jump { to: u64 },
}

/// What the code at `at` begins with, where it can be replaced. It must be one instruction at least as long as the jump: then nobody
/// stands in the middle of what is replaced, and nobody jumps there.
pub(crate) fn displaced(bytes: &[u8], at: u64) -> Option<Displaced> {
    let instruction = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode();
    let len = instruction.len();
    if instruction.is_invalid() || len < JUMP {
        return None;
    }
    let near = instruction.op_count() == 1 && instruction.op0_kind() == OpKind::NearBranch64;
    let to = instruction.near_branch_target();
    match instruction.mnemonic() {
        Mnemonic::Nop => Some(Displaced::Nothing { len: len as u64 }),
        Mnemonic::Call if near && len == JUMP => Some(Displaced::Call { to }),
        Mnemonic::Jmp if near && len == JUMP => Some(Displaced::Jump { to }),
        _ => None,
    }
}

/// What is to be assembled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'p> {
    /// The instruction that is hooked.
    pub(crate) at: u64,
    pub(crate) displaced: Displaced,
    pub(crate) scope: Scope,
    /// The filter's condition.
    pub(crate) program: Option<&'p Program>,
    /// Where the number of those that were not wanted is kept.
    pub(crate) counter: u64,
}

/// The code, for one place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Code {
    pub(crate) bytes: Vec<u8>,
    /// Its INT3, by its offset.
    pub(crate) trap: u64,
    /// The replaced instruction, by its offset.
    pub(crate) resume: u64,
}

/// Assembles it for the address `place`.
///
/// # Errors
/// Why the filter cannot be judged inside.
pub(crate) fn assemble(request: &Request<'_>, place: u64) -> Result<Code, String> {
    let kernel = request.at >= UPPER_HALF;
    let broken = |error: IcedError| format!("its code cannot be made: {error}");
    let mut writer = Writer {
        a: CodeAssembler::new(64).map_err(broken)?,
        at: request.at,
        kernel,
        pushed: 0,
        items: 0,
    };
    let made = writer.stub(request);
    let (mut trap, mut resume) = made.map_err(|error| match error {
        Trouble::Filter(why) => why.to_owned(),
        Trouble::Assembler(error) => broken(error),
    })?;
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let done = writer.a.assemble_options(place, options).map_err(broken)?;
    let offset = |label: &mut CodeLabel| {
        let ip = done.label_ip(label).map_err(broken)?;
        Ok::<u64, String>(ip.wrapping_sub(place))
    };
    Ok(Code {
        trap: offset(&mut trap)?,
        resume: offset(&mut resume)?,
        bytes: done.inner.code_buffer,
    })
}

/// Why there is no code.
enum Trouble {
    Filter(&'static str),
    Assembler(IcedError),
}

impl From<IcedError> for Trouble {
    fn from(error: IcedError) -> Self {
        Self::Assembler(error)
    }
}

/// The last value of the program's stack is in RAX, the others are pushed. Below them lie what was in the flags, RCX and RAX.
struct Writer {
    a: CodeAssembler,
    at: u64,
    kernel: bool,
    /// Values on the stack.
    pushed: i32,
    /// Values in all.
    items: usize,
}

impl Writer {
    /// The whole of it: its INT3, and the replaced instruction.
    fn stub(&mut self, request: &Request<'_>) -> Result<(CodeLabel, CodeLabel), Trouble> {
        let [mut out, mut hit, mut trap, mut resume] = [(); 4].map(|()| self.a.create_label());
        let a = &mut self.a;
        // LEA, as flags must stay until they are kept.
        a.lea(rsp, qword_ptr(rsp - RED_ZONE))?;
        a.push(rax)?;
        a.push(rcx)?;
        a.pushfq()?;
        if let Scope::Dtb(dtb) = request.scope {
            if !self.kernel {
                return Err(Trouble::Filter(
                    "a program cannot read CR3: a scope is judged inside of kernel code only",
                ));
            }
            let program = Condition::dtb(dtb).compile();
            let program = program.map_err(|_| Trouble::Filter("its scope cannot be said in a filter"))?;
            self.program(program.instructions())?;
            self.a.test(eax, eax)?;
            // Out of the scope it is not even an occurrence.
            self.a.jz(out)?;
        }
        if let Some(program) = request.program {
            self.program(program.instructions())?;
            self.a.test(eax, eax)?;
            self.a.jnz(hit)?;
            let place = MemoryOperand::with_base_displ(Name::RIP, request.counter.cast_signed());
            let mut count = Processors::with1(Opcode::Inc_rm64, place)?;
            count.set_has_lock_prefix(true);
            self.a.add_instruction(count)?;
        } else {
            self.a.jmp(hit)?;
        }
        self.a.set_label(&mut out)?;
        self.back()?;
        self.a.set_label(&mut resume)?;
        self.displaced(request.displaced)?;
        self.a.set_label(&mut hit)?;
        self.back()?;
        self.a.set_label(&mut trap)?;
        self.a.int3()?;
        // Where the INT3 is out the guest goes on.
        self.a.jmp(resume)?;
        Ok((trap, resume))
    }

    /// All registers as they were.
    fn back(&mut self) -> Result<(), IcedError> {
        self.a.popfq()?;
        self.a.pop(rcx)?;
        self.a.pop(rax)?;
        self.a.lea(rsp, qword_ptr(rsp + RED_ZONE))
    }

    /// Does the replaced instruction, and what follows it.
    fn displaced(&mut self, displaced: Displaced) -> Result<(), IcedError> {
        match displaced {
            Displaced::Nothing { len } => self.a.jmp(self.at.wrapping_add(len)),
            Displaced::Jump { to } => self.a.jmp(to),
            Displaced::Call { to } => {
                // It returns to where it always did: nobody is to be found here when the hook goes.
                let back = self.at.wrapping_add(JUMP as u64);
                self.a.lea(rsp, qword_ptr(rsp - 8))?;
                self.a.mov(dword_ptr(rsp), back as u32)?;
                self.a.mov(dword_ptr(rsp + 4), (back >> 32) as u32)?;
                self.a.jmp(to)
            }
        }
    }

    /// Its truth in EAX.
    fn program(&mut self, instructions: &[Instruction]) -> Result<(), Trouble> {
        (self.pushed, self.items) = (0, 0);
        let mut labels: Vec<CodeLabel> = (0..=instructions.len()).map(|_| self.a.create_label()).collect();
        let mut reached = vec![false; labels.len()];
        let mut at = 0;
        while let Some(rest) = instructions.get(at..).filter(|rest| !rest.is_empty()) {
            if reached.get(at) == Some(&true)
                && let Some(label) = labels.get_mut(at)
            {
                self.a.set_label(label)?;
                // Two labels cannot be at one instruction.
                self.a.nop()?;
            }
            if let Some(taken) = self.chain(rest)? {
                if reached.get(at + 1..at + taken).is_some_and(|r| r.contains(&true)) {
                    return Err(Trouble::Filter("it jumps into the middle of an address"));
                }
                at += taken;
                continue;
            }
            let Some(instruction) = rest.first() else { break };
            if let Instruction::SkipIfFalse(count) | Instruction::SkipIfTrue(count) = instruction {
                let target = at + 1 + usize::from(*count);
                let Some((label, reached)) = labels.get(target).zip(reached.get_mut(target)) else {
                    return Err(Trouble::Filter("it leads out of the program"));
                };
                *reached = true;
                self.a.test(eax, eax)?;
                match instruction {
                    Instruction::SkipIfFalse(_) => self.a.jz(*label)?,
                    _ => self.a.jnz(*label)?,
                }
            } else {
                self.one(instruction)?;
            }
            at += 1;
        }
        if reached.last() == Some(&true)
            && let Some(label) = labels.last_mut()
        {
            self.a.set_label(label)?;
            self.a.nop()?;
        }
        Ok(())
    }

    /// Makes room for one more value.
    fn push(&mut self) -> Result<(), IcedError> {
        if self.items > 0 {
            self.a.push(rax)?;
            self.pushed += 1;
        }
        self.items += 1;
        Ok(())
    }

    /// The last value to RCX, the one before to RAX.
    fn pop(&mut self) -> Result<(), IcedError> {
        self.a.mov(rcx, rax)?;
        self.a.pop(rax)?;
        self.pushed -= 1;
        self.items -= 1;
        Ok(())
    }

    /// What memory is read: a word of the kernel's per-CPU data, and what lies near to where such a word points. That is always there
    /// where the kernel's own GS is: all else might fault, and the kernel knows nothing of us. How many instructions that
    /// took; `None` where it is none of that.
    fn chain(&mut self, rest: &[Instruction]) -> Result<Option<usize>, Trouble> {
        let [
            Instruction::Field(Field::PerCpu),
            Instruction::Constant(variable),
            Instruction::Arithmetic(Arithmetic::Add),
            Instruction::Load(size),
            after @ ..,
        ] = rest
        else {
            return Ok(None);
        };
        if !self.kernel {
            return Err(Trouble::Filter("only the kernel has per-CPU data"));
        }
        self.push()?;
        self.a.mov(rcx, *variable)?;
        self.load(rcx + 0, true, *size)?;
        match after {
            [
                Instruction::Constant(offset),
                Instruction::Arithmetic(Arithmetic::Add),
                Instruction::Load(inner),
                ..,
            ] if *size == 8 && *offset < FARTHEST => {
                self.load(rax + *offset as i32, false, *inner)?;
                Ok(Some(7))
            }
            _ => Ok(Some(4)),
        }
    }

    fn load(&mut self, from: AsmMemoryOperand, per_cpu: bool, size: u8) -> Result<(), Trouble> {
        let at = |place: AsmMemoryOperand| if per_cpu { place.gs() } else { place };
        match size {
            1 => self.a.movzx(eax, at(byte_ptr(from)))?,
            2 => self.a.movzx(eax, at(word_ptr(from)))?,
            4 => self.a.mov(eax, at(dword_ptr(from)))?,
            8 => self.a.mov(rax, at(qword_ptr(from)))?,
            _ => return Err(Trouble::Filter("numbers in memory have 1, 2, 4 or 8 bytes")),
        }
        Ok(())
    }

    fn one(&mut self, instruction: &Instruction) -> Result<(), Trouble> {
        match instruction {
            Instruction::Constant(number) => {
                self.push()?;
                self.a.mov(rax, *number)?;
            }
            Instruction::Field(field) => {
                self.push()?;
                self.field(*field)?;
            }
            Instruction::Arithmetic(what) => {
                self.pop()?;
                self.arithmetic(*what)?;
            }
            Instruction::Compare(how) => {
                self.pop()?;
                self.a.cmp(rax, rcx)?;
                match how {
                    Comparison::Equal => self.a.sete(al)?,
                    Comparison::Different => self.a.setne(al)?,
                    Comparison::Less => self.a.setb(al)?,
                    Comparison::AtMost => self.a.setbe(al)?,
                }
                self.a.movzx(eax, al)?;
            }
            Instruction::OneOf(numbers) => {
                let [mut found, mut end] = [(); 2].map(|()| self.a.create_label());
                for number in numbers {
                    self.a.mov(rcx, *number)?;
                    self.a.cmp(rax, rcx)?;
                    self.a.je(found)?;
                }
                self.a.xor(eax, eax)?;
                self.a.jmp(end)?;
                self.a.set_label(&mut found)?;
                self.a.mov(eax, 1)?;
                self.a.set_label(&mut end)?;
                self.a.nop()?;
            }
            Instruction::Always(truth) => {
                self.push()?;
                self.a.mov(eax, u32::from(*truth))?;
            }
            Instruction::Both => {
                self.pop()?;
                self.a.and(eax, ecx)?;
            }
            Instruction::Either => {
                self.pop()?;
                self.a.or(eax, ecx)?;
            }
            Instruction::Not => self.a.xor(eax, 1)?,
            Instruction::Load(_) | Instruction::Text(..) => {
                return Err(Trouble::Filter(
                    "it reads memory that may not be there: inside, only the kernel's per-CPU data and what they point at is read",
                ));
            }
            Instruction::SkipIfFalse(_) | Instruction::SkipIfTrue(_) => {}
        }
        Ok(())
    }

    fn arithmetic(&mut self, what: Arithmetic) -> Result<(), IcedError> {
        let a = &mut self.a;
        match what {
            Arithmetic::And => a.and(rax, rcx),
            Arithmetic::Or => a.or(rax, rcx),
            Arithmetic::Xor => a.xor(rax, rcx),
            Arithmetic::Add => a.add(rax, rcx),
            Arithmetic::Subtract => a.sub(rax, rcx),
            Arithmetic::ShiftLeft | Arithmetic::ShiftRight => {
                // The processor looks at six bits of the number only.
                let mut fits = a.create_label();
                a.cmp(rcx, 63)?;
                a.jbe(fits)?;
                a.xor(eax, eax)?;
                a.set_label(&mut fits)?;
                match what {
                    Arithmetic::ShiftLeft => a.shl(rax, cl),
                    _ => a.shr(rax, cl),
                }
            }
        }
    }

    /// What the guest had in a register when it came to the instruction.
    fn field(&mut self, field: Field) -> Result<(), Trouble> {
        const GPRS: [AsmRegister64; 16] = [
            rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ];
        let kept = |n: i32| qword_ptr(rsp + 8 * (self.pushed + n));
        let frame = 8 * (self.pushed + 3) + RED_ZONE;
        let a = &mut self.a;
        match field {
            Field::Register(Register::Rflags) => a.mov(rax, kept(0))?,
            Field::Register(Register::Gpr(1)) => a.mov(rax, kept(1))?,
            Field::Register(Register::Gpr(0)) => a.mov(rax, kept(2))?,
            Field::Register(Register::Gpr(4)) => a.lea(rax, qword_ptr(rsp + frame))?,
            Field::Register(Register::Gpr(n)) => match GPRS.get(usize::from(n)) {
                Some(gpr) => a.mov(rax, *gpr)?,
                None => return Err(Trouble::Filter("there is no such register")),
            },
            Field::Register(Register::Rip) => a.mov(rax, self.at)?,
            Field::Cr3 if self.kernel => a.mov(rax, cr3)?,
            Field::Cpl => a.mov(eax, if self.kernel { 0 } else { 3 })?,
            _ => {
                return Err(Trouble::Filter(
                    "inside, only general-purpose registers, RIP, RFLAGS, the privilege level and, in the kernel, CR3 and its per-CPU data can be looked at",
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
