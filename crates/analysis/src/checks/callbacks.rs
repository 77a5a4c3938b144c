//! What the kernel calls on occasions: notifiers, network filters, security modules, formats, input, timers, BPF.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::structures::{hlist, list, xarray};

use super::pointers::Pointers;
use super::tables::networks;
use crate::{Check, Context, Evidence, Finding, Findings, Owner, Severity, Technique};

/// Elements of one chain that are looked at.
const MAX_CHAIN: usize = 4096;

pub(super) const NOTIFIERS: Check = Check {
    name: "notifiers",
    summary: "Who is told of keys, modules, devices, crashes and shutdown",
    compares: "every function on the kernel's notifier chains with the code that the kernel knows",
    why: "A function on the keyboard's chain is told of every key; one on the modules' chain may hide or stop others; one on die or \
          reboot keeps itself alive.",
    techniques: &[
        Technique::KEYLOGGING,
        Technique::ROOTKIT,
        Technique::IMPAIR_DEFENSES,
    ],
    blind_spots: &[
        "Functions of modules in the tree: what they do when they are told is not judged.",
        "Chains of drivers.",
    ],
    run: notifiers,
};

/// The chains and what heads them.
const CHAINS: &[(&str, &str)] = &[
    ("keyboard_notifier_list", "atomic_notifier_head"),
    ("vt_notifier_list", "atomic_notifier_head"),
    ("netdev_chain", "raw_notifier_head"),
    ("netevent_notif_chain", "atomic_notifier_head"),
    ("inetaddr_chain", "blocking_notifier_head"),
    ("inet6addr_chain", "atomic_notifier_head"),
    ("netlink_chain", "blocking_notifier_head"),
    ("reboot_notifier_list", "blocking_notifier_head"),
    ("restart_handler_list", "atomic_notifier_head"),
    ("panic_notifier_list", "atomic_notifier_head"),
    ("die_chain", "atomic_notifier_head"),
    ("module_notify_list", "blocking_notifier_head"),
    ("tracepoint_notify_list", "blocking_notifier_head"),
    ("oom_notify_list", "blocking_notifier_head"),
    ("task_exit_notifier", "blocking_notifier_head"),
    ("crypto_chain", "blocking_notifier_head"),
    ("pm_chain_head", "blocking_notifier_head"),
    ("memory_chain", "blocking_notifier_head"),
    ("x86_mce_decoder_chain", "blocking_notifier_head"),
    ("acpi_chain_head", "blocking_notifier_head"),
    ("fb_notifier_list", "blocking_notifier_head"),
    ("blocking_lsm_notifier_chain", "blocking_notifier_head"),
];

fn notifiers(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let block = context.object("notifier_block", Gva(0))?;
    let next = context.kernel().offset("notifier_block", "next")?;
    for (symbol, structure) in CHAINS {
        let Some(head) = context.kernel().find_symbol(&[symbol]) else {
            continue;
        };
        findings.looked_at(1);
        let first = context.object(structure, head)?.pointer("head")?;
        let walk = hlist::walk_next(context.space(), first, next, MAX_CHAIN);
        for at in findings.complete(symbol, walk) {
            let slot = block.moved(at).member("notifier_call")?;
            pointers.hook(findings, symbol, "notifier_call", slot);
        }
    }
    Ok(())
}

pub(super) const NETFILTER: Check = Check {
    name: "netfilter",
    summary: "Who sees packets on their way",
    compares: "every function hooked into netfilter, in every network namespace, for IPv4, IPv6, ARP and bridges, with the code that the \
               kernel knows",
    why: "A hook sees every packet before any firewall's rule: a backdoor waits there for the packet that wakes it, and hides traffic.",
    techniques: &[Technique::TRAFFIC_SIGNALING, Technique::ROOTKIT],
    blind_spots: &[
        "Hooks of modules in the tree (nf_tables, nf_conntrack, ip_tables …): the rules behind them are not judged.",
        "Packet sockets, traffic control and XDP see packets, too.",
    ],
    run: netfilter,
};

/// Hooks in one place: MAX_HOOK_COUNT (net/netfilter/core.c).
const MAX_HOOKS: u64 = 1024;

fn netfilter(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let entry = context.object("nf_hook_entry", Gva(0))?;
    for net in networks(context, findings) {
        let number = net.number("ns.inum")?;
        for family in ["hooks_ipv4", "hooks_ipv6", "hooks_arp", "hooks_bridge"] {
            let path = format!("nf.{family}");
            if !net.has(&path) {
                continue;
            }
            let (table, size) = (net.member(&path)?, net.size_of(&path)?);
            for place in 0..(size / 8).min(16) {
                findings.looked_at(1);
                let at = context.pointer("nf_hook_entries", table.wrapping_add(place * 8))?;
                if at.is_null() {
                    continue;
                }
                let entries = context.object("nf_hook_entries", at)?;
                let count = entries.number("num_hook_entries")?.min(MAX_HOOKS);
                let first = entries.member("hooks")?;
                for index in 0..count {
                    if !findings.go_on() {
                        return Ok(());
                    }
                    let slot = entry
                        .moved(first.wrapping_add(index * entry.size()))
                        .member("hook")?;
                    let subject = format!("{family}[{place}] hook {index} of namespace {number}");
                    pointers.hook(findings, &subject, "hook", slot);
                }
            }
        }
    }
    Ok(())
}

