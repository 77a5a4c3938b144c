//! `vmsight disas`: guest code with names on it.

use anyhow::{Context, Result};
use clap::Args;
use iced_x86::{Decoder, DecoderOptions, Formatter};
use serde_json::{Map, Value};
use vmsight_analysis::assembly;
use vmsight_arch::Gva;

use crate::{
    Outcome,
    args::Global,
    commands::raw::Where,
    output::Sheet,
    place::{Place, size},
    session::Session,
};

/// Disassemble guest code with symbols.
#[derive(Args, Debug)]
#[command(after_help = "\
What is shown is what memory holds now: code patched by the kernel (alternatives, ftrace, static calls) or by
somebody else differs from the vmlinux file. Without a length a function is shown up to the next symbol.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Where to begin: SYMBOL, SYMBOL+0x10, 0xffff…
    place: Place,
    /// Bytes to disassemble [default: to the next symbol, at most 4K]
    #[arg(value_parser = size)]
    length: Option<u64>,
    /// Stop after this many instructions
    #[arg(short = 'n', long, value_name = "N")]
    count: Option<usize>,
    #[command(flatten)]
    space: Where,
}

/// What is read at most in one go; code of a function does not come near it.
const LIMIT: u64 = 1 << 20;

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let space = self.space.address_space(&session)?;
        let start = session.gva(&self.place, self.space.cpu)?;
        let length = match self.length {
            Some(n) => n.min(LIMIT),
            None if self.count.is_some() => {
                self.count.map_or(0, |n| (n as u64).saturating_mul(15)).min(LIMIT)
            }
            None => session
                .next_symbol(start)
                .map_or(256, |next| next.0.wrapping_sub(start.0))
                .min(4096),
        };
        let mut code = vec![0; usize::try_from(length)?];
        let readable = session
            .read_up_to(&space, start, &mut code)
            .context("reading the code")?;
        code.truncate(readable);
        let columns = &["address", "symbol", "bytes", "instruction"];
        let mut sheet = Sheet::with_keys(columns, columns);
        if (readable as u64) < length {
            sheet
                .warnings
                .push(format!("only {readable} of {length} bytes could be read"));
        }
        let decode = || Decoder::with_ip(64, &code, start.0, DecoderOptions::NONE).into_iter();
        let shown = decode().take(self.count.unwrap_or(usize::MAX));
        let named = |at: u64| Some((at, session.name_of(Gva(at))?));
        let names = shown.flat_map(|instruction| assembly::addresses(&instruction).collect::<Vec<_>>());
        let mut formatter = assembly::formatter(names.filter(|at| *at >= KERNEL_HALF).filter_map(named));
        let mut text = String::new();
        for instruction in decode().take(self.count.unwrap_or(usize::MAX)) {
            let at = instruction.ip();
            let from = usize::try_from(at.wrapping_sub(start.0)).unwrap_or(0);
            let bytes = code
                .get(from..(from + instruction.len()).min(code.len()))
                .unwrap_or(&[]);
            text.clear();
            formatter.format(&instruction, &mut text);
            let mut row = Map::new();
            row.insert("address".into(), format!("{at:#x}").into());
            row.insert(
                "symbol".into(),
                session.name_of(Gva(at)).map_or(Value::Null, Value::from),
            );
            row.insert(
                "bytes".into(),
                bytes
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect::<String>()
                    .into(),
            );
            row.insert("instruction".into(), text.as_str().into());
            sheet.rows.push(row);
        }
        session.print(&sheet)?;
        Ok(if sheet.rows.is_empty() {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }
}

/// Smaller numbers are immediates or user addresses.
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;
