//! The places that the kernel itself patches in its code while it runs.

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::structures::{hlist, rbtree};

use crate::{Context, Findings};

/// More records than any kernel and its modules have: Debian's have some 50,000.
const MAX_RECORDS: u64 = 1 << 21;
/// More static calls than any kernel and its modules have: some 2,000.
const MAX_CALLS: u64 = 1 << 18;

/// The places where function tracing may put a call, with their flags (`struct dyn_ftrace`; kernel/trace/ftrace.c).
pub(super) fn traced(context: &Context, findings: &mut Findings) -> Result<FxHashMap<u64, u64>, LinuxError> {
    let mut records = FxHashMap::default();
    let Some(head) = context.kernel().find_symbol(&["ftrace_pages_start"]) else {
        findings.note("the kernel has no function tracing, or hides its records");
        return Ok(records);
    };
    let record = context.object("dyn_ftrace", Gva(0))?;
    let (ip, flags) = (record.member("ip")?.0, record.member("flags")?.0);
    let stride = record.size().max(1);
    let mut pages = FxHashSet::default();
    let mut at = context.pointer("ftrace_pages_start", head)?;
    let mut left = MAX_RECORDS;
    while !at.is_null() {
        if !pages.insert(at.0) || left == 0 {
            findings.note("the records of function tracing do not end");
            break;
        }
        let page = context.object("ftrace_page", at)?;
        let (start, count) = (page.pointer("records")?, page.number("index")?);
        // Those of all pages together: a guest that lies may have them share their records. An empty page counts, too.
        let count = count.min(left);
        left -= count.clamp(1, left);
        // A page's worth at a time: a count that nothing backs costs nothing.
        let many = (4096 / stride).max(1);
        let mut done = 0;
        while done < count {
            let now = many.min(count - done);
            let mut bytes = vec![0; (now * stride) as usize];
            let from = start.wrapping_add(done * stride);
            if let Err(error) = context.space().read(from, &mut bytes) {
                findings.note(format!("records of function tracing: {error}"));
                break;
            }
            for record in bytes.chunks_exact(stride as usize) {
                let word = |at: u64| {
                    let bytes = record.get(at as usize..at as usize + 8);
                    u64::from_le_bytes(bytes.and_then(|b| b.try_into().ok()).unwrap_or_default())
                };
                records.insert(word(ip), word(flags));
            }
            done += now;
        }
        at = page.pointer("next")?;
    }
    Ok(records)
}

/// Whether a place is a BPF dispatcher's, and leads to the code that was made for it: before 5.18 that is a jump at the function's begin,
/// where function tracing has its place, too (`bpf_dispatcher_update`, kernel/bpf/dispatcher.c).
pub(super) fn is_dispatch(context: &Context, at: Gva, to: Gva) -> bool {
    is_bpf(context, to, &[DISPATCHER]) && context.symbols_at(at).any(|name| name.starts_with(DISPATCHER))
}

/// Whether a page is of a BPF trampoline or dispatcher: before 6.8 the kernel leaves these writable (`bpf_jit_alloc_exec_page`,
/// kernel/bpf/trampoline.c).
pub(super) fn is_bpf_image(context: &Context, page: Gva) -> bool {
    is_bpf(context, page, &[DISPATCHER, "bpf_trampoline_"])
}

/// How the kernel calls its dispatchers, and the code that it makes for them.
const DISPATCHER: &str = "bpf_dispatcher_";

/// Whether an address is of code of BPF's whose name begins like one of these.
fn is_bpf(context: &Context, at: Gva, names: &[&str]) -> bool {
    let owner = context.owner(at);
    let name = owner.generated().and_then(|what| what.strip_prefix("BPF code "));
    name.is_some_and(|name| names.iter().any(|begin| name.starts_with(begin)))
}

/// A call that the kernel patches to lead where a pointer says (`struct static_call_site`; include/linux/static_call_types.h).
pub(super) struct StaticCalls {
    /// The instructions.
    pub(super) sites: FxHashSet<u64>,
    /// Where they lead is in these (`struct static_call_key`).
    pub(super) keys: FxHashSet<u64>,
    /// How many may still be read: tables of a guest that lies may be one and the same.
    left: u64,
}

/// All static calls of the kernel and of modules. None before 5.10.
pub(super) fn static_calls(context: &Context, findings: &mut Findings) -> StaticCalls {
    let mut calls = StaticCalls {
        sites: FxHashSet::default(),
        keys: FxHashSet::default(),
        left: MAX_CALLS,
    };
    let symbol = |name| context.kernel().find_symbol(&[name]);
    if let (Some(start), Some(stop)) = (
        symbol("__start_static_call_sites"),
        symbol("__stop_static_call_sites"),
    ) {
        let count = stop.0.saturating_sub(start.0) / 8;
        static_calls_of(context, findings, "the kernel", start, count, &mut calls);
    }
    for module in context.modules() {
        let Ok(object) = context.object("module", module.address) else {
            break;
        };
        let table = object.pointer("static_call_sites");
        let count = object.number("num_static_call_sites");
        if let (Ok(table), Ok(count)) = (table, count) {
            static_calls_of(context, findings, &module.name, table, count, &mut calls);
        }
    }
    calls
}

