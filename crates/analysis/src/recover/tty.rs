//! What went through terminals: the line discipline's buffer (drivers/tty/n_tty.c) and the flip buffers below it
//! (drivers/tty/tty_buffer.c). Bytes that were read stay there until others come in their place.

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::file::FileFilter;
use vmsight_linux::listing::address;
use vmsight_linux::structures::list;
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::ReadError;

use super::member::{Member, Structure};

/// Drivers of terminals, and terminals of one driver or open ones.
const MAX_DRIVERS: usize = 1024;
const MAX_TERMINALS: usize = 1 << 14;
/// Flip buffers of one terminal: 64 KiB are allowed, of 256 bytes each at least.
const MAX_BUFFERS: usize = 1024;
/// The largest flip buffer is a page and a half or so.
const MAX_BUFFER: u64 = 64 << 10;
/// `N_TTY_BUF_SIZE` (drivers/tty/n_tty.c).
const LINE_BUFFER: u64 = 4096;
/// Bytes of texts in all.
const MAX_TEXT: usize = 64 << 20;
/// `ICANON` and `ECHO` in `c_lflag` (include/uapi/asm-generic/termbits.h).
const ICANON: u64 = 2;
const ECHO: u64 = 8;
/// `TTY_DRIVER_TYPE_PTY` with its two sides (include/linux/tty_driver.h), where they are no enumerations yet, which count otherwise.
const PTY: i64 = 4;
const MASTER: i64 = 1;
const SLAVE: i64 = 2;

/// Bytes in one buffer of a terminal.
#[derive(Clone, Debug, Serialize)]
pub struct TerminalText {
    /// The terminal: `ttyS0`, `pts/0`; `ptm0` is the other end of `pts/0`, which sshd or a terminal emulator holds.
    pub tty: String,
    /// `input`: what was typed, or came over a line. `output`: what programs wrote to the pseudo-terminal.
    pub what: &'static str,
    /// `line` (the line discipline's buffer), `flip` (the driver's), `free` (the driver's, not in use).
    pub buffer: &'static str,
    /// Nobody has read it yet. What has been read is left over and may be cut at the front.
    pub waiting: bool,
    /// Bytes.
    pub length: usize,
    /// The bytes as text.
    pub text: String,
    /// Lines are handed on when they are complete.
    pub canonical: bool,
    /// What is typed is shown. Off while a password is asked for, and in editors and shells that do it themselves.
    pub echo: bool,
    /// The processes that have the terminal open.
    pub pids: Vec<i32>,
    /// The `tty_struct`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// What is in the buffers of all terminals, terminal by terminal.
///
/// # Errors
/// If drivers or open files cannot be listed, or the kernel's types lack a member.
pub fn terminals(kernel: &Kernel) -> Result<Listing<TerminalText>, LinuxError> {
    let reader = TtyReader::new(kernel)?;
    let mut out = Listing::default();
    let mut ttys = reader.of_drivers(&mut out)?;
    let pids = reader.of_files(&mut out)?;
    // Pseudo-terminals are in no driver's table.
    let mut open: Vec<Gva> = pids.keys().copied().collect();
    open.sort_unstable();
    for tty in open {
        ttys.push(tty);
        // The other end may be held by nobody in sight.
        ttys.extend(
            reader
                .link
                .pointer(kernel.space(), tty)
                .ok()
                .filter(|to| !to.is_null()),
        );
    }
    let mut seen = FxHashSet::default();
    ttys.retain(|tty| seen.insert(*tty));
    if ttys.len() > MAX_TERMINALS {
        out.warn(format!("terminals: cut after {MAX_TERMINALS}"));
        ttys.truncate(MAX_TERMINALS);
    }
    let mut left = MAX_TEXT;
    for tty in ttys {
        let holders = pids.get(&tty).cloned().unwrap_or_default();
        match reader.read(tty, holders, &mut left) {
            Ok(rows) => out.rows.extend(rows),
            Err(error) => out.warn(format!("the terminal at {tty} cannot be read: {error}")),
        }
        if left == 0 {
            out.warn("terminals: cut, there is too much text in them");
            break;
        }
    }
    out.rows
        .sort_by(|a, b| (a.tty.len(), &a.tty).cmp(&(b.tty.len(), &b.tty)));
    Ok(out)
}

/// What a buffer holds.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    /// What was read already, oldest first.
    read: Vec<u8>,
    waiting: Vec<u8>,
}

