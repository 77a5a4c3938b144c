//! The physical limit: a process that maps a dump and gets as many of its pages as vmsight did.

use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;

/// How much the kernel maps at a page fault in a file that is in the page cache (`fault_around_bytes`, since Linux 3.15).
const AROUND: u64 = 64 << 10;

/// The word that makes this program be the floor.
pub(crate) const WORD: &str = "--floor";

/// This program again, as a process that maps `file`, touches it until `bytes` of it are mapped, and ends.
pub(crate) fn command(file: &Path, bytes: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the running program has a path"));
    command.arg(WORD).arg(file).arg(bytes.to_string());
    command
}

/// What the process does that [`command`] starts; its arguments follow [`WORD`].
pub(crate) fn main(arguments: &[String]) {
    let [file, bytes] = arguments else {
        panic!("{WORD} FILE BYTES");
    };
    let file = File::open(file).expect("the dump can be opened");
    let bytes: u64 = bytes.parse().expect("a number");
    let len = file.metadata().expect("an open file has a size").len();
    let map = memmap2::MmapOptions::new()
        .map_raw_read_only(&file)
        .expect("the dump can be mapped");
    let places = (bytes / AROUND).clamp(1, (len / AROUND).max(1));
    let mut sum = 0u64;
    for place in 0..places {
        let at = (len / places * place) & !(AROUND - 1);
        // SAFETY: `at` is inside the mapping. Nobody writes to the dump; if somebody did, any value will do.
        sum = sum.wrapping_add(u64::from(unsafe {
            map.as_ptr().add(at as usize).read_volatile()
        }));
    }
    black_box(sum);
}
