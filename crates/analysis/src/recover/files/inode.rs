//! One inode as a row: names, metadata, and how much of its contents is in memory.

use vmsight_arch::Gva;
use vmsight_linux::clock::rfc3339;
use vmsight_linux::path::PathResolver;
use vmsight_linux::structures::hlist;
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Problem};
use vmsight_memory::ReadError;

use super::CachedFile;
use super::mounts;
use super::overlay::Overlay;
use super::page_cache::{PageCache, Pages};
use super::superblock::SuperBlock;
use crate::recover::frames::PAGE;
use crate::recover::member::{Member, Structure};

/// Names of one file that are shown.
const MAX_LINKS: usize = 64;
/// Entries of all files' page caches that are looked at for each page of memory: each page is in one file only.
const MAX_ENTRIES_A_PAGE: u64 = 4;
/// A symbolic link leads to at most PATH_MAX.
const MAX_TARGET: usize = 4096;
/// The longest name of one file.
const MAX_NAME: usize = 255;
/// What `within_filesystem` appends to the path of what has no name any more.
pub(crate) const REMOVED: &str = "//deleted";

// Of a file's mode, what kind it is (include/uapi/linux/stat.h).
pub(crate) const S_IFMT: u64 = 0o170_000;
pub(crate) const S_IFREG: u64 = 0o100_000;
pub(crate) const S_IFDIR: u64 = 0o040_000;
pub(crate) const S_IFLNK: u64 = 0o120_000;

/// A moment in an inode: seconds and nanoseconds.
struct Moment {
    seconds: Member,
    nanoseconds: Option<Member>,
}

impl Moment {
    fn find(inode: &Structure<'_>, name: &str) -> Option<Self> {
        // A timespec64 up to 6.6, that under another name from 6.7 on, two members since 6.11.
        let paths = |end: &str| format!("{name}{end}|i_{name}{end}|__i_{name}{end}");
        Some(Self {
            seconds: inode
                .find(&paths(".tv_sec"))
                .or_else(|| inode.find(&format!("i_{name}_sec")))?,
            nanoseconds: inode
                .find(&paths(".tv_nsec"))
                .or_else(|| inode.find(&format!("i_{name}_nsec"))),
        })
    }

    fn read(&self, kernel: &Kernel, inode: Gva) -> Option<String> {
        let seconds = self.seconds.number(kernel.space(), inode).ok()? as i64;
        let nanoseconds = match &self.nanoseconds {
            // The upper bits are the kernel's own since 6.13 (I_CTIME_QUERIED).
            Some(member) => (member.number(kernel.space(), inode).ok()? & 0x3fff_ffff) as i64,
            None => 0,
        };
        let moment = seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)?;
        (moment != 0).then(|| rfc3339(moment)).flatten()
    }
}

/// Where an inode's pages are kept.
pub(super) struct MappingReader<'k> {
    kernel: &'k Kernel,
    mapping: Member,
}

impl<'k> MappingReader<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let mapping = Structure::of(kernel, "inode")?.member("i_mapping")?;
        Ok(Self { kernel, mapping })
    }

    /// The `address_space` of the inode at `inode`.
    pub(super) fn of(&self, inode: Gva) -> Result<Gva, LinuxError> {
        let mapping = self.mapping.pointer(self.kernel.space(), inode);
        mapping.map_err(|source| LinuxError::Read {
            what: "inode.i_mapping".to_owned(),
            at: inode,
            source,
        })
    }
}

/// Reads inodes.
pub(super) struct InodeReader<'k> {
    kernel: &'k Kernel,
    pages: PageCache<'k>,
    paths: PathResolver,
    overlay: Option<Overlay>,
    link: Member,
    mode: Member,
    ino: Member,
    uid: Member,
    gid: Member,
    links: Member,
    size: Member,
    mapping: MappingReader<'k>,
    target: Option<Member>,
    aliases: Member,
    alias: Member,
    dentry_name: Member,
    moments: [Option<Moment>; 3],
    /// Entries of page caches that may still be looked at.
    entries: usize,
}

