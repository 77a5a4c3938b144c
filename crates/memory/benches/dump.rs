//! Writing a guest's memory as a dump, next to plain copying of the same bytes to the same disk: `cargo bench --bench dump [DIR]`.
//!
//! Both are timed until the disk has them. The ratio counts, and only within one run: 0.8 is the bar for ELF core and LiME.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use vmsight_arch::Gpa;
use vmsight_memory::dump::write::{Contents, OutFormat, write};
use vmsight_memory::{GuestMemory, Mapping};

const LEN: usize = 512 << 20;
const ROUNDS: usize = 5;

/// Like a guest that is in use: a third zeros, a third text and tables, a third that does not pack.
fn fill(path: &Path) -> std::io::Result<()> {
    let mut state = 1u64;
    let mut out = std::io::BufWriter::new(File::create(path)?);
    for page in 0..LEN / 4096 {
        for word in 0..512u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let word = match page / 64 % 3 {
                0 => 0,
                1 => word & 0x1f | state & 0x0303_0000,
                _ => state ^ state >> 29,
            };
            out.write_all(&word.to_le_bytes())?;
        }
    }
    out.flush()
}

/// Reads and writes, as any program copies memory that is no file to it.
fn copy(source: &File, out: &File) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for at in (0..LEN as u64).step_by(buffer.len()) {
        source.read_exact_at(&mut buffer, at)?;
        out.write_all_at(&buffer, at)?;
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let folder = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let folder = tempfile::tempdir_in(folder)?;
    let source = folder.path().join("ram");
    fill(&source)?;
    let file = File::open(&source)?;
    let mapping = Mapping::live(&file, 0, LEN as u64, false)?;
    let memory = GuestMemory::builder()
        .mapped(Gpa(0), LEN as u64, &mapping, 0)
        .build()
        .map_err(std::io::Error::other)?;
    let contents = Contents {
        memory: &memory,
        registers: &[],
        vmcoreinfo: None,
    };
    let out = folder.path().join("out");
    let sync = |work: &dyn Fn(&File) -> std::io::Result<()>| {
        let _ = std::fs::remove_file(&out);
        let to = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&out)?;
        let begun = Instant::now();
        work(&to)?;
        to.sync_all()?;
        Ok::<_, std::io::Error>(begun.elapsed())
    };
    // In turns: what else the machine does then meets all of them.
    let mut best = [Duration::MAX; OutFormat::ALL.len() + 1];
    for _ in 0..ROUNDS {
        let mut took = vec![sync(&|to| copy(&file, to))?];
        for format in OutFormat::ALL {
            took.push(sync(&|to| {
                let written = write(&contents, format, to, &AtomicBool::new(false), &|_| {});
                written.map(drop).map_err(std::io::Error::other)
            })?);
        }
        for (best, took) in best.iter_mut().zip(took) {
            *best = took.min(*best);
        }
    }
    let [plain, best @ ..] = best;
    println!("{:<14} {plain:>9.2?}", "plain copying");
    for (format, took) in OutFormat::ALL.into_iter().zip(best) {
        let ratio = plain.as_secs_f64() / took.as_secs_f64();
        println!("{:<14} {took:>9.2?}  {ratio:.2} of its speed", format.to_string());
    }
    Ok(())
}
