//! `vmsight symbols`: the names a kernel knows its own addresses by.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::{Map, Value};
use vmsight_symbols::export;
use vmsight_symbols::layout::matches;

use crate::{
    Outcome,
    args::Global,
    commands::beside::write_beside,
    output::{Progress, Sheet},
    place::Place,
    session::{
        Session,
        symbol::{PerCpuSymbols, is_in_image},
    },
};

/// Kernel symbols, read out of the guest's own memory.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "\
Examples:
  vmsight symbols T                        every symbol, modules' included
  vmsight symbols T tcp_v4 '*_ops'         those that contain tcp_v4 or end in _ops
  vmsight symbols T --at 0xffffffff8a2b3c4d
  vmsight symbols export T --isf kernel.json.xz
Addresses are where this boot has them (KASLR applied); `linked` is where vmlinux has them. A per-CPU variable has an
address for each CPU: vmsight read NAME --cpu N reads one.
Exit code 1 if nothing matches.")]
pub(crate) struct Cmd {
    #[command(subcommand)]
    action: Option<Action>,
    /// What to look into
    #[arg(required = true)]
    target: Option<String>,
    /// Names to look for: part of a name, or a pattern with * and ?
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
    /// What lies at this address: symbol and offset
    #[arg(long, value_name = "ADDRESS", conflicts_with = "patterns")]
    at: Vec<Place>,
    /// Leave the modules' symbols out
    #[arg(long)]
    no_modules: bool,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Write symbols and types as a file for other tools
    Export(Export),
}

/// Write symbols and types as a file for other tools.
#[derive(Args, Debug)]
struct Export {
    /// What to look into
    target: String,
    /// A Volatility 3 symbol table; compressed where the name ends in .xz
    #[arg(long, value_name = "FILE")]
    isf: PathBuf,
}

impl Cmd {
    /// Whether it writes a file.
    pub(crate) fn exports(&self) -> bool {
        self.action.is_some()
    }

    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        if let Some(Action::Export(export)) = &self.action {
            return export.run(global);
        }
        let session = Session::open(global, self.target.as_deref().unwrap_or_default())?;
        let kernel = session.kernel()?;
        if !self.at.is_empty() {
            return self.addresses(&session);
        }
        let wanted = |name: &str| self.patterns.is_empty() || self.patterns.iter().any(|p| matches(p, name));
        let keys = ["address", "kind", "name", "module", "linked", "per_cpu"];
        let mut sheet = Sheet::with_keys(&keys, &["address", "kind", "name", "module"]);
        let hex = |a: Option<u64>| a.map_or(Value::Null, |a| format!("{a:#018x}").into());
        let mut push = |address: Option<u64>,
                        linked: Option<u64>,
                        kind: u8,
                        name: &str,
                        module: Option<&str>,
                        per_cpu: bool| {
            let mut row = Map::new();
            row.insert("address".into(), hex(address));
            row.insert("kind".into(), char::from(kind).to_string().into());
            row.insert("name".into(), name.into());
            row.insert("module".into(), module.map_or(Value::Null, Value::from));
            row.insert("linked".into(), hex(linked));
            row.insert("per_cpu".into(), per_cpu.into());
            sheet.rows.push(row);
        };
        let symbols = &kernel.profile().symbols;
        let per_cpu = PerCpuSymbols::of(symbols);
        for symbol in symbols.iter().filter(|s| wanted(s.name)) {
            let per_cpu = per_cpu.has(&symbol);
            let address = match (is_in_image(&symbol), per_cpu) {
                (_, true) => None,
                (true, false) => Some(kernel.image().runtime(symbol.address).0),
                (false, false) => Some(symbol.address),
            };
            push(
                address,
                Some(symbol.address),
                symbol.kind,
                symbol.name,
                None,
                per_cpu,
            );
        }
        if !self.no_modules {
            for symbol in session.modules()?.iter().filter(|s| wanted(&s.name)) {
                push(
                    Some(symbol.address.0),
                    None,
                    symbol.kind as u8,
                    &symbol.name,
                    Some(&symbol.module),
                    false,
                );
            }
        }
        session.print(&sheet)?;
        Ok(if sheet.rows.is_empty() {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }

    fn addresses(&self, session: &Session) -> Result<Outcome> {
        let columns = &["address", "symbol"];
        let mut sheet = Sheet::with_keys(columns, columns);
        let mut unknown = false;
        for place in &self.at {
            let at = session.gva(place, None)?;
            let name = session.name_of(at);
            unknown |= name.is_none();
            let mut row = Map::new();
            row.insert("address".into(), format!("{at:#018x}").into());
            row.insert("symbol".into(), name.map_or(Value::Null, Value::from));
            sheet.rows.push(row);
        }
        session.print(&sheet)?;
        Ok(if unknown { Outcome::Nothing } else { Outcome::Fine })
    }
}

impl Export {
    fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        let xz = self.isf.extension().is_some_and(|e| e == "xz");
        write_beside(&self.isf, "the symbol table", |out| {
            let _progress = Progress::spinner(global.quiet, "writing the symbol table");
            export::isf(kernel.profile(), out, xz.then_some(export::XZ_LEVEL))
                .context("writing the symbol table")
        })?;
        let mut row = Map::new();
        row.insert("file".into(), self.isf.display().to_string().into());
        row.insert("release".into(), kernel.profile().release.as_str().into());
        row.insert("symbols".into(), kernel.profile().symbols.len().into());
        row.insert("types".into(), kernel.profile().types.len().into());
        let columns = &["file", "release", "symbols", "types"];
        let mut sheet = Sheet::with_keys(columns, columns);
        sheet.rows.push(row);
        session.print(&sheet)?;
        Ok(Outcome::Fine)
    }
}

#[cfg(test)]
mod tests {
    use vmsight_symbols::layout::matches;

    #[test]
    fn patterns() {
        assert!(matches("tcp_v4", "__tcp_v4_rcv"));
        assert!(matches("*_ops", "tcp4_seq_ops"));
        assert!(!matches("*_ops", "ops_init"));
        assert!(matches("sys_*at", "sys_openat"));
        assert!(matches("?ys*", "sys_"));
        assert!(!matches("?ys", "ys"));
        assert!(!matches(&("*a".repeat(50) + "b"), &"a".repeat(400)));
    }
}
