//! From what a filter says to its program.

use super::FilterError;
use super::expression::{Condition, Value};
use super::program::{Instruction, MOST_INSTRUCTIONS, Program};

/// Most conditions and values inside one another.
const MOST_DEPTH: usize = 32;

impl Condition {
    /// The program for it.
    ///
    /// # Errors
    /// Where it is too long or too deep, reads too much, or names what there is not.
    pub fn compile(&self) -> Result<Program, FilterError> {
        Program::new(of_condition(self, MOST_DEPTH)?)
    }
}

impl Value {
    /// The program for it.
    ///
    /// # Errors
    /// As [`Condition::compile`].
    pub fn compile(&self) -> Result<Program, FilterError> {
        Program::new(of_value(self, MOST_DEPTH)?)
    }
}

fn of_value(value: &Value, depth: usize) -> Result<Vec<Instruction>, FilterError> {
    let depth = depth.checked_sub(1).ok_or(FilterError::TooDeep)?;
    Ok(match value {
        Value::Constant(number) => vec![Instruction::Constant(*number)],
        Value::Field(field) => vec![Instruction::Field(*field)],
        Value::Load { at, size } => {
            let mut code = of_value(at, depth)?;
            code.push(Instruction::Load(*size));
            code
        }
        Value::Combined(first, what, second) => {
            let mut code = of_value(first, depth)?;
            code.extend(of_value(second, depth)?);
            code.push(Instruction::Arithmetic(*what));
            code
        }
    })
}

fn of_condition(condition: &Condition, depth: usize) -> Result<Vec<Instruction>, FilterError> {
    let depth = depth.checked_sub(1).ok_or(FilterError::TooDeep)?;
    Ok(match condition {
        Condition::Compare(first, how, second) => {
            let mut code = of_value(first, depth)?;
            code.extend(of_value(second, depth)?);
            code.push(Instruction::Compare(*how));
            code
        }
        Condition::OneOf(value, numbers) => {
            let mut numbers = numbers.clone();
            numbers.sort_unstable();
            let mut code = of_value(value, depth)?;
            code.push(Instruction::OneOf(numbers.into()));
            code
        }
        Condition::Text(at, how, text) => {
            let mut code = of_value(at, depth)?;
            code.push(Instruction::Text(*how, text.as_slice().into()));
            code
        }
        Condition::All(all) => joined(all, depth, true)?,
        Condition::Any(any) => joined(any, depth, false)?,
        Condition::Not(condition) => {
            let mut code = of_condition(condition, depth)?;
            code.push(Instruction::Not);
            code
        }
    })
}

/// One after the other, until one decides.
fn joined(conditions: &[Condition], depth: usize, all: bool) -> Result<Vec<Instruction>, FilterError> {
    let Some((first, rest)) = conditions.split_first() else {
        return Ok(vec![Instruction::Always(all)]);
    };
    let mut code = of_condition(first, depth)?;
    for condition in rest {
        let next = of_condition(condition, depth)?;
        let count = u16::try_from(next.len() + 1).map_err(|_| FilterError::TooLong)?;
        code.push(match all {
            true => Instruction::SkipIfFalse(count),
            false => Instruction::SkipIfTrue(count),
        });
        code.extend(next);
        code.push(if all {
            Instruction::Both
        } else {
            Instruction::Either
        });
        if code.len() > MOST_INSTRUCTIONS {
            return Err(FilterError::TooLong);
        }
    }
    Ok(code)
}
