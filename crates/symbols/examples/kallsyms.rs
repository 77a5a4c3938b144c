//! Prints the symbols of the kernel in a memory dump as /proc/kallsyms of that guest would: run-time address, kind, name.
//! What the kernel and its profile are goes to stderr. For comparing with what the guest itself says:
//!
//! ```sh
//! cargo run --release -p vmsight-symbols --example kallsyms -- mem.raw | LC_ALL=C sort | sha256sum
//! ```

use std::error::Error;
use std::io::{BufWriter, Write, stdout};
use std::path::Path;
use std::time::Instant;

use vmsight_memory::dump;
use vmsight_symbols::cache::Cache;
use vmsight_symbols::kernel::Hints;
use vmsight_symbols::locate;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let path = arguments.next().ok_or("usage: kallsyms DUMP [CACHE-DIRECTORY]")?;
    let cache = match arguments.next() {
        Some(directory) => Cache::open(Path::new(&directory))?,
        None => Cache::disabled(),
    };
    let dump = dump::open(Path::new(&path), None)?;
    let start = Instant::now();
    let l = locate(
        &dump.memory,
        &Hints::with_registers(dump.registers.clone()),
        &cache,
    )?;
    let took = start.elapsed();

    eprintln!("{}", l.image.banner);
    eprintln!("chosen: {}; of {}", l.found.why, l.found.candidates.len());
    l.image.evidence.iter().for_each(|e| eprintln!("  {e}"));
    let (symbols, types) = (l.profile.symbols.len(), l.profile.types.len());
    eprintln!(
        "{symbols} symbols, {types} types from {} in {took:.1?}",
        l.profile.source
    );
    l.profile.warnings.iter().for_each(|w| eprintln!("warning: {w}"));

    let mut out = BufWriter::new(stdout().lock());
    for s in l.profile.symbols.iter() {
        // Absolute values, such as offsets in the per-CPU area, do not move.
        let address = if s.address < 1 << 47 {
            s.address
        } else {
            l.image.runtime(s.address).0
        };
        writeln!(out, "{address:016x} {} {}", char::from(s.kind), s.name)?;
    }
    out.flush()?;
    Ok(())
}
