//! Files of every filesystem of the workload, byte for byte.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vmsight_analysis::recover::files::{CachedFile, ExtractError, Extracted, extract, list};
use vmsight_linux::Kernel;

use crate::support::subject;

fn rows(kernel: &Kernel, how: &str) -> Vec<CachedFile> {
    let listing = list(kernel).unwrap();
    assert_eq!(listing.warnings, [""; 0], "{how}");
    for row in &listing.rows {
        assert_eq!(row.problems, [], "{how}: {:?}", row.path);
    }
    listing.rows
}

fn at<'r>(rows: &'r [CachedFile], path: &str) -> &'r CachedFile {
    let mut found = rows.iter().filter(|row| row.is_called(path));
    let row = found.next().unwrap_or_else(|| panic!("no {path:?}"));
    assert!(found.next().is_none(), "{path:?} is there twice");
    row
}

fn written(kernel: &Kernel, rows: &[CachedFile], into: &Path) -> Vec<Extracted> {
    let mut out = Vec::new();
    extract(kernel, rows, into, |file| out.push(file.clone())).unwrap();
    out
}

/// Files whose contents the workload is known to have written.
fn planted() -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        ("/bin/bash", fs::read(bash()).unwrap()),
        ("/srv/data/plain.txt", b"0123456789abcdef\n".to_vec()),
        ("/srv/data/mapped.bin", vec![0x5a; 128 << 10]),
        ("/etc/hostname", b"vmsight-lab\n".to_vec()),
        ("/var/log/app.log", b"started\nholding\n".to_vec()),
        ("/tmp/deleted secret.bin", vec![0xd5; 5000]),
        ("/memfd:lab memory", b"only in memory".to_vec()),
        ("/mnt/disk/on-disk.txt", b"on a block device\n".to_vec()),
        ("/mnt/overlay/below.txt", b"from the lower layer\n".to_vec()),
        ("/mnt/overlay/dir/changed.txt", b"after\n".to_vec()),
        ("/srv/data/lower/dir/changed.txt", b"before\n".to_vec()),
        ("/srv/data/upper/dir/changed.txt", b"after\n".to_vec()),
        ("/tmp/Gr\u{fc}\u{df}e \u{2603}.txt", Vec::new()),
        ("/tmp/new\nline\ttab", Vec::new()),
        ("/tmp/\x1b[31mred", Vec::new()),
    ])
}

fn bash() -> &'static Path {
    let places = ["/bin/bash-static", "/usr/bin/bash-static"].map(Path::new);
    places.into_iter().find(|path| path.exists()).unwrap()
}

#[test]
fn planted_files_come_back_whole() {
    let subject = subject();
    for (how, kernel) in subject.both() {
        let rows = rows(&kernel, how);
        let wanted: Vec<CachedFile> = planted().keys().map(|path| at(&rows, path).clone()).collect();
        let folder = tempfile::tempdir().unwrap();
        let into = folder.path().join("out");
        for (file, (path, contents)) in written(&kernel, &wanted, &into).iter().zip(planted()) {
            assert_eq!(file.failure, None, "{how}: {path}");
            assert!(file.file.is_whole(), "{how}: {path}: {file:?}");
            let output = into.join(file.output.as_ref().unwrap());
            assert!(fs::read(&output).unwrap() == contents, "{how}: {path} differs");
            assert_eq!(fs::metadata(&output).unwrap().mode() & 0o777, 0o600);
            let text = output.to_str().unwrap();
            assert!(!text.contains(char::is_control), "{text:?}");
            assert!(file.sha256.is_some());
        }
        let deleted: Vec<_> = wanted.iter().filter(|row| row.deleted).collect();
        assert_eq!(
            deleted
                .iter()
                .filter_map(|row| row.path.as_deref())
                .collect::<Vec<_>>(),
            ["/memfd:lab memory", "/tmp/deleted secret.bin"],
            "{how}"
        );
        // A folder that is in use is left alone.
        assert!(matches!(
            extract(&kernel, &wanted, &into, |_| ()),
            Err(ExtractError::NotEmpty(_))
        ));
    }
}

#[test]
fn open_files_have_the_inode_and_size_that_the_guest_says() {
    let subject = subject();
    let told: BTreeMap<(String, u64), u64> = subject
        .guest
        .truth()
        .processes
        .iter()
        .flat_map(|p| &p.fds)
        .filter_map(|fd| {
            let path = fd.link.to_string();
            let known = [
                "/tmp/",
                "/srv/",
                "/var/",
                "/run/",
                "/mnt/overlay/",
                "/mnt/tmp/",
                "/mnt/disk/",
            ];
            let here =
                known.iter().any(|folder| path.starts_with(folder)) && fd.mode & 0o170_000 == 0o100_000;
            here.then_some(((path, fd.inode), fd.size))
        })
        .collect();
    assert!(told.len() > 10, "{told:?}");
    for (how, kernel) in subject.both() {
        let rows = rows(&kernel, how);
        for ((path, inode), size) in &told {
            // What the guest appends may be a name's own end, too.
            let removed = path.strip_suffix(" (deleted)");
            let called = |row: &&CachedFile| {
                row.inode == *inode
                    && (row.is_called(path) || row.deleted && removed.is_some_and(|path| row.is_called(path)))
            };
            let row = rows.iter().find(called);
            let row = row.unwrap_or_else(|| panic!("{how}: no {path:?} with inode {inode}"));
            assert_eq!(row.size, Some(*size), "{how}: {path}");
        }
    }
}

#[test]
fn whole_filesystems_come_back_with_directories_and_links_in_the_manifest() {
    let subject = subject();
    let kernel = subject.dumped();
    let all = rows(&kernel, "dumped");
    let folder = tempfile::tempdir().unwrap();
    let files = written(&kernel, &all, folder.path());
    assert_eq!(files.len(), all.len());
    let failures: Vec<_> = files.iter().filter(|f| f.failure.is_some()).collect();
    assert!(failures.is_empty(), "{failures:?}");
    let manifest = fs::read_to_string(folder.path().join("manifest.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = manifest
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), all.len());
    let link = lines.iter().find(|line| line["path"] == "/bin/sh").unwrap();
    assert_eq!(
        (&link["target"], &link["output"]),
        (&"busybox".into(), &serde_json::Value::Null)
    );
    let root = at(&all, "/srv/data");
    let device = root.device.replace(':', "-");
    assert!(
        folder
            .path()
            .join(format!("tmpfs-{device}/srv/data/upper/dir"))
            .is_dir()
    );
    // Room that was set aside in a file and what nobody wrote is a hole here, too.
    let sparse = files.iter().find(|f| f.file.holes >= 4096).unwrap();
    let output = fs::metadata(folder.path().join(sparse.output.as_ref().unwrap())).unwrap();
    assert_eq!(Some(output.len()), sparse.file.size);
    assert!(output.blocks() * 512 < output.len(), "{sparse:?}");
    // The initramfs was moved away, but for a link that the workload leaves behind: its filesystem is there all the same.
    assert!(
        all.iter()
            .any(|row| &*row.fs_type == "rootfs" && row.path.as_deref() == Some("/bin/sh"))
    );
}
