//! `vmsight recover files`: the page cache as a tree of files.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::files::{CachedFile, Extracted, extract, list};
use vmsight_linux::Listing;

use crate::{
    Outcome,
    args::Global,
    output::{Fields, Progress, Record, Row, Sheet, Sink},
    session::{Missing, Session},
};

/// Files in the page cache, deleted ones too.
#[derive(Args, Debug)]
#[command(after_help = "\
Shown are the files of every filesystem that something of is in memory, and all files, directories and symbolic links of
filesystems that are nowhere else (tmpfs, ramfs, the first root). `cached` are the bytes in memory, `missing` those that
are only on a disk or in swap, `holes` those that were never written and read as zeros. An overlay's files are shown
under the overlay and under the layer that has them.

--extract and --all write to a new folder: each filesystem below a folder of its own, sparse, and manifest.jsonl with a
line on each file: where it was, its times and owner, what is missing, and of whole files the SHA-256. Names that would
lead out of the folder or steer a terminal are written with %XX. Links are not made; the manifest says where they lead.

What cannot be seen: files that nothing of is in memory; what of a file was only read past the page cache (O_DIRECT);
huge pages of hugetlbfs; raw blocks of block devices; names that the kernel has dropped from memory (such a file is called
MAJOR:MINOR/INODE); before Linux 5.11, files of an overlay under the overlay's own paths.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only what lies at or below this path
    #[arg(long, value_name = "PATH")]
    under: Option<String>,
    /// Only filesystems of these types
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',')]
    fs: Vec<String>,
    /// Only files whose name was removed
    #[arg(long)]
    deleted: bool,
    /// Show them as a tree
    #[arg(long, conflicts_with_all = ["extract", "all"])]
    tree: bool,
    /// Write out the file of this path, or MAJOR:MINOR/INODE where it has none
    #[arg(long, value_name = "PATH", requires = "into")]
    extract: Vec<String>,
    /// Write out all files that would be listed
    #[arg(long, requires = "into", conflicts_with = "extract")]
    all: bool,
    /// The new folder to write to
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,
}

const COLUMNS: &[&str] = &[
    "type", "size", "cached", "missing", "holes", "fs_type", "deleted", "path",
];
const TREE: &[&str] = &["size", "cached", "missing", "holes", "deleted", "tree"];
const WRITTEN: &[&str] = &["size", "written", "missing", "failure", "output"];

impl Row for CachedFile {
    const COLUMNS: &'static [&'static str] = &[
        "path",
        "other_paths",
        "type",
        "size",
        "cached",
        "missing",
        "holes",
        "dirty",
        "swapped",
        "deleted",
        "target",
        "fs_type",
        "device",
        "mount_point",
        "mnt_ns",
        "inode",
        "mode",
        "uid",
        "gid",
        "links",
        "modified",
        "changed",
        "accessed",
        "address",
        "problems",
    ];
}

