//! `vmsight read`: guest memory by physical, virtual, process or symbolic address.

use std::io::{self, IsTerminal, Write as _};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::Map;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::AddressSpace;

use crate::{
    Outcome,
    args::Global,
    output::{Format, PROBLEMS, Sheet, Style, escape},
    place::{Place, number, size},
    session::{Session, typed},
};

/// Which address space a virtual address belongs to.
#[derive(Args, Clone, Debug)]
pub(crate) struct Where {
    /// Addresses are this process's
    #[arg(long, value_name = "PID", conflicts_with = "dtb")]
    pub(crate) pid: Option<u32>,
    /// Use the page tables at this physical address (CR3)
    #[arg(long, value_name = "GPA", value_parser = |t: &str| number(t).ok_or("not a number"))]
    pub(crate) dtb: Option<u64>,
    /// ADDRESS is a per-CPU variable or pointer: take this CPU's copy
    #[arg(long, value_name = "N", conflicts_with_all = ["pid", "dtb"])]
    pub(crate) cpu: Option<u32>,
}

impl Where {
    /// The space asked for; the kernel's own where nothing is said.
    pub(crate) fn address_space(&self, session: &Session) -> Result<AddressSpace> {
        let kernel = session.kernel()?;
        match (self.pid, self.dtb) {
            (Some(pid), _) => session.process_space(pid),
            (None, Some(dtb)) => Ok(kernel.space().with_dtb(Dtb::from_cr3(dtb))),
            (None, None) => Ok(kernel.space().clone()),
        }
    }
}

/// How bytes are shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
enum As {
    /// Hexadecimal and text side by side
    #[default]
    Hex,
    /// The bytes themselves, for a pipe or a file
    Bytes,
    /// One unsigned byte a row
    U8,
    /// 16-bit little-endian numbers
    U16,
    /// 32-bit little-endian numbers
    U32,
    /// 64-bit little-endian numbers
    U64,
    /// 64-bit numbers with the symbol they point at
    Pointer,
    /// Text up to its zero byte
    String,
}

/// Read guest memory.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vmsight read T linux_banner --as string
  vmsight read T phys:0x1000 4K --as bytes > page
  vmsight read T init_task --type task_struct --fields comm,pid,cred.uid.val
  vmsight read T 0x7ffe12345000 --pid 812 256
  vmsight read T current_task --cpu 0 --as pointer
An object is one row a member in every format: where it lies, its type and value; of a pointer also the symbol it
points at. A dot behind a pointer follows it. Values of enumerations are strings, the name or, where there is none, the number. Arrays and texts are cut
after 64 elements and 4096 bytes, which `problems` then says; --fields 'a[100]' reads one element behind.
What cannot be read is shown as ?? or null with its reason, and makes the exit code 1.")]
pub(crate) struct Read {
    /// What to look into
    target: String,
    /// Where: SYMBOL, SYMBOL+0x10, 0xffff…, phys:0x1000
    place: Place,
    /// How many bytes (64, 0x40, 4K, 2M) [default: 64; of text, to its zero byte, at most 4K]
    #[arg(value_parser = size, conflicts_with = "type_name")]
    length: Option<u64>,
    #[command(flatten)]
    space: Where,
    /// How to show the bytes
    #[arg(long = "as", value_name = "KIND", default_value = "hex")]
    shape: As,
    /// Read an object of this kernel type
    #[arg(long = "type", value_name = "TYPE")]
    type_name: Option<String>,
    /// Only these members of the type (a.b.c, `a[3]`)
    #[arg(long, value_name = "MEMBER,…", value_delimiter = ',', requires = "type_name")]
    fields: Vec<String>,
    /// Write --as bytes to a terminal too
    #[arg(long)]
    force: bool,
}

/// The most that is read at once; larger pieces of memory are what dumps are for.
const READ_LIMIT: u64 = 1 << 30;

