//! A filter in the form in which it crosses into the VMM: instructions for a machine with a stack. It only ever
//! goes forward, so it ends after as many instructions as it has; what it may read of the guest is counted before
//! it runs.

use serde::{Deserialize, Serialize};

use super::FilterError;
use super::expression::{Arithmetic, Comparison, Field, TextMatch};
use super::verify::verify;
use crate::verdict::Register;

/// Most instructions of a program.
pub const MOST_INSTRUCTIONS: usize = 256;
/// Most bytes of a program.
pub const MOST_BYTES: usize = 4096;
/// Most values that a program has at a time.
pub const MOST_VALUES: usize = 16;
/// Most reads of guest memory in a program, each of at most 256 bytes.
pub const MOST_READS: usize = 16;

/// One instruction.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Instruction {
    /// A number.
    Constant(u64),
    /// What the vCPU or the event holds.
    Field(Field),
    /// An address becomes the number of so many bytes that lies there.
    Load(u8),
    /// Two numbers become one.
    Arithmetic(Arithmetic),
    /// Two numbers become a truth.
    Compare(Comparison),
    /// A number becomes the truth whether it is one of these, which are in order.
    OneOf(Box<[u64]>),
    /// An address becomes the truth about the text there.
    Text(TextMatch, Box<[u8]>),
    /// A truth.
    Always(bool),
    /// Two truths become one.
    Both,
    /// Two truths become one.
    Either,
    /// A truth becomes its contrary.
    Not,
    /// Where the last truth is "false", so many instructions are passed over. It stays.
    SkipIfFalse(u16),
    /// Where the last truth is "true", so many instructions are passed over. It stays.
    SkipIfTrue(u16),
}

/// What a program ends with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Yields {
    /// A number.
    Number,
    /// A truth.
    Truth,
}

/// A program that was verified: there is no other way to have one.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(into = "Vec<u8>", try_from = "Vec<u8>")]
pub struct Program {
    instructions: Vec<Instruction>,
    yields: Yields,
    most_values: usize,
}

impl Program {
    pub(super) fn new(instructions: Vec<Instruction>) -> Result<Self, FilterError> {
        let (yields, most_values) = verify(&instructions)?;
        let program = Self {
            instructions,
            yields,
            most_values,
        };
        let bytes = program.to_bytes().len();
        match bytes <= MOST_BYTES {
            true => Ok(program),
            false => Err(FilterError::TooLong),
        }
    }

    /// Reads and verifies a program that somebody else has written.
    ///
    /// # Errors
    /// Where it is none, or one that is not allowed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FilterError> {
        if bytes.len() > MOST_BYTES {
            return Err(FilterError::TooLong);
        }
        let mut reader = Reader { bytes };
        let mut instructions = Vec::new();
        while !reader.bytes.is_empty() {
            if instructions.len() == MOST_INSTRUCTIONS {
                return Err(FilterError::TooLong);
            }
            let at = instructions.len();
            let instruction = reader.instruction().ok_or(FilterError::Malformed {
                at,
                what: "there is no such instruction",
            })?;
            instructions.push(instruction);
        }
        Self::new(instructions)
    }

    /// The program as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for instruction in &self.instructions {
            write(instruction, &mut bytes);
        }
        bytes
    }

    /// Its instructions, in their order.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }

    /// How many values it has at most at a time.
    pub(super) fn most_values(&self) -> usize {
        self.most_values
    }

    pub(super) fn yields(&self) -> Yields {
        self.yields
    }
}

impl From<Program> for Vec<u8> {
    fn from(program: Program) -> Self {
        program.to_bytes()
    }
}

impl TryFrom<Vec<u8>> for Program {
    type Error = FilterError;

    fn try_from(bytes: Vec<u8>) -> Result<Self, FilterError> {
        Self::from_bytes(&bytes)
    }
}

mod code {
    pub(super) const CONSTANT: u8 = 1;
    pub(super) const FIELD: u8 = 2;
    pub(super) const LOAD: u8 = 3;
    pub(super) const ARITHMETIC: u8 = 4;
    pub(super) const COMPARE: u8 = 5;
    pub(super) const TEXT: u8 = 6;
    pub(super) const ALWAYS: u8 = 7;
    pub(super) const BOTH: u8 = 8;
    pub(super) const EITHER: u8 = 9;
    pub(super) const NOT: u8 = 10;
    pub(super) const SKIP_IF_FALSE: u8 = 11;
    pub(super) const SKIP_IF_TRUE: u8 = 12;
    pub(super) const ONE_OF: u8 = 13;
}

/// Fields by their number; registers have 0 to 15 and two more.
const FIELDS: [(u8, Field); 19] = [
    (16, Field::Register(Register::Rip)),
    (17, Field::Register(Register::Rflags)),
    (32, Field::Cr0),
    (33, Field::Cr2),
    (34, Field::Cr3),
    (35, Field::Cr4),
    (36, Field::Efer),
    (37, Field::Cpl),
    (38, Field::FsBase),
    (39, Field::GsBase),
    (40, Field::PerCpu),
    (41, Field::Vcpu),
    (64, Field::New),
    (65, Field::Old),
    (66, Field::Gva),
    (67, Field::Gpa),
    (68, Field::Length),
    (69, Field::Index),
    (70, Field::ErrorCode),
];

