//! `vmsight read` and `vmsight write`: guest memory by physical, virtual, process or symbolic address.

use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Map, Value};
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::AddressSpace;

use crate::{
    Outcome,
    args::Global,
    output::{Format, Sheet, escape},
    place::{Place, number, size},
    session::Session,
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
What cannot be read is shown as ?? (null in JSON) and makes the exit code 1.")]
pub(crate) struct Read {
    /// What to look into
    target: String,
    /// Where: SYMBOL, SYMBOL+0x10, 0xffff…, phys:0x1000
    place: Place,
    /// How many bytes (64, 0x40, 4K, 2M)
    #[arg(value_parser = size, default_value = "64", conflicts_with = "type_name")]
    length: u64,
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
}

/// The most that is read at once; larger pieces of memory are what dumps are for.
const READ_LIMIT: u64 = 1 << 30;

impl Read {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        if let Some(name) = &self.type_name {
            return self.object(global, name);
        }
        ensure!(
            self.length <= READ_LIMIT,
            "reads at most 1G at once; for more take a dump"
        );
        let session = self.session(global)?;
        let (start, bytes, holes) = self.bytes(&session)?;
        let mut outcome = if holes.iter().all(|h| *h) && !holes.is_empty() {
            Outcome::Nothing
        } else {
            Outcome::Fine
        };
        if holes.contains(&true) {
            crate::output::warn(&format!(
                "{} of {} pages could not be read",
                holes.iter().filter(|h| **h).count(),
                holes.len()
            ));
            outcome = Outcome::Nothing;
        }
        let missing = |i: usize| {
            let page = ((start & 0xfff) as usize + i) >> 12;
            holes.get(page).copied().unwrap_or(false)
        };
        match self.shape {
            As::Bytes => io::stdout().write_all(&bytes)?,
            As::Hex if global.output == Format::Table => hex_dump(start, &bytes, &missing)?,
            As::Hex => {
                let text: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
                self.print(global, [("bytes", text.into())].into())?;
            }
            As::String => {
                let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
                let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
                if global.output == Format::Table {
                    println!("{}", escape(&text));
                } else {
                    self.print(global, [("text", text.into())].into())?;
                }
            }
            As::U8 | As::U16 | As::U32 | As::U64 | As::Pointer => {
                self.numbers(global, &session, start, &bytes, &missing)?;
            }
        }
        Ok(outcome)
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
        let mut bytes = vec![0; usize::try_from(self.length)?];
        let start = if self.place.physical {
            session.gpa(&self.place)?.0
        } else {
            session.gva(&self.place)?.0
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
            done += piece;
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

    fn print(&self, global: &Global, pairs: Vec<(&str, Value)>) -> Result<()> {
        let mut row = Map::new();
        row.insert("place".into(), self.place.to_string().into());
        row.extend(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)));
        global.style().print(&Sheet {
            rows: vec![row],
            columns: &["place"],
            warnings: Vec::new(),
        })
    }

    fn numbers(
        &self,
        global: &Global,
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
        let columns: &[&str] = if self.shape == As::Pointer {
            &["address", "value", "symbol"]
        } else {
            &["address", "value", "decimal"]
        };
        let mut sheet = Sheet {
            columns,
            ..Sheet::default()
        };
        for (i, piece) in bytes.chunks_exact(width).enumerate() {
            let value = piece.iter().rev().fold(0u64, |v, b| (v << 8) | u64::from(*b));
            let mut row = Map::new();
            row.insert(
                "address".into(),
                format!("{:#x}", start.wrapping_add((i * width) as u64)).into(),
            );
            if missing(i * width) || missing(i * width + width - 1) {
                row.insert("value".into(), Value::Null);
            } else {
                row.insert("value".into(), format!("{value:#x}").into());
                row.insert("decimal".into(), value.into());
                if self.shape == As::Pointer {
                    row.insert(
                        "symbol".into(),
                        session.name_of(Gva(value)).map_or(Value::Null, Value::from),
                    );
                }
            }
            sheet.rows.push(row);
        }
        global.style().print(&sheet)
    }

    fn object(&self, global: &Global, type_name: &str) -> Result<Outcome> {
        ensure!(
            !self.place.physical,
            "--type reads by virtual address; leave phys: out"
        );
        let session = Session::open(global, &self.target)?;
        let space = self.space.address_space(&session)?;
        let at = session.gva(&self.place)?;
        let rows = crate::session::typed::read(&session, &space, at, type_name, &self.fields)?;
        if global.output == Format::Table {
            let columns: &[&str] = &["address", "member", "type", "value"];
            global.style().print(&Sheet {
                rows,
                columns,
                warnings: Vec::new(),
            })?;
        } else {
            // For programs the object is an object: member name to value.
            let mut object = Map::new();
            object.insert("address".into(), format!("{at:#x}").into());
            for mut row in rows {
                if let (Some(Value::String(name)), Some(value)) = (row.remove("member"), row.remove("value"))
                {
                    object.insert(name, value);
                }
            }
            global.style().print(&Sheet {
                rows: vec![object],
                columns: &["address"],
                warnings: Vec::new(),
            })?;
        }
        Ok(Outcome::Fine)
    }
}

/// Sixteen bytes a line, `??` where nothing could be read.
fn hex_dump(start: u64, bytes: &[u8], missing: &dyn Fn(usize) -> bool) -> Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
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

