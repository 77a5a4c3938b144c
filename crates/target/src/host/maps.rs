//! `/proc/PID/maps`: where a process has what mapped.

use std::io;

use super::process::Process;

/// The most of `maps` that is read: 256 bytes for each of the 65530 mappings the kernel allows by default.
const MAX_MAPS: u64 = 16 << 20;

/// One line of `/proc/PID/maps`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mapping {
    /// First byte, in the process's address space.
    pub(crate) start: u64,
    /// One past the last byte.
    pub(crate) end: u64,
    /// Readable.
    pub(crate) read: bool,
    /// Writable.
    pub(crate) write: bool,
    /// Executable.
    pub(crate) exec: bool,
    /// Shared, not private: what the guest writes is seen through the file.
    pub(crate) shared: bool,
    /// Where in the file it starts.
    pub(crate) offset: u64,
    /// The file's inode, 0 for anonymous memory.
    pub(crate) inode: u64,
    /// `major:minor` of the file's device.
    pub(crate) device: String,
    /// The file's path as the kernel prints it (` (deleted)` at its end included), `[heap]`, or empty.
    pub(crate) path: String,
}

impl Mapping {
    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Anonymous memory of no special kind: what guests get without a memory backend.
    pub(crate) fn is_anonymous(&self) -> bool {
        self.inode == 0 && (self.path.is_empty() || self.path.starts_with("[anon:"))
    }
}

/// The mappings of a process in address order. Needs the right to trace it.
pub(crate) fn of(process: Process) -> io::Result<Vec<Mapping>> {
    Ok(parse(&process.text("maps", MAX_MAPS)?))
}

/// Parses the file; lines of another form are left out.
pub(crate) fn parse(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(parse_line).collect()
}

/// Neighbours which are one piece to the process (the kernel splits a mapping where protections, policies or
/// huge page advice differ) joined into one.
pub(crate) fn joined(mappings: &[Mapping]) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for next in mappings {
        if let Some(last) = all.last_mut()
            && last.end == next.start
            && (last.read, last.write, last.exec, last.shared)
                == (next.read, next.write, next.exec, next.shared)
            && (last.inode, &last.device) == (next.inode, &next.device)
            && last.path == next.path
            && (next.inode == 0 || last.offset.checked_add(last.len()) == Some(next.offset))
        {
            last.end = next.end;
        } else {
            all.push(next.clone());
        }
    }
    all
}

fn parse_line(line: &str) -> Option<Mapping> {
    // 7f00-7f10 rw-s 00000000 fe:00 12   /path with spaces
    let (range, rest) = line.split_once(' ')?;
    let (flags, rest) = rest.split_once(' ')?;
    let (offset, rest) = rest.split_once(' ')?;
    let (device, rest) = rest.split_once(' ')?;
    let (inode, path) = rest.split_once(' ').unwrap_or((rest, ""));
    let (start, end) = range.split_once('-')?;
    let flags = flags.as_bytes();
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        read: *flags.first()? == b'r',
        write: *flags.get(1)? == b'w',
        exec: *flags.get(2)? == b'x',
        shared: *flags.get(3)? == b's',
        offset: u64::from_str_radix(offset, 16).ok()?,
        inode: inode.parse().ok()?,
        device: device.to_owned(),
        path: path.trim_start_matches(' ').to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of a real QEMU 7.2 with one private and one memfd backend.
    const REAL: &str = "\
55cf78388000-55cf783bb000 rw-p 00000000 00:00 0 
7fef4be00000-7fef6be00000 rw-p 00000000 00:00 0 
7fef6be00000-7fef6be01000 ---p 00000000 00:00 0 
7fefb0000000-7fefb8000000 rw-s 00000000 00:01 1027                       /memfd:memory-backend-memfd (deleted)
7fefbc000000-7fefbc0c5000 r--p 00000000 fe:00 326305                     /usr/lib/x86_64-linux-gnu/libcrypto.so.3
";

    #[test]
    fn real_lines() {
        let maps = parse(REAL);
        assert_eq!(maps.len(), 5);
        assert!(maps[1].is_anonymous() && maps[1].write && !maps[1].shared);
        assert_eq!(maps[1].len(), 0x2000_0000);
        assert!(!maps[2].read);
        assert_eq!(maps[3].path, "/memfd:memory-backend-memfd (deleted)");
        assert!(maps[3].shared && maps[3].inode == 1027);
    }

    #[test]
    fn broken_lines_are_left_out() {
        assert!(parse("nonsense\n\n7f-\nzz-zz rw-p 0 0:0 0 x\n").is_empty());
    }

    #[test]
    fn neighbours_join_only_when_they_are_one_piece() {
        let text = "\
1000-2000 rw-p 00000000 00:00 0 
2000-4000 rw-p 00000000 00:00 0 
4000-5000 ---p 00000000 00:00 0 
6000-7000 rw-s 00000000 00:01 9 /memfd:a
7000-8000 rw-s 00001000 00:01 9 /memfd:a
8000-9000 rw-s 00005000 00:01 9 /memfd:a
";
        let joined = joined(&parse(text));
        let spans: Vec<_> = joined.iter().map(|m| (m.start, m.end)).collect();
        assert_eq!(
            spans,
            [
                (0x1000, 0x4000),
                (0x4000, 0x5000),
                (0x6000, 0x8000),
                (0x8000, 0x9000)
            ]
        );
    }
}