pub(super) const LSM: Check = Check {
    name: "lsm",
    summary: "Security modules' hooks are the kernel's own",
    compares: "every function registered for the hooks of Linux security modules with the kernel's text; since 6.12 also the static calls \
               that the kernel makes of them",
    why: "No module can be a security module: a hook outside of the kernel decides who may do what, or sees it.",
    techniques: &[Technique::IMPAIR_DEFENSES, Technique::ROOTKIT],
    blind_spots: &["That a hook was taken out."],
    run: lsm,
};

fn lsm(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let registered = context.object("security_hook_list", Gva(0))?;
    if let Some(heads) = context.kernel().find_symbol(&["security_hook_heads"]) {
        let size = context.object("security_hook_heads", heads)?.size();
        let list = context.kernel().offset("security_hook_list", "list")?;
        for index in 0..(size / 8).min(1024) {
            if !findings.go_on() {
                break;
            }
            let walk = hlist::walk(context.space(), heads.wrapping_add(index * 8));
            for node in findings.complete("hooks of security modules", walk) {
                let hook = registered.moved(node.wrapping_sub(list));
                security_hook(context, findings, &mut pointers, hook.member("hook")?)?;
            }
        }
        return Ok(());
    }
    let Some(table) = context.kernel().find_symbol(&["static_calls_table"]) else {
        findings.note("the kernel has no security modules, or hides their hooks");
        return Ok(());
    };
    let size = context.object("lsm_static_calls_table", table)?.size();
    let call = context.object("lsm_static_call", table)?;
    for index in 0..size.checked_div(call.size()).unwrap_or(0).min(1 << 14) {
        let call = call.moved(table.wrapping_add(index * call.size()));
        let hook = call.pointer("hl")?;
        findings.looked_at(1);
        if hook.is_null() {
            continue;
        }
        security_hook(
            context,
            findings,
            &mut pointers,
            registered.moved(hook).member("hook")?,
        )?;
        let key = call.pointer("key")?;
        let slot = context.object("static_call_key", key)?.member("func")?;
        security_hook(context, findings, &mut pointers, slot)?;
    }
    Ok(())
}

fn security_hook(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
    slot: Gva,
) -> Result<(), LinuxError> {
    let value = context.pointer("a security hook", slot)?;
    let before = findings.found().len();
    let name = context.name(slot).unwrap_or_else(|| "security hook".to_owned());
    pointers.value(findings, &name, "hook", slot, value);
    let owner = context.owner(value);
    if findings.found().len() == before && matches!(owner, Owner::Module { .. }) {
        let finding = Finding::new(Severity::Critical, name, "a module has a security module's hook")
            .at(slot)
            .by(owner.module().map(str::to_owned))
            .with(context.evidence("leads to", value));
        findings.report(finding);
    }
    Ok(())
}

pub(super) const BINFMT: Check = Check {
    name: "binfmt",
    summary: "Formats of programs",
    compares: "the functions of every registered binary format with the code that the kernel knows",
    why: "A format's load_binary runs with the kernel's rights whenever a program is started.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &["Rules of binfmt_misc: what interpreter a file is given to."],
    run: binfmt,
};

fn binfmt(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let offset = context.kernel().offset("linux_binfmt", "lh")?;
    // Other files have variables of this name, too; this one heads a list.
    let symbols = &context.kernel().profile().symbols;
    let is_list = |at: &Gva| {
        let first = context.pointer("formats", *at).ok()?;
        let back = context.pointer("formats", first.wrapping_add(8)).ok()?;
        (back == *at).then_some(())
    };
    let head = symbols
        .addresses("formats")
        .map(|linked| context.kernel().image().runtime(linked))
        .find(|at| is_list(at).is_some());
    let Some(head) = head else {
        findings.note("the list of formats is not found, or is broken");
        return Ok(());
    };
    each(context, findings, "formats", head, offset, "linux_binfmt")
}

pub(super) const INPUT: Check = Check {
    name: "input",
    summary: "Who sees what is typed and moved",
    compares: "the functions of every handler of input events with the code that the kernel knows",
    why: "A handler of input events is told of every key, below all terminals and desktops.",
    techniques: &[Technique::KEYLOGGING],
    blind_spots: &["Programs that have /dev/input open."],
    run: input,
};

fn input(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let Some(head) = context.kernel().find_symbol(&["input_handler_list"]) else {
        findings.note("the kernel has no input handlers built in, or hides their list");
        return Ok(());
    };
    let offset = context.kernel().offset("input_handler", "node")?;
    each(context, findings, "input handlers", head, offset, "input_handler")
}

