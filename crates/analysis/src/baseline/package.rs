//! The files in a Debian package (deb(5)) or a folder, one after the other, each as it is read.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::Path;

use tar::{Archive, EntryType, PaxExtensions};

use super::packed;
use super::trusted::TrustedError;

/// What a package begins with: it is an archive of ar's.
pub(super) const ARCHIVE: &[u8] = b"!<arch>\n";
/// The member that has the files begins with this, and ends as it is packed.
const DATA: &[u8] = b"data.tar";
/// Members before that one: deb(5) has two.
const MAX_MEMBERS: usize = 16;
/// The longest header that says a file's name.
const MAX_NAME: u64 = 64 << 10;
/// More files than a package of a kernel has, and modules that there are: some 6,000.
const MAX_FILES: usize = 1 << 18;
/// The most that a package may hold, unpacked.
const MAX_UNPACKED: u64 = 16 << 30;
/// How deep folders may lie in each other.
const MAX_DEPTH: usize = 32;

/// Is given a file's path in the package or below the folder, and the file.
pub(super) type Visit<'v> = dyn FnMut(&str, &mut dyn Read) -> Result<(), TrustedError> + 'v;

/// All files of the package in `file`, which lies at `path`.
pub(super) fn package(path: &Path, file: impl Read, visit: &mut Visit<'_>) -> Result<(), TrustedError> {
    let failed = failing(path);
    let file = BufReader::with_capacity(1 << 18, file);
    let files = packed::unpacked(data(file).map_err(&failed)?).map_err(&failed)?;
    let mut archive = Archive::new(files.take(MAX_UNPACKED));
    // As they stand there: a name's length is bounded here.
    let entries = archive.entries().map_err(&failed)?.raw(true);
    let mut long_name = None;
    for (number, entry) in entries.enumerate() {
        let mut entry = entry.map_err(&failed)?;
        if number >= MAX_FILES {
            return Err(failed(implausible("it holds too many files")));
        }
        match entry.header().entry_type() {
            EntryType::GNULongName => {
                let name = name(&mut entry).map_err(&failed)?;
                long_name = Some(name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec());
            }
            EntryType::XHeader => {
                let header = name(&mut entry).map_err(&failed)?;
                let mut facts = PaxExtensions::new(&header).flatten();
                long_name = facts
                    .find(|fact| fact.key_bytes() == b"path")
                    .map(|fact| fact.value_bytes().to_vec());
            }
            EntryType::Regular | EntryType::Continuous => {
                let name = long_name.take();
                let name = name.unwrap_or_else(|| entry.header().path_bytes().into_owned());
                let name = String::from_utf8_lossy(&name).into_owned();
                visit(name.trim_start_matches("./"), &mut entry)?;
            }
            _ => long_name = None,
        }
    }
    Ok(())
}

fn name(entry: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    entry.take(MAX_NAME).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The member of the archive that has the files. Each stands behind its header, and begins at an even place.
fn data(mut file: impl Read) -> io::Result<impl Read> {
    let mut magic = [0; ARCHIVE.len()];
    file.read_exact(&mut magic)?;
    if magic != ARCHIVE {
        return Err(implausible("it is no archive"));
    }
    for _ in 0..MAX_MEMBERS {
        // Name in 16 bytes, then what is of no matter here; the size in decimal in 10, and two that are always the same.
        let mut header = [0; 60];
        file.read_exact(&mut header)?;
        let [header @ .., b'`', b'\n'] = header.as_slice() else {
            return Err(implausible("a member has no header"));
        };
        let size = header
            .get(48..)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let size = size.and_then(|digits| digits.trim_end().parse::<u64>().ok());
        let size = size.ok_or_else(|| implausible("a member has no size"))?;
        if header.starts_with(DATA) {
            return Ok(file.take(size));
        }
        let skipped = size + size % 2;
        if io::copy(&mut file.by_ref().take(skipped), &mut io::sink())? != skipped {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Err(implausible("it has no data.tar"))
}

/// All files below a folder; links are not followed.
pub(super) fn folder(folder: &Path, visit: &mut Visit<'_>) -> Result<(), TrustedError> {
    let mut folders = vec![(folder.to_owned(), 0)];
    let mut files = 0;
    while let Some((path, depth)) = folders.pop() {
        let failed = failing(&path);
        for entry in fs::read_dir(&path).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            files += 1;
            if files > MAX_FILES {
                return Err(failed(implausible("it holds too many files")));
            }
            let kind = entry.file_type().map_err(&failed)?;
            let path = entry.path();
            if kind.is_dir() && depth < MAX_DEPTH {
                folders.push((path, depth + 1));
            } else if kind.is_file() {
                let below = path.strip_prefix(folder).unwrap_or(&path);
                visit(&below.to_string_lossy(), &mut Lazy::Closed(&path))?;
            }
        }
    }
    Ok(())
}

/// A file that is opened when it is first read: most are not.
enum Lazy<'p> {
    Closed(&'p Path),
    Open(File),
}

impl Read for Lazy<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Lazy::Closed(path) = self {
            *self = Lazy::Open(File::open(path)?);
        }
        match self {
            Lazy::Closed(_) => Ok(0),
            Lazy::Open(file) => file.read(buffer),
        }
    }
}

