//! A kernel built word by word: an image of text, read-only data and data, with types and symbols of our own making.

#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_linux::Kernel;
use vmsight_memory::GuestMemory;
use vmsight_symbols::kernel::KernelImage;
use vmsight_symbols::types::{Builder, Def, MemberDef};
use vmsight_symbols::{Profile, ProfileSource, SymbolTable, TypeId, Types};

/// Where the image lies, at physical address 0.
pub const IMAGE: u64 = 0xffff_ffff_8000_0000;
/// Its parts, as offsets. What lies past the end of memory is nobody's.
pub const TEXT: std::ops::Range<u64> = 0x10_0000..0x12_0000;
pub const RODATA: std::ops::Range<u64> = 0x12_0000..0x13_0000;
pub const DATA: std::ops::Range<u64> = 0x13_0000..0x20_0000;
const SIZE: usize = 2 << 20;
const TOP: u64 = 0x1000;
const PDPT: u64 = 0x2000;

/// What a member is.
#[derive(Clone, Copy)]
pub enum Is {
    U32,
    Word,
    /// A pointer to a function.
    Function,
    /// So many bytes.
    Bytes(u32),
    /// A structure of this list, given before.
    Inside(&'static str),
}
use Is::{Bytes, Function, Inside, U32, Word};

/// The structures, members one behind the other as C would have them.
const STRUCTS: &[(&str, &[(&str, Is)])] = &[
    ("ns_common", &[("inum", U32)]),
    ("cpumask", &[("bits", Bytes(8))]),
    (
        "file_operations",
        &[("owner", Word), ("read", Function), ("iterate_shared", Function)],
    ),
    (
        "inode_operations",
        &[("lookup", Function), ("permission", Function)],
    ),
    (
        "dentry_operations",
        &[("d_revalidate", Function), ("d_hash", Function)],
    ),
    (
        "proc_ops",
        &[
            ("proc_flags", U32),
            ("proc_open", Function),
            ("proc_read", Function),
        ],
    ),
    (
        "super_operations",
        &[("alloc_inode", Function), ("statfs", Function)],
    ),
    (
        "seq_operations",
        &[
            ("start", Function),
            ("stop", Function),
            ("next", Function),
            ("show", Function),
        ],
    ),
    ("tty_operations", &[("lookup", Function), ("write", Function)]),
    (
        "tty_ldisc_ops",
        &[("name", Word), ("num", U32), ("receive_buf", Function)],
    ),
    ("consw", &[("owner", Word), ("con_putc", Function)]),
    (
        "bpf_ksym",
        &[
            ("start", Word),
            ("end", Word),
            ("name", Bytes(32)),
            ("lnode", Bytes(16)),
        ],
    ),
    ("kprobe_insn_cache", &[("lock", Word), ("pages", Bytes(16))]),
    ("kprobe_insn_page", &[("list", Bytes(16)), ("insns", Word)]),
    ("dyn_ftrace", &[("ip", Word), ("flags", Word)]),
    (
        "ftrace_page",
        &[("next", Word), ("records", Word), ("index", U32), ("order", U32)],
    ),
    (
        "ftrace_ops",
        &[
            ("func", Function),
            ("next", Word),
            ("flags", Word),
            ("saved_func", Function),
            ("func_hash", Word),
            ("trampoline", Word),
            ("trampoline_size", Word),
        ],
    ),
    (
        "ftrace_ops_hash",
        &[("notrace_hash", Word), ("filter_hash", Word)],
    ),
    ("ftrace_hash", &[("size_bits", Word), ("buckets", Word)]),
    ("ftrace_func_entry", &[("hlist", Bytes(16)), ("ip", Word)]),
    ("static_call_key", &[("func", Word), ("sites", Word)]),
    (
        "kprobe",
        &[
            ("hlist", Bytes(16)),
            ("list", Bytes(16)),
            ("addr", Word),
            ("pre_handler", Function),
            ("post_handler", Function),
        ],
    ),
    ("tracepoint", &[("name", Word), ("funcs", Word)]),
    (
        "tracepoint_func",
        &[("func", Word), ("data", Word), ("prio", Word)],
    ),
    (
        "proc_dir_entry",
        &[
            ("proc_iops", Word),
            ("proc_ops", Word),
            ("proc_dops", Word),
            ("seq_ops", Word),
            ("single_show", Word),
            ("write", Function),
            ("subdir", Word),
            ("subdir_node", Bytes(24)),
            ("name", Word),
            ("mode", U32),
        ],
    ),
    (
        "netns_nf",
        &[
            ("hooks_ipv4", Bytes(40)),
            ("hooks_ipv6", Bytes(40)),
            ("hooks_arp", Bytes(24)),
            ("hooks_bridge", Bytes(40)),
        ],
    ),
    (
        "net",
        &[
            ("list", Bytes(16)),
            ("proc_net", Word),
            ("ns", Inside("ns_common")),
            ("nf", Inside("netns_nf")),
        ],
    ),
    (
        "file_system_type",
        &[
            ("name", Word),
            ("init_fs_context", Function),
            ("kill_sb", Function),
            ("next", Word),
        ],
    ),
    (
        "super_block",
        &[
            ("s_list", Bytes(16)),
            ("s_type", Word),
            ("s_op", Word),
            ("s_d_op", Word),
            ("s_root", Word),
            ("s_id", Bytes(32)),
        ],
    ),
    ("dentry", &[("d_inode", Word)]),
    ("inode", &[("i_op", Word), ("i_fop", Word), ("i_ino", Word)]),
    (
        "tty_driver",
        &[
            ("num", U32),
            ("name", Word),
            ("ops", Word),
            ("ttys", Word),
            ("tty_drivers", Bytes(16)),
        ],
    ),
    (
        "tty_struct",
        &[("ops", Word), ("ldisc", Word), ("name", Bytes(64))],
    ),
    ("tty_ldisc", &[("ops", Word)]),
    ("vc", &[("d", Word)]),
    ("vc_data", &[("vc_sw", Word)]),
    ("notifier_block", &[("notifier_call", Function), ("next", Word)]),
    ("atomic_notifier_head", &[("lock", Word), ("head", Word)]),
    ("blocking_notifier_head", &[("rwsem", Bytes(40)), ("head", Word)]),
    ("raw_notifier_head", &[("head", Word)]),
    ("nf_hook_entry", &[("hook", Function), ("priv", Word)]),
    (
        "nf_hook_entries",
        &[("num_hook_entries", U32), ("hooks", Bytes(16))],
    ),
    ("security_hook_heads", &[("heads", Bytes(256))]),
    ("security_hook_list", &[("list", Bytes(16)), ("hook", Word)]),
    (
        "linux_binfmt",
        &[("lh", Bytes(16)), ("module", Word), ("load_binary", Function)],
    ),
    (
        "input_handler",
        &[("event", Function), ("name", Word), ("node", Bytes(16))],
    ),
    ("timer_base", &[("cpu", Word), ("vectors", Bytes(512))]),
    ("timer_list", &[("entry", Bytes(16)), ("function", Function)]),
    ("idr", &[("idr_rt", Word), ("xa_head", Word), ("idr_base", U32)]),
    ("xa_node", &[("shift", U32), ("slots", Bytes(512))]),
    (
        "bpf_prog",
        &[
            ("type", U32),
            ("len", U32),
            ("aux", Word),
            ("bpf_func", Function),
            ("insnsi", Bytes(64)),
        ],
    ),
    ("bpf_map_ops", &[("map_alloc", Function), ("map_free", Function)]),
    ("bpf_map", &[("ops", Word), ("name", Bytes(16))]),
    ("bpf_link_ops", &[("release", Function), ("dealloc", Function)]),
    ("bpf_link", &[("ops", Word)]),
    ("hrtimer_cpu_base", &[("clock_base", Bytes(64))]),
    ("hrtimer_clock_base", &[("active", Bytes(16))]),
    ("hrtimer", &[("node", Bytes(32)), ("function", Function)]),
    (
        "work_struct",
        &[("data", Word), ("entry", Bytes(16)), ("func", Function)],
    ),
    (
        "delayed_work",
        &[("work", Inside("work_struct")), ("timer", Inside("timer_list"))],
    ),
    ("worker", &[("node", Bytes(16)), ("current_func", Function)]),
    ("worker_pool", &[("worklist", Bytes(16)), ("workers", Bytes(16))]),
    (
        "workqueue_struct",
        &[("pwqs", Bytes(16)), ("list", Bytes(16)), ("name", Bytes(24))],
    ),
    (
        "pool_workqueue",
        &[("pwqs_node", Bytes(16)), ("inactive_works", Bytes(16))],
    ),
    (
        "uprobe",
        &[
            ("rb_node", Bytes(24)),
            ("consumers", Bytes(16)),
            ("inode", Word),
            ("offset", Word),
        ],
    ),
    (
        "uprobe_consumer",
        &[("handler", Function), ("cons_node", Bytes(16))],
    ),
    ("bpf_prog_aux", &[("name", Bytes(16))]),
];

/// Variables, each with as much room as the largest of them needs.
const VARIABLES: &[&str] = &[
    "bpf_kallsyms",
    "ftrace_ops_list",
    "ftrace_list_end",
    "kprobe_insn_slots",
    "kprobe_optinsn_slots",
    "ftrace_pages_start",
    "__start_static_call_sites",
    "__stop_static_call_sites",
    "kprobe_table",
    "__start___tracepoints_ptrs",
    "__stop___tracepoints_ptrs",
    "proc_root",
    "net_namespace_list",
    "file_systems",
    "super_blocks",
    "tty_ldiscs",
    "tty_drivers",
    "conswitchp",
    "vc_cons",
    "keyboard_notifier_list",
    "netdev_chain",
    "reboot_notifier_list",
    "die_chain",
    "module_notify_list",
    "security_hook_heads",
    "formats",
    "input_handler_list",
    "timer_bases",
    "prog_idr",
    "map_idr",
    "link_idr",
    "hrtimer_bases",
    "worker_pool_idr",
    "workqueues",
    "uprobes_tree",
    "idt_table",
    "gdt_page",
    "modules",
    "end_of_variables",
];
const ROOM: u64 = 0x1000;

const FUNCTIONS: &[&str] = &[
    "__x64_sys_read",
    "__x64_sys_write",
    "entry_SYSCALL_64",
    "do_syscall_64",
    "x64_sys_call",
    "syscall_init",
    "tcp_seq_start",
    "tcp_seq_stop",
    "tcp_seq_next",
    "tcp4_seq_show",
    "kernel_halt",
    "delayed_work_timer_fn",
    "__bpf_call_base",
    "bpf_probe_write_user",
];

fn types() -> Types {
    let mut builder = Builder::new();
    let int = |name, size| Def::int(name, size, false);
    let byte = builder.add(&int("unsigned char", 1));
    let u32 = builder.add(&int("unsigned int", 4));
    let word = builder.add(&int("unsigned long", 8));
    let proto = builder.add(&Def::FuncProto {
        result: u32,
        params: &[],
    });
    let function = builder.add(&Def::Ptr(proto));
    let mut known: Vec<(&str, TypeId, u64)> = Vec::new();
    for (name, members) in STRUCTS {
        let mut at = 0u64;
        let mut defs = Vec::new();
        for (member, is) in *members {
            let (type_id, size, align) = match is {
                U32 => (u32, 4, 4),
                Word => (word, 8, 8),
                Function => (function, 8, 8),
                Bytes(count) => {
                    let array = Def::Array {
                        element: byte,
                        index: u32,
                        count: *count,
                    };
                    (builder.add(&array), u64::from(*count), 8)
                }
                Inside(name) => {
                    let (_, id, size) = known.iter().find(|k| k.0 == *name).unwrap();
                    (*id, *size, 8)
                }
            };
            at = at.next_multiple_of(align);
            defs.push(MemberDef {
                name: member,
                type_id,
                bit_offset: at * 8,
                bit_size: None,
            });
            at += size;
        }
        let size = at.next_multiple_of(8);
        let id = builder.add(&Def::Struct {
            name,
            size: size as u32,
            members: &defs,
        });
        known.push((name, id, size));
    }
    builder.finish().unwrap()
}

/// A guest under construction. Addresses are offsets into the image.
pub struct Guest {
    pub bytes: Vec<u8>,
    symbols: Vec<(String, u64, u8)>,
}

impl Guest {
    /// All zeroes but for the tables that map it, a CPU, and a RET at the begin of every function.
    pub fn new() -> Guest {
        let mut guest = Guest {
            bytes: vec![0; SIZE],
            symbols: Vec::new(),
        };
        guest.put(TOP + (IMAGE >> 39 & 511) * 8, PDPT | 3);
        guest.put(PDPT + (IMAGE >> 30 & 511) * 8, 0x83);
        let mut symbol =
            |name: &str, at: u64, kind: u8| guest.symbols.push((name.to_owned(), IMAGE + at, kind));
        symbol("_text", TEXT.start, b'T');
        symbol("_etext", TEXT.end, b'T');
        symbol("__start_rodata", RODATA.start, b'R');
        symbol("__start_ro_after_init", RODATA.end, b'D');
        symbol("__per_cpu_offset", DATA.start, b'D');
        symbol("__cpu_possible_mask", DATA.start + 0x40, b'D');
        symbol("sys_call_table", RODATA.start, b'R');
        symbol("tcp4_seq_ops", RODATA.start + 0x100, b'R');
        symbol("rodata_rest", RODATA.start + 0x200, b'R');
        for (number, name) in FUNCTIONS.iter().enumerate() {
            symbol(name, function_at(number), b'T');
        }
        for (number, name) in VARIABLES.iter().enumerate() {
            symbol(name, variable_at(number), b'D');
        }
        guest.put(DATA.start + 0x40, 1);
        for number in 0..FUNCTIONS.len() {
            guest.bytes[function_at(number) as usize] = 0xc3;
        }
        guest
    }

