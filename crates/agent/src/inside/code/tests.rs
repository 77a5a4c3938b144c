//! The code is run by this very processor, next to the program that it was made of.

use vmsight_arch::{Dtb, Gva, Registers};
use vmsight_hooks::{Condition, Detail, Moment, Truth, Value};
use vmsight_lab::chance::Dice;

use super::super::jump;
use super::*;
use crate::nothing::Nothing;

const SIZE: usize = 0x1_0000;
/// What is called, where the jump is, and where the call goes that it may stand for.
const HARNESS: usize = 0;
const SITE: usize = 0x1000;
const BEHIND: usize = 0x1800;
const CODE: usize = 0x2000;
/// Registers before and after, RFLAGS in the place of RSP; the counter; and whether somebody came to [`BEHIND`].
const BEFORE: usize = 0x8000;
const AFTER: usize = 0x8100;
const STACK: usize = 0x8200;
const COUNTER: usize = 0x8300;
const CALLED: usize = 0x8308;

/// Memory that can be executed.
struct Arena(*mut u8);

impl Arena {
    fn new() -> Self {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, protection, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let arena = Self(at.cast());
        arena.put(HARNESS, &arena.harness());
        arena
    }

    fn at(&self, offset: usize) -> u64 {
        self.0.addr() as u64 + offset as u64
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= SIZE);
        // SAFETY: within the mapping, and nobody runs there.
        unsafe {
            self.0
                .add(at)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
    }

    fn word(&self, at: usize) -> u64 {
        assert!(at + 8 <= SIZE);
        // SAFETY: within the mapping.
        u64::from_ne_bytes(unsafe { self.0.add(at).cast::<[u8; 8]>().read_volatile() })
    }

    /// Loads all registers, calls the site, and keeps what they are then.
    fn harness(&self) -> Vec<u8> {
        const GPRS: [AsmRegister64; 15] = [
            rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ];
        let kept = [rbx, rbp, r12, r13, r14, r15];
        let mut a = CodeAssembler::new(64).unwrap();
        for register in kept {
            a.push(register).unwrap();
        }
        let word = |offset: usize| MemoryOperand::with_base_displ(Name::RIP, self.at(offset).cast_signed());
        let load = |a: &mut CodeAssembler, register: AsmRegister64, from: usize| {
            let load = Processors::with2(Opcode::Mov_r64_rm64, Name::from(register), word(from)).unwrap();
            a.add_instruction(load).unwrap();
        };
        let store = |a: &mut CodeAssembler, to: usize, register: AsmRegister64| {
            let store = Processors::with2(Opcode::Mov_rm64_r64, word(to), Name::from(register)).unwrap();
            a.add_instruction(store).unwrap();
        };
        load(&mut a, rax, BEFORE + 8 * 15);
        a.push(rax).unwrap();
        // What the stack pointer is at the site.
        a.mov(rax, rsp).unwrap();
        store(&mut a, STACK, rax);
        for (n, register) in GPRS.into_iter().enumerate() {
            load(&mut a, register, BEFORE + 8 * n);
        }
        a.popfq().unwrap();
        a.call(self.at(SITE)).unwrap();
        store(&mut a, AFTER, rax);
        a.pushfq().unwrap();
        a.pop(rax).unwrap();
        store(&mut a, AFTER + 8 * 15, rax);
        for (n, register) in GPRS.into_iter().enumerate().skip(1) {
            store(&mut a, AFTER + 8 * n, register);
        }
        for register in kept.into_iter().rev() {
            a.pop(register).unwrap();
        }
        a.ret().unwrap();
        a.assemble(self.at(HARNESS)).unwrap()
    }

    /// Runs what a jump at the site leads to, with these registers, in the order of the harness, flags last. Whether the filter
    /// wanted it.
    fn run(&self, request: &Request<'_>, before: &[u64; 16]) -> bool {
        let mut code = assemble(request, self.at(CODE)).unwrap();
        // As long as the hook is not armed.
        assert_eq!(code.bytes[code.trap as usize], 0xcc);
        code.bytes[code.trap as usize] = 0x90;
        self.put(CODE, &code.bytes);
        self.put(SITE, &jump(self.at(SITE), self.at(CODE)).unwrap());
        self.put(SITE + JUMP, &[0xc3]);
        for (n, value) in before.iter().enumerate() {
            self.put(BEFORE + 8 * n, &value.to_le_bytes());
        }
        self.put(COUNTER, &[0; 16]);
        // SAFETY: the harness, which keeps to the convention of a function without arguments.
        unsafe {
            let harness: extern "C" fn() = std::mem::transmute(self.0.add(HARNESS));
            harness();
        }
        for (n, value) in before.iter().enumerate() {
            assert_eq!(self.word(AFTER + 8 * n), *value, "register {n} after {request:?}");
        }
        match self.word(COUNTER) {
            0 => true,
            1 => false,
            n => panic!("counted {n} times"),
        }
    }

