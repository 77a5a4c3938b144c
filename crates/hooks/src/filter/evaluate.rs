//! Running a program on what happened: in the VMM, or in the monitor where a backend cannot do it there. It is the
//! same code.

use vmsight_arch::paging::{PagingMode, TableMemory, resolve};
use vmsight_arch::{Gpa, Gva, Registers};

use super::expression::{Arithmetic, Comparison, Field, TextMatch};
use super::program::{Instruction, MOST_VALUES, Program};
use crate::event::Detail;
use crate::hook::ControlRegister;
use crate::verdict::Register;

/// The bit in which the roots of a process differ with page-table isolation (Linux, arch/x86/entry/calling.h).
const USER_ROOT: u64 = 1 << 12;
const PAGE: u64 = 4096;
/// A text of 255 bytes and its zero.
const LONGEST: usize = 256;
/// As many values as most programs have at a time.
const FEW: usize = 3;

/// Guest memory, as it is at the moment of the event.
pub trait FilterMemory: TableMemory {
    /// Reads physical memory that lies on one page; whether all of it is there. Aligned numbers should be read in
    /// one piece.
    fn read_physical(&self, gpa: Gpa, out: &mut [u8]) -> bool;

    /// Reads virtual memory of the vCPU of the event, and returns how many bytes came before the first that is not
    /// there. With page-table isolation a vCPU in user mode has little of the kernel's half mapped: that is read by
    /// the kernel's own root.
    fn read_virtual(&self, registers: &Registers, gva: Gva, out: &mut [u8]) -> usize {
        self.walk(registers, gva, out)
    }

    /// The same by the page tables in this memory, whatever [`Self::read_virtual`] does.
    fn walk(&self, registers: &Registers, gva: Gva, out: &mut [u8]) -> usize {
        walk_and_read(registers, self, gva.0, out)
    }

    /// KERNEL_GS_BASE of the vCPU of the event, where the registers do not have it.
    fn kernel_gs_base(&self) -> Option<u64> {
        None
    }
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub struct Moment<'m> {
    /// The vCPU's registers.
    pub registers: &'m Registers,
    /// The event.
    pub detail: &'m Detail,
}

/// An answer to a condition.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Truth {
    /// It does not hold.
    False,
    /// It depends on what is not there.
    Unknown,
    /// It holds.
    True,
}

impl From<bool> for Truth {
    fn from(truth: bool) -> Self {
        if truth { Self::True } else { Self::False }
    }
}

impl std::ops::Not for Truth {
    type Output = Self;

    fn not(self) -> Self {
        match self {
            Self::False => Self::True,
            Self::Unknown => Self::Unknown,
            Self::True => Self::False,
        }
    }
}

/// A number that may be unknown, or a truth.
#[derive(Clone, Copy)]
enum Item {
    Number(Option<u64>),
    Truth(Truth),
}

impl Item {
    const NOTHING: Self = Self::Number(None);

    fn number(self) -> Option<u64> {
        match self {
            Self::Number(number) => number,
            Self::Truth(_) => None,
        }
    }

    fn truth(self) -> Truth {
        match self {
            Self::Truth(truth) => truth,
            Self::Number(_) => Truth::Unknown,
        }
    }
}

/// What a program has at a time: as much as was verified that it needs.
struct Items<const MOST: usize> {
    items: [Item; MOST],
    len: usize,
}

impl<const MOST: usize> Items<MOST> {
    const fn new() -> Self {
        Self {
            items: [Item::NOTHING; MOST],
            len: 0,
        }
    }

    fn push(&mut self, item: Item) {
        if let Some(place) = self.items.get_mut(self.len) {
            *place = item;
            self.len += 1;
        }
    }

    fn pop(&mut self) -> Item {
        let last = self.last();
        self.len = self.len.saturating_sub(1);
        last
    }

    fn last(&self) -> Item {
        let last = self.len.checked_sub(1).and_then(|last| self.items.get(last));
        last.copied().unwrap_or(Item::NOTHING)
    }
}

impl Program {
    /// Whether a condition holds. Of a program of a value it is unknown.
    pub fn truth(&self, moment: Moment<'_>, memory: &impl FilterMemory) -> Truth {
        self.run(moment, memory).truth()
    }

