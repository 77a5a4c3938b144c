//! Files in memory: inodes, by their filesystems' lists of them (`super_block.s_inodes`).

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_linux::{Kernel, LinuxError};

use crate::Findings;
use crate::recover::files::inode::{S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use crate::recover::files::superblock::SuperBlock;
use crate::recover::member::{Member, Structure, read_many};

/// Inodes that are looked at.
const MAX_INODES: usize = 8 << 20;

/// What one inode says.
#[derive(Clone, Copy, Debug)]
pub(super) struct File {
    mode: u64,
    /// Hard links.
    pub(super) links: u64,
    /// Pages of it in the page cache.
    pub(super) pages: u64,
    pub(super) size: u64,
    pub(super) number: u64,
    /// The link of the first of its names in memory.
    pub(super) first_name: Gva,
}

impl File {
    pub(super) fn is_regular(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    /// In a word.
    pub(super) fn kind(&self) -> &'static str {
        match self.mode & S_IFMT {
            S_IFREG => "file",
            S_IFDIR => "directory",
            S_IFLNK => "symbolic link",
            _ => "special file",
        }
    }

    /// How many names it must have. Each directory in a directory is a link of that.
    pub(super) fn names(&self) -> u64 {
        match self.mode & S_IFMT {
            S_IFDIR => self.links.min(1),
            _ => self.links,
        }
    }
}

/// Reads inodes.
pub(super) struct Files<'k> {
    kernel: &'k Kernel,
    /// How far into an inode what is read of it lies.
    size: usize,
    link: Member,
    mode: Member,
    links: Member,
    pages: Member,
    length: Member,
    number: Member,
    first_name: Member,
    left: usize,
}

impl<'k> Files<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let inode = Structure::of(kernel, "inode")?;
        Ok(Self {
            kernel,
            size: usize::try_from(inode.size()).unwrap_or(0).min(4096),
            link: inode.member("i_sb_list")?,
            mode: inode.member("i_mode")?,
            links: inode.member("i_nlink")?,
            pages: inode.member("i_data.nrpages")?,
            length: inode.member("i_size")?,
            number: inode.member("i_ino")?,
            first_name: inode.member("i_dentry.first")?,
            left: MAX_INODES,
        })
    }

    /// The inodes in a filesystem's list, and whether those are all.
    pub(super) fn listed(&mut self, block: &SuperBlock, findings: &mut Findings) -> (Vec<Gva>, bool) {
        let found = block.inodes(self.kernel, self.left);
        self.left = self.left.saturating_sub(found.items.len() + 1);
        findings.end(
            &format!("inodes of {} {}", block.fs_type, block.device),
            &found.end,
        );
        let inodes = found.items.into_iter();
        let inodes = inodes.map(|node| self.link.container(node)).collect();
        (inodes, found.end.is_complete())
    }

    /// Reads inodes side by side, and tells of each that can be read.
    pub(super) fn read_many(&self, all: &[Gva], mut tell: impl FnMut(Gva, File)) {
        read_many(self.kernel.space(), self.size, all, |at, bytes| {
            if let Some(file) = bytes.and_then(|bytes| self.of(bytes)) {
                tell(at, file);
            }
        });
    }

    /// What the inode at `at` says now.
    pub(super) fn read(&self, at: Gva) -> Option<File> {
        let mut bytes = vec![0; self.size];
        self.kernel.space().read(at, &mut bytes).ok()?;
        self.of(&bytes)
    }

    fn of(&self, inode: &[u8]) -> Option<File> {
        Some(File {
            mode: self.mode.of(inode)?,
            links: self.links.of(inode)?,
            pages: self.pages.of(inode)?,
            size: self.length.of(inode)?,
            number: self.number.of(inode)?,
            first_name: Gva(self.first_name.of(inode)?),
        })
    }
}

/// The inodes of one filesystem.
pub(super) struct Listed {
    pub(super) inodes: FxHashSet<Gva>,
    /// Whether those are all.
    pub(super) complete: bool,
}
