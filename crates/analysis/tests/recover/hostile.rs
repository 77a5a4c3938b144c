//! A guest that lies about its files: nothing is written outside the folder, nothing runs for ever.

use std::fs;
use std::path::{Path, PathBuf};

use vmsight_analysis::recover::files::{Extracted, extract, list};
use vmsight_arch::Gva;

use crate::support::{Forgery, subject};

/// Files that were tampered with.
struct Files(Forgery);

impl Files {
    fn inode(&self, path: &str) -> Gva {
        let rows = list(&self.0.kernel).unwrap().rows;
        rows.iter().find(|row| row.is_called(path)).unwrap().address
    }

    /// Gives a file another name.
    fn rename(&self, path: &str, name: &[u8]) {
        let alias = self
            .0
            .pointer(self.0.member("inode", "i_dentry.first", self.inode(path)));
        let dentry = alias.wrapping_sub(self.0.kernel.offset("dentry", "d_u.d_alias").unwrap());
        let text = self.0.pointer(self.0.member("dentry", "d_name.name", dentry));
        self.0.put(text, name);
        self.0.put(
            self.0.member("dentry", "d_name.len", dentry),
            &u32::try_from(name.len()).unwrap().to_le_bytes(),
        );
    }

    fn resize(&self, path: &str, size: u64) {
        self.0.put(
            self.0.member("inode", "i_size", self.inode(path)),
            &size.to_le_bytes(),
        );
    }

    fn extracted(&self, into: &Path) -> (Vec<Extracted>, Vec<String>) {
        let kernel = self.0.forged();
        let listing = list(&kernel).unwrap();
        let mut out = Vec::new();
        extract(&kernel, &listing.rows, into, |file| out.push(file.clone())).unwrap();
        (out, listing.warnings)
    }
}

fn everything_below(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            everything_below(&path, out);
        }
        out.push(path);
    }
}

#[test]
fn names_lead_nowhere_and_sizes_fill_no_disk() {
    let subject = subject();
    let forged = Files(Forgery::of(&subject));
    forged.rename("/srv/data/plain.txt", b"../../../../escaped");
    forged.rename("/etc/passwd", b"..");
    forged.rename("/etc/hostname", b"/absolute");
    forged.rename("/var/log/app.log", b"a\x1b[2J\x7f\r\n%");
    forged.resize("/srv/data/mapped.bin", i64::MAX as u64);
    // Two files with the same path, and a file where another has its directory.
    forged.rename("/mnt/overlay/below.txt", b"dir");
    let top = tempfile::tempdir().unwrap();
    let into = top.path().join("a/b/c/out");
    fs::create_dir_all(into.parent().unwrap()).unwrap();
    let (files, _) = forged.extracted(&into);
    let mut all = Vec::new();
    everything_below(top.path(), &mut all);
    for path in &all {
        let inside = path.starts_with(&into) || into.starts_with(path);
        assert!(
            inside && !path.to_str().unwrap().contains(char::is_control),
            "{path:?}"
        );
        assert!(!fs::symlink_metadata(path).unwrap().is_symlink());
    }
    let holds = |contents: &[u8]| {
        let mut files = all.iter().filter(|path| path.is_file());
        files.any(|path| path.metadata().unwrap().len() < 1 << 20 && fs::read(path).unwrap() == contents)
    };
    for contents in [
        &b"0123456789abcdef\n"[..],
        b"vmsight-lab\n",
        b"started\nholding\n",
        b"from the lower layer\n",
    ] {
        assert!(holds(contents), "{:?} is lost", String::from_utf8_lossy(contents));
    }
    let huge = files
        .iter()
        .find(|f| f.file.path.as_deref() == Some("/srv/data/mapped.bin"))
        .unwrap();
    assert!(huge.failure.is_some(), "{huge:?}");
    let output = into.join(huge.output.as_ref().unwrap());
    assert_eq!(fs::read(output).unwrap(), vec![0x5a; 128 << 10]);
}

#[test]
fn lists_and_trees_that_lie_cost_a_row_or_a_warning() {
    let subject = subject();
    let forged = Files(Forgery::of(&subject));
    let list_of = |path: &str| forged.0.member("inode", "i_sb_list", forged.inode(path));
    // A list of inodes that never comes back to its head.
    let looped = list_of("/mnt/disk/on-disk.txt");
    forged.0.put(looped, &looped.0.to_le_bytes());
    // A file whose tree of pages is its own inode, and one that claims another file's pages.
    let head = |path: &str| {
        let mapping = forged
            .0
            .pointer(forged.0.member("inode", "i_mapping", forged.inode(path)));
        forged.0.member("address_space", "i_pages.xa_head", mapping)
    };
    let inode = forged.inode("/srv/data/mapped.bin");
    forged
        .0
        .put(head("/srv/data/mapped.bin"), &(inode.0 | 2).to_le_bytes());
    let stolen = forged.0.pointer(head("/etc/passwd"));
    forged.0.put(head("/srv/data/plain.txt"), &stolen.0.to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    let (files, warnings) = forged.extracted(folder.path());
    assert!(
        warnings.iter().any(|w| w.starts_with("inodes of ext4")),
        "{warnings:?}"
    );
    let row = |path: &str| files.iter().find(|f| f.file.is_called(path)).unwrap();
    for path in ["/srv/data/mapped.bin", "/srv/data/plain.txt"] {
        let file = row(path);
        assert!(!file.file.problems.is_empty(), "{file:?}");
        assert_eq!((file.written, &file.sha256), (0, &None), "{file:?}");
    }
    assert!(row("/etc/passwd").sha256.is_some());
}