impl Cmd {
    /// Whether it makes files.
    pub(super) fn writes(&self) -> bool {
        self.into.is_some()
    }

    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        anyhow::ensure!(
            self.into.is_none() || self.all || !self.extract.is_empty(),
            "--into is for --extract PATH or --all"
        );
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "looking through the page cache");
        let mut listing = list(session.kernel()?).context("listing the page cache")?;
        drop(progress);
        listing.rows.retain(|row| self.wants(row));
        if let Some(into) = &self.into {
            return self.write(global, &session, listing, into);
        }
        let any = !listing.rows.is_empty();
        if self.tree {
            let placed = places(&listing.rows);
            let sheet = Sheet {
                keys: [&["depth", "tree"], CachedFile::COLUMNS].concat(),
                columns: TREE,
                rows: placed,
                warnings: listing.warnings,
            };
            session.print(&sheet)?;
        } else {
            session.print(&Sheet::new(COLUMNS, &listing.rows, listing.warnings))?;
        }
        session.let_go(listing.rows);
        Ok(if any { Outcome::Fine } else { Outcome::Nothing })
    }

    fn wants(&self, row: &CachedFile) -> bool {
        let below = |under: &str| {
            let under = under.trim_end_matches('/');
            let mut paths = row.path.iter().chain(&row.other_paths);
            paths.any(|path| {
                path.strip_prefix(under)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
        };
        (!self.deleted || row.deleted)
            && (self.fs.is_empty() || self.fs.iter().any(|fs| **fs == *row.fs_type))
            && self.under.as_deref().is_none_or(below)
    }

    fn write(
        &self,
        global: &Global,
        session: &Session,
        mut listing: Listing<CachedFile>,
        into: &std::path::Path,
    ) -> Result<Outcome> {
        if !self.all {
            for name in &self.extract {
                if !listing.rows.iter().any(|row| row.is_called(name)) {
                    let what = format!("no file {name:?} is in the guest's memory");
                    return Err(Missing(what).into());
                }
            }
            listing
                .rows
                .retain(|row| self.extract.iter().any(|name| row.is_called(name)));
        }
        let total = listing.rows.iter().map(|row| row.cached).sum();
        let progress = Progress::bytes(global.quiet, "writing files", total);
        let mut done = Vec::new();
        let written = extract(session.kernel()?, &listing.rows, into, |file| {
            progress.advance(file.written);
            done.push(file.clone());
        });
        drop(progress);
        written.with_context(|| format!("writing files to {}", into.display()))?;
        let own = ["output", "written", "missing_ranges", "sha256", "failure"];
        let sheet = Sheet::of_done(CachedFile::COLUMNS, &own, WRITTEN, &done, listing.warnings)?;
        session.print(&sheet)?;
        let failed = |file: &Extracted| file.failure.is_some();
        Ok(if done.iter().any(failed) {
            Outcome::Failed
        } else {
            Outcome::Fine
        })
    }
}

/// A file at its place in the tree.
struct Placed<'a> {
    depth: usize,
    tree: String,
    file: &'a CachedFile,
}

impl Record for Placed<'_> {
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> serde_json::Result<()> {
        to.field("depth", &self.depth)?;
        to.field("tree", &self.tree)?;
        (&self.file).fields(to)
    }
}

/// Every file below the nearest directory above it that is shown, filesystem by filesystem.
fn places(rows: &[CachedFile]) -> Vec<Placed<'_>> {
    let mut out = Vec::with_capacity(rows.len());
    for own in rows.chunk_by(|a, b| a.device == b.device) {
        let mut sorted: Vec<&CachedFile> = own.iter().collect();
        // A directory comes right before what lies in it.
        sorted.sort_by(|a, b| parts(a).cmp(parts(b)));
        let mut above: Vec<&str> = Vec::new();
        for file in sorted {
            let path = file.path.as_deref().unwrap_or("?");
            while let Some(directory) = above.last()
                && below(path, directory).is_none()
            {
                above.pop();
            }
            let own = above.last().and_then(|directory| below(path, directory));
            let mut tree = "  ".repeat(above.len().min(64));
            tree.push_str(own.unwrap_or(path));
            if file.kind == "DIR" && !tree.ends_with('/') {
                tree.push('/');
            }
            if let Some(target) = &file.target {
                tree.push_str(" -> ");
                tree.push_str(target);
            }
            out.push(Placed {
                depth: above.len(),
                tree,
                file,
            });
            if file.kind == "DIR" {
                above.push(path);
            }
        }
    }
    out
}

fn parts(file: &CachedFile) -> impl Iterator<Item = &str> {
    file.path
        .as_deref()
        .unwrap_or("")
        .split('/')
        .filter(|part| !part.is_empty())
}

/// What of a path follows a directory, without the `/` between.
fn below<'p>(path: &'p str, directory: &str) -> Option<&'p str> {
    let rest = path.strip_prefix(directory.trim_end_matches('/'))?;
    rest.strip_prefix('/').filter(|rest| !rest.is_empty())
}
