//! Writes a profile for other tools: as a symbol table of Volatility 3, and its symbols as an ELF file for debuggers.
//!
//! The form of the former is ISF 6.2.0 (`volatility3/schemas/schema-6.2.0.json`), with the conventions of dwarf2json that plugins
//! rely on: typedefs are resolved, anonymous structs and unions are named and marked, symbols of unknown type are
//! `void`, and `linux_banner` carries its text so that the table can be matched to a dump.
//!
//! `lab/volatility` holds what volatility3 2.28 sees with such tables (pslist, lsmod, lsof, sockstat, bash) against what
//! guests say of themselves. What is known not to work: `hidden_modules` takes tables of no producer but dwarf2json; on
//! kernels whose kallsyms leaves its own tables out (6.1 does, 6.12 does not) `kallsyms` and `pscallstack` miss
//! `kallsyms_num_syms`. Kernels newer than volatility3 knows are exported all the same; what it makes of them is its own
//! affair (of Linux 7.2 it lists processes, files, sockets, and fails at modules for `taint_flag.module`, which is gone).

mod describe;
mod elf;
mod globals;
mod names;

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};

use liblzma::write::XzEncoder;
use thiserror::Error;

use crate::types::{Kind, Type};
use crate::{Profile, SymbolTable};

use describe::Describe;
pub use elf::{PlacedSymbol, elf};
use names::Names;

/// Why a profile could not be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExportError {
    /// There are no types: a table without any is of no use to anybody.
    #[error(
        "writing a symbol table for {release}: the profile has no types (the kernel carries no BTF); \
         give a file that has them with --symbols"
    )]
    NoTypes {
        /// Release of the kernel.
        release: String,
    },
    /// There are no symbols.
    #[error("writing a symbol table for {release}: the profile has no symbols")]
    NoSymbols {
        /// Release of the kernel.
        release: String,
    },
    /// Whatever was written to did not take it.
    #[error("writing a symbol table: {0}")]
    Io(#[from] io::Error),
}

/// How strongly xz compresses, 0 to 9, where nothing else is asked for. Level 1 takes twice as long and saves 6 %.
pub const XZ_LEVEL: u32 = 0;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Symbols.
    pub symbols: usize,
    /// Symbols whose type is known.
    pub typed: usize,
    /// Structs and unions.
    pub types: usize,
    /// Enumerations.
    pub enums: usize,
}

/// Writes the profile as ISF, compressed by xz at the level given. The same profile gives the same bytes each time.
pub fn isf(profile: &Profile, out: impl Write, xz: Option<u32>) -> Result<Written, ExportError> {
    let Some(level) = xz else {
        let mut out = BufWriter::with_capacity(1 << 18, out);
        let written = write(profile, &mut out)?;
        out.flush()?;
        return Ok(written);
    };
    let mut out = BufWriter::with_capacity(1 << 18, XzEncoder::new(out, level.min(9)));
    let written = write(profile, &mut out)?;
    out.into_inner().map_err(|e| e.into_error())?.finish()?.flush()?;
    Ok(written)
}

fn write(profile: &Profile, out: &mut dyn Write) -> Result<Written, ExportError> {
    let release = || profile.release.clone();
    if !profile.has_types() {
        return Err(ExportError::NoTypes { release: release() });
    }
    if profile.symbols.is_empty() {
        return Err(ExportError::NoSymbols { release: release() });
    }
    let types = &profile.types;
    let names = Names::new(types);
    let describe = Describe { types, names: &names };
    out.write_all(b"{\"metadata\":")?;
    metadata(profile, out)?;
    out.write_all(b",\n\"base_types\":{")?;
    describe.base_types(out)?;
    out.write_all(b"},\n\"user_types\":{")?;
    let mut comma = Comma::default();
    let (mut structs, mut enums) = (0, 0);
    for (t, name) in named(profile, &names, Kind::is_composite) {
        comma.write(out)?;
        describe.user_type(&t, name, out)?;
        structs += 1;
    }
    out.write_all(b"},\n\"enums\":{")?;
    let mut comma = Comma::default();
    for (t, name) in named(profile, &names, Kind::is_enum) {
        comma.write(out)?;
        describe.enumeration(&t, name, out)?;
        enums += 1;
    }
    out.write_all(b"},\n\"symbols\":{")?;
    let (symbols, typed) = symbols(profile, &describe, out)?;
    out.write_all(b"}}\n")?;
    Ok(Written {
        symbols,
        typed,
        types: structs,
        enums,
    })
}

