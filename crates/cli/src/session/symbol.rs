//! What a symbol's name stands for: several symbols may share one, and a per-CPU variable has an address for each CPU.

use std::fmt::Write;
use std::ops::Range;

use vmsight_symbols::{Symbol, SymbolTable};

/// No kernel image is linked below this: up to 6.14 x86-64 links per-CPU variables from zero on.
const LOWEST_IMAGE: u64 = 1 << 47;

/// Tells a kernel's per-CPU variables from its other symbols.
pub(crate) struct PerCpuSymbols(Range<u64>);

impl PerCpuSymbols {
    /// By the bounds that the linker gave their section; where those are not known, by the address.
    pub(crate) fn of(symbols: &SymbolTable) -> PerCpuSymbols {
        match (
            symbols.address("__per_cpu_start"),
            symbols.address("__per_cpu_end"),
        ) {
            (Some(start), Some(end)) => PerCpuSymbols(start..end),
            _ => PerCpuSymbols(0..LOWEST_IMAGE),
        }
    }

    /// Whether the symbol is one of them.
    pub(crate) fn has(&self, symbol: &Symbol<'_>) -> bool {
        self.0.contains(&symbol.address)
    }
}

/// Whether the address of a kernel's symbol is its address in memory once KASLR is added: not that of a per-CPU
/// variable linked at zero, nor that of an absolute one.
pub(crate) fn is_in_image(symbol: &Symbol<'_>) -> bool {
    symbol.address >= LOWEST_IMAGE
}

/// The symbols of this name, each address once.
pub(crate) fn named<'a>(symbols: &'a SymbolTable, name: &'a str) -> Vec<Symbol<'a>> {
    let mut found: Vec<_> = symbols.find(name).collect();
    found.dedup_by_key(|s| s.address);
    found
}

/// `3 symbols are called foo: 0x1000 (bar+0x10), …`.
pub(crate) fn ambiguous(name: &str, addresses: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = format!("{} symbols are called {name}: ", addresses.len());
    text.push_str(&addresses[..addresses.len().min(SHOWN)].join(", "));
    if addresses.len() > SHOWN {
        let _ = write!(text, " and {} more", addresses.len() - SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsight_symbols::SymbolTableBuilder;

    fn table(symbols: &[(&str, u64)]) -> SymbolTable {
        let mut builder = SymbolTableBuilder::new();
        for (name, address) in symbols {
            assert!(builder.push(name, *address, b'D'));
        }
        builder.finish()
    }

    fn per_cpu(table: &SymbolTable, name: &str) -> bool {
        PerCpuSymbols::of(table).has(&named(table, name)[0])
    }

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    #[test]
    fn per_cpu_variables_linked_at_zero() {
        let table = table(&[
            ("__per_cpu_start", 0),
            ("current_task", 0x1fbc0),
            ("__per_cpu_end", 0x35000),
            ("absolute", 0x4000_0000),
            ("_text", TEXT),
        ]);
        assert!(per_cpu(&table, "current_task"));
        assert!(!per_cpu(&table, "absolute") && !is_in_image(&named(&table, "absolute")[0]));
        assert!(!per_cpu(&table, "_text") && is_in_image(&named(&table, "_text")[0]));
    }

    #[test]
    fn per_cpu_variables_in_the_image() {
        let table = table(&[
            ("_text", TEXT),
            ("__per_cpu_start", TEXT + 0x1000),
            ("current_task", TEXT + 0x1040),
            ("__per_cpu_end", TEXT + 0x2000),
            ("init_task", TEXT + 0x2000),
        ]);
        assert!(per_cpu(&table, "current_task"));
        assert!(!per_cpu(&table, "init_task") && !per_cpu(&table, "_text"));
    }

    #[test]
    fn per_cpu_variables_of_a_table_without_bounds() {
        let table = table(&[("current_task", 0x1fbc0), ("_text", TEXT)]);
        assert!(per_cpu(&table, "current_task") && !per_cpu(&table, "_text"));
    }

    #[test]
    fn a_name_of_two_and_one_that_stands_twice_at_one_address() {
        let table = table(&[("a", TEXT), ("a", TEXT + 16), ("b", TEXT), ("b", TEXT)]);
        assert_eq!(named(&table, "a").len(), 2);
        assert_eq!(named(&table, "b").len(), 1);
        let many: Vec<String> = (0..20).map(|i| format!("{i:#x}")).collect();
        assert_eq!(ambiguous("a", &many[..2]), "2 symbols are called a: 0x0, 0x1");
        assert!(ambiguous("a", &many).ends_with("0x7 and 12 more"));
    }
}
