//! Instructions as evidence.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter, SymbolResolver, SymbolResult};
use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use crate::{Context, Evidence};

/// The longest instruction.
const MAX_INSTRUCTION: usize = 15;
/// Smaller numbers are no addresses of the kernel.
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;

/// The first `count` instructions at `at`.
pub(crate) fn evidence(context: &Context, what: &str, at: Gva, count: usize) -> Evidence {
    let mut bytes = vec![0; count * MAX_INSTRUCTION];
    // What lies at the end of a page may be followed by nothing.
    while let Err(error) = context.space().read(at, &mut bytes) {
        if bytes.len() <= MAX_INSTRUCTION {
            return Evidence::value(format!("{what} at {at}"), error);
        }
        bytes.truncate(bytes.len() - MAX_INSTRUCTION);
    }
    let decoded: Vec<_> = Decoder::with_ip(64, &bytes, at.0, DecoderOptions::NONE)
        .into_iter()
        .take(count)
        .collect();
    let mut names = Names::default();
    for instruction in &decoded {
        let operands = (0..instruction.op_count()).filter_map(|i| instruction.try_immediate(i).ok());
        let places = [
            instruction.near_branch_target(),
            instruction.memory_displacement64(),
        ];
        for address in operands.chain(places).filter(|a| *a >= KERNEL_HALF) {
            names.0.insert(address, context.describe(Gva(address)));
        }
    }
    let mut formatter = IntelFormatter::with_options(Some(Box::new(names)), None);
    formatter.options_mut().set_space_after_operand_separator(true);
    formatter.options_mut().set_hex_prefix("0x");
    formatter.options_mut().set_hex_suffix("");
    formatter.options_mut().set_uppercase_hex(false);
    formatter.options_mut().set_branch_leading_zeros(false);
    formatter.options_mut().set_show_symbol_address(true);
    let instructions = decoded
        .iter()
        .map(|instruction| {
            let mut text = String::new();
            formatter.format(instruction, &mut text);
            text
        })
        .collect();
    Evidence::Code {
        what: what.to_owned(),
        at,
        instructions,
    }
}

#[derive(Default)]
struct Names(FxHashMap<u64, String>);

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        _instruction: &iced_x86::Instruction,
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
