//! Mount options: the flags every mount has, and those of the filesystems whose settings can be read.

use std::cell::OnceCell;
use std::fmt::Write;
use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::overlay::OverlayLayout;
use crate::layout::{Field, layout};
use crate::{Kernel, LinuxError};

/// `MNT_*` of include/linux/mount.h in the order that mountinfo prints them. `MNT_NOSYMFOLLOW` is of 5.10.
const MOUNT_FLAGS: &[(u32, &str)] = &[
    (0x01, "nosuid"),
    (0x02, "nodev"),
    (0x04, "noexec"),
    (0x08, "noatime"),
    (0x10, "nodiratime"),
    (0x20, "relatime"),
    (0x80, "nosymfollow"),
];
const MNT_READONLY: u32 = 0x40;

/// `SB_*` of include/linux/fs.h likewise.
const SUPER_FLAGS: &[(u64, &str)] = &[
    (1 << 4, "sync"),
    (1 << 7, "dirsync"),
    (1 << 6, "mand"),
    (1 << 25, "lazytime"),
];
const SB_RDONLY: u64 = 1;

/// The options of one mount, as the sixth field of mountinfo.
pub(super) fn mount_options(flags: u32, idmapped: bool) -> String {
    let mut out = if flags & MNT_READONLY != 0 { "ro" } else { "rw" }.to_owned();
    for (bit, name) in MOUNT_FLAGS {
        if flags & bit != 0 {
            out.push(',');
            out.push_str(name);
        }
    }
    if idmapped {
        out.push_str(",idmapped");
    }
    out
}

layout! {
    struct SuperOpsLayout = "super_operations" {
        show_options: Field<Gva> = "show_options",
    }
}

layout! {
    /// tmpfs, devtmpfs and rootfs (include/linux/shmem_fs.h).
    struct ShmemLayout = "shmem_sb_info" {
        max_blocks: Field<u64> = "max_blocks",
        max_inodes: Field<u64> = "max_inodes",
        mode: Field<u16> = "mode",
        huge: Field<u8> = "huge",
        uid: Field<u32> = "uid",
        gid: Field<u32> = "gid",
        full_inums: Option<Field<bool>> = "full_inums",           // 5.9
        noswap: Option<Field<bool>> = "noswap",                   // 6.4
        mpol: Option<Field<Gva>> = "mpol",
    }
}

layout! {
    struct ProcLayout = "proc_fs_info" {
        gid: Field<u32> = "pid_gid",
        hide_pid: Field<u32> = "hide_pid",
        pidonly: Field<u32> = "pidonly",
    }
}

layout! {
    /// devpts (fs/devpts/inode.c).
    struct PtsLayout = "pts_fs_info" {
        setuid: Field<u32> = "mount_opts.setuid",
        setgid: Field<u32> = "mount_opts.setgid",
        uid: Field<u32> = "mount_opts.uid",
        gid: Field<u32> = "mount_opts.gid",
        mode: Field<u16> = "mount_opts.mode",
        ptmxmode: Field<u16> = "mount_opts.ptmxmode",
        max: Field<u32> = "mount_opts.max",
    }
}

/// `NR_UNIX98_PTY_MAX` (include/linux/tty.h).
const PTY_MAX: u32 = 1 << 20;

/// What the options of a filesystem are made from.
pub(super) struct SuperFacts<'a> {
    pub(super) flags: u64,
    pub(super) op: Gva,
    pub(super) info: Gva,
    pub(super) fs_type: &'a str,
}

pub(super) struct OptionReader<'k> {
    kernel: &'k Kernel,
    ops: Arc<SuperOpsLayout>,
    shmem: Option<Arc<ShmemLayout>>,
    proc_fs: Option<Arc<ProcLayout>>,
    pts: Option<Arc<PtsLayout>>,
    overlay: OnceCell<Option<OverlayLayout>>,
    shmem_ops: Option<Gva>,
    total_pages: Option<u64>,
}

