//! The filesystems there are: `super_blocks` (fs/super.c), mounted or not.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_linux::structures::list;
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing};

use super::mounts::{Mounted, mounted};
use crate::recover::member::Structure;

/// More filesystems than any system has.
const MAX_BLOCKS: usize = 1 << 16;

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
pub(super) struct SuperBlock {
    /// The head of the list of its inodes.
    pub(super) inodes: Gva,
    pub(super) fs_type: Arc<str>,
    /// `MAJOR:MINOR`.
    pub(super) device: Arc<str>,
    /// What is not in memory was never written.
    pub(super) memory_only: bool,
    /// Its files have their contents in other filesystems' files.
    pub(super) overlay: bool,
    pub(super) mounts: Vec<Mounted>,
}

/// The filesystems whose files have pages.
pub(super) fn all<T>(kernel: &Kernel, listing: &mut Listing<T>) -> Result<Vec<SuperBlock>, LinuxError> {
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
    let mut mounted = mounted(kernel, listing);
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
            inodes: inodes.at(at),
            memory_only: MEMORY_ONLY.contains(&name.as_str()),
            overlay: name == "overlay",
            mounts: mounted.remove(&*device).unwrap_or_default(),
            fs_type: name.into(),
            device,
        });
    }
    Ok(out)
}