/// The types of one sort together with the names they get.
fn named<'a>(
    profile: &'a Profile,
    names: &'a Names,
    sort: fn(Kind) -> bool,
) -> impl Iterator<Item = (Type<'a>, &'a str)> {
    let of_sort = profile.types.iter().filter(move |t| sort(t.kind()));
    of_sort.filter_map(|t| Some((t, names.get(t.id())?)))
}

fn metadata(profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    // The schema has no room for a build-id of its own; `name` is free text, and it is where import looks for it.
    let build_id = profile
        .build_id
        .as_deref()
        .map(hex)
        .unwrap_or_else(|| "unknown".to_owned());
    let symbols = format!("kallsyms of {}, build-id {build_id}", profile.release);
    let types = format!("BTF of {}, build-id {build_id}", profile.release);
    out.write_all(b"{\"linux\":{\"symbols\":[{\"kind\":\"symtab\",\"name\":")?;
    string(out, &symbols)?;
    out.write_all(b"}],\"types\":[{\"name\":")?;
    string(out, &types)?;
    out.write_all(b"}]},\"producer\":{\"name\":\"vmsight\",\"version\":")?;
    string(out, env!("CARGO_PKG_VERSION"))?;
    out.write_all(b"},\"format\":\"6.2.0\"}")
}

/// Writes all symbols: how many, and how many of them have a type.
fn symbols(profile: &Profile, describe: &Describe<'_>, out: &mut dyn Write) -> io::Result<(usize, usize)> {
    let chosen = choose(&profile.symbols);
    let globals = globals::types(profile);
    let mut comma = Comma::default();
    let mut typed = 0;
    for (index, symbol) in profile.symbols.iter().enumerate() {
        if chosen.get(symbol.name) != Some(&index) {
            continue;
        }
        comma.write(out)?;
        string(out, symbol.name)?;
        write!(out, ":{{\"address\":{},\"type\":", symbol.address)?;
        match globals.get(symbol.name) {
            Some(global) => {
                describe.global(global, out)?;
                typed += 1;
            }
            None => out.write_all(describe::VOID)?,
        }
        if symbol.name == "linux_banner" {
            // As it lies in the kernel: the text ends with a newline and a NUL, and readers search for all of it.
            let text = format!("{}\n\0", profile.banner.trim_end_matches(['\n', '\0']));
            write!(
                out,
                ",\"constant_data\":\"{}\"",
                crate::import::base64::encode(text.as_bytes())
            )?;
        }
        out.write_all(b"}")?;
    }
    Ok((chosen.len(), typed))
}

/// The number of the symbol that each name stands for. A name can be there once only: the global symbol, else the
/// first.
fn choose(symbols: &SymbolTable) -> HashMap<&str, usize> {
    // The guest chooses the names, so the hash must not be known beforehand.
    let mut chosen: HashMap<&str, (usize, bool)> = HashMap::default();
    for (index, symbol) in symbols.iter().enumerate().filter(|(_, s)| !s.name.is_empty()) {
        let global = symbol.kind.is_ascii_uppercase();
        let entry = chosen.entry(symbol.name).or_insert((index, global));
        if global && !entry.1 {
            *entry = (index, global);
        }
    }
    chosen
        .into_iter()
        .map(|(name, (index, _))| (name, index))
        .collect()
}

/// A comma before everything but the first.
#[derive(Default)]
struct Comma(bool);

impl Comma {
    fn write(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let separator: &[u8] = if self.0 { b",\n" } else { b"\n" };
        self.0 = true;
        out.write_all(separator)
    }
}

/// A JSON string, quotes and escapes included.
fn string(out: &mut dyn Write, text: &str) -> io::Result<()> {
    serde_json::to_writer(out, text).map_err(io::Error::from)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