/// Write guest memory of a live VM.
#[derive(Args, Debug)]
#[command(after_help = "\
Writing changes a running guest and can crash it; nothing is written without --write. What was there before is
printed, so that it can be put back. The pages' own protection does not matter: this writes as the hardware would.
Examples:
  vmsight write --write T hostname_buf --string web1
  vmsight write --write T 0xffff888003a41000 --hex 90909090
  vmsight write --write T phys:0x7000 --number 1 --width 4")]
pub(crate) struct Write {
    /// What to write to: a live VM
    target: String,
    /// Where: SYMBOL, SYMBOL+0x10, 0xffff…, phys:0x1000
    place: Place,
    #[command(flatten)]
    space: Where,
    #[command(flatten)]
    data: Data,
    /// Bytes that --number is written as, little-endian: 1, 2, 4 or 8
    #[arg(long, value_name = "N", default_value_t = 8, requires = "number")]
    width: u8,
    /// Yes, change the guest
    #[arg(long)]
    write: bool,
    /// Write only if these bytes (hexadecimal) are there now
    #[arg(long, value_name = "HEX")]
    expect: Option<String>,
}

/// What is written.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct Data {
    /// Bytes in hexadecimal
    #[arg(long, value_name = "HEX")]
    hex: Option<String>,
    /// Text, with a zero byte at its end
    #[arg(long, value_name = "TEXT")]
    string: Option<String>,
    /// A number
    #[arg(long, value_name = "N", value_parser = |t: &str| number(t).ok_or("not a number"))]
    number: Option<u64>,
    /// The contents of a file, at most 1 MiB
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Write {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let bytes = self.bytes()?;
        ensure!(!bytes.is_empty(), "there is nothing to write");
        ensure!(
            self.write,
            "this would change {} bytes of a running guest; say --write if that is wanted",
            bytes.len()
        );
        let session = Session::for_writing(global, &self.target, !self.place.physical)?;
        let mut before = vec![0; bytes.len()];
        let address;
        if self.place.physical {
            let gpa = session.gpa(&self.place)?;
            address = gpa.0;
            session
                .memory()
                .read(gpa, &mut before)
                .with_context(|| format!("reading what is at {}", self.place))?;
            self.expected(&before)?;
            session
                .memory()
                .write(gpa, &bytes)
                .with_context(|| format!("writing to {}", self.place))?;
        } else {
            let gva = session.gva(&self.place)?;
            address = gva.0;
            let space = self.space.address_space(&session)?;
            space
                .read(gva, &mut before)
                .with_context(|| format!("reading what is at {}", self.place))?;
            self.expected(&before)?;
            space
                .write(gva, &bytes)
                .with_context(|| format!("writing to {}", self.place))?;
        }
        let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let mut row = Map::new();
        row.insert("place".into(), self.place.to_string().into());
        row.insert("address".into(), format!("{address:#x}").into());
        row.insert("length".into(), bytes.len().into());
        row.insert("before".into(), hex(&before).into());
        row.insert("after".into(), hex(&bytes).into());
        global.style().print(&Sheet {
            rows: vec![row],
            columns: &["address", "length", "before", "after"],
            warnings: Vec::new(),
        })?;
        Ok(Outcome::Fine)
    }

    fn expected(&self, before: &[u8]) -> Result<()> {
        let Some(expect) = &self.expect else { return Ok(()) };
        let expect = parse_hex(expect)?;
        ensure!(
            before.starts_with(&expect),
            "nothing written: {} does not hold what --expect says but {}",
            self.place,
            before
                .iter()
                .take(expect.len())
                .map(|b| format!("{b:02x}"))
                .collect::<String>()
        );
        Ok(())
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        let data = &self.data;
        if let Some(hex) = &data.hex {
            return parse_hex(hex);
        }
        if let Some(text) = &data.string {
            let mut bytes = text.clone().into_bytes();
            bytes.push(0);
            return Ok(bytes);
        }
        if let Some(n) = data.number {
            let width = usize::from(self.width);
            ensure!(matches!(width, 1 | 2 | 4 | 8), "--width is 1, 2, 4 or 8");
            ensure!(
                width == 8 || n >> (width * 8) == 0,
                "{n:#x} does not fit into {width} bytes"
            );
            return Ok(n.to_le_bytes()[..width].to_vec());
        }
        if let Some(file) = &data.file {
            let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
            ensure!(bytes.len() <= 1 << 20, "{} is larger than 1 MiB", file.display());
            return Ok(bytes);
        }
        bail!("say what to write: --hex, --string, --number or --file")
    }
}

fn parse_hex(text: &str) -> Result<Vec<u8>> {
    let digits: Vec<u8> = text
        .trim_start_matches("0x")
        .chars()
        .filter(|c| !c.is_whitespace() && *c != ':')
        .map(|c| {
            c.to_digit(16)
                .and_then(|d| u8::try_from(d).ok())
                .with_context(|| format!("{c:?} is no hexadecimal digit"))
        })
        .collect::<Result<_>>()?;
    ensure!(
        digits.len().is_multiple_of(2),
        "an odd number of hexadecimal digits"
    );
    Ok(digits.chunks_exact(2).map(|d| d[0] << 4 | d[1]).collect())
}