    fn request<'p>(&self, program: Option<&'p Program>, displaced: Displaced) -> Request<'p> {
        Request {
            at: self.at(SITE),
            displaced,
            scope: Scope::All,
            program,
            counter: self.at(COUNTER),
        }
    }

    /// The registers as a program sees them.
    fn seen(&self, before: &[u64; 16]) -> Registers {
        let mut registers = Registers {
            rip: self.at(SITE),
            rflags: before[15],
            ..Registers::default()
        };
        let numbers = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        for (n, value) in numbers.into_iter().zip(before) {
            registers.gprs[n] = *value;
        }
        // The pushed flags are gone again, and the return address is there.
        registers.gprs[4] = self.word(STACK);
        registers.cs.selector = 3;
        registers.ss.selector = 3;
        registers
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: what `new` has mapped.
        unsafe { libc::munmap(self.0.cast(), SIZE) };
    }
}

/// What programs are made of at random.
trait Parts {
    fn number(&mut self) -> u64;
    fn value(&mut self, depth: u64) -> Value;
    fn condition(&mut self, depth: u64) -> Condition;
}

impl Parts for Dice {
    fn number(&mut self) -> u64 {
        match self.roll(4) {
            0 => self.roll(4),
            1 => self.roll(1 << 40) << 24,
            2 => u64::MAX - self.roll(3),
            _ => self.roll(128),
        }
    }

    fn value(&mut self, depth: u64) -> Value {
        if depth == 0 || self.roll(3) == 0 {
            return match self.roll(6) {
                0 => self.number().into(),
                1 => Register::Rip.into(),
                2 => Register::Rflags.into(),
                3 => Field::Cpl.into(),
                _ => Register::Gpr(self.roll(16) as u8).into(),
            };
        }
        let (first, second) = (self.value(depth - 1), self.value(depth - 1));
        let what = [
            Arithmetic::And,
            Arithmetic::Or,
            Arithmetic::Xor,
            Arithmetic::Add,
            Arithmetic::Subtract,
            Arithmetic::ShiftLeft,
            Arithmetic::ShiftRight,
        ];
        Value::Combined(Box::new(first), what[self.roll(7) as usize], Box::new(second))
    }

    fn condition(&mut self, depth: u64) -> Condition {
        if depth == 0 || self.roll(3) == 0 {
            let first = self.value(2);
            return match self.roll(5) {
                0 => first.is(self.value(1)),
                1 => first.is_not(self.value(1)),
                2 => first.is_below(self.value(1)),
                3 => first.is_at_most(self.value(1)),
                _ => {
                    let few = self.roll(4);
                    first.is_one_of((0..few).map(|_| self.number()))
                }
            };
        }
        let count = self.roll(4);
        let few = (0..count).map(|_| self.condition(depth - 1)).collect();
        match self.roll(3) {
            0 => Condition::All(few),
            1 => Condition::Any(few),
            _ => !Condition::Any(few),
        }
    }
}

/// All arithmetic flags, DF and AC left out: the harness calls no one while they are set.
const FLAGS: u64 = 0x8d5;

#[test]
fn it_judges_as_the_program_does_and_leaves_no_trace() {
    let arena = Arena::new();
    let detail = Detail::Execute {
        rip: Gva(arena.at(SITE)),
    };
    let mut dice = Dice::new(0x9e37_79b9_7f4a_7c15);
    let mut wanted = 0;
    let mut judged = 0;
    while judged < 3000 {
        let Ok(program) = dice.condition(3).compile() else {
            continue;
        };
        let mut before = [0; 16].map(|_: u64| dice.number());
        // The interrupt flag and the bit that is always set, too.
        before[15] = dice.number() & FLAGS | 0x202;
        let got = arena.run(
            &arena.request(Some(&program), Displaced::Nothing { len: 5 }),
            &before,
        );
        let registers = arena.seen(&before);
        let moment = Moment {
            registers: &registers,
            detail: &detail,
        };
        assert_eq!(
            program.truth(moment, &Nothing),
            Truth::from(got),
            "{program:?} with {before:x?}"
        );
        wanted += u64::from(got);
        judged += 1;
    }
    assert!(wanted > 300 && wanted < 2700, "{wanted}");
}

