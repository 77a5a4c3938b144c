//! The filesystems there are: `super_blocks` (fs/super.c), mounted or not.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_linux::structures::{Walk, list};
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing};

use super::mounts::{Mounted, mounted};
use crate::recover::member::Structure;

/// More filesystems than any system has.
const MAX_BLOCKS: usize = 1 << 16;
/// How often a list that changed under the walk is gone through anew.
const TRIES: usize = 4;

/// Filesystems whose files have no contents in the page cache: they are made when they are read.
const WITHOUT_PAGES: &[&str] = &[
    "anon_inodefs",
    "bdev",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "cpuset",
    "debugfs",
    "devpts",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "pidfs",
    "pipefs",
    "proc",
    "pstore",
    "securityfs",
    "selinuxfs",
    "sockfs",
    "sysfs",
    "tracefs",
];

/// Filesystems that are in memory only.
const MEMORY_ONLY: &[&str] = &["devtmpfs", "ramfs", "rootfs", "tmpfs"];

/// One filesystem.
#[derive(Debug)]
pub(crate) struct SuperBlock {
    /// The `struct super_block`.
    pub(crate) address: Gva,
    /// The head of the list of its inodes.
    inodes: Gva,
    pub(crate) fs_type: Arc<str>,
    /// `MAJOR:MINOR`.
    pub(crate) device: Arc<str>,
    /// What is not in memory was never written.
    pub(crate) memory_only: bool,
    /// Its files have their contents in other filesystems' files.
    pub(super) overlay: bool,
    /// Where it is mounted, once [`find_mounts`] was asked.
    pub(crate) mounts: Vec<Mounted>,
}

impl SuperBlock {
    /// The links of its inodes in its list of them, at most `limit`.
    pub(crate) fn inodes(&self, kernel: &Kernel, limit: usize) -> Walk {
        let mut found = list::walk(kernel.space(), self.inodes, limit);
        for _ in 1..TRIES {
            if !kernel.memory().is_live() || (found.walk.end.is_complete() && found.uneven == 0) {
                break;
            }
            found = list::walk(kernel.space(), self.inodes, limit);
        }
        found.walk
    }
}

/// Finds out where each of them is mounted. Where that cannot be listed, a warning says so.
pub(crate) fn find_mounts<T>(kernel: &Kernel, blocks: &mut [SuperBlock], listing: &mut Listing<T>) {
    let mut mounted = mounted(kernel, listing);
    for block in blocks {
        block.mounts = mounted.remove(&*block.device).unwrap_or_default();
    }
}

/// The filesystems whose files have pages. Where they are mounted is not known yet.
pub(crate) fn all<T>(kernel: &Kernel, listing: &mut Listing<T>) -> Result<Vec<SuperBlock>, LinuxError> {
    let block = Structure::of(kernel, "super_block")?;
    let (link, inodes) = (block.member("s_list")?, block.member("s_inodes")?);
    let (dev, fs_type) = (block.member("s_dev")?, block.member("s_type")?);
    let type_name = Structure::of(kernel, "file_system_type")?.member("name")?;
    let space = kernel.space();
    let head = kernel.symbol("super_blocks")?;
    let found = list::walk(space, head, MAX_BLOCKS).walk;
    if let Some(warning) = found.end.warning("filesystems") {
        listing.warn(warning);
    }
    let mut out = Vec::new();
    for node in found.items {
        let at = link.container(node);
        let read = || {
            let name = type_name.pointer(space, fs_type.pointer(space, at)?)?;
            Ok((dev.number(space, at)?, space.read_cstr(name, 64)?))
        };
        let (device, name) = match read() {
            Ok(both) => both,
            Err(error) => {
                let error: vmsight_memory::ReadError = error;
                listing.warn(format!("the filesystem at {at} cannot be read: {error}"));
                continue;
            }
        };
        let name = guest_text(&name);
        if WITHOUT_PAGES.contains(&name.as_str()) {
            continue;
        }
        // The kernel's own encoding of a device number (include/linux/kdev_t.h).
        let device: Arc<str> = format!("{}:{}", device >> 20 & 0xfff, device & 0xf_ffff).into();
        out.push(SuperBlock {
            address: at,
            inodes: inodes.at(at),
            memory_only: MEMORY_ONLY.contains(&name.as_str()),
            overlay: name == "overlay",
            mounts: Vec::new(),
            fs_type: name.into(),
            device,
        });
    }
    Ok(out)
}