struct TtyReader<'k> {
    kernel: &'k Kernel,
    name: Member,
    index: Member,
    driver: Member,
    link: Member,
    port: Member,
    ldisc: Member,
    ldisc_ops: Member,
    ldisc_number: Member,
    disc_data: Member,
    local_flags: Member,
    driver_link: Member,
    driver_count: Member,
    driver_ttys: Member,
    driver_type: Member,
    driver_subtype: Member,
    file_ops: Member,
    file_data: Member,
    private_tty: Member,
    line: LineMembers,
    flip: FlipMembers,
    /// What the driver's type and subtype are, of the two ends of a pseudo-terminal.
    master: (u64, u64),
    slave: (u64, u64),
}

/// Members of `struct n_tty_data`.
struct LineMembers {
    buffer: Member,
    head: Member,
    tail: Member,
}

/// Members of `struct tty_bufhead` in the port, and of `struct tty_buffer`.
struct FlipMembers {
    head: Member,
    free: Member,
    next: Member,
    used: Member,
    size: Member,
    read: Member,
    data: Member,
}

impl<'k> TtyReader<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let tty = Structure::of(kernel, "tty_struct")?;
        let driver = Structure::of(kernel, "tty_driver")?;
        let file = Structure::of(kernel, "file")?;
        let line = Structure::of(kernel, "n_tty_data")?;
        let port = Structure::of(kernel, "tty_port")?;
        let buffer = Structure::of(kernel, "tty_buffer")?;
        let value = |name: &str, before: i64| kernel.types().enumerator(name).unwrap_or(before) as u64;
        let pty = value("TTY_DRIVER_TYPE_PTY", PTY);
        Ok(Self {
            kernel,
            master: (pty, value("PTY_TYPE_MASTER", MASTER)),
            slave: (pty, value("PTY_TYPE_SLAVE", SLAVE)),
            name: tty.member("name")?,
            index: tty.member("index")?,
            driver: tty.member("driver")?,
            link: tty.member("link")?,
            port: tty.member("port")?,
            ldisc: tty.member("ldisc")?,
            ldisc_ops: Structure::of(kernel, "tty_ldisc")?.member("ops")?,
            ldisc_number: Structure::of(kernel, "tty_ldisc_ops")?.member("num")?,
            disc_data: tty.member("disc_data")?,
            local_flags: tty.member("termios.c_lflag")?,
            driver_link: driver.member("tty_drivers")?,
            driver_count: driver.member("num")?,
            driver_ttys: driver.member("ttys")?,
            driver_type: driver.member("type")?,
            driver_subtype: driver.member("subtype")?,
            file_ops: file.member("f_op")?,
            file_data: file.member("private_data")?,
            private_tty: Structure::of(kernel, "tty_file_private")?.member("tty")?,
            line: LineMembers {
                buffer: line.member("read_buf")?,
                head: line.member("read_head")?,
                tail: line.member("read_tail")?,
            },
            flip: FlipMembers {
                head: port.member("buf.head")?,
                free: port.member("buf.free.first")?,
                next: buffer.member("next")?,
                used: buffer.member("used")?,
                size: buffer.member("size")?,
                read: buffer.member("read")?,
                data: buffer.member("data")?,
            },
        })
    }

    /// The terminals in the drivers' tables: consoles, serial lines.
    fn of_drivers(&self, out: &mut Listing<TerminalText>) -> Result<Vec<Gva>, LinuxError> {
        let space = self.kernel.space();
        let drivers = list::walk(space, self.kernel.symbol("tty_drivers")?, MAX_DRIVERS).walk;
        if let Some(warning) = drivers.end.warning("drivers of terminals") {
            out.warn(warning);
        }
        let mut found = Vec::new();
        for node in drivers.items {
            let driver = self.driver_link.container(node);
            let table = self.driver_ttys.pointer(space, driver);
            let count = self.driver_count.number(space, driver);
            let (Ok(table), Ok(count)) = (table, count) else {
                out.warn(format!("the driver of terminals at {driver} cannot be read"));
                continue;
            };
            if table.is_null() {
                continue;
            }
            let count = count.min(MAX_TERMINALS as u64);
            let entries = (0..count).map_while(|nth| space.read_u64(table.wrapping_add(nth * 8)).ok());
            found.extend(entries.filter(|&tty| tty != 0).map(Gva));
        }
        Ok(found)
    }

    /// The terminals that processes have open, and which processes.
    fn of_files(&self, out: &mut Listing<TerminalText>) -> Result<FxHashMap<Gva, Vec<i32>>, LinuxError> {
        let filter = FileFilter {
            directories: false,
            peers: false,
            ..FileFilter::default()
        };
        let files = self.kernel.open_files(filter)?;
        files.warnings.into_iter().for_each(|warning| out.warn(warning));
        let known: Vec<Gva> = ["tty_fops", "console_fops", "ptmx_fops"]
            .iter()
            .filter_map(|name| self.kernel.find_symbol(&[name]))
            .collect();
        let space = self.kernel.space();
        let mut found: FxHashMap<Gva, Vec<i32>> = FxHashMap::default();
        for file in files.rows.iter().filter(|file| file.kind == "CHR") {
            let tty = file.address.and_then(|at| {
                let ops = self.file_ops.pointer(space, at).ok()?;
                let data = self.file_data.pointer(space, at).ok()?;
                let is_tty = known.contains(&ops) && !data.is_null();
                is_tty.then(|| self.private_tty.pointer(space, data).ok())?
            });
            if let Some(tty) = tty.filter(|tty| !tty.is_null()) {
                let pids = found.entry(tty).or_default();
                if !pids.contains(&file.pid) {
                    pids.push(file.pid);
                }
            }
        }
        Ok(found)
    }

    /// The rows of one terminal.
    fn read(&self, tty: Gva, pids: Vec<i32>, left: &mut usize) -> Result<Vec<TerminalText>, ReadError> {
        let space = self.kernel.space();
        let driver = self.driver.pointer(space, tty)?;
        let kind = self.driver_type.number(space, driver)?;
        let side = self.driver_subtype.number(space, driver)?;
        let flags = self.local_flags.number(space, tty)?;
        let name = match (kind, side) == self.slave {
            true => format!("pts/{}", self.index.number(space, tty)?),
            false => guest_text(&space.read_cstr(self.name.at(tty), 64)?),
        };
        let row = TerminalText {
            tty: name,
            what: match (kind, side) == self.master {
                true => "output",
                false => "input",
            },
            buffer: "",
            waiting: false,
            length: 0,
            text: String::new(),
            canonical: flags & ICANON != 0,
            echo: flags & ECHO != 0,
            pids,
            address: tty,
            problems: Vec::new(),
        };
        let mut rows = Vec::new();
        let mut add = |buffer, waiting: bool, bytes: &[u8], problem: Option<Problem>| {
            let bytes = bytes.get(..bytes.len().min(*left)).unwrap_or(bytes);
            *left -= bytes.len();
            // The kernel wipes flip buffers as it hands their bytes on.
            let wiped = !waiting && buffer != "line" && bytes.iter().all(|&byte| byte == 0);
            if !(bytes.is_empty() || wiped) || problem.is_some() {
                rows.push(TerminalText {
                    buffer,
                    waiting,
                    length: bytes.len(),
                    text: guest_text(bytes),
                    problems: problem.into_iter().collect(),
                    ..row.clone()
                });
            }
        };
        match self.line(tty) {
            Ok(Some(held)) => {
                add("line", false, &held.read, None);
                add("line", true, &held.waiting, None);
            }
            Ok(None) => {}
            Err(error) => add("line", false, &[], Some(Problem::read("text", &error))),
        }
        let port = self.port.pointer(space, tty)?;
        if !port.is_null() {
            for (buffer, first) in [("flip", &self.flip.head), ("free", &self.flip.free)] {
                let (parts, error) = self.flips(first.pointer(space, port)?);
                for held in parts {
                    add(buffer, false, &held.read, None);
                    // What is in a free buffer waits for nobody.
                    add(buffer, buffer == "flip", &held.waiting, None);
                }
                if let Some(error) = error {
                    add(buffer, false, &[], Some(Problem::new("text", error)));
                }
            }
        }
        Ok(rows)
    }

    /// What is left over and what waits in the line discipline; `None` for disciplines other than N_TTY.
    fn line(&self, tty: Gva) -> Result<Option<Held>, ReadError> {
        let space = self.kernel.space();
        let ldisc = self.ldisc.pointer(space, tty)?;
        let data = self.disc_data.pointer(space, tty)?;
        if ldisc.is_null() || data.is_null() {
            return Ok(None);
        }
        let ops = self.ldisc_ops.pointer(space, ldisc)?;
        if self.ldisc_number.number(space, ops)? != 0 {
            return Ok(None);
        }
        let mut ring = vec![0; LINE_BUFFER as usize];
        space.read(self.line.buffer.at(data), &mut ring)?;
        let (head, tail) = (
            self.line.head.number(space, data)?,
            self.line.tail.number(space, data)?,
        );
        Ok(Some(ring_parts(&ring, head, tail)))
    }

    /// What is left over and what waits in each of a chain of flip buffers, and what kept the walk from its end.
    fn flips(&self, first: Gva) -> (Vec<Held>, Option<String>) {
        let mut out = Vec::new();
        let mut seen = FxHashSet::default();
        let mut at = first;
        while !at.is_null() {
            if !seen.insert(at) || out.len() >= MAX_BUFFERS {
                return (out, Some("its flip buffers have no end".to_owned()));
            }
            match self.flip(at) {
                Ok((parts, next)) => {
                    out.push(parts);
                    at = next;
                }
                Err(error) => return (out, Some(error.to_string())),
            }
        }
        (out, None)
    }

    fn flip(&self, at: Gva) -> Result<(Held, Gva), ReadError> {
        let (space, flip) = (self.kernel.space(), &self.flip);
        let size = flip.size.number(space, at)?.min(MAX_BUFFER);
        let used = flip.used.number(space, at)?.min(size);
        let read = flip.read.number(space, at)?.min(used);
        let mut bytes = vec![0; used as usize];
        space.read(flip.data.at(at), &mut bytes)?;
        let waiting = bytes.split_off(read as usize);
        Ok((Held { read: bytes, waiting }, flip.next.pointer(space, at)?))
    }
}

