//! Tables of operations: of /proc, of filesystems, of sockets in /proc/net, of terminals.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::structures::{hlist, list, rbtree};
use vmsight_memory::AddressSpace;

use super::pointers::Pointers;
use crate::recover::files::inode::{S_IFDIR, S_IFLNK, S_IFMT};
use crate::{Check, Context, Finding, Findings, Object, Owner, Severity, Technique};

/// Entries below /proc that are looked at.
const MAX_ENTRIES: usize = 1 << 16;
/// Filesystems, drivers, terminals, namespaces that are looked at.
const MAX_OBJECTS: usize = 1 << 14;

pub(super) const RODATA: Check = Check {
    name: "rodata",
    summary: "Read-only data of the kernel leads to no module",
    compares: "every aligned word between __start_rodata and the data that is read-only after init with the places of modules: what \
               was fixed when the kernel was built cannot know where a module is",
    why: "Tables of operations (of /proc, of the sockets' listings, of filesystems, of system calls) are read-only data: who wants to \
          be called instead writes there.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "Tables that lead to other places of the kernel's own text.",
        "Memory outside of the area where modules lie.",
    ],
    run: rodata,
};

fn rodata(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let start = context.symbol(&["__start_rodata"])?;
    let end = context.symbol(&["__start_ro_after_init", "__end_rodata"])?;
    let mut chunk = vec![0; 1 << 16];
    let mut at = start;
    while at.0 < end.0.min(start.0.saturating_add(256 << 20)) {
        let length = ((end.0 - at.0) as usize).min(chunk.len());
        let bytes = chunk.get_mut(..length).unwrap_or_default();
        if let Err(error) = context.space().read(at, bytes) {
            findings.note(format!("read-only data at {at}: {error}"));
            break;
        }
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let value = Gva(u64::from_le_bytes(word.try_into().unwrap_or_default()));
            // Most are no addresses at all.
            if value.0 < 0xffff_ffff_0000_0000 || context.kernel().image().contains(value) {
                continue;
            }
            let slot = at.wrapping_add(index as u64 * 8);
            let owner = context.owner(value);
            let strange = match owner {
                Owner::Module { .. } => true,
                Owner::ModuleArea => executable(context.space(), value),
                _ => false,
            };
            if strange {
                let name = context.name(slot).unwrap_or_else(|| slot.to_string());
                let finding = Finding::new(
                    Severity::Critical,
                    name,
                    "read-only data of the kernel leads to a place where modules lie",
                )
                .at(slot)
                .by(owner.module().map(str::to_owned))
                .with(context.evidence("word at", slot))
                .with(context.evidence("leads to", value))
                .with(context.code("code there", value, 4));
                findings.report(finding);
            }
        }
        findings.looked_at(length / 8);
        at = at.wrapping_add(length as u64);
    }
    Ok(())
}

fn executable(space: &AddressSpace, at: Gva) -> bool {
    space.translate(at).is_ok_and(|page| page.access.execute)
}

pub(super) const PROC: Check = Check {
    name: "proc",
    summary: "Operations of everything below /proc",
    compares: "operations of files, folders and listings of each entry below /proc, and below /proc/net of each network namespace, with \
               the code of the kernel and of the module whose entry it is",
    why: "What is hidden from ps, lsmod and ss is hidden by changing what files below /proc do when they are read.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "What is below /proc/PID is made when it is looked at; its tables are read-only data: see rodata.",
    ],
    run: proc,
};

