//! Types of global variables, which BTF does not tell (but for per-CPU ones).
//!
//! The table says what the kernel's sources say of the variables that analysts and Volatility's plugins start from.
//! It is not needed to be complete: a symbol without a type is still found by its address. Where a declaration has
//! changed between versions, there is a line for each; the first whose type the kernel has counts.

use std::collections::HashMap;

use crate::Profile;
use crate::types::{Kind, Kinds, TypeId, Types};

/// The type of one variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Global {
    pub(super) type_id: TypeId,
    pub(super) shape: Shape,
}

/// What the variable is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Value,
    Pointer,
    /// With this many elements.
    Array(u64),
    PointerArray(u64),
}

/// How the table below says it. The text is a type's name, with its keyword.
enum Is {
    Value(&'static str),
    Pointer(&'static str),
    /// As many as have room before the next symbol.
    Array(&'static str),
    PointerArray(&'static str),
    /// The anonymous struct that begins with these members.
    With(&'static [&'static str]),
}

use Is::{Array, Pointer, PointerArray, Value, With};

const TABLE: &[(Is, &[&str])] = &[
    (Value("struct task_struct"), &["init_task"]),
    (Value("struct pid_namespace"), &["init_pid_ns"]),
    (Value("struct user_namespace"), &["init_user_ns"]),
    (Value("struct uts_namespace"), &["init_uts_ns"]),
    (Value("struct ipc_namespace"), &["init_ipc_ns"]),
    (Value("struct cgroup_namespace"), &["init_cgroup_ns"]),
    (Value("struct time_namespace"), &["init_time_ns"]),
    (Value("struct nsproxy"), &["init_nsproxy"]),
    (Value("struct net"), &["init_net"]),
    (Value("struct cred"), &["init_cred"]),
    (Value("struct files_struct"), &["init_files"]),
    (Value("struct fs_struct"), &["init_fs"]),
    (Value("struct mm_struct"), &["init_mm"]),
    (Value("struct css_set"), &["init_css_set"]),
    (Value("struct cgroup_root"), &["cgrp_dfl_root"]),
    (
        Value("struct list_head"),
        &[
            "modules",
            "net_namespace_list",
            "tty_drivers",
            "super_blocks",
            "slab_caches",
            "proto_list",
            "bpf_kallsyms",
            "ftrace_mod_maps",
            "ftrace_ops_trampoline_list",
            "ftrace_events",
            "cgroup_roots",
            "pci_root_buses",
            "input_dev_list",
            "input_handler_list",
            "crypto_alg_list",
            "nf_hooks",
            "fb_notifier_list",
            "vmap_area_list",
            "clocksource_list",
        ],
    ),
    (Pointer("struct kset"), &["module_kset", "devices_kset"]),
    (Value("struct mod_tree_root"), &["mod_tree"]),
    (Value("struct latch_tree_root"), &["bpf_tree"]),
    (
        Value("struct idr"),
        &["prog_idr", "map_idr", "link_idr", "btf_idr"],
    ),
    (Pointer("struct printk_ringbuffer"), &["prb"]),
    (
        Value("struct printk_ringbuffer"),
        &["printk_rb_static", "printk_rb_dynamic"],
    ),
    (Pointer("char"), &["log_buf", "saved_command_line"]),
    (
        Array("char"),
        &[
            "linux_banner",
            "linux_proc_banner",
            "boot_command_line",
            "__log_buf",
        ],
    ),
    (
        Value("unsigned int"),
        &[
            "log_buf_len",
            "log_first_idx",
            "log_next_idx",
            "log_end",
            "d_hash_shift",
            "kallsyms_num_syms",
        ],
    ),
    (
        Value("int"),
        &[
            "cap_last_cap",
            "num_registered_fb",
            "panic_timeout",
            "sysctl_legacy_va_layout",
            "modules_disabled",
        ],
    ),
    (
        Value("long unsigned int"),
        &[
            "module_addr_min",
            "module_addr_max",
            "vmemmap_base",
            "page_offset_base",
            "vmalloc_base",
            "phys_base",
            "jiffies",
            "max_pfn",
            "totalram_pages",
            "kallsyms_relative_base",
            "empty_zero_page",
        ],
    ),
    (
        Value("char"),
        &[
            "_text",
            "_stext",
            "_etext",
            "_sinittext",
            "_einittext",
            "_sdata",
            "_edata",
            "_end",
        ],
    ),
    (
        Array("long unsigned int"),
        &["__per_cpu_offset", "swapper_pg_dir", "init_top_pgt"],
    ),
    (PointerArray("struct fb_info"), &["registered_fb"]),
    (PointerArray("struct char_device_struct"), &["chrdevs"]),
    (PointerArray("struct net_proto_family"), &["net_families"]),
    (PointerArray("struct net_protocol"), &["inet_protos"]),
    (PointerArray("struct pglist_data"), &["node_data"]),
    (Array("struct gate_struct"), &["idt_table"]),
    (Array("struct taint_flag"), &["taint_flags"]),
    (
        Array("sys_call_ptr_t"),
        &["sys_call_table", "ia32_sys_call_table", "x32_sys_call_table"],
    ),
    // The same as an array of int where relocations are relative, which is what readers have to know.
    (Array("tracepoint_ptr_t"), &["__start___tracepoints_ptrs"]),
    (
        Array("struct kernel_symbol"),
        &["__start___ksymtab", "__start___ksymtab_gpl"],
    ),
    (Array("struct hlist_head"), &["kprobe_table", "unix_socket_table"]),
    (
        Value("struct atomic_notifier_head"),
        &[
            "keyboard_notifier_list",
            "die_chain",
            "panic_notifier_list",
            "netevent_notif_chain",
        ],
    ),
    (
        Value("struct blocking_notifier_head"),
        &["reboot_notifier_list", "module_notify_list"],
    ),
    (Value("struct raw_notifier_head"), &["netdev_chain"]),
    (Value("struct file_operations"), &["socket_file_ops"]),
    (Value("struct dentry_operations"), &["sockfs_dentry_operations"]),
    (Pointer("struct ftrace_ops"), &["ftrace_ops_list"]),
    (Value("struct ftrace_ops"), &["ftrace_list_end", "global_ops"]),
    (Value("struct resource"), &["iomem_resource", "ioport_resource"]),
    (
        Value("struct seq_operations"),
        &[
            "raw_seq_ops",
            "udp_seq_ops",
            "arp_seq_ops",
            "unix_seq_ops",
            "udp6_seq_ops",
            "raw6_seq_ops",
            "tcp_seq_ops",
            "tcp4_seq_ops",
            "tcp6_seq_ops",
            "packet_seq_ops",
            "modules_op",
            "cpuinfo_op",
        ],
    ),
    (
        Value("struct tcp_seq_afinfo"),
        &["tcp4_seq_afinfo", "tcp6_seq_afinfo"],
    ),
    (
        Value("struct udp_seq_afinfo"),
        &[
            "udp4_seq_afinfo",
            "udp6_seq_afinfo",
            "udplite4_seq_afinfo",
            "udplite6_seq_afinfo",
        ],
    ),
    (Value("struct inet_hashinfo"), &["tcp_hashinfo"]),
    (Value("struct udp_table"), &["udp_table"]),
    (
        Value("struct raw_hashinfo"),
        &["raw_v4_hashinfo", "raw_v6_hashinfo"],
    ),
    (Pointer("struct file_system_type"), &["file_systems"]),
    (Pointer("struct hlist_bl_head"), &["dentry_hashtable"]),
    (
        Pointer("struct hlist_head"),
        &["inode_hashtable", "mount_hashtable", "mountpoint_hashtable"],
    ),
    (Pointer("struct page"), &["mem_map"]),
    (Pointer("struct console"), &["console_drivers"]),
    (Value("struct hlist_head"), &["console_list"]),
    (Value("struct security_hook_heads"), &["security_hook_heads"]),
    (Value("struct rb_root"), &["vmap_area_root"]),
    (Value("struct rq"), &["runqueues"]),
    // Named since Linux 6.13.
    (Value("struct tk_data"), &["tk_core"]),
    (With(&["seq", "timekeeper"]), &["tk_core"]),
    // Scheduling classes are what tasks in plain memory are recognised by.
    (
        Value("struct sched_class"),
        &[
            "stop_sched_class",
            "dl_sched_class",
            "rt_sched_class",
            "fair_sched_class",
            "idle_sched_class",
            "ext_sched_class",
        ],
    ),
];

/// The types of those global variables of a kernel that are known, by name.
pub(super) fn types(profile: &Profile) -> HashMap<&str, Global> {
    let types = &profile.types;
    let mut out = HashMap::default();
    for t in types.iter().filter(|t| t.kind() == Kind::Var) {
        if let Some(type_id) = t.target() {
            out.entry(t.name()).or_insert(Global {
                type_id,
                shape: Shape::Value,
            });
        }
    }
    for (is, symbols) in TABLE {
        let Some(type_id) = is.find(types) else { continue };
        for &symbol in *symbols {
            let room = || room(profile, symbol, types.size_of(type_id));
            let shape = match is {
                Value(_) | With(_) => Shape::Value,
                Pointer(_) => Shape::Pointer,
                Array(_) => Shape::Array(room().unwrap_or(0)),
                PointerArray(_) => {
                    let size = Some(u64::from(types.pointer_size()));
                    Shape::PointerArray(self::room(profile, symbol, size).unwrap_or(0))
                }
            };
            out.entry(symbol).or_insert(Global { type_id, shape });
        }
    }
    out
}

impl Is {
    fn find(&self, types: &Types) -> Option<TypeId> {
        let name = match self {
            Value(name) | Pointer(name) | Array(name) | PointerArray(name) => name,
            With(members) => {
                let begins = |t: &crate::Type<'_>| {
                    members
                        .iter()
                        .copied()
                        .eq(t.members().map(|m| m.name).take(members.len()))
                };
                let anonymous = types
                    .iter()
                    .filter(|t| t.kind() == Kind::Struct && t.name().is_empty());
                return anonymous.into_iter().find(begins).map(|t| t.id());
            }
        };
        match name.split_once(' ') {
            Some(("struct", name)) => types.find(name, Kinds::STRUCT),
            _ => types.find(name, Kinds::INT | Kinds::TYPEDEF),
        }
    }
}

/// How many elements of `size` bytes fit between a symbol and the next one.
fn room(profile: &Profile, symbol: &str, size: Option<u64>) -> Option<u64> {
    let start = profile.symbols.address(symbol)?;
    // No table of the kernel is larger; the bound keeps a sparse symbol table from making one up.
    let next = profile.symbols.after(start)?;
    let bytes = next.address.checked_sub(start).filter(|bytes| *bytes < 1 << 20)?;
    bytes.checked_div(size?)
}