/// What of a ring has been read, oldest first, and what waits. `head` and `tail` only ever rise.
fn ring_parts(ring: &[u8], head: u64, tail: u64) -> Held {
    let size = ring.len() as u64;
    let byte = |at: u64| ring.get((at % size.max(1)) as usize).copied().unwrap_or(0);
    let waiting = head.wrapping_sub(tail).min(size);
    let read = tail.min(size - waiting);
    Held {
        read: (tail - read..tail).map(byte).collect(),
        waiting: (0..waiting).map(|nth| byte(tail.wrapping_add(nth))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_read_from_its_oldest_byte_on() {
        let parts = |ring: &[u8], head, tail| {
            let held = ring_parts(ring, head, tail);
            let text = |bytes| String::from_utf8(bytes).unwrap();
            (text(held.read), text(held.waiting))
        };
        let both = |read: &str, waiting: &str| (read.to_owned(), waiting.to_owned());
        assert_eq!(parts(b"abcdef\0\0", 6, 4), both("abcd", "ef"));
        assert_eq!(parts(b"ijcdefgh", 10, 8), both("cdefgh", "ij"));
        assert_eq!(parts(b"abcdefgh", 8, 0), both("", "abcdefgh"));
        assert_eq!(parts(b"abcdefgh", 16, 16), both("abcdefgh", ""));
        assert_eq!(parts(b"abcdefgh", 0, 0), both("", ""));
        assert_eq!(parts(b"", 5, 3), both("", ""));
    }

    #[test]
    fn a_ring_that_lies_is_no_larger_than_it_is() {
        for (head, tail) in [(u64::MAX, 0), (0, u64::MAX), (3, 5), (u64::MAX, u64::MAX)] {
            let held = ring_parts(b"abcdefgh", head, tail);
            assert!(held.read.len() + held.waiting.len() <= 8, "{head} {tail}");
        }
    }
}
