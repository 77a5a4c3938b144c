//! A guest built byte by byte: page tables, type data, symbols and task structures of our own making, so that tests can make them lie.

#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

#[path = "../flicker/mod.rs"]
mod flicker;

use std::collections::BTreeMap;

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_linux::Kernel;
use vmsight_memory::GuestMemory;
use vmsight_symbols::kernel::KernelImage;
use vmsight_symbols::types::{Builder, Def, MemberDef};
use vmsight_symbols::{Profile, ProfileSource, SymbolTable, TypeId, Types};

/// Where the synthetic kernel maps all memory.
pub const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// The image "text": the same memory again, through the last gigabytes of the address space.
pub const IMAGE: u64 = 0xffff_ffff_8000_0000;

const TOP: u64 = 0x1000;
const DIRECT_PDPT: u64 = 0x2000;
const IMAGE_PDPT: u64 = 0x3000;
const FREE: u64 = 0x10_000;

type Members = &'static [(&'static str, u64, u64)];

/// Members of the structures that the listings use: name, offset, size. The offsets are about those of a 6.1 kernel.
pub const STRUCTS: &[(&str, u64, Members)] = &[
    (
        "task_struct",
        9856,
        &[
            ("thread_info.cpu", 20, 4),
            ("__state", 24, 4),
            ("stack", 32, 8),
            ("flags", 44, 4),
            ("on_cpu", 52, 4),
            ("prio", 100, 4),
            ("static_prio", 104, 4),
            ("rt_priority", 112, 4),
            ("se.sum_exec_runtime", 208, 8),
            ("policy", 944, 4),
            ("tasks", 2128, 16),
            ("mm", 2208, 8),
            ("exit_state", 2256, 4),
            ("atomic_flags", 2288, 8),
            ("pid", 2360, 4),
            ("tgid", 2364, 4),
            ("real_parent", 2376, 8),
            ("group_leader", 2424, 8),
            ("thread_pid", 2464, 8),
            ("thread_node", 2552, 16),
            ("utime", 2584, 8),
            ("stime", 2592, 8),
            ("start_boottime", 2640, 8),
            ("real_cred", 2832, 8),
            ("comm", 2864, 16),
            ("fs", 2904, 8),
            ("nsproxy", 2928, 8),
            ("signal", 2936, 8),
            ("seccomp.mode", 3032, 4),
            ("seccomp.filter_count", 3036, 4),
            ("cgroups", 3280, 8),
            ("nvcsw", 3296, 8),
            ("nivcsw", 3304, 8),
            ("ret_stack", 3312, 8),
            ("rethooks.first", 3320, 8),
            ("thread.sp", 3344, 8),
        ],
    ),
    ("inactive_task_frame", 56, &[("bp", 40, 8), ("ret_addr", 48, 8)]),
    (
        "pt_regs",
        168,
        &[
            ("r13", 16, 8),
            ("bp", 32, 8),
            ("r10", 56, 8),
            ("ax", 80, 8),
            ("dx", 96, 8),
            ("di", 112, 8),
            ("ip", 128, 8),
            ("cs", 136, 8),
            ("sp", 152, 8),
        ],
    ),
    (
        "rethook_node",
        40,
        &[("llist", 16, 8), ("ret_addr", 24, 8), ("frame", 32, 8)],
    ),
    (
        "ftrace_ret_stack",
        32,
        &[("ret", 0, 8), ("func", 8, 8), ("retp", 24, 8)],
    ),
    (
        "signal_struct",
        1064,
        &[
            ("nr_threads", 8, 4),
            ("thread_head", 16, 16),
            ("pids", 368, 32),
            ("tty", 408, 8),
            ("utime", 440, 8),
            ("stime", 448, 8),
            ("sum_sched_runtime", 568, 8),
            ("oom_score_adj", 926, 2),
        ],
    ),
    (
        "mm_struct",
        1024,
        &[
            ("mm_mt", 0, 16),
            ("pgd", 72, 8),
            ("map_count", 104, 4),
            ("total_vm", 200, 8),
            ("data_vm", 224, 8),
            ("exec_vm", 232, 8),
            ("stack_vm", 240, 8),
            ("start_brk", 296, 8),
            ("brk", 304, 8),
            ("start_stack", 312, 8),
            ("arg_start", 320, 8),
            ("arg_end", 328, 8),
            ("env_start", 336, 8),
            ("env_end", 344, 8),
            ("rss_stat.count", 736, 32),
            ("exe_file", 888, 8),
        ],
    ),
    (
        "vm_area_struct",
        152,
        &[
            ("vm_start", 0, 8),
            ("vm_end", 8, 8),
            ("vm_mm", 16, 8),
            ("vm_flags", 32, 8),
            ("vm_ops", 96, 8),
            ("vm_pgoff", 104, 8),
            ("vm_file", 112, 8),
            ("vm_private_data", 120, 8),
        ],
    ),
    ("maple_tree", 16, &[("ma_root", 8, 8)]),
    (
        "maple_range_64",
        256,
        &[("parent", 0, 8), ("pivot", 8, 120), ("slot", 128, 128)],
    ),
    (
        "maple_arange_64",
        256,
        &[("parent", 0, 8), ("pivot", 8, 72), ("slot", 80, 80)],
    ),
    (
        "cred",
        184,
        &[
            ("uid", 8, 4),
            ("gid", 12, 4),
            ("suid", 16, 4),
            ("sgid", 20, 4),
            ("euid", 24, 4),
            ("egid", 28, 4),
            ("fsuid", 32, 4),
            ("fsgid", 36, 4),
            ("cap_inheritable", 48, 8),
            ("cap_permitted", 56, 8),
            ("cap_effective", 64, 8),
            ("cap_bset", 72, 8),
            ("cap_ambient", 80, 8),
            ("user_ns", 144, 8),
            ("group_info", 160, 8),
        ],
    ),
    ("group_info", 8, &[("ngroups", 4, 4), ("gid", 8, 0)]),
    ("user_namespace", 600, &[("ns.inum", 240, 4)]),
    ("pid", 128, &[("level", 4, 4), ("numbers", 96, 16)]),
    ("upid", 16, &[("nr", 0, 4), ("ns", 8, 8)]),
    ("pid_namespace", 200, &[("ns.inum", 120, 4)]),
    (
        "nsproxy",
        72,
        &[
            ("uts_ns", 8, 8),
            ("ipc_ns", 16, 8),
            ("mnt_ns", 24, 8),
            ("net_ns", 40, 8),
        ],
    ),
    ("tty_struct", 696, &[("name", 360, 64)]),
    (
        "file",
        232,
        &[("f_path", 16, 16), ("f_inode", 32, 8), ("f_mode", 44, 4)],
    ),
    (
        "inode",
        600,
        &[("i_sb", 40, 8), ("i_ino", 64, 8), ("i_private", 584, 8)],
    ),
    ("super_block", 1408, &[("s_dev", 16, 4), ("s_type", 40, 8)]),
    ("file_system_type", 72, &[("name", 0, 8)]),
    ("path", 16, &[("mnt", 0, 8), ("dentry", 8, 8)]),
    ("fs_struct", 56, &[("root", 24, 16), ("pwd", 40, 16)]),
    (
        "dentry",
        192,
        &[
            ("d_hash.pprev", 16, 8),
            ("d_parent", 24, 8),
            ("d_name.len", 36, 4),
            ("d_name.name", 40, 8),
            ("d_inode", 48, 8),
            ("d_iname", 56, 32),
            ("d_op", 96, 8),
            ("d_sb", 104, 8),
            ("d_fsdata", 120, 8),
        ],
    ),
    ("dentry_operations", 128, &[("d_dname", 64, 8)]),
    (
        "mount",
        328,
        &[
            ("mnt_parent", 16, 8),
            ("mnt_mountpoint", 24, 8),
            ("mnt.mnt_root", 32, 8),
            ("mnt.mnt_sb", 40, 8),
            ("mnt_ns", 224, 8),
        ],
    ),
    (
        "btf",
        240,
        &[
            ("data", 0, 8),
            ("data_size", 60, 4),
            ("name", 130, 56),
            ("kernel_btf", 186, 1),
        ],
    ),
    ("idr", 24, &[("idr_rt.xa_head", 8, 8), ("idr_base", 16, 4)]),
    ("xa_node", 576, &[("shift", 0, 1), ("slots", 40, 512)]),
    ("ns_common", 24, &[("ops", 8, 8)]),
    ("proc_ns_operations", 56, &[("name", 0, 8)]),
];