fn proc(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let root = context.symbol(&["proc_root"])?;
    let mut trees = vec![("/proc".to_owned(), root)];
    for net in networks(context, findings) {
        let number = net.number("ns.inum")?;
        trees.push((
            format!("/proc/net of namespace {number}"),
            net.pointer("proc_net")?,
        ));
    }
    let entry = context.object("proc_dir_entry", root)?;
    let node = context.kernel().offset("proc_dir_entry", "subdir_node")?;
    let mut seen = rustc_hash::FxHashSet::default();
    while let Some((path, at)) = trees.pop() {
        if at.is_null() || !seen.insert(at.0) {
            continue;
        }
        if !findings.go_on() {
            break;
        }
        if seen.len() > MAX_ENTRIES {
            findings.note(format!("entries below /proc: cut after {MAX_ENTRIES}"));
            break;
        }
        let entry = entry.moved(at);
        let looked = proc_entry(findings, &mut pointers, &path, &entry);
        findings.or_note(&path, looked);
        let Some(subdir) = findings.or_note(&path, entry.member("subdir")) else {
            continue;
        };
        let limit = MAX_ENTRIES.min(findings.left());
        let below = findings.complete(&path, rbtree::walk(context.space(), subdir, limit));
        for child in below {
            let child = child.wrapping_sub(node);
            let name = entry
                .moved(child)
                .text("name", 256)
                .unwrap_or_else(|_| "?".to_owned());
            // A name may have a path's worth of levels above it at most.
            if path.len() < 4096 {
                trees.push((format!("{path}/{name}"), child));
            }
        }
    }
    Ok(())
}

fn proc_entry(
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
    path: &str,
    entry: &Object<'_>,
) -> Result<(), LinuxError> {
    pointers.table(findings, path, "inode_operations", entry.pointer("proc_iops")?);
    if entry.has("proc_dops") {
        pointers.table(findings, path, "dentry_operations", entry.pointer("proc_dops")?);
    }
    let operations = entry.pointer("proc_ops|proc_fops")?;
    match entry.number("mode")? & S_IFMT {
        S_IFDIR => pointers.table(findings, path, "file_operations", operations),
        S_IFLNK => {}
        _ => {
            pointers.table(findings, path, "proc_ops", operations);
            let shared = pointers.context().symbol_at(operations).unwrap_or_default();
            match shared {
                "proc_seq_ops" | "proc_net_seq_ops" => {
                    pointers.table(findings, path, "seq_operations", entry.pointer("seq_ops")?);
                }
                "proc_single_ops" | "proc_net_single_ops" => {
                    pointers.slot(findings, path, "single_show", entry.member("single_show")?);
                }
                _ => {}
            }
        }
    }
    pointers.slot(findings, path, "write", entry.member("write")?);
    Ok(())
}

/// The network namespaces.
pub(super) fn networks<'c>(context: &'c Context, findings: &mut Findings) -> Vec<Object<'c>> {
    let read = || {
        let head = context.symbol(&["net_namespace_list"])?;
        let offset = context.kernel().offset("net", "list")?;
        let found = list::walk(context.space(), head, MAX_OBJECTS).walk;
        let net = context.object("net", Gva(0))?;
        let nets = found
            .items
            .iter()
            .map(|node| net.moved(node.wrapping_sub(offset)))
            .collect();
        Ok::<_, LinuxError>((nets, found.end))
    };
    match read() {
        Ok((nets, end)) => {
            findings.end("network namespaces", &end);
            nets
        }
        Err(why) => {
            findings.note(format!("network namespaces: {why}"));
            Vec::new()
        }
    }
}

pub(super) const SEQ_OPS: Check = Check {
    name: "seq-ops",
    summary: "Listings of sockets in /proc/net",
    compares: "each operation of the listings of TCP, UDP, raw, UNIX, packet and netlink sockets with the symbol that it must be",
    why: "Whoever replaces tcp4_seq_ops.show decides which connections netstat and /proc/net/tcp show.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "ss asks by netlink and not by these tables.",
        "Listings of protocols that are modules.",
    ],
    run: seq_ops,
};