#[test]
fn what_was_replaced_is_done() {
    let arena = Arena::new();
    let mut before = [7; 16];
    before[15] = 0x246;
    // What is called notes that it was, without a register, and returns.
    let mut a = CodeAssembler::new(64).unwrap();
    let called = MemoryOperand::with_base_displ(Name::RIP, arena.at(CALLED).cast_signed());
    a.pushfq().unwrap();
    a.add_instruction(Processors::with1(Opcode::Inc_rm64, called).unwrap())
        .unwrap();
    a.popfq().unwrap();
    a.ret().unwrap();
    arena.put(BEHIND, &a.assemble(arena.at(BEHIND)).unwrap());
    let to = arena.at(BEHIND);
    for (displaced, calls) in [
        (Displaced::Nothing { len: 5 }, 0),
        (Displaced::Call { to }, 1),
        (Displaced::Jump { to }, 1),
    ] {
        for wanted in [true, false] {
            let condition = Value::register(Register::Gpr(3)).is(if wanted { 7 } else { 8 });
            let program = condition.compile().unwrap();
            assert_eq!(
                arena.run(&arena.request(Some(&program), displaced), &before),
                wanted
            );
            assert_eq!(arena.word(CALLED), calls, "{displaced:?}");
        }
    }
}

#[test]
fn only_what_can_be_done_elsewhere_is_replaced() {
    let at = 0xffff_ffff_8100_0000;
    let of = |bytes: &[u8]| displaced(bytes, at);
    assert_eq!(of(&[0x0f, 0x1f, 0x44, 0, 0]), Some(Displaced::Nothing { len: 5 }));
    let long = [0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
    assert_eq!(of(&long), Some(Displaced::Nothing { len: 9 }));
    assert_eq!(
        of(&[0xe8, 0xfb, 0xff, 0xff, 0xff]),
        Some(Displaced::Call { to: at })
    );
    assert_eq!(
        of(&[0xe9, 0, 0x10, 0, 0]),
        Some(Displaced::Jump { to: at + 0x1005 })
    );
    // ENDBR64; PUSH RBP; MOV EAX, 1; a conditional jump; CALL [RIP]; what ends too early.
    for bytes in [
        &[0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0][..],
        &[0x55, 0x48, 0x89, 0xe5, 0x53],
        &[0xb8, 1, 0, 0, 0],
        &[0x0f, 0x84, 0, 0, 0, 0],
        &[0xff, 0x15, 0, 0, 0, 0],
        &[0x0f, 0x1f, 0x44, 0],
        &[],
    ] {
        assert_eq!(of(bytes), None, "{bytes:x?}");
    }
}

#[test]
fn the_kernels_own_are_followed_and_no_others() {
    let current = || Value::from(Field::PerCpu).plus(0x1_fbc0).load(8);
    let make = |at, condition: Condition| {
        let program = condition.compile().unwrap();
        let request = Request {
            at,
            displaced: Displaced::Nothing { len: 5 },
            scope: Scope::Dtb(Dtb(0x1000)),
            program: Some(&program),
            counter: at & !0xfff,
        };
        assemble(&request, at & !0xfff | 0x2000)
    };
    let kernel = 0xffff_ffff_8100_0000;
    let pid = current().plus(0x9a4).load(4);
    let code = make(kernel, pid.clone().is(42)).unwrap();
    // MOV RAX, GS:[RCX]; MOV EAX, [RAX+9A4h].
    let chain = [0x65, 0x48, 0x8b, 0x01, 0x8b, 0x80, 0xa4, 0x09, 0, 0];
    assert!(
        code.bytes.windows(chain.len()).any(|w| w == chain),
        "{:x?}",
        code.bytes
    );
    assert!(code.bytes.len() < 200);
    for condition in [
        pid.load(8).is(0),
        current().plus(1 << 20).load(8).is(0),
        Value::register(Register::RDI).load(8).is(0),
        Value::from(Field::GsBase).load(8).is(0),
        Value::register(Register::RDI).begins_with("/etc"),
        Value::from(Field::Vcpu).is(0),
    ] {
        assert!(make(kernel, condition.clone()).is_err(), "{condition:?}");
    }
    assert!(make(0x40_0000, current().is(0)).is_err(), "of a program");
}
