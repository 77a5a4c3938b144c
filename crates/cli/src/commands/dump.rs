//! `vmsight dump`: the guest's memory as a file, with an account of how it was made.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;
use vmsight_arch::Registers;
use vmsight_linux::clock::rfc3339;
use vmsight_memory::Region;
use vmsight_memory::dump::Coding;
use vmsight_memory::dump::write::{Contents, OutFormat, Written, find_vmcoreinfo, write};

use super::until::on_interrupt;
use crate::{
    Outcome,
    args::Global,
    output::{Progress, Sheet},
    session::Session,
};

/// Write the guest's memory as a dump, or a dump in another format.
#[derive(Args, Debug)]
#[command(after_help = "\
Formats:
  elf          an ELF core with the vCPUs' registers: what most tools read
  lime, avml   LiME, and AVML's LiME with Snappy
  kdump-zstd, kdump-zlib, kdump-snappy
               compressed kdump files: small, and read page by page
  raw          the byte at offset x is the one at address x
Without --format the name's end tells (.lime, .avml, .kdump, .raw, .img, .bin, .vmem), else it is elf.

Beside OUT comes OUT.json: what was dumped, when, by which version, and the SHA-256 of the file and of each region of memory.
Both are moved to their names when they are whole; a dump that was interrupted leaves nothing. Only their owner can read them.

A guest that runs changes while it is dumped: --pause stops it for that time.")]
pub(crate) struct Cmd {
    /// What to dump
    target: String,
    /// The file to write
    out: PathBuf,
    /// As what
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    format: Option<OutFormat>,
    /// Replace OUT and OUT.json if they are there
    #[arg(long)]
    force: bool,
}

/// For clap: a format by its name.
fn format(text: &str) -> Result<OutFormat, String> {
    text.parse()
}

const COLUMNS: &[&str] = &["file", "format", "memory", "bytes", "stored", "sha256"];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let account = with_json(&self.out);
        for path in [&self.out, &account] {
            ensure!(!path.is_dir(), "{} is a directory", path.display());
            ensure!(
                self.force || !path.exists(),
                "{} is there already: --force replaces it",
                path.display()
            );
        }
        let format = self.format.unwrap_or_else(|| by_name(&self.out));
        let session = Session::without_kernel(global, &self.target)?;
        let stop = on_interrupt()?;
        let begun = SystemTime::now();
        let (registers, no_registers) = registers(&session, format);
        if let Some(why) = &no_registers {
            session.style().warn(why);
        }
        let target = session.target();
        // The dump's own, or what the guest's kernel keeps ready for a crash.
        let found = match (&target.vmcoreinfo, format.has_notes()) {
            (None, true) => find_vmcoreinfo(&target.memory, &stop),
            _ => None,
        };
        let vmcoreinfo = target
            .vmcoreinfo
            .as_deref()
            .or(found.as_ref().map(|found| found.text.as_str()));
        let contents = Contents {
            memory: &target.memory,
            registers: &registers,
            vmcoreinfo,
        };

        // Made first: where it cannot be, nothing needs to be read.
        let (part, account_part) = (beside(&self.out)?, beside(&account)?);
        let progress = Progress::bytes(global.quiet, "dumping memory", target.memory.size());
        let written = write(&contents, format, part.as_file(), &stop, &|bytes| {
            progress.advance(bytes)
        });
        drop(progress);
        let read = SystemTime::now();
        session.resume();
        let written = written.with_context(|| format!("writing {}", self.out.display()))?;
        {
            let _progress = Progress::spinner(global.quiet, "waiting for the disk");
            part.as_file()
                .sync_all()
                .with_context(|| format!("writing {}", self.out.display()))?;
        }
        let story = json!({
            "tool": "vmsight",
            "version": env!("CARGO_PKG_VERSION"),
            "command": std::env::args().collect::<Vec<_>>(),
            "target": self.target,
            "name": target.name,
            "kind": target.kind.to_string(),
            "pid": target.info.as_ref().map(|info| info.pid),
            "uuid": target.info.as_ref().and_then(|info| info.uuid.clone()),
            "live": target.memory.is_live(),
            "paused": target.memory.is_live().then_some(global.pause),
            "begun": time(begun),
            "read": time(read),
            "file": self.out.file_name().map(|name| name.to_string_lossy()),
            "format": format.to_string(),
            "bytes": written.len,
            "stored_bytes": written.stored,
            "sha256": hex(&written.sha256),
            "memory_bytes": written.regions.iter().map(|r| r.region.len).sum::<u64>(),
            "regions": written.regions.iter().map(|r| {
                let mut region = bounds(r.region);
                region.insert("sha256".into(), hex(&r.sha256).into());
                region
            }).collect::<Vec<_>>(),
            "unreadable_bytes": written.unreadable_bytes,
            "unreadable": written.unreadable.iter().map(|(region, error)| {
                let mut region = bounds(*region);
                region.insert("reason".into(), error.to_string().into());
                region
            }).collect::<Vec<_>>(),
            "missing": target.memory.missing().iter().copied().map(bounds).collect::<Vec<_>>(),
            "left_out": written.left_out.iter().copied().map(bounds).collect::<Vec<_>>(),
            "vcpus": registers.len(),
            "no_registers": no_registers,
            "vmcoreinfo": found.as_ref().map(|found| format!("{:#x}", found.gpa)),
            "notes": target.notes,
        });
        self.tell(&session, &written);
        write_account(&account_part, &story).with_context(|| format!("writing {}", account.display()))?;
        self.place(part, &self.out)?;
        self.place(account_part, &account)?;

        let mut row = Map::new();
        row.insert("file".into(), self.out.display().to_string().into());
        for key in ["format", "bytes", "sha256"] {
            row.insert(key.into(), story.get(key).cloned().unwrap_or_default());
        }
        row.insert(
            "memory".into(),
            story.get("memory_bytes").cloned().unwrap_or_default(),
        );
        row.insert("stored".into(), written.stored.into());
        let mut sheet = Sheet::with_keys(COLUMNS, COLUMNS);
        sheet.rows.push(row);
        session.style().print(&sheet)?;
        Ok(Outcome::Fine)
    }

    /// What of memory is not in the dump.
    fn tell(&self, session: &Session, written: &Written) {
        let style = session.style();
        if written.unreadable_bytes > 0 {
            style.warn(&format!(
                "{} KiB of memory could not be read and are not in the dump: {} says which",
                written.unreadable_bytes.div_ceil(1024),
                with_json(&self.out).display()
            ));
        }
        for region in &written.left_out {
            style.note(&format!(
                "the memory at {region} is not in the raw image, which would be 4 GiB long for it"
            ));
        }
    }

    /// Gives a file that is whole its name.
    fn place(&self, part: NamedTempFile, path: &Path) -> Result<File> {
        let placed = match self.force {
            true => part.persist(path),
            // Somebody may have made one meanwhile.
            false => part.persist_noclobber(path),
        };
        placed
            .map_err(|error| error.error)
            .with_context(|| format!("moving what was written to {}", path.display()))
    }
}

