//! Files in the page cache: what of each file of a guest lies in its memory, and the files that are nowhere else.
//!
//! Every filesystem's inodes are gone through, not the processes' open files: a file that nobody has open, and one whose name was
//! removed while somebody has it open, are inodes like any other.

mod extract;
pub(crate) mod inode;
pub(crate) mod mounts;
mod overlay;
pub(crate) mod page_cache;
pub(crate) mod pieces;
pub(crate) mod superblock;

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::listing::address;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};

pub use super::output::ExtractError;
pub use extract::{Extracted, extract};

use inode::InodeReader;
use superblock::SuperBlock;

/// Rows of one listing.
const MAX_ROWS: usize = 1 << 20;
/// Bytes of names in one listing.
const MAX_NAMES: usize = 256 << 20;
/// Inodes that are looked at.
const MAX_INODES: usize = 8 << 20;

/// A file, directory or symbolic link whose inode is in memory.
#[derive(Clone, Debug, Serialize)]
pub struct CachedFile {
    /// Its path where its filesystem is mounted, else within the filesystem. `None` where no name of it is in memory.
    pub path: Option<String>,
    /// Its other names (hard links) that are in memory.
    pub other_paths: Vec<String>,
    /// `REG`, `DIR` or `LNK`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Bytes of it in memory.
    pub cached: u64,
    /// Bytes of it that are not in memory, but on a disk, in swap or nowhere.
    pub missing: u64,
    /// Bytes that were never written, of files that are only in memory: they read as zeros.
    pub holes: u64,
    /// Bytes in memory that are not on the disk yet. Of a file that is only in memory this says nothing.
    pub dirty: u64,
    /// Bytes that are in swap.
    pub swapped: u64,
    /// Its name was removed, and something still holds it.
    pub deleted: bool,
    /// What a symbolic link leads to.
    pub target: Option<String>,
    /// Type of its filesystem.
    pub fs_type: Arc<str>,
    /// Device number of its filesystem, `MAJOR:MINOR`.
    pub device: Arc<str>,
    /// Where its filesystem is mounted; `None` where it is mounted nowhere.
    pub mount_point: Option<Arc<str>>,
    /// The mount namespace that the path is one of: of the first process in whose namespace the filesystem is mounted.
    pub mnt_ns: Option<u32>,
    /// Inode number.
    pub inode: u64,
    /// Permissions, in octal.
    pub mode: String,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Hard links; 0 for one that was removed.
    pub links: u32,
    /// When its contents were last changed, RFC 3339.
    pub modified: Option<String>,
    /// When it or its metadata were last changed, RFC 3339.
    pub changed: Option<String>,
    /// When it was last read, RFC 3339, as far as the filesystem keeps that.
    pub accessed: Option<String>,
    /// The `struct inode`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// The inode that has its contents: another one on an overlay.
    #[serde(skip)]
    content: Gva,
    /// What is not in memory was never written, or is in swap.
    #[serde(skip)]
    memory_only: bool,
    /// Its path within its filesystem.
    #[serde(skip)]
    within: Option<String>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl CachedFile {
    /// Whether all of its contents are in memory.
    pub fn is_whole(&self) -> bool {
        self.size.is_some() && self.missing == 0 && self.problems.is_empty()
    }

    /// Whether it has this path or, written `MAJOR:MINOR/INODE`, this number.
    pub fn is_called(&self, name: &str) -> bool {
        self.path.as_deref() == Some(name)
            || self.other_paths.iter().any(|path| path == name)
            || name
                .strip_prefix(&*self.device)
                .and_then(|rest| rest.strip_prefix('/'))
                .is_some_and(|inode| inode.parse() == Ok(self.inode))
    }

    /// Bytes of its names.
    fn name_bytes(&self) -> usize {
        let names = [&self.path, &self.within, &self.target];
        names.into_iter().flatten().map(String::len).sum::<usize>()
            + self.other_paths.iter().map(String::len).sum::<usize>()
    }
}

/// The files that something of is in memory, with the directories and symbolic links of filesystems that are in memory only,
/// filesystem by filesystem, sorted by path.
///
/// # Errors
/// If the list of filesystems cannot be found or the kernel's types lack a member.
pub fn list(kernel: &Kernel) -> Result<Listing<CachedFile>, LinuxError> {
    let mut listing = Listing::default();
    let mut blocks = superblock::all(kernel, &mut listing)?;
    superblock::find_mounts(kernel, &mut blocks, &mut listing);
    let mut reader = InodeReader::new(kernel)?;
    let (mut names, mut inodes) = (MAX_NAMES, MAX_INODES);
    for block in &blocks {
        let first = listing.rows.len();
        let full = walk(kernel, &mut reader, block, &mut listing, &mut names, &mut inodes);
        if let Some(own) = listing.rows.get_mut(first..) {
            own.sort_by(|a, b| (&a.path, a.inode).cmp(&(&b.path, b.inode)));
        }
        if full {
            listing.warn("files: cut, the listing holds too many already");
            break;
        }
    }
    Ok(listing)
}

/// Adds the files of one filesystem; true where there is no room for more.
fn walk(
    kernel: &Kernel,
    reader: &mut InodeReader<'_>,
    block: &SuperBlock,
    listing: &mut Listing<CachedFile>,
    names: &mut usize,
    inodes: &mut usize,
) -> bool {
    let found = block.inodes(kernel, *inodes);
    let what = format!("inodes of {} {}", block.fs_type, block.device);
    if let Some(warning) = found.end.warning(&what) {
        listing.warn(warning);
    }
    *inodes = inodes.saturating_sub(found.items.len());
    for node in found.items {
        let Some(row) = reader.row(block, node) else {
            continue;
        };
        let Some(left) = names.checked_sub(row.name_bytes()) else {
            return true;
        };
        *names = left;
        if listing.rows.len() >= MAX_ROWS {
            return true;
        }
        listing.rows.push(row);
    }
    *inodes == 0
}
