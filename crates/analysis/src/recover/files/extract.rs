//! Writing files out: sparse, each under a name that is harmless here, with a list of what they are.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vmsight_arch::{Gpa, Gva};
use vmsight_linux::{Kernel, LinuxError, Problem};

use super::page_cache::{PageCache, Pages, Stretch};
use super::{CachedFile, inode};
use crate::recover::frames::PAGE;
use crate::recover::output::{self, ExtractError, Manifest, create, digest, failure, name};

/// Longer files are made as long as their last byte in memory demands: ext4 ends at 16 TiB.
const MAX_LENGTH: u64 = 1 << 44;
/// Digests are made of no more bytes than so many times the guest's memory: files can be nearly all holes.
const MAX_DIGESTED: u64 = 4;
/// Gaps of one file that are listed.
const MAX_GAPS: usize = 1 << 12;
/// Pages that are copied at once.
const AT_ONCE: u64 = 64;
/// No more is written than so many times the guest's memory: a page is in one file.
const MAX_COPIES: u64 = 2;

/// What became of one file.
#[derive(Clone, Debug, Serialize)]
pub struct Extracted {
    /// The file in the guest.
    #[serde(flatten)]
    pub file: CachedFile,
    /// Where it was written, below the folder. `None` for a symbolic link, of which the list alone tells, and for what could not be
    /// written.
    pub output: Option<PathBuf>,
    /// Bytes of the guest that were written; the rest of the file's length reads as zeros.
    pub written: u64,
    /// What is missing of it: offset and length in bytes.
    pub missing_ranges: Vec<(u64, u64)>,
    /// SHA-256 of the file, where nothing of it is missing, and unless very much was digested already.
    pub sha256: Option<String>,
    /// Why it could not be written, or not as it is.
    pub failure: Option<String>,
}

/// Writes these files of the guest to the folder `into`, which must be new or empty, each filesystem below a folder of its own, and
/// a line of JSON on each to `manifest.jsonl` there. `each` is told of every file as it is done.
///
/// Nothing outside the folder is touched and no link is made or followed: names are written so that they lead only downwards, and a
/// file that would fall onto another is named by its inode.
///
/// # Errors
/// If the folder is there and not empty, or cannot be written to. What concerns one file is in its own row.
pub fn extract(
    kernel: &Kernel,
    files: &[CachedFile],
    into: &Path,
    mut each: impl FnMut(&Extracted),
) -> Result<(), ExtractError> {
    let mut manifest = Manifest::new(into)?;
    let mut writer = Writer::new(kernel, into)?;
    for file in files {
        let done = writer.write(file)?;
        manifest.add(&done)?;
        each(&done);
    }
    manifest.finish()
}

struct Writer<'k> {
    kernel: &'k Kernel,
    into: PathBuf,
    pages: PageCache<'k>,
    mapping: inode::MappingReader<'k>,
    /// Bytes that may still be written.
    left: u64,
    /// Bytes that may still go into digests.
    digestible: u64,
}