/// The functions of each structure on a list.
fn each(
    context: &Context,
    findings: &mut Findings,
    what: &str,
    head: Gva,
    offset: u64,
    structure: &str,
) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let walk = list::walk(context.space(), head, MAX_CHAIN).walk;
    for node in findings.complete(what, walk) {
        let object = context.object(structure, node.wrapping_sub(offset))?;
        let subject = match object.text("name", 64) {
            Ok(name) => format!("{structure} {name}"),
            Err(_) => format!("{structure} {}", context.describe(object.address())),
        };
        for (member, slot) in object.function_pointers() {
            pointers.hook(findings, &subject, &member, slot);
        }
    }
    Ok(())
}

pub(super) const TIMERS: Check = Check {
    name: "timers",
    summary: "Functions that timers will call",
    compares: "the function of every pending timer on every CPU with the code that the kernel knows",
    why: "A timer is how code that is in no list and no process comes to run again and again.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &[
        "High-resolution timers and queued work.",
        "A timer that is running or is set anew at the moment.",
    ],
    run: timers,
};

/// BASE_STD, BASE_DEF, and since 6.9 BASE_LOCAL and BASE_GLOBAL.
const MAX_BASES: u64 = 4;

fn timers(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let bases = context.kernel().per_cpu_symbol("timer_bases")?;
    let base = context.object("timer_base", Gva(0))?;
    let node = context.kernel().offset("timer_list", "entry")?;
    let timer = context.object("timer_list", Gva(0))?;
    let vectors = base.size_of("vectors")? / 8;
    // As many as there is room for before the next variable.
    let room = context.room("timer_bases").checked_div(base.size()).unwrap_or(0);
    let mut pointers = Pointers::new(context);
    for (cpu, at) in context.kernel().per_cpu()?.copies(bases) {
        for number in 0..room.clamp(1, MAX_BASES) {
            if !findings.go_on() {
                return Ok(());
            }
            let base = base.moved(at.wrapping_add(number * base.size()));
            let vector = base.member("vectors")?;
            let mut heads = vec![0; vectors.min(1024) as usize * 8];
            if let Err(error) = context.space().read(vector, &mut heads) {
                findings.note(format!("timers of CPU {cpu}: {error}"));
                break;
            }
            findings.looked_at(heads.len() / 8);
            for (index, head) in heads.chunks_exact(8).enumerate() {
                if head.iter().all(|b| *b == 0) {
                    continue;
                }
                let walk = hlist::walk(context.space(), vector.wrapping_add(index as u64 * 8));
                // Timers come and go while they are read; a chain that ends oddly is one that did.
                for entry in walk.items.into_iter().take(MAX_CHAIN) {
                    if !findings.go_on() {
                        return Ok(());
                    }
                    let timer = timer.moved(entry.wrapping_sub(node));
                    let slot = timer.member("function")?;
                    if context.space().read_u64(slot).is_ok() {
                        pointers.hook(findings, &format!("timer of CPU {cpu}"), "function", slot);
                    }
                }
            }
        }
    }
    Ok(())
}

pub(super) const BPF: Check = Check {
    name: "bpf",
    summary: "BPF programs run as what the kernel compiled them to",
    compares: "the code of every loaded BPF program with the kernel's list of BPF code and its interpreters; which of them may make \
               functions of the kernel return what they like",
    why: "BPF reaches as deep as a module and is in no list of modules: rootkits hide processes and answer packets with it.",
    techniques: &[Technique::ROOTKIT, Technique::TRAFFIC_SIGNALING],
    blind_spots: &[
        "What a program does, but for overriding results of functions.",
        "Classic filters of sockets and of seccomp.",
    ],
    run: bpf,
};

/// `struct idr` of programs.
fn bpf(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let Some(idr) = context.kernel().find_symbol(&["prog_idr"]) else {
        findings.note("the kernel has no BPF, or hides its programs");
        return Ok(());
    };
    let walk = xarray::walk_idr(context.kernel(), idr)?;
    let mut pointers = Pointers::new(context);
    // There may be none: the table was looked at.
    findings.looked_at(1);
    for entry in findings.complete("table of BPF programs", walk) {
        if !findings.go_on() {
            break;
        }
        let Some(at) = entry.pointer() else { continue };
        let program = context.object("bpf_prog", at)?;
        let name = context
            .object("bpf_prog_aux", program.pointer("aux")?)?
            .array_text("name")?;
        let subject = format!("BPF program {} ({name})", entry.index);
        let slot = program.member("bpf_func")?;
        pointers.slot(findings, &subject, "bpf_func", slot);
        if program.number("kprobe_override").unwrap_or(0) != 0 {
            let finding = Finding::new(
                Severity::Medium,
                subject,
                "the program may make functions of the kernel return what it likes",
            )
            .at(at)
            .with(context.evidence("bpf_func", program.pointer("bpf_func")?))
            .with(Evidence::value("type", program.number("type")?));
            findings.report(finding);
        }
    }
    Ok(())
}
