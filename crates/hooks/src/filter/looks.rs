//! What of a vCPU a filter looks at: where a register costs something to read, the others need not be read to judge an event.

use super::expression::Field;
use super::program::{Instruction, Program, number_of_field};

/// Fields of the vCPU and of the event.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Looks(u128);

impl Looks {
    /// Whether a field is among them.
    pub fn at(self, field: Field) -> bool {
        self.0 >> (number_of_field(field) & 127) & 1 != 0
    }

    /// These and those.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn with(self, field: Field) -> Self {
        self.and(Self(1 << (number_of_field(field) & 127)))
    }
}

impl Program {
    /// Everything that it may look at, whatever it finds. Reading virtual memory takes what says how addresses are translated.
    pub fn looks(&self) -> Looks {
        let mut looks = Looks::default();
        for instruction in self.instructions() {
            looks = match instruction {
                Instruction::Field(field) => looks.with(*field),
                Instruction::Load(_) | Instruction::Text(..) => {
                    let translation = [Field::Cr0, Field::Cr3, Field::Cr4, Field::Efer];
                    translation.into_iter().fold(looks, Looks::with)
                }
                _ => looks,
            };
        }
        looks
    }
}