/// Offset of a member in [`STRUCTS`].
pub fn offset(structure: &str, member: &str) -> u64 {
    let (_, _, members) = STRUCTS.iter().find(|(name, ..)| *name == structure).unwrap();
    members.iter().find(|(name, ..)| *name == member).unwrap().1
}

fn size(structure: &str) -> u64 {
    STRUCTS.iter().find(|(name, ..)| *name == structure).unwrap().1
}

fn types() -> Types {
    let mut builder = Builder::new();
    let mut ints: BTreeMap<u64, TypeId> = BTreeMap::new();
    for (bytes, name) in [(1u32, "char"), (2, "short"), (4, "int"), (8, "unsigned long")] {
        let def = Def::int(name, bytes, false);
        ints.insert(u64::from(bytes), builder.add(&def));
    }
    let member_type = |builder: &mut Builder, bytes: u64| match ints.get(&bytes) {
        Some(&id) => id,
        None => builder.add(&Def::Array {
            element: ints[&1],
            index: ints[&4],
            count: bytes as u32,
        }),
    };
    for (name, size, members) in STRUCTS {
        let mut defs = Vec::new();
        for (path, at, bytes) in *members {
            let mut type_id = member_type(&mut builder, *bytes);
            let mut parts = path.rsplit('.');
            let mut part = parts.next().unwrap();
            let mut inner = *bytes;
            // "a.b": one anonymous struct around each inner member. Members that share their outer name get one struct each,
            // and the reader sees the first: so each is made long enough to hold all.
            for outer in parts {
                let shared: Vec<_> = members
                    .iter()
                    .filter(|m| m.0.starts_with(&format!("{outer}.")))
                    .collect();
                let base = shared.iter().map(|m| m.1).min().unwrap();
                let fields: Vec<(&str, u64, u64)> = shared
                    .iter()
                    .map(|m| (m.0.rsplit('.').next().unwrap(), m.1 - base, m.2))
                    .collect();
                inner = fields.iter().map(|f| f.1 + f.2).max().unwrap();
                let fields: Vec<MemberDef<'_>> = fields
                    .iter()
                    .map(|&(name, at, bytes)| MemberDef {
                        name,
                        type_id: member_type(&mut builder, bytes),
                        bit_offset: at * 8,
                        bit_size: None,
                    })
                    .collect();
                type_id = builder.add(&Def::Struct {
                    name: "",
                    size: inner as u32,
                    members: &fields,
                });
                part = outer;
            }
            let _ = inner;
            let first = members
                .iter()
                .find(|m| m.0.split('.').next() == Some(part))
                .unwrap()
                .1;
            let at = if path.contains('.') { first } else { *at };
            defs.push(MemberDef {
                name: part,
                type_id,
                bit_offset: at * 8,
                bit_size: None,
            });
        }
        builder.add(&Def::Struct {
            name,
            size: *size as u32,
            members: &defs,
        });
    }
    builder.finish().unwrap()
}