impl Read {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        if let Some(name) = &self.type_name {
            return self.object(global, name);
        }
        ensure!(
            self.length() <= READ_LIMIT,
            "reads at most 1G at once; for more take a dump"
        );
        ensure!(
            self.shape != As::Bytes || self.force || !io::stdout().is_terminal(),
            "the guest's bytes may hold what takes over a terminal: send them to a file or a pipe, or say --force"
        );
        let session = self.session(global)?;
        let (start, bytes, holes) = self.bytes(&session)?;
        let missing = |i: usize| {
            let page = ((start & 0xfff) as usize + i) >> 12;
            holes.get(page).copied().unwrap_or(false)
        };
        let style = session.style();
        let unread = holes.iter().filter(|h| **h).count();
        if unread > 0 {
            style.warn(&format!("{unread} of {} pages could not be read", holes.len()));
        }
        match self.shape {
            As::Bytes => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes)?;
                out.flush()?;
            }
            As::Hex if style.format == Format::Table && style.columns.is_none() => {
                hex_dump(style, start, &bytes, &missing)?;
            }
            As::Hex => {
                let text: String = (0..)
                    .zip(&bytes)
                    .map(|(i, b)| hex_or_hole(*b, missing(i)))
                    .collect();
                self.print(style, "bytes", text, unread > 0)?;
            }
            As::String => {
                let end = (0..bytes.len())
                    .find(|i| bytes[*i] == 0 || missing(*i))
                    .unwrap_or(bytes.len());
                if end == bytes.len() && self.length.is_none() {
                    style.warn(&format!(
                        "the text goes on after {end} bytes: give a length to see more"
                    ));
                }
                let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
                if style.format == Format::Table && style.columns.is_none() {
                    let mut out = style.out()?;
                    writeln!(out, "{}", escape(&text))?;
                    out.flush()?;
                } else {
                    self.print(style, "text", text, end < bytes.len() && missing(end))?;
                }
            }
            As::U8 | As::U16 | As::U32 | As::U64 | As::Pointer => {
                self.numbers(&session, start, &bytes, &missing)?;
            }
        }
        session.finish(unread > 0)?;
        Ok(if unread > 0 {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }

    /// How many bytes are read at most.
    fn length(&self) -> u64 {
        self.length.unwrap_or(match self.shape {
            As::String => 4096,
            _ => 64,
        })
    }

    /// A session with no more in it than the address needs.
    fn session(&self, global: &Global) -> Result<Session> {
        if self.place.physical {
            Session::without_kernel(global, &self.target)
        } else {
            Session::open(global, &self.target)
        }
    }

    /// The bytes, zero where nothing could be read, and for each page touched whether it is missing.
    fn bytes(&self, session: &Session) -> Result<(u64, Vec<u8>, Vec<bool>)> {
        let mut bytes = vec![0; usize::try_from(self.length())?];
        let start = if self.place.physical {
            session.gpa(&self.place)?.0
        } else {
            session.gva(&self.place, self.space.cpu)?.0
        };
        let space = if self.place.physical {
            None
        } else {
            Some(self.space.address_space(session)?)
        };
        let mut holes = Vec::new();
        let mut done = 0usize;
        while done < bytes.len() {
            let at = start.wrapping_add(done as u64);
            let piece = (0x1000 - (at & 0xfff) as usize).min(bytes.len() - done);
            let to = &mut bytes[done..done + piece];
            let result = match &space {
                None => session.memory().read(Gpa(at), to).map_err(anyhow::Error::from),
                Some(space) => space.read(Gva(at), to).map_err(anyhow::Error::from),
            };
            if let Err(error) = result {
                tracing::info!("{error:#}");
                to.fill(0);
                holes.push(true);
            } else {
                holes.push(false);
            }
            let ends = self.shape == As::String && bytes[done..done + piece].contains(&0);
            done += piece;
            if ends {
                // What comes behind a text is not asked for, whether it can be read or not.
                bytes.truncate(done);
            }
        }
        if holes.iter().all(|h| *h) && !bytes.is_empty() {
            // Nothing at all: that is an error with its reason, not a dump of question marks.
            let mut byte = [0];
            match &space {
                None => session
                    .memory()
                    .read(Gpa(start), &mut byte)
                    .with_context(|| format!("reading {}", self.place))?,
                Some(space) => space
                    .read(Gva(start), &mut byte)
                    .with_context(|| format!("reading {}", self.place))?,
            }
        }
        Ok((start, bytes, holes))
    }

    fn print(&self, style: &Style, key: &'static str, text: String, holes: bool) -> Result<()> {
        let mut sheet = Sheet::with_keys(&["place", key, PROBLEMS], &["place"]);
        let mut row = Map::new();
        row.insert("place".into(), self.place.to_string().into());
        row.insert(key.into(), text.into());
        if holes {
            row.insert(
                PROBLEMS.into(),
                vec![format!("{key}: pages that could not be read")].into(),
            );
        }
        sheet.rows.push(row);
        style.print(&sheet)
    }

    fn numbers(
        &self,
        session: &Session,
        start: u64,
        bytes: &[u8],
        missing: &dyn Fn(usize) -> bool,
    ) -> Result<()> {
        let width = match self.shape {
            As::U8 => 1,
            As::U16 => 2,
            As::U32 => 4,
            _ => 8,
        };
        let mut sheet = if self.shape == As::Pointer {
            let keys = ["address", "value", "decimal", "symbol", PROBLEMS];
            Sheet::with_keys(&keys, &["address", "value", "symbol"])
        } else {
            let keys = ["address", "value", "decimal", PROBLEMS];
            Sheet::with_keys(&keys, &["address", "value", "decimal"])
        };
        for (i, piece) in bytes.chunks_exact(width).enumerate() {
            let value = piece.iter().rev().fold(0u64, |v, b| (v << 8) | u64::from(*b));
            let mut row = Map::new();
            row.insert(
                "address".into(),
                format!("{:#x}", start.wrapping_add((i * width) as u64)).into(),
            );
            if missing(i * width) || missing(i * width + width - 1) {
                row.insert(PROBLEMS.into(), vec!["value: its page could not be read"].into());
            } else {
                row.insert("value".into(), format!("{value:#x}").into());
                row.insert("decimal".into(), value.into());
                if self.shape == As::Pointer
                    && let Some(name) = session.name_of(Gva(value))
                {
                    row.insert("symbol".into(), name.into());
                }
            }
            sheet.rows.push(row);
        }
        session.style().print(&sheet)
    }

    fn object(&self, global: &Global, type_name: &str) -> Result<Outcome> {
        ensure!(
            !self.place.physical,
            "--type reads by virtual address; leave phys: out"
        );
        let session = Session::open(global, &self.target)?;
        let space = self.space.address_space(&session)?;
        let at = session.gva(&self.place, self.space.cpu)?;
        let source = typed::Source {
            types: session.kernel()?.types(),
            read: &|at, buf| space.read(at, buf),
            name_of: &|at| session.name_of(at),
        };
        let object = typed::read(&source, at, type_name, &self.fields)?;
        let sheet = Sheet {
            rows: object.rows,
            warnings: object.warnings,
            ..Sheet::with_keys(typed::COLUMNS, &["address", "member", "type", "value", "symbol"])
        };
        session.style().print(&sheet)?;
        session.finish(object.unreadable)?;
        Ok(if object.unreadable {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }
}

/// A byte in hexadecimal, `??` where nothing could be read.
fn hex_or_hole(byte: u8, missing: bool) -> String {
    if missing {
        "??".to_owned()
    } else {
        format!("{byte:02x}")
    }
}

/// Sixteen bytes a line, `??` where nothing could be read.
fn hex_dump(style: &Style, start: u64, bytes: &[u8], missing: &dyn Fn(usize) -> bool) -> Result<()> {
    let mut out = style.out()?;
    for (line, piece) in bytes.chunks(16).enumerate() {
        write!(out, "{:016x} ", start.wrapping_add(line as u64 * 16))?;
        for i in 0..16 {
            if i == 8 {
                write!(out, " ")?;
            }
            match piece.get(i) {
                Some(_) if missing(line * 16 + i) => write!(out, " ??")?,
                Some(b) => write!(out, " {b:02x}")?,
                None => write!(out, "   ")?,
            }
        }
        write!(out, "  |")?;
        for (i, b) in piece.iter().enumerate() {
            let c = if missing(line * 16 + i) {
                '?'
            } else if (0x20..0x7f).contains(b) {
                char::from(*b)
            } else {
                '.'
            };
            write!(out, "{c}")?;
        }
        writeln!(out, "|")?;
    }
    out.flush()?;
    Ok(())
}
