//! Mounts of every mount namespace, as `/proc/PID/mountinfo` shows them (fs/proc_namespace.c).

mod namespace;
mod options;
mod overlay;

use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::Budget;
use crate::layout::{Buffer, Field, Place, Spans, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::path::{Location, PathResolver};
use crate::{Kernel, LinuxError};

use namespace::Namespace;

layout! {
    /// `struct mount` (fs/mount.h).
    struct MountLayout = "mount" {
        id: Field<i32> = "mnt_id",
        parent: Field<Gva> = "mnt_parent",
        vfsmount: Place = "mnt",
        root: Field<Gva> = "mnt.mnt_root",
        sb: Field<Gva> = "mnt.mnt_sb",
        flags: Field<u32> = "mnt.mnt_flags",
        t_flags: Option<Field<u32>> = "mnt_t_flags",              // 6.17: propagation moved here
        idmap: Option<Field<Gva>> = "mnt.mnt_idmap",              // 6.2
        devname: Field<Gva> = "mnt_devname",
        group: Field<i32> = "mnt_group_id",
        master: Field<Gva> = "mnt_master",
        list: Option<Place> = "mnt_list",
        node: Option<Place> = "mnt_node",                         // 6.8: namespaces hold their mounts in a tree
    }
}

layout! {
    struct SuperLayout = "super_block" {
        dev: Field<u32> = "s_dev",
        flags: Field<u64> = "s_flags",
        fstype: Field<Gva> = "s_type",
        subtype: Field<Gva> = "s_subtype",
        op: Field<Gva> = "s_op",
        info: Field<Gva> = "s_fs_info",
    }
}

layout! {
    struct FsTypeLayout = "file_system_type" {
        name: Field<Gva> = "name",
    }
}

/// `MNT_CURSOR` of 5.8 to 6.7: no mount but the place of somebody who reads the list.
const MNT_CURSOR: u32 = 0x1000_0000;

/// `MNT_SHARED` and `MNT_UNBINDABLE` in `mnt_flags` up to 6.16.
const MNT_SHARED: u32 = 0x1000;
const MNT_UNBINDABLE: u32 = 0x2000;
/// `T_SHARED` and `T_UNBINDABLE` in `mnt_t_flags` since.
const T_SHARED: u32 = 1;
const T_UNBINDABLE: u32 = 2;

/// A mount of one mount namespace.
#[derive(Clone, Debug, Serialize)]
pub struct Mount {
    /// Inode number of the mount namespace, as in `/proc/PID/ns/mnt`.
    pub namespace: u32,
    /// The mount's id.
    pub mount_id: i32,
    /// Id of the mount that it is mounted on; its own for the topmost.
    pub parent_id: Option<i32>,
    /// Device number of the filesystem, `MAJOR:MINOR`.
    pub device: Option<String>,
    /// The directory of the filesystem that is mounted: not `/` for bind mounts.
    pub root: Option<String>,
    /// Where it is mounted, as seen by the processes of the namespace.
    pub mount_point: Option<String>,
    /// Options of this mount: `rw,nosuid,relatime`.
    pub options: Option<String>,
    /// Propagation: `shared:N`, `master:N`, `propagate_from:N`, `unbindable`; empty for a private mount.
    pub propagation: Vec<String>,
    /// Type of the filesystem, with its subtype: `ext4`, `fuse.sshfs`.
    pub fs_type: Option<String>,
    /// What was mounted, a device for one; `none` where nothing was named.
    pub source: Option<String>,
    /// Options of the filesystem, as far as they are known: see `super_options_known`.
    pub super_options: Option<String>,
    /// Whether `super_options` is complete. Each filesystem keeps its own in its own way; those of tmpfs, proc and devpts are read,
    /// and an overlay's layers.
    pub super_options_known: bool,
    /// The processes of the namespace cannot see it: it lies above their root, or is detached.
    pub unreachable: bool,
    /// The first process in the namespace; `None` if it is only held by a file or a bind mount.
    pub pid: Option<i32>,
    /// How many processes are in the namespace.
    pub processes: usize,
    /// The `struct mount`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Mount {
    /// Bytes of its strings.
    fn bytes(&self) -> usize {
        let texts = [
            &self.root,
            &self.mount_point,
            &self.options,
            &self.source,
            &self.super_options,
        ];
        texts.into_iter().flatten().map(String::len).sum::<usize>()
            + self.propagation.iter().map(String::len).sum::<usize>()
    }
}

impl Kernel {
    /// The mounts of all mount namespaces, namespace by namespace, the first process's first.
    ///
    /// # Errors
    /// If the processes cannot be listed or the kernel's types lack a member.
    pub fn mounts(&self) -> Result<Listing<Mount>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Mount| row.problems.len(),
            || self.list_mounts(),
        )
    }

    fn list_mounts(&self) -> Result<Listing<Mount>, LinuxError> {
        let reader = MountReader::new(self)?;
        let (namespaces, warnings) = namespace::all(self)?;
        let mut listing = Listing::new(Vec::new(), warnings);
        let budget = Budget::default();
        for (nth, namespace) in namespaces.iter().enumerate() {
            let what = format!("mounts of namespace {}", namespace.inum);
            let (mounts, warning) =
                namespace::mounts(self, namespace, reader.layout.list, reader.layout.node, &budget);
            if let Some(warning) = warning.warning(&what) {
                listing.warn(warning);
            }
            let first = listing.rows.len();
            let mut groups = Vec::new();
            let mut full = false;
            for mount in mounts {
                if let Some((row, chain)) = reader.mount(mount, namespace) {
                    full = !budget.row(row.bytes());
                    if full {
                        break;
                    }
                    groups.push(chain);
                    listing.rows.push(row);
                }
            }
            let here: FxHashMap<i32, ()> = groups.iter().map(|g| (g.group, ())).collect();
            for (row, groups) in listing.rows.iter_mut().skip(first).zip(&groups) {
                groups.dominating(row, &here);
            }
            if full {
                listing.warn(format!(
                    "mounts: those of the last {} namespaces are left out, at least in part",
                    namespaces.len() - nth
                ));
                break;
            }
        }
        budget
            .warning("mounts")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }
}