    /// What a value is. Of a program of a condition it is `None`.
    pub fn number(&self, moment: Moment<'_>, memory: &impl FilterMemory) -> Option<u64> {
        self.run(moment, memory).number()
    }

    /// To make room for more values than a program has costs more than to run most of them.
    fn run(&self, moment: Moment<'_>, memory: &impl FilterMemory) -> Item {
        match self.most_values() {
            0..=FEW => run::<FEW>(self.instructions(), moment, memory),
            _ => run::<MOST_VALUES>(self.instructions(), moment, memory),
        }
    }
}

fn run<const MOST: usize>(
    instructions: &[Instruction],
    moment: Moment<'_>,
    memory: &impl FilterMemory,
) -> Item {
    let mut items = Items::<MOST>::new();
    let mut at = 0;
    // Forward only: at most as many rounds as there are instructions.
    while let Some(instruction) = instructions.get(at) {
        at += 1;
        // What is verified has what it takes.
        let mut take = || items.pop();
        let gives = match instruction {
            Instruction::Constant(number) => Item::Number(Some(*number)),
            Instruction::Field(field) => Item::Number(read_field(*field, moment, memory)),
            Instruction::Load(size) => Item::Number(
                take()
                    .number()
                    .and_then(|gva| load(moment.registers, memory, gva, *size)),
            ),
            Instruction::Arithmetic(what) => {
                let (second, first) = (take().number(), take().number());
                let both = first.zip(second);
                Item::Number(both.map(|(a, b)| arithmetic(*what, a, b)))
            }
            Instruction::Compare(how) => {
                let (second, first) = (take().number(), take().number());
                let both = first.zip(second);
                Item::Truth(both.map_or(Truth::Unknown, |(a, b)| compare(*how, a, b).into()))
            }
            Instruction::OneOf(numbers) => Item::Truth(match take().number() {
                Some(number) => numbers.binary_search(&number).is_ok().into(),
                None => Truth::Unknown,
            }),
            Instruction::Text(how, text) => Item::Truth(match take().number() {
                Some(gva) => same_text(moment.registers, memory, gva, *how, text),
                None => Truth::Unknown,
            }),
            Instruction::Always(truth) => Item::Truth((*truth).into()),
            Instruction::Both => {
                let (second, first) = (take().truth(), take().truth());
                Item::Truth(first.min(second))
            }
            Instruction::Either => {
                let (second, first) = (take().truth(), take().truth());
                Item::Truth(first.max(second))
            }
            Instruction::Not => Item::Truth(!take().truth()),
            Instruction::SkipIfFalse(count) | Instruction::SkipIfTrue(count) => {
                let decides = match instruction {
                    Instruction::SkipIfTrue(_) => Truth::True,
                    _ => Truth::False,
                };
                if items.last().truth() == decides {
                    at += usize::from(*count);
                }
                continue;
            }
        };
        items.push(gives);
    }
    items.pop()
}

fn arithmetic(what: Arithmetic, a: u64, b: u64) -> u64 {
    let shift = u32::try_from(b).unwrap_or(u32::MAX);
    match what {
        Arithmetic::And => a & b,
        Arithmetic::Or => a | b,
        Arithmetic::Xor => a ^ b,
        Arithmetic::Add => a.wrapping_add(b),
        Arithmetic::Subtract => a.wrapping_sub(b),
        Arithmetic::ShiftLeft => a.checked_shl(shift).unwrap_or(0),
        Arithmetic::ShiftRight => a.checked_shr(shift).unwrap_or(0),
    }
}

fn compare(how: Comparison, a: u64, b: u64) -> bool {
    match how {
        Comparison::Equal => a == b,
        Comparison::Different => a != b,
        Comparison::Less => a < b,
        Comparison::AtMost => a <= b,
    }
}

fn read_field(field: Field, moment: Moment<'_>, memory: &impl FilterMemory) -> Option<u64> {
    let r = moment.registers;
    Some(match field {
        Field::Register(Register::Gpr(n)) => *r.gprs.get(usize::from(n))?,
        Field::Register(Register::Rip) => r.rip,
        Field::Register(Register::Rflags) => r.rflags,
        Field::Cr0 => r.cr0,
        Field::Cr2 => r.cr2,
        Field::Cr3 => r.cr3,
        Field::Cr4 => r.cr4,
        Field::Efer => r.efer,
        Field::Cpl => r.cpl().into(),
        Field::FsBase => r.fs.base,
        Field::GsBase => r.gs.base,
        Field::PerCpu => match r.cpl() {
            3 => r.kernel_gs_base.or_else(|| memory.kernel_gs_base())?,
            _ => r.gs.base,
        },
        Field::Vcpu => r.vcpu.into(),
        of_event => of_detail(of_event, moment.detail)?,
    })
}