/// What goes into the dump of registers; and why there are none, where the format has a place for them.
fn registers(session: &Session, format: OutFormat) -> (Vec<Registers>, Option<String>) {
    if !format.has_notes() {
        return (Vec::new(), None);
    }
    match session.registers(None) {
        Ok(registers) => (registers, None),
        Err(error) => (Vec::new(), Some(format!("the dump has no registers: {error:#}"))),
    }
}

/// The format that a file's name asks for.
fn by_name(path: &Path) -> OutFormat {
    let end = path.extension().map(|end| end.to_string_lossy().to_lowercase());
    match end.as_deref() {
        Some("lime") => OutFormat::Lime,
        Some("avml") => OutFormat::Avml,
        Some("kdump") => OutFormat::Kdump(Coding::Zstd),
        Some("raw" | "img" | "bin" | "vmem") => OutFormat::Raw,
        _ => OutFormat::Elf,
    }
}

/// `OUT.json`.
fn with_json(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// A file beside another, under a name that nobody can know before; it goes away unless it is moved.
fn beside(path: &Path) -> Result<NamedTempFile> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    tempfile::Builder::new()
        .prefix(".vmsight-")
        // A guest's memory has its secrets.
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(folder)
        .with_context(|| format!("making a file in {}", folder.display()))
}

fn write_account(file: &NamedTempFile, story: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(story)?;
    text.push('\n');
    let mut out = file.as_file();
    out.write_all(text.as_bytes())?;
    out.sync_all()?;
    Ok(())
}

fn bounds(region: Region) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("start".into(), format!("{:#x}", region.start).into());
    row.insert("bytes".into(), region.len.into());
    row
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn time(at: SystemTime) -> Option<String> {
    let since = at.duration_since(UNIX_EPOCH).ok()?;
    rfc3339(i64::try_from(since.as_nanos()).ok()?)
}
