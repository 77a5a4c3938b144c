//! What the kernel calls on occasions: notifiers, network filters, security modules, formats, input.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::structures::{hlist, list};

use super::pointers::Pointers;
use super::tables::networks;
use crate::{Check, Context, Finding, Findings, Owner, Severity, Technique};

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
            let walk = hlist::walk(context.space(), heads.wrapping_add(index * 8), findings.left());
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
