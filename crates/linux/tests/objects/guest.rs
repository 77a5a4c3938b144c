//! A guest put together object by object, with page tables, types and symbols of our own making, so that tests can make it lie.

#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_linux::Kernel;
use vmsight_memory::GuestMemory;
use vmsight_symbols::kernel::KernelImage;
use vmsight_symbols::types::{Builder, Def, MemberDef};
use vmsight_symbols::{Profile, ProfileSource, SymbolTable, TypeId, Types};

use crate::flicker;
use crate::layout::{self, STRUCTS};

/// Where the guest maps all its memory.
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// The image: the same memory again.
const IMAGE: u64 = 0xffff_ffff_8000_0000;
const MEMORY: u64 = 2 << 20;

const TOP: u64 = 0x1000;
const DIRECT_PDPT: u64 = 0x2000;
const IMAGE_PDPT: u64 = 0x3000;

/// Size and members of a structure.
fn structure(name: &str) -> &'static layout::Structure {
    STRUCTS
        .iter()
        .find(|s| s.0 == name)
        .unwrap_or_else(|| panic!("no struct {name}"))
}

/// Offset of a member.
pub(crate) fn offset(name: &str, member: &str) -> u64 {
    structure(name)
        .2
        .iter()
        .find(|m| m.0 == member)
        .unwrap_or_else(|| panic!("no {name}.{member}"))
        .1
}

/// Builds the types; a path `a.b.c` becomes nested anonymous structures.
struct TypeMaker {
    builder: Builder,
    ints: BTreeMap<u64, TypeId>,
}

impl TypeMaker {
    fn all() -> Types {
        let mut maker = Self {
            builder: Builder::new(),
            ints: BTreeMap::new(),
        };
        for (size, name) in [(1, "char"), (2, "short"), (4, "int"), (8, "unsigned long")] {
            let def = Def::int(name, size as u32, false);
            maker.ints.insert(size, maker.builder.add(&def));
        }
        for (name, size, members) in STRUCTS {
            maker.structure(name, *size, 0, members);
        }
        maker.builder.finish().unwrap()
    }

    fn leaf(&mut self, size: u64) -> TypeId {
        if let Some(&int) = self.ints.get(&size) {
            return int;
        }
        self.builder.add(&Def::Array {
            element: self.ints[&1],
            index: self.ints[&4],
            count: size as u32,
        })
    }

    /// `base`: what to take off the members' offsets.
    fn structure(&mut self, name: &str, size: u64, base: u64, members: &[(&str, u64, u64)]) -> TypeId {
        let mut groups: BTreeMap<&str, Vec<(&str, u64, u64)>> = BTreeMap::new();
        for &(path, at, bytes) in members {
            let (first, rest) = path.split_once('.').unwrap_or((path, ""));
            groups.entry(first).or_default().push((rest, at, bytes));
        }
        let mut defs: Vec<(u64, &str, TypeId)> = Vec::new();
        for (first, inner) in groups {
            let own = inner.iter().find(|m| m.0.is_empty()).map(|m| (m.1, m.2));
            let nested: Vec<_> = inner.into_iter().filter(|m| !m.0.is_empty()).collect();
            if nested.is_empty() {
                let (at, bytes) = own.unwrap();
                let type_id = self.leaf(bytes);
                defs.push((at - base, first, type_id));
                continue;
            }
            let at = own.map_or_else(|| nested.iter().map(|m| m.1).min().unwrap(), |o| o.0);
            let end = nested.iter().map(|m| m.1 + m.2).max().unwrap();
            let bytes = own.map_or(end - at, |o| o.1.max(end - at));
            let type_id = self.structure("", bytes, at, &nested);
            defs.push((at - base, first, type_id));
        }
        defs.sort_by_key(|d| d.0);
        let defs: Vec<MemberDef<'_>> = defs
            .iter()
            .map(|&(at, name, type_id)| MemberDef {
                name,
                type_id,
                bit_offset: at * 8,
                bit_size: None,
            })
            .collect();
        self.builder.add(&Def::Struct {
            name,
            size: size as u32,
            members: &defs,
        })
    }
}

