//! Whether a program is one that may run: the kinds of its values fit, on every way through it, and it ends with one.

use super::FilterError;
use super::expression::Field;
use super::program::{Instruction, MOST_INSTRUCTIONS, MOST_READS, MOST_VALUES, Yields};
use crate::verdict::Register;

/// The kinds of the values that there are, the last one last.
type Kinds = Vec<Yields>;

/// What a program ends with, and how many values it has at most at a time.
///
/// # Errors
/// Where it may not run.
pub(super) fn verify(instructions: &[Instruction]) -> Result<(Yields, usize), FilterError> {
    if instructions.len() > MOST_INSTRUCTIONS {
        return Err(FilterError::TooLong);
    }
    let reads = |i: &&Instruction| matches!(i, Instruction::Load(_) | Instruction::Text(..));
    if instructions.iter().filter(reads).count() > MOST_READS {
        return Err(FilterError::TooManyReads);
    }
    // What those who skip to a place have; the last place is the end.
    let mut arrivals: Vec<Option<Kinds>> = vec![None; instructions.len() + 1];
    let mut kinds = Kinds::new();
    let mut most = 0;
    for (at, instruction) in instructions.iter().enumerate() {
        meet(at, &kinds, arrivals.get(at))?;
        let malformed = |what| FilterError::Malformed { at, what };
        let target = step(instruction, &mut kinds).map_err(malformed)?;
        most = most.max(kinds.len());
        if most > MOST_VALUES {
            return Err(malformed("too many values at a time"));
        }
        let Some(count) = target else { continue };
        let place = arrivals
            .get_mut(at + 1 + usize::from(count))
            .ok_or(malformed("it leads out of the program"))?;
        match place {
            Some(there) if *there != kinds => return Err(malformed("it does not fit where it leads to")),
            _ => *place = Some(kinds.clone()),
        }
    }
    meet(instructions.len(), &kinds, arrivals.last())?;
    match kinds.as_slice() {
        [one] => Ok((*one, most)),
        _ => Err(FilterError::Malformed {
            at: instructions.len(),
            what: "it does not end with one value",
        }),
    }
}

/// Those who skipped to here must have what those have who came here step by step.
fn meet(at: usize, kinds: &Kinds, arrived: Option<&Option<Kinds>>) -> Result<(), FilterError> {
    match arrived {
        Some(Some(there)) if there != kinds => Err(FilterError::Malformed {
            at,
            what: "it depends on the way here what there is",
        }),
        _ => Ok(()),
    }
}

/// What an instruction makes of the values; how many instructions may be skipped, where it is one that skips.
fn step(instruction: &Instruction, kinds: &mut Kinds) -> Result<Option<u16>, &'static str> {
    use Yields::{Number, Truth};
    let mut take = |wanted: &[Yields]| {
        let rest = kinds
            .len()
            .checked_sub(wanted.len())
            .ok_or("a value is missing")?;
        match kinds.get(rest..) == Some(wanted) {
            true => {
                kinds.truncate(rest);
                Ok(())
            }
            false => Err("a value of the other kind is wanted"),
        }
    };
    let gives = match instruction {
        Instruction::Constant(_) => Number,
        Instruction::Field(Field::Register(Register::Gpr(16..))) => return Err("there is no such register"),
        Instruction::Field(_) => Number,
        Instruction::Load(1 | 2 | 4 | 8) => {
            take(&[Number])?;
            Number
        }
        Instruction::Load(_) => return Err("numbers in memory have 1, 2, 4 or 8 bytes"),
        Instruction::Arithmetic(_) => {
            take(&[Number, Number])?;
            Number
        }
        Instruction::Compare(_) => {
            take(&[Number, Number])?;
            Truth
        }
        Instruction::Text(_, text) => {
            if text.is_empty() || text.len() > usize::from(u8::MAX) {
                return Err("a text has 1 to 255 bytes");
            }
            take(&[Number])?;
            Truth
        }
        Instruction::OneOf(numbers) => {
            if numbers.len() > usize::from(u8::MAX) {
                return Err("at most 255 numbers");
            }
            if !numbers.is_sorted() {
                return Err("numbers are not in order");
            }
            take(&[Number])?;
            Truth
        }
        Instruction::Always(_) => Truth,
        Instruction::Both | Instruction::Either => {
            take(&[Truth, Truth])?;
            Truth
        }
        Instruction::Not => {
            take(&[Truth])?;
            Truth
        }
        Instruction::SkipIfFalse(count) | Instruction::SkipIfTrue(count) => {
            return match kinds.last() {
                Some(Truth) => Ok(Some(*count)),
                _ => Err("a truth is wanted"),
            };
        }
    };
    kinds.push(gives);
    Ok(None)
}