fn implausible(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn failing(path: &Path) -> impl Fn(io::Error) -> TrustedError + '_ {
    |source| TrustedError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, size: &str, bytes: &[u8]) -> Vec<u8> {
        let mut member = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, 644).into_bytes();
        member.extend_from_slice(bytes);
        if bytes.len() % 2 == 1 {
            member.push(b'\n');
        }
        member
    }

    fn with(name: &str, bytes: &[u8]) -> Vec<u8> {
        let size = bytes.len().to_string();
        let members = [
            member("debian-binary", "4", b"2.0\n"),
            member("control.tar.xz", "3", b"odd"),
        ];
        [ARCHIVE, &members.concat(), &member(name, &size, bytes)].concat()
    }

    fn files(names: &[&str]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_size(name.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, name.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn found(package: &[u8]) -> Result<Vec<String>, TrustedError> {
        let mut found = Vec::new();
        super::package(Path::new("a.deb"), package, &mut |name, file| {
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, name);
            found.push(text);
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn the_files_of_a_package_are_read_however_it_is_packed() {
        let long = format!("lib/modules/{}/x.ko", "a-long-name".repeat(20));
        let names = ["boot/vmlinuz-6.1", long.as_str(), "z"];
        let tar = files(&names);
        assert_eq!(found(&with("data.tar", &tar)).unwrap(), names);
        let zst = zstd::encode_all(tar.as_slice(), 1).unwrap();
        assert_eq!(found(&with("data.tar.zst", &zst)).unwrap(), names);
        let mut xz = Vec::new();
        io::copy(&mut liblzma::read::XzEncoder::new(tar.as_slice(), 0), &mut xz).unwrap();
        assert_eq!(found(&with("data.tar.xz", &xz)).unwrap(), names);
        // Cut anywhere, it is an error, and what stands before is seen.
        for end in [3, 30, 80, 200] {
            assert!(found(&with("data.tar.zst", &zst)[..end]).is_err(), "cut at {end}");
        }
        let whole = with("data.tar", &tar);
        assert!(found(&whole[..whole.len() - 2000]).is_err());
    }

    #[test]
    fn a_package_that_lies_is_an_error() {
        let lie = |size: &str| {
            let member = member("control.tar", size, b"");
            found(&[ARCHIVE, &member].concat()).unwrap_err().to_string()
        };
        assert!(lie("9999999999").contains("reading a.deb"));
        assert!(lie("-1").contains("no size"));
        assert!(lie("none").contains("no size"));
        assert!(found(b"!<arch>\n").is_err());
        assert!(found(&with("other", b"text")).is_err());
        let many = member("other", "0", b"").repeat(MAX_MEMBERS + 1);
        let many = found(&[ARCHIVE, &many].concat()).unwrap_err().to_string();
        assert!(many.contains("no data.tar"), "{many}");
        // A file of 8 EiB in the archive.
        let mut tar = files(&["abc"]);
        let mut header = tar::Header::from_byte_slice(&tar[..512]).clone();
        header.set_size(1 << 63);
        header.set_cksum();
        tar[..512].copy_from_slice(header.as_bytes());
        let result = super::package(
            Path::new("a.deb"),
            with("data.tar", &tar).as_slice(),
            &mut |_, file| {
                io::copy(&mut file.take(1 << 20), &mut io::sink()).unwrap();
                Ok(())
            },
        );
        assert!(result.is_err());
    }

    #[test]
    fn a_folder_is_gone_through_and_links_are_not() {
        let top = tempfile::tempdir().unwrap();
        let below = top.path().join("kernel/fs");
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join("a.ko"), "one").unwrap();
        std::os::unix::fs::symlink("/", top.path().join("build")).unwrap();
        let mut found = Vec::new();
        folder(top.path(), &mut |name, file| {
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            found.push((name.to_owned(), text));
            Ok(())
        })
        .unwrap();
        assert_eq!(found, [("kernel/fs/a.ko".to_owned(), "one".to_owned())]);
    }
}