fn of_detail(field: Field, detail: &Detail) -> Option<u64> {
    match (field, *detail) {
        (
            Field::Old,
            Detail::Memory { old, .. } | Detail::ControlRegister { old, .. } | Detail::Msr { old, .. },
        ) => old,
        (
            Field::New,
            Detail::Memory { new, .. } | Detail::ControlRegister { new, .. } | Detail::Msr { new, .. },
        ) => new,
        (Field::New, Detail::Port { value, .. }) => value.map(u64::from),
        (Field::Gva, Detail::Memory { gva, .. }) => gva.map(|a| a.0),
        (Field::Gpa, Detail::Memory { gpa, .. }) => gpa.map(|a| a.0),
        (Field::Length, Detail::Memory { len, .. } | Detail::Port { len, .. }) => Some(len.into()),
        (Field::Index, Detail::Msr { index, .. }) => Some(index.into()),
        (Field::Index, Detail::Port { port, .. }) => Some(port.into()),
        (Field::Index, Detail::Interrupt { vector, .. }) => Some(vector.into()),
        (Field::Index, Detail::ControlRegister { register, .. }) => match register {
            ControlRegister::Cr0 => Some(0),
            ControlRegister::Cr3 => Some(3),
            ControlRegister::Cr4 => Some(4),
            ControlRegister::Cr8 => Some(8),
            _ => None,
        },
        (Field::ErrorCode, Detail::Interrupt { error_code, .. }) => error_code.map(u64::from),
        _ => None,
    }
}

fn translate(registers: &Registers, memory: &(impl FilterMemory + ?Sized), gva: u64) -> Option<u64> {
    let Some(mode) = PagingMode::from_registers(registers) else {
        return Some(gva);
    };
    let by = |cr3| resolve(mode, &memory, mode.dtb(cr3), Gva(gva)).map(|r| r.gpa.0);
    let kernel = registers.cr3 & !USER_ROOT;
    by(registers.cr3).or_else(|| match gva >> 63 != 0 && kernel != registers.cr3 {
        true => by(kernel),
        false => None,
    })
}

/// See [`FilterMemory::walk`].
fn walk_and_read(
    registers: &Registers,
    memory: &(impl FilterMemory + ?Sized),
    gva: u64,
    out: &mut [u8],
) -> usize {
    let mut done = 0;
    while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let address = gva.wrapping_add(done as u64);
        let on_page = usize::try_from(PAGE - (address & (PAGE - 1))).unwrap_or(1);
        let len = on_page.min(rest.len());
        let Some(part) = rest.get_mut(..len) else { break };
        match translate(registers, memory, address) {
            Some(gpa) if memory.read_physical(Gpa(gpa), part) => done += len,
            _ => break,
        }
    }
    done
}

fn load(registers: &Registers, memory: &impl FilterMemory, gva: u64, size: u8) -> Option<u64> {
    let mut bytes = [0; 8];
    let part = bytes.get_mut(..usize::from(size))?;
    let len = part.len();
    (memory.read_virtual(registers, Gva(gva), part) == len).then(|| u64::from_le_bytes(bytes))
}

/// A difference decides, also where what is behind it is not there.
fn same_text(
    registers: &Registers,
    memory: &impl FilterMemory,
    gva: u64,
    how: TextMatch,
    text: &[u8],
) -> Truth {
    let mut bytes = [0; LONGEST];
    let wanted = text.len() + usize::from(how == TextMatch::Whole);
    let Some(part) = bytes.get_mut(..wanted) else {
        return Truth::Unknown;
    };
    let len = memory.read_virtual(registers, Gva(gva), part);
    let expected = text.iter().chain(std::iter::once(&0));
    if part.iter().take(len).zip(expected).any(|(a, b)| a != b) {
        return Truth::False;
    }
    match len == wanted {
        true => Truth::True,
        false => Truth::Unknown,
    }
}
