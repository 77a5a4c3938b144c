//! Instructions as text, with names for the addresses in them: for evidence, and for whoever disassembles.

use iced_x86::{Formatter, Instruction, IntelFormatter, SymbolResolver, SymbolResult};
use rustc_hash::FxHashMap;

/// What in an instruction may be an address: its immediates, where it branches to, and its displacement.
pub fn addresses(instruction: &Instruction) -> impl Iterator<Item = u64> {
    let operands = (0..instruction.op_count()).filter_map(|i| instruction.try_immediate(i).ok());
    operands.chain([
        instruction.near_branch_target(),
        instruction.memory_displacement64(),
    ])
}

/// Writes instructions in Intel's syntax, and `names` in place of the addresses that have one. It owns them, so they are
/// those of the addresses that occur.
pub fn formatter(names: impl IntoIterator<Item = (u64, String)>) -> IntelFormatter {
    let names = Names(names.into_iter().collect());
    let mut formatter = IntelFormatter::with_options(Some(Box::new(names)), None);
    let options = formatter.options_mut();
    options.set_space_after_operand_separator(true);
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_branch_leading_zeros(false);
    formatter
}

struct Names(FxHashMap<u64, String>);

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        _instruction: &Instruction,
        _operand: u32,
        _instruction_operand: Option<u32>,
        address: u64,
        _address_size: u32,
    ) -> Option<SymbolResult<'_>> {
        self.0
            .get(&address)
            .map(|name| SymbolResult::with_str(address, name))
    }
}