/// The tables, and of each what its operations' names begin with; the tables' own names stay the same over all versions here.
const LISTINGS: &[(&str, &[&str])] = &[
    ("tcp4_seq_ops", &["tcp"]),
    ("tcp6_seq_ops", &["tcp"]),
    ("udp_seq_ops", &["udp"]),
    ("udp6_seq_ops", &["udp"]),
    ("udplite_seq_ops", &["udp"]),
    ("raw_seq_ops", &["raw"]),
    ("raw6_seq_ops", &["raw"]),
    ("unix_seq_ops", &["unix", "bpf_iter_unix"]),
    ("packet_seq_ops", &["packet"]),
    ("netlink_seq_ops", &["netlink", "bpf_iter_netlink"]),
    ("arp_seq_ops", &["arp", "neigh"]),
    ("dev_seq_ops", &["dev"]),
];

fn seq_ops(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    for (symbol, prefixes) in LISTINGS {
        let Some(at) = context.kernel().find_symbol(&[symbol]) else {
            continue;
        };
        let before = findings.found().len();
        pointers.table(findings, symbol, "seq_operations", at);
        if findings.found().len() > before {
            continue;
        }
        for (member, slot) in context.object("seq_operations", at)?.function_pointers() {
            let value = context.pointer("seq_operations", slot)?;
            let fits = context
                .symbols_at(value)
                .any(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)));
            if !fits && context.owner(value) == Owner::Kernel {
                let finding = Finding::new(
                    Severity::High,
                    format!("{symbol} seq_operations.{member}"),
                    "a function of the kernel's, but none of this listing",
                )
                .at(slot)
                .with(context.evidence("leads to", value));
                findings.report(finding);
            }
        }
    }
    Ok(())
}

pub(super) const FILESYSTEMS: Check = Check {
    name: "filesystems",
    summary: "Operations of filesystems and of what is mounted",
    compares: "operations of every registered filesystem, of each superblock, and of the root folder of each with the code of the kernel \
               and of the module that they belong to",
    why: "A filesystem's root folder that lists and opens with somebody else's functions hides files from every program.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &["Operations of single files and folders below the root."],
    run: filesystems,
};

fn filesystems(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let head = context.symbol(&["file_systems"])?;
    let kind = context.object("file_system_type", Gva(0))?;
    // Chained by a pointer up to 7.0, by a node since.
    let (next, node) = match kind.has("next") {
        true => (kind.member("next")?.0, 0),
        false => (0, kind.member("list")?.0),
    };
    let first = context.pointer("file_systems", head)?;
    let walk = hlist::walk_next(context.space(), first, next, MAX_OBJECTS);
    for at in findings.complete("list of filesystems", walk) {
        let kind = kind.moved(at.wrapping_sub(node));
        let name = kind.text("name", 64)?;
        pointers.table(
            findings,
            &format!("filesystem {name}"),
            "file_system_type",
            kind.address(),
        );
    }
    let head = context.symbol(&["super_blocks"])?;
    let offset = context.kernel().offset("super_block", "s_list")?;
    let walk = list::walk(context.space(), head, MAX_OBJECTS).walk;
    for node in findings.complete("list of superblocks", walk) {
        let block = context.object("super_block", node.wrapping_sub(offset))?;
        let looked = superblock(context, findings, &mut pointers, &block);
        findings.or_note("a superblock", looked);
    }
    Ok(())
}

fn superblock(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
    block: &Object<'_>,
) -> Result<(), LinuxError> {
    let name = block.array_text("s_id")?;
    let kind = context
        .object("file_system_type", block.pointer("s_type")?)?
        .text("name", 64)?;
    let subject = format!("{kind} on {name}");
    pointers.table(findings, &subject, "super_operations", block.pointer("s_op")?);
    pointers.table(
        findings,
        &subject,
        "dentry_operations",
        block.pointer("s_d_op|__s_d_op")?,
    );
    let root = block.pointer("s_root")?;
    if root.is_null() {
        return Ok(());
    }
    let inode = context.object("dentry", root)?.pointer("d_inode")?;
    if inode.is_null() {
        return Ok(());
    }
    let inode = context.object("inode", inode)?;
    let subject = format!("root of {subject}");
    pointers.table(findings, &subject, "inode_operations", inode.pointer("i_op")?);
    pointers.table(findings, &subject, "file_operations", inode.pointer("i_fop")?);
    Ok(())
}