/// A guest under construction. All addresses given out are of the direct map.
pub struct Guest {
    /// Physical memory from address 0 on.
    pub bytes: Vec<u8>,
    next: u64,
    symbols: Vec<(&'static str, u64)>,
    /// Address of `init_task`.
    pub init: u64,
    cred: u64,
    pid_ns: u64,
}

impl Guest {
    /// A guest with `megabytes` of memory, an idle task and no process.
    pub fn new(megabytes: usize) -> Self {
        let mut guest = Self {
            bytes: vec![0; megabytes << 20],
            next: FREE,
            symbols: Vec::new(),
            init: 0,
            cred: 0,
            pid_ns: 0,
        };
        // One page of 1 GiB maps everything; the image's map is the same page again.
        guest.put(TOP + (DIRECT_MAP >> 39 & 511) * 8, DIRECT_PDPT | 3);
        guest.put(DIRECT_PDPT, 0x83);
        guest.put(TOP + (IMAGE >> 39 & 511) * 8, IMAGE_PDPT | 3);
        guest.put(IMAGE_PDPT + (IMAGE >> 30 & 511) * 8, 0x83);
        let user_ns = guest.alloc("user_namespace");
        guest.set(user_ns, "user_namespace", "ns.inum", 0xeffffffd);
        let groups = guest.alloc("group_info");
        guest.cred = guest.alloc("cred");
        guest.set(guest.cred, "cred", "user_ns", user_ns);
        guest.set(guest.cred, "cred", "group_info", groups);
        guest.pid_ns = guest.alloc("pid_namespace");
        guest.set(guest.pid_ns, "pid_namespace", "ns.inum", 0xeffffffc);
        guest.init = guest.task(0, "swapper/0", None);
        let list = guest.init + offset("task_struct", "tasks");
        guest.link(list, list);
        guest.symbols.push(("init_task", guest.init));
        guest
    }