impl<'k> Writer<'k> {
    fn new(kernel: &'k Kernel, into: &Path) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel,
            into: into.to_owned(),
            pages: PageCache::new(kernel)?,
            mapping: inode::MappingReader::new(kernel)?,
            left: kernel.memory().size().saturating_mul(MAX_COPIES),
            digestible: kernel.memory().size().saturating_mul(MAX_DIGESTED),
        })
    }

    fn write(&mut self, file: &CachedFile) -> Result<Extracted, ExtractError> {
        let mut done = Extracted {
            file: file.clone(),
            output: None,
            written: 0,
            missing_ranges: Vec::new(),
            sha256: None,
            failure: None,
        };
        let result = match file.kind {
            "LNK" => Ok(()),
            "DIR" => self.directory(file).map(|at| done.output = at),
            _ => self.contents(&mut done),
        };
        done.failure = failure(result, &self.into, done.output.as_deref())?.or(done.failure);
        Ok(done)
    }

    /// The folder of a filesystem.
    fn root(file: &CachedFile) -> PathBuf {
        let device = file.device.replace(':', "-");
        name::component(&format!("{}-{device}", file.fs_type)).into()
    }

    fn directory(&self, file: &CachedFile) -> io::Result<Option<PathBuf>> {
        let root = Self::root(file);
        let Some(within) = file.within.as_deref().filter(|_| !file.deleted) else {
            return Ok(None);
        };
        let at = match name::relative(within) {
            Some(below) => root.join(below),
            None => root,
        };
        output::folders(&self.into, &at).map(|()| Some(at))
    }

    /// Makes the file under its own name, or where that cannot be, by its inode.
    fn open(&self, file: &CachedFile) -> io::Result<(PathBuf, File)> {
        let root = Self::root(file);
        if let Some(below) = file.within.as_deref().and_then(name::relative) {
            let at = root.join(below);
            let folder = at.parent().unwrap_or(&root);
            let made = output::folders(&self.into, folder).and_then(|()| create(&self.into.join(&at)));
            if let Ok(made) = made {
                return Ok((at, made));
            }
        }
        output::folders(&self.into, &root)?;
        let names = [
            format!("inode-{}", file.inode),
            format!("inode-{}-{:x}", file.inode, file.address.0),
        ];
        let mut last = ErrorKind::AlreadyExists.into();
        for name in names {
            let at = root.join(name);
            match create(&self.into.join(&at)) {
                Ok(made) => return Ok((at, made)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn contents(&mut self, done: &mut Extracted) -> io::Result<()> {
        let size = done.file.size.unwrap_or(0);
        let mapping = self.mapping.of(done.file.content).map_err(io::Error::other)?;
        let entries = usize::try_from(self.kernel.memory().size() / PAGE).unwrap_or(usize::MAX);
        let pages = self.pages.pages(mapping, entries).map_err(io::Error::other)?;
        let (at, mut out) = self.open(&done.file)?;
        done.output = Some(at);
        let end = pages
            .stretches
            .iter()
            .map(|s| s.index.saturating_add(s.count).saturating_mul(PAGE).min(size))
            .max()
            .unwrap_or(0);
        if size > MAX_LENGTH || out.set_len(size).is_err() {
            out.set_len(end)?;
            done.failure = Some(format!(
                "it is said to have {size} bytes; the file is as long as what of it is in memory"
            ));
        }
        let mut gaps = Gaps::new(&done.file, &pages);
        for stretch in &pages.stretches {
            self.copy(mapping, stretch, size, &mut out, &mut gaps, &mut done.written)?;
        }
        (done.missing_ranges, done.file.problems) =
            gaps.finish(std::mem::take(&mut done.file.problems), &pages);
        let whole = done.missing_ranges.is_empty() && done.failure.is_none();
        if whole && done.file.problems.is_empty() && size <= self.digestible {
            self.digestible -= size;
            done.sha256 = Some(digest(&mut out)?);
        }
        Ok(())
    }

    /// Writes the pages of a stretch; notes those that cannot be read, or were another file's by then.
    fn copy(
        &mut self,
        mapping: Gva,
        stretch: &Stretch,
        size: u64,
        out: &mut File,
        gaps: &mut Gaps,
        written: &mut u64,
    ) -> io::Result<()> {
        let mut bytes = vec![0; (AT_ONCE * PAGE) as usize];
        let mut done = 0;
        while done < stretch.count {
            let count = AT_ONCE.min(stretch.count - done);
            let offset = stretch.index.saturating_add(done).saturating_mul(PAGE);
            let length = (count * PAGE).min(size.saturating_sub(offset)).min(self.left);
            if length == 0 {
                break;
            }
            let to = bytes.get_mut(..length as usize).unwrap_or(&mut []);
            let from = Gpa(stretch.gpa.0.saturating_add(done * PAGE));
            let read = self.kernel.memory().read(from, to).is_ok();
            if read && (!self.kernel.memory().is_live() || self.pages.holds(mapping, stretch)) {
                // Pages of zeros are left out: the file is sparse.
                for (nth, page) in to.chunks(PAGE as usize).enumerate() {
                    if page.iter().any(|&b| b != 0) {
                        out.write_all_at(page, offset + nth as u64 * PAGE)?;
                    }
                }
                *written += length;
                self.left -= length;
            } else {
                gaps.add(offset, length);
            }
            done += count;
        }
        Ok(())
    }
}

/// What of a file is missing.
struct Gaps {
    ranges: Vec<(u64, u64)>,
    changed: u64,
}

impl Gaps {
    fn new(file: &CachedFile, pages: &Pages) -> Self {
        let size = file.size.unwrap_or(0);
        let clip = |index: u64, end: u64| {
            let start = index.saturating_mul(PAGE).min(size);
            (start, end.saturating_mul(PAGE).min(size) - start)
        };
        let mut ranges = Vec::new();
        if file.memory_only {
            ranges.extend(pages.moved_out.iter().map(|&(i, n)| clip(i, i.saturating_add(n))));
        } else {
            let mut next = 0;
            for stretch in &pages.stretches {
                if stretch.index > next {
                    ranges.push(clip(next, stretch.index));
                }
                next = next.max(stretch.index.saturating_add(stretch.count));
            }
            ranges.push(clip(next, u64::MAX));
        }
        ranges.retain(|&(_, length)| length > 0);
        Self { ranges, changed: 0 }
    }

    /// Something that was in memory and could not be had.
    fn add(&mut self, offset: u64, length: u64) {
        self.ranges.push((offset, length));
        self.changed = self.changed.saturating_add(length);
    }

    fn finish(mut self, mut problems: Vec<Problem>, pages: &Pages) -> (Vec<(u64, u64)>, Vec<Problem>) {
        self.ranges.sort_unstable();
        if self.ranges.len() > MAX_GAPS {
            problems.push(Problem::new(
                "missing_ranges",
                format!("the first {MAX_GAPS} of {}", self.ranges.len()),
            ));
            self.ranges.truncate(MAX_GAPS);
        }
        if self.changed > 0 {
            problems.push(Problem::new(
                "written",
                format!("{} bytes could not be read, or changed meanwhile", self.changed),
            ));
        }
        if !pages.end.is_complete() && problems.iter().all(|p| p.field != "cached") {
            problems.extend(
                pages
                    .end
                    .warning("its page cache")
                    .map(|w| Problem::new("cached", w)),
            );
        }
        (self.ranges, problems)
    }
}