    pub fn put(&mut self, at: u64, value: u64) {
        self.bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// The offset of a symbol.
    pub fn at(&self, name: &str) -> u64 {
        let (_, at, _) = self.symbols.iter().find(|s| s.0 == name).unwrap();
        at - IMAGE
    }

    /// The run-time address of a symbol.
    pub fn address(&self, name: &str) -> u64 {
        IMAGE + self.at(name)
    }

    fn profile(&self) -> (Profile, KernelImage) {
        let banner = "Linux version 6.1.0-synthetic (nobody@nowhere) #1".to_owned();
        let symbols: SymbolTable = self
            .symbols
            .iter()
            .map(|(name, at, kind)| (name.as_str(), *at, *kind))
            .collect();
        let profile = Profile::new(None, banner.clone(), symbols, types(), ProfileSource::Memory);
        let image = KernelImage {
            text: Gva(IMAGE),
            phys: Gpa(0),
            len: SIZE as u64,
            slide: 0,
            dtb: Dtb(TOP),
            mode: PagingMode::X86Level4,
            direct_map: None,
            parts: Vec::new(),
            banner,
            build_id: None,
            evidence: Vec::new(),
        };
        (profile, image)
    }

    /// As a dump.
    pub fn kernel(&self) -> Kernel {
        let memory = GuestMemory::from_bytes(vec![(Gpa(0), self.bytes.clone())]).unwrap();
        let (profile, image) = self.profile();
        Kernel::new(memory, image, profile)
    }

    /// As a running guest; memory may be written through the second.
    pub fn live(&self) -> (Kernel, GuestMemory) {
        let memory = GuestMemory::live_from_bytes(vec![(Gpa(0), self.bytes.clone())]).unwrap();
        let (profile, image) = self.profile();
        (Kernel::new(memory.clone(), image, profile), memory)
    }
}

fn function_at(number: usize) -> u64 {
    TEXT.start + 0x1000 * (number as u64 + 1)
}

fn variable_at(number: usize) -> u64 {
    DATA.start + ROOM * (number as u64 + 1)
}