/// A guest under construction. All addresses are of its direct map.
pub(crate) struct Guest {
    bytes: Vec<u8>,
    next: u64,
    symbols: Vec<(&'static str, u64)>,
    /// `init_task`, whose list of processes is empty but for [`Guest::process`]es.
    pub(crate) init: u64,
    /// `init_net`.
    pub(crate) net: u64,
    /// The `mnt_namespace` of all processes.
    pub(crate) mnt_ns: u64,
    nsproxy: u64,
}

impl Guest {
    /// A guest with one network and one mount namespace and no process.
    pub(crate) fn new() -> Self {
        let mut guest = Self {
            bytes: vec![0; MEMORY as usize],
            next: 0x10_000,
            symbols: Vec::new(),
            init: 0,
            net: 0,
            mnt_ns: 0,
            nsproxy: 0,
        };
        guest.put(TOP + (DIRECT_MAP >> 39 & 511) * 8, DIRECT_PDPT | 3);
        guest.put(DIRECT_PDPT, 0x83);
        guest.put(TOP + (IMAGE >> 39 & 511) * 8, IMAGE_PDPT | 3);
        guest.put(IMAGE_PDPT + (IMAGE >> 30 & 511) * 8, 0x83);
        guest.init = guest.alloc("task_struct");
        let tasks = guest.init + offset("task_struct", "tasks");
        guest.list(tasks, &[]);
        guest.symbol("init_task", guest.init);
        guest.net = guest.alloc("net");
        guest.set(guest.net, "net", "ns.inum", 4_026_531_840);
        let nets = guest.space(16);
        let net = guest.net + offset("net", "list");
        guest.list(nets, &[net]);
        guest.symbol("net_namespace_list", nets);
        guest.symbol("init_net", guest.net);
        guest.mnt_ns = guest.alloc("mnt_namespace");
        guest.set(guest.mnt_ns, "mnt_namespace", "ns.inum", 4_026_531_841);
        guest.nsproxy = guest.alloc("nsproxy");
        guest.set(guest.nsproxy, "nsproxy", "mnt_ns", guest.mnt_ns);
        guest.set(guest.nsproxy, "nsproxy", "net_ns", guest.net);
        let devices = guest.net + offset("net", "dev_base_head");
        guest.list(devices, &[]);
        guest
    }

    /// Writes a word.
    pub(crate) fn put(&mut self, at: u64, value: u64) {
        self.put_bytes(at, &value.to_le_bytes());
    }