const ARITHMETIC: [Arithmetic; 7] = [
    Arithmetic::And,
    Arithmetic::Or,
    Arithmetic::Xor,
    Arithmetic::Add,
    Arithmetic::Subtract,
    Arithmetic::ShiftLeft,
    Arithmetic::ShiftRight,
];

const COMPARISONS: [Comparison; 4] = [
    Comparison::Equal,
    Comparison::Different,
    Comparison::Less,
    Comparison::AtMost,
];

const TEXTS: [TextMatch; 2] = [TextMatch::Prefix, TextMatch::Whole];

fn number_of<T: PartialEq>(table: &[T], value: &T) -> u8 {
    let index = table.iter().position(|t| t == value);
    index.and_then(|i| u8::try_from(i).ok()).unwrap_or(u8::MAX)
}

pub(super) fn number_of_field(field: Field) -> u8 {
    match field {
        Field::Register(Register::Gpr(n)) => n,
        other => {
            let entry = FIELDS.iter().find(|(_, field)| *field == other);
            entry.map_or(u8::MAX, |(number, _)| *number)
        }
    }
}

fn field_of(number: u8) -> Option<Field> {
    match number {
        0..=15 => Some(Field::Register(Register::Gpr(number))),
        _ => FIELDS.iter().find(|(n, _)| *n == number).map(|(_, field)| *field),
    }
}

fn write(instruction: &Instruction, to: &mut Vec<u8>) {
    match instruction {
        Instruction::Constant(number) => {
            to.push(code::CONSTANT);
            to.extend(number.to_le_bytes());
        }
        Instruction::Field(field) => to.extend([code::FIELD, number_of_field(*field)]),
        Instruction::Load(size) => to.extend([code::LOAD, *size]),
        Instruction::Arithmetic(what) => to.extend([code::ARITHMETIC, number_of(&ARITHMETIC, what)]),
        Instruction::Compare(how) => to.extend([code::COMPARE, number_of(&COMPARISONS, how)]),
        Instruction::Text(how, text) => {
            // Verified: at most 255 bytes.
            let len = u8::try_from(text.len()).unwrap_or(u8::MAX);
            to.extend([code::TEXT, number_of(&TEXTS, how), len]);
            to.extend(text.iter().take(usize::from(len)));
        }
        Instruction::OneOf(numbers) => {
            // Verified, too.
            let len = u8::try_from(numbers.len()).unwrap_or(u8::MAX);
            to.extend([code::ONE_OF, len]);
            for number in numbers.iter().take(usize::from(len)) {
                to.extend(number.to_le_bytes());
            }
        }
        Instruction::Always(truth) => to.extend([code::ALWAYS, u8::from(*truth)]),
        Instruction::Both => to.push(code::BOTH),
        Instruction::Either => to.push(code::EITHER),
        Instruction::Not => to.push(code::NOT),
        Instruction::SkipIfFalse(count) => {
            to.push(code::SKIP_IF_FALSE);
            to.extend(count.to_le_bytes());
        }
        Instruction::SkipIfTrue(count) => {
            to.push(code::SKIP_IF_TRUE);
            to.extend(count.to_le_bytes());
        }
    }
}

struct Reader<'b> {
    bytes: &'b [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.bytes.split_first_chunk::<N>()?;
        self.bytes = rest;
        Some(*head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    /// The next instruction; `None` where there is none such, or it is cut short.
    fn instruction(&mut self) -> Option<Instruction> {
        Some(match self.byte()? {
            code::CONSTANT => Instruction::Constant(u64::from_le_bytes(self.take()?)),
            code::FIELD => Instruction::Field(field_of(self.byte()?)?),
            code::LOAD => Instruction::Load(self.byte()?),
            code::ARITHMETIC => Instruction::Arithmetic(*ARITHMETIC.get(usize::from(self.byte()?))?),
            code::COMPARE => Instruction::Compare(*COMPARISONS.get(usize::from(self.byte()?))?),
            code::TEXT => {
                let how = *TEXTS.get(usize::from(self.byte()?))?;
                let len = usize::from(self.byte()?);
                let (text, rest) = self.bytes.split_at_checked(len)?;
                self.bytes = rest;
                Instruction::Text(how, text.into())
            }
            code::ONE_OF => {
                let len = self.byte()?;
                let numbers: Option<Box<[u64]>> =
                    (0..len).map(|_| self.take().map(u64::from_le_bytes)).collect();
                Instruction::OneOf(numbers?)
            }
            code::ALWAYS => match self.byte()? {
                0 => Instruction::Always(false),
                1 => Instruction::Always(true),
                _ => return None,
            },
            code::BOTH => Instruction::Both,
            code::EITHER => Instruction::Either,
            code::NOT => Instruction::Not,
            code::SKIP_IF_FALSE => Instruction::SkipIfFalse(u16::from_le_bytes(self.take()?)),
            code::SKIP_IF_TRUE => Instruction::SkipIfTrue(u16::from_le_bytes(self.take()?)),
            _ => return None,
        })
    }
}