pub(super) const TTY: Check = Check {
    name: "tty",
    summary: "Operations of terminals and their line disciplines",
    compares: "operations of every terminal driver, of each open terminal, of its line discipline, of all registered line disciplines and \
               of the virtual consoles with the code of the kernel and of the module that they belong to",
    why: "A line discipline's receive_buf sees every key pressed on a terminal, passwords too.",
    techniques: &[Technique::KEYLOGGING, Technique::ROOTKIT],
    blind_spots: &[
        "A line discipline of a module in the tree that was set on a terminal for no honest reason.",
    ],
    run: tty,
};

/// Line disciplines (NR_LDISCS: 30 up to 5.10, 31 since) and virtual consoles (MAX_NR_CONSOLES).
const MAX_DISCIPLINES: u64 = 32;
const MAX_CONSOLES: u64 = 63;

fn tty(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    if let Some(table) = context.kernel().find_symbol(&["tty_ldiscs"]) {
        for index in 0..context.entries(table, MAX_DISCIPLINES) {
            let at = context.pointer("tty_ldiscs", table.wrapping_add(index * 8))?;
            pointers.table(findings, &format!("line discipline {index}"), "tty_ldisc_ops", at);
        }
    }
    let head = context.symbol(&["tty_drivers"])?;
    let offset = context.kernel().offset("tty_driver", "tty_drivers")?;
    let walk = list::walk(context.space(), head, MAX_OBJECTS).walk;
    for node in findings.complete("list of terminal drivers", walk) {
        let driver = context.object("tty_driver", node.wrapping_sub(offset))?;
        let name = driver
            .text("driver_name|name", 64)
            .unwrap_or_else(|_| "?".to_owned());
        pointers.table(
            findings,
            &format!("tty driver {name}"),
            "tty_operations",
            driver.pointer("ops")?,
        );
        let (ttys, count) = (driver.pointer("ttys")?, driver.number("num")?);
        for index in 0..if ttys.is_null() { 0 } else { count.min(4096) } {
            if !findings.go_on() {
                return Ok(());
            }
            let tty = context.pointer("tty_driver.ttys", ttys.wrapping_add(index * 8))?;
            if !tty.is_null() {
                let looked = terminal(context, findings, &mut pointers, tty);
                findings.or_note(&format!("terminal {index} of {name}"), looked);
            }
        }
    }
    consoles(context, findings, &mut pointers)
}

fn terminal(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
    at: Gva,
) -> Result<(), LinuxError> {
    let tty = context.object("tty_struct", at)?;
    let name = format!("terminal {}", tty.array_text("name")?);
    pointers.table(findings, &name, "tty_operations", tty.pointer("ops")?);
    let discipline = tty.pointer("ldisc")?;
    if !discipline.is_null() {
        let operations = context.object("tty_ldisc", discipline)?.pointer("ops")?;
        pointers.table(findings, &name, "tty_ldisc_ops", operations);
    }
    Ok(())
}

fn consoles(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
) -> Result<(), LinuxError> {
    if let Some(at) = context.kernel().find_symbol(&["conswitchp"]) {
        let switch = context.pointer("conswitchp", at)?;
        pointers.table(findings, "default console", "consw", switch);
    }
    if let (Some(table), Ok(console)) = (
        context.kernel().find_symbol(&["vc_cons"]),
        context.object("vc", Gva(0)),
    ) {
        for index in 0..MAX_CONSOLES {
            let at = console
                .moved(table.wrapping_add(index * console.size()))
                .pointer("d")?;
            if !at.is_null() {
                let data = context.object("vc_data", at)?;
                pointers.table(
                    findings,
                    &format!("console tty{}", index + 1),
                    "consw",
                    data.pointer("vc_sw")?,
                );
            }
        }
    }
    Ok(())
}