    /// Writes bytes.
    pub(crate) fn put_bytes(&mut self, at: u64, bytes: &[u8]) {
        let at = (at & 0x3fff_ffff) as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Reads a word.
    pub(crate) fn get(&self, at: u64) -> u64 {
        let at = (at & 0x3fff_ffff) as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    /// Zeroed memory, 64-byte aligned.
    pub(crate) fn space(&mut self, bytes: u64) -> u64 {
        let at = self.next.next_multiple_of(64);
        self.next = at + bytes;
        assert!(self.next <= MEMORY, "the guest is too small");
        DIRECT_MAP + at
    }

    /// A zeroed structure.
    pub(crate) fn alloc(&mut self, name: &str) -> u64 {
        self.space(structure(name).1)
    }

    /// A structure with some members set.
    pub(crate) fn make(&mut self, name: &str, members: &[(&str, u64)]) -> u64 {
        let at = self.alloc(name);
        for (member, value) in members {
            self.set(at, name, member, *value);
        }
        at
    }

    /// Sets a member to an integer of its size.
    pub(crate) fn set(&mut self, at: u64, name: &str, member: &str, value: u64) {
        let (_, place, bytes) = structure(name)
            .2
            .iter()
            .find(|m| m.0 == member)
            .unwrap_or_else(|| panic!("{member}"));
        self.put_bytes(at + place, &value.to_le_bytes()[..(*bytes).min(8) as usize]);
    }

    /// A NUL-terminated string somewhere.
    pub(crate) fn text(&mut self, bytes: &[u8]) -> u64 {
        let at = self.space(bytes.len() as u64 + 1);
        self.put_bytes(at, bytes);
        at
    }

    /// Names an address.
    pub(crate) fn symbol(&mut self, name: &'static str, at: u64) {
        self.symbols.push((name, at));
    }

    /// Makes a circular list of `nodes` at `head`.
    pub(crate) fn list(&mut self, head: u64, nodes: &[u64]) {
        let mut last = head;
        for &node in nodes {
            self.put(last, node);
            self.put(node + 8, last);
            last = node;
        }
        self.put(last, head);
        self.put(head + 8, last);
    }

    /// A process at the end of the list of all; gives its `task_struct`.
    pub(crate) fn process(&mut self, pid: u64, name: &str) -> u64 {
        let task = self.make(
            "task_struct",
            &[("pid", pid), ("tgid", pid), ("nsproxy", self.nsproxy)],
        );
        self.put_bytes(task + offset("task_struct", "comm"), name.as_bytes());
        let signal = self.make("signal_struct", &[("nr_threads", 1)]);
        self.set(task, "task_struct", "signal", signal);
        let head = self.init + offset("task_struct", "tasks");
        let node = task + offset("task_struct", "tasks");
        let last = self.get(head + 8);
        self.put(last, node);
        self.put(node + 8, last);
        self.put(node, head);
        self.put(head + 8, node);
        task
    }

    /// A filesystem of a type: `super_block` whose device is 0:42.
    pub(crate) fn filesystem(&mut self, name: &str) -> u64 {
        let name = self.text(name.as_bytes());
        let fs_type = self.make("file_system_type", &[("name", name)]);
        let ops = self.alloc("super_operations");
        self.make(
            "super_block",
            &[("s_dev", 42), ("s_type", fs_type), ("s_op", ops)],
        )
    }

    /// An inode of a mode (`S_IFREG | 0o644`) in a filesystem.
    pub(crate) fn inode(&mut self, sb: u64, number: u64, mode: u64) -> u64 {
        self.make(
            "inode",
            &[("i_ino", number), ("i_mode", mode), ("i_sb", sb), ("i_nlink", 1)],
        )
    }

    /// A dentry; its own parent where none is given.
    pub(crate) fn dentry(&mut self, name: &[u8], parent: Option<u64>, inode: u64) -> u64 {
        let at = self.text(name);
        let dentry = self.make(
            "dentry",
            &[
                ("d_name.name", at),
                ("d_name.len", name.len() as u64),
                ("d_inode", inode),
            ],
        );
        self.set(dentry, "dentry", "d_parent", parent.unwrap_or(dentry));
        // Hashed: not deleted.
        self.set(dentry, "dentry", "d_hash.pprev", dentry);
        if inode != 0 {
            let sb = self.get(inode + offset("inode", "i_sb"));
            self.set(dentry, "dentry", "d_sb", sb);
        }
        dentry
    }

    /// A mount of a root dentry on a dentry of another mount; its own parent where none is given. Gives the `struct mount`.
    pub(crate) fn mount(&mut self, id: u64, sb: u64, root: u64, on: Option<(u64, u64)>) -> u64 {
        let mount = self.make(
            "mount",
            &[
                ("mnt_id", id),
                ("mnt.mnt_root", root),
                ("mnt.mnt_sb", sb),
                ("mnt_ns", self.mnt_ns),
            ],
        );
        let (parent, point) = on.unwrap_or((mount, root));
        self.set(mount, "mount", "mnt_parent", parent);
        self.set(mount, "mount", "mnt_mountpoint", point);
        mount
    }

    /// An open file; `mount` is a `struct mount`.
    pub(crate) fn file(&mut self, mount: u64, dentry: u64) -> u64 {
        let inode = self.get(dentry + offset("dentry", "d_inode"));
        let file = self.make(
            "file",
            &[("f_inode", inode), ("f_mode", 3), ("f_flags", 0o100_002)],
        );
        let path = file + offset("file", "f_path");
        self.set(path, "path", "mnt", mount + offset("mount", "mnt"));
        self.set(path, "path", "dentry", dentry);
        file
    }

    /// Gives a process a table of open files, from descriptor 0 on; gives the `fdtable`.
    pub(crate) fn open(&mut self, task: u64, files: &[u64]) -> u64 {
        let words = files.len().div_ceil(64).max(1) as u64;
        let fd = self.space(words * 64 * 8);
        let (open, exec) = (self.space(words * 8), self.space(words * 8));
        for (index, file) in files.iter().enumerate() {
            self.put(fd + index as u64 * 8, *file);
            let word = open + index as u64 / 64 * 8;
            let bits = self.get(word) | 1 << (index % 64);
            self.put(word, bits);
        }
        let table = self.make(
            "fdtable",
            &[
                ("max_fds", words * 64),
                ("fd", fd),
                ("open_fds", open),
                ("close_on_exec", exec),
            ],
        );
        let files = self.make("files_struct", &[("fdt", table)]);
        self.set(task, "task_struct", "files", files);
        table
    }

    /// The kernel as vmsight sees it, in a dump.
    pub(crate) fn kernel(&self) -> Kernel {
        self.over(GuestMemory::from_bytes(vec![(Gpa(0), self.bytes.clone())]).unwrap())
    }

    /// The kernel as vmsight sees it while it runs; its memory may be written through the second.
    pub(crate) fn live(&self) -> (Kernel, GuestMemory) {
        let memory = GuestMemory::live_from_bytes(vec![(Gpa(0), self.bytes.clone())]).unwrap();
        (self.over(memory.clone()), memory)
    }

    /// The kernel as vmsight sees it while it runs, when the word at `at` is `first` at the first look.
    pub(crate) fn flickering(&self, at: u64, first: u64) -> Kernel {
        self.over(flicker::memory(&self.bytes, at - DIRECT_MAP, first))
    }

    /// Where an address of the direct map lies in memory.
    pub(crate) fn physical(at: u64) -> Gpa {
        Gpa(at - DIRECT_MAP)
    }

    fn over(&self, memory: GuestMemory) -> Kernel {
        let banner = "Linux version 6.12.0-synthetic (nobody@nowhere) #1".to_owned();
        let symbols: SymbolTable = self.symbols.iter().map(|&(name, at)| (name, at, b'D')).collect();
        let profile = Profile::new(
            None,
            banner.clone(),
            symbols,
            TypeMaker::all(),
            ProfileSource::Memory,
        );
        let image = KernelImage {
            text: Gva(IMAGE),
            phys: Gpa(0),
            len: 0x4000_0000,
            slide: 0,
            dtb: Dtb(TOP),
            mode: PagingMode::X86Level4,
            direct_map: Some(Gva(DIRECT_MAP)),
            parts: Vec::new(),
            banner,
            build_id: None,
            evidence: Vec::new(),
        };
        Kernel::new(memory, image, profile)
    }
}