    /// Writes a word at a physical or direct-map address.
    pub fn put(&mut self, at: u64, value: u64) {
        self.put_bytes(at, &value.to_le_bytes());
    }

    /// Writes bytes at a physical or direct-map address.
    pub fn put_bytes(&mut self, at: u64, bytes: &[u8]) {
        let at = (at & 0x3fff_ffff) as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Reads a word.
    pub fn get(&self, at: u64) -> u64 {
        let at = (at & 0x3fff_ffff) as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    /// Free memory, aligned.
    pub fn space(&mut self, bytes: u64, align: u64) -> u64 {
        let at = self.next.next_multiple_of(align);
        self.next = at + bytes;
        assert!(
            self.next <= self.bytes.len() as u64,
            "the synthetic guest is too small"
        );
        DIRECT_MAP + at
    }

    /// A zeroed structure.
    pub fn alloc(&mut self, structure: &str) -> u64 {
        self.space(size(structure), 64)
    }

    /// Sets a member to an integer of its size.
    pub fn set(&mut self, at: u64, structure: &str, member: &str, value: u64) {
        let (_, _, members) = STRUCTS.iter().find(|(name, ..)| *name == structure).unwrap();
        let (_, place, bytes) = members.iter().find(|(name, ..)| *name == member).unwrap();
        self.put_bytes(at + place, &value.to_le_bytes()[..*bytes as usize]);
    }

    /// Names an address.
    pub fn symbol(&mut self, name: &'static str, at: u64) {
        self.symbols.push((name, at));
    }

    /// `b` follows `a` in a circular list.
    pub fn link(&mut self, a: u64, b: u64) {
        self.put(a, b);
        self.put(b + 8, a);
    }

    /// A task with signal and credentials, in no list.
    pub fn task(&mut self, pid: i32, name: &str, parent: Option<u64>) -> u64 {
        let task = self.alloc("task_struct");
        let signal = self.alloc("signal_struct");
        let pid_struct = self.alloc("pid");
        let pid = pid as u32 as u64;
        self.set(task, "task_struct", "pid", pid);
        self.set(task, "task_struct", "tgid", pid);
        self.set(task, "task_struct", "__state", 1);
        self.set(task, "task_struct", "static_prio", 120);
        self.set(task, "task_struct", "prio", 120);
        self.set(task, "task_struct", "real_parent", parent.unwrap_or(task));
        self.set(task, "task_struct", "signal", signal);
        self.set(task, "task_struct", "real_cred", self.cred);
        self.set(task, "task_struct", "thread_pid", pid_struct);
        self.set(task, "task_struct", "start_boottime", pid * 1_000_000_000);
        self.put_bytes(
            task + offset("task_struct", "comm"),
            &name.as_bytes()[..name.len().min(16)],
        );
        self.set(signal, "signal_struct", "nr_threads", 1);
        let (head, node) = (
            signal + offset("signal_struct", "thread_head"),
            task + offset("task_struct", "thread_node"),
        );
        self.link(head, node);
        self.link(node, head);
        self.put(pid_struct + offset("pid", "numbers"), pid);
        self.put(
            pid_struct + offset("pid", "numbers") + offset("upid", "ns"),
            self.pid_ns,
        );
        for index in 2..4 {
            self.put(signal + offset("signal_struct", "pids") + index * 8, pid_struct);
        }
        task
    }

    /// A task at the end of the list of all processes.
    pub fn process(&mut self, pid: i32, name: &str, parent: u64) -> u64 {
        let task = self.task(pid, name, Some(parent));
        let node = task + offset("task_struct", "tasks");
        let head = self.init + offset("task_struct", "tasks");
        let last = self.get(head + 8);
        self.link(last, node);
        self.link(node, head);
        task
    }

    /// Gives a process memory with arguments and environment in a page of its own, mapped at `0x7ffff000`, and returns the
    /// `mm_struct` and the physical address of the page-table entry.
    pub fn user_memory(&mut self, task: u64, argv: &[u8], environ: &[u8]) -> (u64, u64) {
        let mm = self.alloc("mm_struct");
        let tables: Vec<u64> = (0..5).map(|_| self.space(4096, 4096) & 0x3fff_ffff).collect();
        let user = 0x7fff_f000u64;
        for (level, pair) in tables.windows(2).enumerate() {
            let index = user >> (39 - 9 * level) & 511;
            self.put(pair[0] + index * 8, pair[1] | 7);
        }
        let (arg_end, env_end) = (
            user + argv.len() as u64,
            user + (argv.len() + environ.len()) as u64,
        );
        self.put_bytes(tables[4], argv);
        self.put_bytes(tables[4] + argv.len() as u64, environ);
        for (member, value) in [
            ("pgd", DIRECT_MAP + tables[0]),
            ("arg_start", user),
            ("arg_end", arg_end),
            ("env_start", arg_end),
            ("env_end", env_end),
        ] {
            self.set(mm, "mm_struct", member, value);
        }
        self.set(task, "task_struct", "mm", mm);
        (mm, tables[3] + (user >> 12 & 511) * 8)
    }

    /// The kernel as vmsight sees it, in a dump.
    pub fn kernel(&self) -> Kernel {
        self.over(GuestMemory::from_bytes(vec![(Gpa(0), self.bytes.clone())]).unwrap())
    }

    /// The kernel as vmsight sees it, running: memory may be written through the second.
    pub fn live(&self) -> (Kernel, GuestMemory) {
        let memory = GuestMemory::live_from_bytes(vec![(Gpa(0), self.bytes.clone())]).unwrap();
        (self.over(memory.clone()), memory)
    }

    /// The kernel as vmsight sees it, running, when the word at `at` is `first` at the first look.
    pub fn flickering(&self, at: u64, first: u64) -> Kernel {
        self.over(flicker::memory(&self.bytes, at & 0x3fff_ffff, first))
    }

    fn over(&self, memory: GuestMemory) -> Kernel {
        let banner = "Linux version 6.1.0-synthetic (nobody@nowhere) #1".to_owned();
        let symbols: SymbolTable = self.symbols.iter().map(|&(name, at)| (name, at, b'D')).collect();
        let profile = Profile::new(None, banner.clone(), symbols, types(), ProfileSource::Memory);
        let image = KernelImage {
            text: Gva(DIRECT_MAP),
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
