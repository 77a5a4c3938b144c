//! `vmsight write`: guest memory changed, and what became of it.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Map;

use crate::{
    Outcome,
    args::Global,
    commands::raw::Where,
    output::{PROBLEMS, Sheet},
    place::{Place, number},
    session::Session,
};

/// Write guest memory of a live VM.
#[derive(Args, Debug)]
#[command(after_help = "\
Writing changes a running guest and can crash it; nothing is written without --write. What was there before is
printed, so that it can be put back, and what is there afterwards, read back: where that is not what was written, be
it that writing failed midway or that the guest wrote there too, the exit code is 2.
The pages' own protection does not matter: this writes as the hardware would.
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
        let change = if self.place.physical {
            let gpa = session.gpa(&self.place)?;
            let memory = session.memory();
            let read = |at: u64, to: &mut [u8]| Ok(memory.read(gpa.wrapping_add(at), to)?);
            let write = || Ok(memory.write(gpa, &bytes)?);
            self.change(gpa.0, &bytes, &read, &write)?
        } else {
            let gva = session.gva(&self.place, self.space.cpu)?;
            let space = self.space.address_space(&session)?;
            let read = |at: u64, to: &mut [u8]| Ok(space.read(gva.wrapping_add(at), to)?);
            let write = || Ok(space.write(gva, &bytes)?);
            self.change(gva.0, &bytes, &read, &write)?
        };
        session.print(&change.sheet(&self.place))?;
        change.verdict(&self.place)
    }

    /// Writes, and reads back what is there then.
    fn change(
        &self,
        address: u64,
        bytes: &[u8],
        read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
        write: &dyn Fn() -> Result<()>,
    ) -> Result<Change> {
        let mut before = vec![0; bytes.len()];
        read(0, &mut before).with_context(|| format!("reading what is at {}", self.place))?;
        self.expected(&before)?;
        let failure = write().err();
        // Piece by piece: where writing failed midway, part of it may be out of reach.
        let mut after = Vec::with_capacity(bytes.len());
        while after.len() < bytes.len() {
            let done = after.len() as u64;
            let to_page_end = 0x1000 - (address.wrapping_add(done) & 0xfff) as usize;
            let mut piece = vec![0; to_page_end.min(bytes.len() - after.len())];
            match read(done, &mut piece) {
                Ok(()) => after.extend(piece.into_iter().map(Some)),
                Err(_) => after.extend(piece.iter().map(|_| None)),
            }
        }
        Ok(Change {
            address,
            wanted: bytes.to_vec(),
            before,
            after,
            failure,
        })
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

/// What a write did to memory.
struct Change {
    address: u64,
    wanted: Vec<u8>,
    before: Vec<u8>,
    /// Read back; `None` where it could not be.
    after: Vec<Option<u8>>,
    /// Why writing failed.
    failure: Option<anyhow::Error>,
}

const COLUMNS: &[&str] = &[
    "place", "address", "length", "before", "written", "after", "changed", PROBLEMS,
];

impl Change {
    /// Bytes that are not what they were before.
    fn changed(&self) -> usize {
        self.before
            .iter()
            .zip(&self.after)
            .filter(|(b, a)| a.is_some_and(|a| a != **b))
            .count()
    }

    /// How many bytes do not hold what was written, and where the first lies.
    fn wrong(&self) -> Option<(usize, u64)> {
        let mut wrong = (0u64..)
            .zip(self.wanted.iter().zip(&self.after))
            .filter(|(_, (w, a))| **a != Some(**w));
        let (first, _) = wrong.next()?;
        Some((1 + wrong.count(), self.address.wrapping_add(first)))
    }

    fn problem(&self) -> Option<String> {
        let (count, first) = self.wrong()?;
        Some(format!(
            "{count} of {} bytes, from {first:#x} on, do not hold what was to be written",
            self.wanted.len()
        ))
    }

    fn sheet(&self, place: &Place) -> Sheet {
        let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let after = |b: &Option<u8>| b.map_or_else(|| "??".to_owned(), |b| format!("{b:02x}"));
        let problems: Vec<String> = self.problem().iter().map(|p| format!("after: {p}")).collect();
        let mut row = Map::new();
        row.insert("place".into(), place.to_string().into());
        row.insert("address".into(), format!("{:#x}", self.address).into());
        row.insert("length".into(), self.wanted.len().into());
        row.insert("before".into(), hex(&self.before).into());
        row.insert("written".into(), hex(&self.wanted).into());
        row.insert(
            "after".into(),
            self.after.iter().map(after).collect::<String>().into(),
        );
        row.insert("changed".into(), self.changed().into());
        row.insert(PROBLEMS.into(), problems.into());
        Sheet {
            rows: vec![row],
            ..Sheet::with_keys(COLUMNS, &["address", "length", "before", "after", "changed"])
        }
    }

    /// An error where memory does not hold now what was to be written.
    fn verdict(self, place: &Place) -> Result<Outcome> {
        let problem = self.problem();
        match (self.failure, problem) {
            (None, None) => Ok(Outcome::Fine),
            (None, Some(problem)) => {
                bail!("writing to {place}: {problem}; the guest writes there too, or it is no memory")
            }
            (Some(error), None) => Err(error.context(format!(
                "writing to {place} failed, yet all of it is there as it was to be"
            ))),
            (Some(error), Some(problem)) => Err(error.context(format!("writing to {place}: {problem}"))),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn command() -> Write {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            write: Write,
        }
        Line::parse_from(["x", "target", "phys:0xffe", "--hex", "aabbccdd"]).write
    }

    /// Memory of two pages, of which writes reach `reach` bytes.
    fn write_to(reach: usize, then: &[u8], reads_after: usize) -> Change {
        let memory = RefCell::new(vec![1u8, 2, 3, 4]);
        let wrote = RefCell::new(false);
        let read = |at: u64, to: &mut [u8]| {
            let from = at as usize;
            ensure!(!*wrote.borrow() || from + to.len() <= reads_after, "gone");
            to.copy_from_slice(&memory.borrow()[from..from + to.len()]);
            Ok(())
        };
        let write = || {
            let bytes = [0xaa, 0xbb, 0xcc, 0xdd];
            memory.borrow_mut()[..reach].copy_from_slice(&bytes[..reach]);
            memory.borrow_mut()[..then.len()].copy_from_slice(then);
            *wrote.borrow_mut() = true;
            ensure!(reach == 4, "no more memory");
            Ok(())
        };
        command()
            .change(0xffe, &[0xaa, 0xbb, 0xcc, 0xdd], &read, &write)
            .unwrap()
    }

    fn row(change: &Change) -> Map<String, serde_json::Value> {
        let sheet = change.sheet(&command().place);
        assert_eq!(sheet.rows[0].keys().collect::<Vec<_>>(), COLUMNS);
        sheet.rows[0].clone()
    }

    #[test]
    fn what_is_there_afterwards_is_read_back() {
        let change = write_to(4, &[], 4);
        let row = row(&change);
        assert_eq!(
            (&row["before"], &row["after"]),
            (&"01020304".into(), &"aabbccdd".into())
        );
        assert_eq!(row["changed"], 4);
        assert!(change.verdict(&command().place).is_ok());
    }

    #[test]
    fn a_write_that_fails_midway_says_what_it_changed() {
        let change = write_to(2, &[], 4);
        let row = row(&change);
        assert_eq!((&row["after"], &row["changed"]), (&"aabb0304".into(), &2.into()));
        let error = format!("{:#}", change.verdict(&command().place).unwrap_err());
        assert!(
            error.contains("2 of 4 bytes, from 0x1000 on") && error.contains("no more memory"),
            "{error}"
        );
    }

    #[test]
    fn what_cannot_be_read_back_is_marked() {
        let change = write_to(2, &[], 2);
        let row = row(&change);
        assert_eq!((&row["after"], &row["changed"]), (&"aabb????".into(), &2.into()));
        assert!(change.verdict(&command().place).is_err());
    }

    #[test]
    fn a_guest_that_writes_there_too_is_no_success() {
        let change = write_to(4, &[9], 4);
        assert_eq!(row(&change)["after"], "09bbccdd");
        assert!(change.verdict(&command().place).is_err());
    }

    #[test]
    fn bytes_in_hexadecimal() {
        assert_eq!(parse_hex("0x90:91 92").unwrap(), [0x90, 0x91, 0x92]);
        assert!(parse_hex("9").is_err() && parse_hex("zz").is_err());
    }
}