impl<'k> InodeReader<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let (inode, dentry) = (Structure::of(kernel, "inode")?, Structure::of(kernel, "dentry")?);
        let entries = (kernel.memory().size() / PAGE).saturating_mul(MAX_ENTRIES_A_PAGE);
        Ok(Self {
            kernel,
            pages: PageCache::new(kernel)?,
            paths: PathResolver::new(kernel)?,
            overlay: Overlay::find(kernel),
            link: inode.member("i_sb_list")?,
            mode: inode.member("i_mode")?,
            ino: inode.member("i_ino")?,
            uid: inode.member("i_uid.val")?,
            gid: inode.member("i_gid.val")?,
            links: inode.member("i_nlink")?,
            size: inode.member("i_size")?,
            mapping: MappingReader::new(kernel)?,
            target: inode.find("i_link"),
            aliases: inode.member("i_dentry")?,
            alias: dentry.member("d_u.d_alias|d_alias")?,
            dentry_name: dentry.member("d_name.name")?,
            moments: ["mtime", "ctime", "atime"].map(|name| Moment::find(&inode, name)),
            entries: usize::try_from(entries).unwrap_or(usize::MAX),
        })
    }

    /// The row of the inode whose link in its filesystem's list lies at `node`; `None` where it has nothing to show.
    pub(super) fn row(&mut self, block: &SuperBlock, node: Gva) -> Option<CachedFile> {
        let at = self.link.container(node);
        let space = self.kernel.space();
        let mode = self.mode.number(space, at).ok()?;
        let kind = match mode & S_IFMT {
            S_IFREG => "REG",
            S_IFDIR if block.memory_only => "DIR",
            S_IFLNK if block.memory_only => "LNK",
            _ => return None,
        };
        let mut row = CachedFile {
            path: None,
            other_paths: Vec::new(),
            kind,
            size: None,
            cached: 0,
            missing: 0,
            holes: 0,
            dirty: 0,
            swapped: 0,
            deleted: false,
            target: None,
            fs_type: block.fs_type.clone(),
            device: block.device.clone(),
            mount_point: None,
            mnt_ns: None,
            inode: 0,
            mode: format!("{:04o}", mode & 0o7777),
            uid: 0,
            gid: 0,
            links: 0,
            modified: None,
            changed: None,
            accessed: None,
            address: at,
            content: at,
            memory_only: block.memory_only,
            within: None,
            problems: Vec::new(),
        };
        if let Err(error) = self.metadata(&mut row) {
            row.problems.push(Problem::read("inode", &error));
        }
        if block.overlay {
            match self.overlay.as_ref().and_then(|o| o.real(self.kernel, at)) {
                Some(real) => row.content = real,
                // What its types would tell is not known: the file is there under its layer's own path.
                None => return None,
            }
        }
        match kind {
            "REG" => self.contents(&mut row, block.memory_only),
            "LNK" => row.size = self.size.number(space, at).ok(),
            _ => {}
        }
        if !block.memory_only && row.cached == 0 && row.problems.is_empty() {
            return None;
        }
        self.names(&mut row, block);
        if kind == "LNK" {
            self.target(&mut row);
        }
        Some(row)
    }

    fn metadata(&self, row: &mut CachedFile) -> Result<(), ReadError> {
        let (space, at) = (self.kernel.space(), row.address);
        let [modified, changed, accessed] = &self.moments;
        let moment = |m: &Option<Moment>| m.as_ref().and_then(|m| m.read(self.kernel, at));
        (row.modified, row.changed, row.accessed) = (moment(modified), moment(changed), moment(accessed));
        row.inode = self.ino.number(space, at)?;
        row.uid = self.uid.number(space, at)? as u32;
        row.gid = self.gid.number(space, at)? as u32;
        row.links = self.links.number(space, at)? as u32;
        row.deleted = row.links == 0;
        Ok(())
    }

    fn contents(&mut self, row: &mut CachedFile, memory_only: bool) {
        let size = match self.size.number(self.kernel.space(), row.content) {
            Ok(size) => size,
            Err(error) => {
                row.problems.push(Problem::read("size", &error));
                return;
            }
        };
        row.size = Some(size);
        let pages = match self.pages(row.content) {
            Ok(pages) => pages,
            Err(error) => {
                row.problems.push(Problem::new("cached", error.to_string()));
                return;
            }
        };
        let bytes = |index: u64, count: u64| {
            let start = index.saturating_mul(PAGE).min(size);
            index.saturating_add(count).saturating_mul(PAGE).min(size) - start
        };
        for stretch in &pages.stretches {
            let here = bytes(stretch.index, stretch.count);
            row.cached = row.cached.saturating_add(here);
            if stretch.dirty {
                row.dirty = row.dirty.saturating_add(here);
            }
        }
        let moved_out: u64 = pages.moved_out.iter().fold(0, |sum: u64, &(index, count)| {
            sum.saturating_add(bytes(index, count))
        });
        if memory_only {
            row.swapped = moved_out;
            row.missing = moved_out;
            row.holes = size.saturating_sub(row.cached).saturating_sub(moved_out);
        } else {
            row.missing = size.saturating_sub(row.cached);
        }
        if let Some(warning) = pages.end.warning("its page cache") {
            row.problems.push(Problem::new("cached", warning));
        }
        if pages.astray > 0 {
            row.problems.push(Problem::new(
                "cached",
                format!("{} entries of its page cache lead to no page of it", pages.astray),
            ));
        }
    }

    /// The pages of the inode at `inode`.
    fn pages(&mut self, inode: Gva) -> Result<Pages, LinuxError> {
        let mapping = self.mapping.of(inode)?;
        let pages = self.pages.pages(mapping, self.entries)?;
        let seen = pages.stretches.len() + pages.moved_out.len() + pages.astray as usize;
        self.entries = self.entries.saturating_sub(seen);
        Ok(pages)
    }

    fn names(&self, row: &mut CachedFile, block: &SuperBlock) {
        // Many inodes of a guest that lies may share one endless chain: no more of it is followed than is shown.
        let space = self.kernel.space();
        let first = self.aliases.pointer(space, row.address).unwrap_or(Gva(0));
        let aliases = hlist::walk_next(space, first, 0, MAX_LINKS);
        let mut names = aliases.items.iter().filter_map(|&node| {
            let dentry = self.alias.container(node);
            let path = self.paths.within_filesystem(dentry).ok()?;
            if path.path == "/" && row.kind != "DIR" {
                // A file that never was in a directory: memfd, shared memory. Its dentry is its own parent.
                return Some((true, format!("/{}", self.name(dentry).ok()?), path.problem));
            }
            let removed = path.path.strip_suffix(REMOVED).map(str::to_owned);
            Some((removed.is_some(), removed.unwrap_or(path.path), path.problem))
        });
        let shown = |within: &str| mounts::path(&block.mounts, within);
        if let Some((removed, within, problem)) = names.next() {
            row.deleted |= removed;
            match shown(&within) {
                Some((path, mount)) => {
                    row.path = Some(path);
                    row.mount_point = Some(mount.at.clone());
                    row.mnt_ns = Some(mount.namespace);
                }
                None => row.path = Some(within.clone()),
            }
            row.within = Some(within);
            row.problems.extend(problem.map(|p| Problem::new("path", p)));
        }
        row.other_paths = names
            .map(|(_, within, _)| shown(&within).map_or(within, |(path, _)| path))
            .collect();
    }

    /// The name that a dentry itself has.
    fn name(&self, dentry: Gva) -> Result<String, ReadError> {
        let space = self.kernel.space();
        let at = self.dentry_name.pointer(space, dentry)?;
        space.read_cstr(at, MAX_NAME).map(|name| guest_text(&name))
    }

    fn target(&self, row: &mut CachedFile) {
        let space = self.kernel.space();
        let short = self
            .target
            .and_then(|member| member.pointer(space, row.address).ok())
            .filter(|text| !text.is_null());
        let text = match short {
            Some(at) => space.read_cstr(at, MAX_TARGET).map_err(|e| e.to_string()),
            None => self.first_page(row),
        };
        match text {
            Ok(text) => row.target = Some(guest_text(&text)),
            Err(error) => row.problems.push(Problem::new("target", error)),
        }
    }

    /// What a long symbolic link leads to is in its first page.
    fn first_page(&self, row: &CachedFile) -> Result<Vec<u8>, String> {
        let mapping = self.mapping.of(row.content).map_err(|e| e.to_string())?;
        let pages = self.pages.pages(mapping, 1).map_err(|e| e.to_string())?;
        let first = pages.stretches.first().filter(|s| s.index == 0);
        let first = first.ok_or_else(|| "not in memory".to_owned())?;
        let size = row.size.unwrap_or(0).min(MAX_TARGET as u64) as usize;
        let mut text = vec![0; size];
        let memory = self.kernel.memory();
        memory.read(first.gpa, &mut text).map_err(|e| e.to_string())?;
        let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
        text.truncate(end);
        Ok(text)
    }
}
