//! How a file lies in the page cache: in single pages, or in large pieces that are mapped at once.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;

/// What the page cache holds a file in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pieces {
    /// Pages of 4 KiB, each with an entry of its own in the page tables of whoever maps it. So it is where a program wrote or
    /// read the file here and there, and on file systems that know nothing else.
    Small,
    /// Up to 2 MiB (large folios), where the file system has them and memory is there in one piece. So it is where the file was
    /// read from front to back, as by `sha256sum`.
    Large,
}

/// Drops what the page cache has of `file` and reads it anew.
pub(crate) fn read_anew(file: &Path, pieces: Pieces) {
    let mut file = File::open(file).expect("the dump can be opened");
    // What was not written yet is not dropped.
    file.sync_data().expect("the dump can be synced");
    let advise = |advice| {
        // SAFETY: a plain system call on a descriptor that is open.
        let failed = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
        assert_eq!(failed, 0, "posix_fadvise");
    };
    advise(libc::POSIX_FADV_DONTNEED);
    if pieces == Pieces::Small {
        // No reading ahead: of large pieces, there are none without.
        advise(libc::POSIX_FADV_RANDOM);
    }
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).expect("the dump can be read") > 0 {}
}