impl<'k> OptionReader<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let total = kernel
            .find_symbol(&["_totalram_pages"])
            .and_then(|at| kernel.space().read_u64(at).ok());
        Ok(Self {
            kernel,
            ops: kernel.layout()?,
            shmem: kernel.layout().ok(),
            proc_fs: kernel.layout().ok(),
            pts: kernel.layout().ok(),
            overlay: OnceCell::new(),
            shmem_ops: kernel.find_symbol(&["shmem_ops"]),
            total_pages: total,
        })
    }

    /// The options of a filesystem as the last field of mountinfo, and whether they are all of them.
    pub(super) fn super_options(&self, facts: &SuperFacts<'_>) -> (String, bool) {
        let mut out = if facts.flags & SB_RDONLY != 0 { "ro" } else { "rw" }.to_owned();
        for (bit, name) in SUPER_FLAGS {
            if facts.flags & bit != 0 {
                out.push(',');
                out.push_str(name);
            }
        }
        let known = match self.ops.show_options.read(self.kernel.space(), facts.op) {
            Ok(show) if show.is_null() => true,
            Ok(_) if Some(facts.op) == self.shmem_ops => self.shmem(facts.info, &mut out).unwrap_or(false),
            Ok(_) if facts.fs_type == "proc" => self.proc_fs(facts.info, &mut out).unwrap_or(false),
            Ok(_) if facts.fs_type == "devpts" => self.devpts(facts.info, &mut out).unwrap_or(false),
            Ok(_) if facts.fs_type == "overlay" => {
                if let Some(layout) = self.overlay.get_or_init(|| OverlayLayout::find(self.kernel))
                    && let Err(error) = layout.options(self.kernel, facts.info, &mut out)
                {
                    tracing::debug!(%error, "the layers of an overlay cannot be read");
                }
                false
            }
            _ => false,
        };
        (out, known)
    }

    /// `devpts_show_options`.
    fn devpts(&self, info: Gva, out: &mut String) -> Result<bool, ReadError> {
        let Some(l) = &self.pts else { return Ok(false) };
        let space = self.kernel.space();
        for (name, set, id) in [("uid", &l.setuid, &l.uid), ("gid", &l.setgid, &l.gid)] {
            if set.read(space, info)? != 0 {
                let _ = write!(out, ",{name}={}", id.read(space, info)?);
            }
        }
        let _ = write!(
            out,
            ",mode={:03o},ptmxmode={:03o}",
            l.mode.read(space, info)?,
            l.ptmxmode.read(space, info)?
        );
        let max = l.max.read(space, info)?;
        if max < PTY_MAX {
            let _ = write!(out, ",max={max}");
        }
        Ok(true)
    }

    /// `shmem_show_options` (mm/shmem.c). A limit that is the default is not shown.
    fn shmem(&self, info: Gva, out: &mut String) -> Result<bool, ReadError> {
        let Some(l) = &self.shmem else { return Ok(false) };
        let space = self.kernel.space();
        let default = self.total_pages.map(|pages| pages / 2);
        let blocks = l.max_blocks.read(space, info)?;
        let inodes = l.max_inodes.read(space, info)?;
        if Some(blocks) != default {
            let _ = write!(out, ",size={}k", blocks.wrapping_mul(4));
        }
        if Some(inodes) != default {
            let _ = write!(out, ",nr_inodes={inodes}");
        }
        let mode = l.mode.read(space, info)?;
        if mode != 0o1777 {
            let _ = write!(out, ",mode={mode:03o}");
        }
        for (name, field) in [("uid", &l.uid), ("gid", &l.gid)] {
            let id = field.read(space, info)?;
            if id != 0 {
                let _ = write!(out, ",{name}={id}");
            }
        }
        if let Some(field) = &l.full_inums
            && field.read(space, info)?
        {
            out.push_str(",inode64");
        }
        if let Some(name) = match l.huge.read(space, info)? {
            1 => Some("always"),
            2 => Some("within_size"),
            3 => Some("advise"),
            _ => None,
        } {
            let _ = write!(out, ",huge={name}");
        }
        if let Some(field) = &l.noswap
            && field.read(space, info)?
        {
            out.push_str(",noswap");
        }
        let policy = match &l.mpol {
            Some(field) => !field.read(space, info)?.is_null(),
            None => false,
        };
        Ok(!policy && default.is_some())
    }

    /// `proc_show_options` (fs/proc/root.c).
    fn proc_fs(&self, info: Gva, out: &mut String) -> Result<bool, ReadError> {
        let Some(l) = &self.proc_fs else { return Ok(false) };
        let space = self.kernel.space();
        let gid = l.gid.read(space, info)?;
        if gid != 0 {
            let _ = write!(out, ",gid={gid}");
        }
        if let Some(name) = match l.hide_pid.read(space, info)? {
            1 => Some("noaccess"),
            2 => Some("invisible"),
            4 => Some("ptraceable"),
            _ => None,
        } {
            let _ = write!(out, ",hidepid={name}");
        }
        if l.pidonly.read(space, info)? == 1 {
            out.push_str(",subset=pid");
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::mount_options;

    #[test]
    fn options_come_in_mountinfos_order() {
        assert_eq!(mount_options(0, false), "rw");
        assert_eq!(
            mount_options(0x40 | 0x07 | 0x20, false),
            "ro,nosuid,nodev,noexec,relatime"
        );
        assert_eq!(mount_options(0x80, true), "rw,nosymfollow,idmapped");
    }
}