fn static_calls_of(
    context: &Context,
    findings: &mut Findings,
    whose: &str,
    table: Gva,
    count: u64,
    calls: &mut StaticCalls,
) {
    if count > calls.left {
        findings.note(format!(
            "static calls of {whose}: not all are looked at, they are too many"
        ));
    }
    let count = count.min(calls.left);
    calls.left -= count;
    let mut bytes = [0; 4096];
    let mut done = 0;
    while done < count {
        let now = (count - done).min(512);
        let from = table.wrapping_add(done * 8);
        let Some(bytes) = bytes.get_mut(..now as usize * 8) else {
            break;
        };
        if let Err(error) = context.space().read(from, bytes) {
            findings.note(format!("static calls of {whose}: {error}"));
            return;
        }
        for (index, site) in bytes.chunks_exact(8).enumerate() {
            let at = from.wrapping_add(index as u64 * 8);
            let relative = |from: usize| {
                let bytes = site.get(from..from + 4).and_then(|b| b.try_into().ok());
                i64::from(i32::from_le_bytes(bytes.unwrap_or_default())) as u64
            };
            calls.sites.insert(at.0.wrapping_add(relative(0)));
            // The low two bits are flags: a tail call, a place in init code.
            calls
                .keys
                .insert(at.0.wrapping_add(4).wrapping_add(relative(4)) & !3);
        }
        done += now;
    }
}

/// The instructions of static keys: a NOP or a jump, as the key says (`struct jump_entry`; include/linux/jump_label.h).
pub(super) fn static_keys(context: &Context, findings: &mut Findings) -> Result<FxHashSet<u64>, LinuxError> {
    let mut sites = FxHashSet::default();
    let entry = context.object("jump_entry", Gva(0))?;
    let (code, size) = (entry.member("code")?.0, entry.size().max(4));
    let symbol = |name| context.kernel().find_symbol(&[name]);
    let mut tables = Vec::new();
    if let (Some(start), Some(stop)) = (symbol("__start___jump_table"), symbol("__stop___jump_table")) {
        tables.push((start, stop.0.saturating_sub(start.0) / size));
    }
    for module in context.modules() {
        let object = context.object("module", module.address)?;
        tables.push((
            object.pointer("jump_entries")?,
            object.number("num_jump_entries")?,
        ));
    }
    for (table, count) in tables {
        for index in 0..count.min(MAX_CALLS) {
            if !findings.go_on() {
                return Ok(sites);
            }
            let at = table.wrapping_add(index * size + code);
            match context.space().read_u32(at) {
                // Place-relative.
                Ok(offset) => sites.insert(at.0.wrapping_add(i64::from(offset as i32) as u64)),
                Err(error) => {
                    findings.note(format!("static keys: {error}"));
                    break;
                }
            };
        }
    }
    Ok(sites)
}

/// The addresses that have a kprobe, with the address of one `struct kprobe` each (kernel/kprobes.c).
pub(super) fn probed(context: &Context, findings: &mut Findings) -> Result<Vec<(Gva, Gva)>, LinuxError> {
    let mut probes = Vec::new();
    let Some(table) = context.kernel().find_symbol(&["kprobe_table"]) else {
        findings.note("the kernel has no kprobes, or hides their table");
        return Ok(probes);
    };
    let (node, addr) = (
        context.kernel().offset("kprobe", "hlist")?,
        context.kernel().offset("kprobe", "addr")?,
    );
    // KPROBE_TABLE_SIZE is 64 in all versions.
    for bucket in 0..context.entries(table, 64) {
        if !findings.go_on() {
            break;
        }
        let walk = hlist::walk(context.space(), table.wrapping_add(bucket * 8), findings.left());
        for found in findings.complete("table of kprobes", walk) {
            let probe = found.wrapping_sub(node);
            let at = context.pointer("kprobe.addr", probe.wrapping_add(addr))?;
            probes.push((at, probe));
        }
    }
    Ok(probes)
}

/// Where modules keep the code that the kernel puts in the place of other code of theirs, and what goes with it
/// (arch/x86/include/asm/alternative.h, cpufeature.h). The kernel gives the memory of a module's init code back, and these stay.
const REPLACEMENTS: [&str; 2] = [".altinstr_replacement", ".altinstr_aux"];

/// The replacements of all modules: first byte, and the one past the last.
pub(super) fn replacements(context: &Context) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for module in context.modules() {
        let sections = module.sections.as_deref().unwrap_or_default();
        for section in sections.iter().filter(|s| REPLACEMENTS.contains(&&*s.name)) {
            let start = section.address.0;
            let behind = sections
                .iter()
                .map(|s| s.address.0)
                .filter(|at| *at > start)
                .min();
            let ranges = module
                .ranges
                .iter()
                .map(|r| (r.base.0, r.base.0.saturating_add(r.size)));
            let end = ranges
                .clone()
                .find(|(first, end)| (*first..*end).contains(&start));
            let end = end.map_or(start, |(_, end)| end);
            found.push((start, behind.map_or(end, |behind| behind.min(end))));
        }
    }
    found
}

/// More uprobes than anybody has.
const MAX_USER_PROBES: usize = 1 << 14;

/// The uprobes: inode, and offset in its file (`uprobes_tree`, kernel/events/uprobes.c).
pub(super) fn user_probes(context: &Context, findings: &mut Findings) -> Result<Vec<(Gva, u64)>, LinuxError> {
    let mut probes = Vec::new();
    let Some(root) = context.kernel().find_symbol(&["uprobes_tree"]) else {
        findings.note("the kernel has no uprobes, or hides them");
        return Ok(probes);
    };
    let node = context.kernel().offset("uprobe", "rb_node")?;
    let limit = MAX_USER_PROBES.min(findings.left());
    for at in findings.complete("tree of uprobes", rbtree::walk(context.space(), root, limit)) {
        let uprobe = context.object("uprobe", at.wrapping_sub(node))?;
        probes.push((uprobe.pointer("inode")?, uprobe.number("offset")?));
    }
    Ok(probes)
}