/// Peer groups that a mount gets its propagation from.
struct Groups {
    group: i32,
    /// The master's group, then its master's, and so on.
    masters: Vec<i32>,
}

impl Groups {
    /// `get_dominating_id` (fs/pnode.c): the nearest group up the chain that has a mount in this namespace.
    fn dominating(&self, row: &mut Mount, here: &FxHashMap<i32, ()>) {
        let Some(master) = self.masters.first() else {
            return;
        };
        if let Some(dominating) = self.masters.iter().find(|g| here.contains_key(g))
            && dominating != master
        {
            let at = row
                .propagation
                .iter()
                .position(|p| p.starts_with("master:"))
                .map_or(0, |i| i + 1);
            row.propagation.insert(at, format!("propagate_from:{dominating}"));
        }
    }
}

struct MountReader<'k> {
    kernel: &'k Kernel,
    paths: PathResolver,
    layout: Arc<MountLayout>,
    spans: Spans,
    sb: Arc<SuperLayout>,
    fstype: Arc<FsTypeLayout>,
    options: options::OptionReader<'k>,
    nop_idmap: Option<Gva>,
}

impl<'k> MountReader<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let layout: Arc<MountLayout> = kernel.layout()?;
        let l = &layout;
        let mut extents = vec![
            l.id.extent(),
            l.parent.extent(),
            l.root.extent(),
            l.sb.extent(),
            l.flags.extent(),
            l.devname.extent(),
            l.group.extent(),
            l.master.extent(),
        ];
        extents.extend(l.t_flags.iter().map(Field::extent));
        extents.extend(l.idmap.iter().map(Field::extent));
        Ok(Self {
            kernel,
            paths: PathResolver::new(kernel)?,
            spans: Spans::covering("mount", kernel.release(), extents)?,
            layout,
            sb: kernel.layout()?,
            fstype: kernel.layout()?,
            options: options::OptionReader::new(kernel)?,
            nop_idmap: kernel.find_symbol(&["nop_mnt_idmap"]),
        })
    }

    /// The row of a mount; `None` for a reader's cursor.
    fn mount(&self, address: Gva, namespace: &Namespace) -> Option<(Mount, Groups)> {
        let l = &self.layout;
        let mut row = Mount {
            namespace: namespace.inum,
            mount_id: 0,
            parent_id: None,
            device: None,
            root: None,
            mount_point: None,
            options: None,
            propagation: Vec::new(),
            fs_type: None,
            source: None,
            super_options: None,
            super_options_known: false,
            unreachable: false,
            pid: namespace.pid,
            processes: namespace.processes,
            address,
            problems: Vec::new(),
        };
        let mut groups = Groups {
            group: 0,
            masters: Vec::new(),
        };
        let space = self.kernel.space();
        let mut object = self.spans.buffer();
        if let Err(error) = self.spans.read(space, address, &mut object) {
            row.problems.push(Problem::read("mount_id", &error));
            return Some((row, groups));
        }
        let flags = l.flags.of(&object);
        if l.node.is_none() && flags & MNT_CURSOR != 0 {
            return None;
        }
        row.mount_id = l.id.of(&object);
        let parent = l.parent.of(&object);
        match l.id.read(space, parent) {
            Ok(id) => row.parent_id = Some(id),
            Err(error) => row.problems.push(Problem::read("parent_id", &error)),
        }
        row.options = Some(options::mount_options(flags, self.is_idmapped(&object)));
        groups.group = l.group.of(&object);
        groups.masters = self.masters(l.master.of(&object), &mut row);
        self.propagation(&mut row, &object, &groups);
        let devname = l.devname.of(&object);
        if devname.is_null() {
            row.source = Some("none".to_owned());
        } else {
            match self.kernel.text(devname, 4096) {
                Ok(source) => row.source = Some(source),
                Err(error) => row.problems.push(Problem::read("source", &error)),
            }
        }
        let root = l.root.of(&object);
        let sb = l.sb.of(&object);
        self.paths(
            &mut row,
            Location {
                mnt: l.vfsmount.at(address),
                dentry: root,
            },
            namespace,
        );
        if let Err(error) = self.filesystem(&mut row, sb) {
            row.problems.push(Problem::read("fs_type", &error));
        }
        Some((row, groups))
    }

    fn paths(&self, row: &mut Mount, at: Location, namespace: &Namespace) {
        let root = match self.paths.pseudo_object(at.dentry) {
            Ok(Some(name)) => Ok(name),
            Ok(None) => self.paths.within_filesystem(at.dentry),
            Err(error) => Err(error),
        };
        match root {
            Ok(root) => {
                row.problems.extend(root.problem.map(|p| Problem::new("root", p)));
                row.root = Some(root.path);
            }
            Err(error) => row.problems.push(Problem::read("root", &error)),
        }
        match self.paths.resolve_at(at, namespace.root) {
            Ok(point) => {
                row.unreachable = point.unreachable;
                row.problems
                    .extend(point.problem.map(|p| Problem::new("mount_point", p)));
                row.mount_point = Some(point.path);
            }
            Err(error) => row.problems.push(Problem::read("mount_point", &error)),
        }
    }

    fn filesystem(&self, row: &mut Mount, sb: Gva) -> Result<(), ReadError> {
        let space = self.kernel.space();
        let dev = self.sb.dev.read(space, sb)?;
        row.device = Some(device(dev));
        let fstype = self.sb.fstype.read(space, sb)?;
        let mut name = self.kernel.text(self.fstype.name.read(space, fstype)?, 64)?;
        let subtype = self.sb.subtype.read(space, sb)?;
        if !subtype.is_null() {
            name = format!("{name}.{}", self.kernel.text(subtype, 64)?);
        }
        let facts = options::SuperFacts {
            flags: self.sb.flags.read(space, sb)?,
            op: self.sb.op.read(space, sb)?,
            info: self.sb.info.read(space, sb)?,
            fs_type: &name,
        };
        let (options, known) = self.options.super_options(&facts);
        row.super_options = Some(options);
        row.super_options_known = known;
        row.fs_type = Some(name);
        Ok(())
    }

    fn is_idmapped(&self, object: &Buffer) -> bool {
        match (&self.layout.idmap, self.nop_idmap) {
            (Some(field), Some(nop)) => field.of(object) != nop,
            _ => false,
        }
    }

    /// Peer groups up the chain of masters. Bounded: a chain that long is none.
    fn masters(&self, mut master: Gva, row: &mut Mount) -> Vec<i32> {
        let mut groups = Vec::new();
        while !master.is_null() {
            if groups.len() >= 256 {
                row.problems
                    .push(Problem::new("propagation", "the chain of masters does not end"));
                break;
            }
            let space = self.kernel.space();
            match (
                self.layout.group.read(space, master),
                self.layout.master.read(space, master),
            ) {
                (Ok(group), Ok(next)) => {
                    groups.push(group);
                    master = next;
                }
                (Err(error), _) | (_, Err(error)) => {
                    row.problems.push(Problem::read("propagation", &error));
                    break;
                }
            }
        }
        groups
    }

    fn propagation(&self, row: &mut Mount, object: &Buffer, groups: &Groups) {
        let (shared, unbindable) = match &self.layout.t_flags {
            Some(field) => {
                let flags = field.of(object);
                (flags & T_SHARED != 0, flags & T_UNBINDABLE != 0)
            }
            None => {
                let flags = self.layout.flags.of(object);
                (flags & MNT_SHARED != 0, flags & MNT_UNBINDABLE != 0)
            }
        };
        if shared {
            row.propagation.push(format!("shared:{}", groups.group));
        }
        if let Some(master) = groups.masters.first() {
            row.propagation.push(format!("master:{master}"));
        }
        if unbindable {
            row.propagation.push("unbindable".to_owned());
        }
    }
}

/// `MAJOR:MINOR` of a `dev_t` as the kernel keeps it: 20 bits of minor number (include/linux/kdev_t.h).
pub(crate) fn device(dev: u32) -> String {
    format!("{}:{}", dev >> 20, dev & 0xf_ffff)
}
