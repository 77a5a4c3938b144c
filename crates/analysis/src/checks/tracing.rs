//! Hooks that the kernel itself offers on its code: function tracing, kprobes, static calls, tracepoints.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::structures::{hlist, list};

use super::pointers::Pointers;
use super::sites;
use crate::{Check, Context, Evidence, Finding, Findings, Owner, Severity, Technique};

/// `FTRACE_OPS_FL_IPMODIFY` (include/linux/ftrace.h, bit 13 in all versions here): it sends the caller elsewhere.
const IPMODIFY: u64 = 1 << 13;
/// More users of function tracing than a kernel has.
const MAX_OPS: usize = 4096;

pub(super) const FTRACE: Check = Check {
    name: "ftrace",
    summary: "Function tracing is used by the kernel only, and its call sites lead to it",
    compares: "the functions of all registered ftrace_ops with the kernel's text; what stands at each of the recorded call sites with \
               a NOP and a call of the kernel's own trampolines",
    why: "Function tracing is the easiest way to redirect any function of the kernel; rootkits of today use it more than tables.",
    techniques: &[Technique::ROOTKIT, Technique::KERNEL_MODULE],
    blind_spots: &[
        "Live patches, tracefs and BPF use it too: their functions are the kernel's own, and what they do there is not judged.",
        "A module that takes its own ftrace_ops out of the list loses its hook with it, but not a trampoline patched by hand: see text.",
    ],
    run: ftrace,
};

fn ftrace(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    operations(context, findings)?;
    let records = sites::traced(context, findings)?;
    findings.looked_at(records.len());
    for (&ip, &flags) in &records {
        let at = Gva(ip);
        // Records of modules' init code stay a while after it.
        if !context.owner(at).is_code() {
            continue;
        }
        let mut bytes = [0; 5];
        if let Err(error) = context.space().read(at, &mut bytes) {
            findings.note(format!("a call site at {at}: {error}"));
            continue;
        }
        let [opcode, a, b, c, d] = bytes;
        let to = at
            .wrapping_add(5)
            .wrapping_add(i64::from(i32::from_le_bytes([a, b, c, d])) as u64);
        let fine = match opcode {
            // NOPs of five bytes, of the old and the new kind.
            0x0f | 0x66 | 0x3e => true,
            0xe8 => is_tracer(context, to),
            0xe9 => sites::is_dispatch(context, at, to) || disabled(context, at),
            // Being patched, or a kprobe on it.
            0xcc => context.is_changing() || flags >> 29 != 0,
            _ => disabled(context, at),
        };
        if fine {
            continue;
        }
        findings.report_with(|_| {
            Finding::new(
                Severity::Critical,
                context.name(at).unwrap_or_else(|| at.to_string()),
                "where function tracing has its place stands something else",
            )
            .at(at)
            .by(context.owner(to).module().map(str::to_owned))
            .with(Evidence::value("record's flags", format_args!("{flags:#x}")))
            .with(context.bytes("bytes", at, 8))
            .with(context.code("code", at, 3))
        });
    }
    Ok(())
}

/// A weak function that another replaced has a record, and anything there (6.0 marks them as disabled).
fn disabled(context: &Context, at: Gva) -> bool {
    !context.symbols_at(at).any(|_| true)
        && context.symbols_at(at.wrapping_sub(4)).next().is_none()
        && context.owner(at) == Owner::Kernel
}

fn is_tracer(context: &Context, to: Gva) -> bool {
    match context.owner(to) {
        Owner::Generated(_) => true,
        Owner::Kernel => context
            .symbols_at(to)
            .any(|name| name.starts_with("ftrace_") || name == "__fentry__"),
        _ => false,
    }
}

fn operations(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let Some(head) = context.kernel().find_symbol(&["ftrace_ops_list"]) else {
        findings.note("the kernel has no function tracing, or hides its list");
        return Ok(());
    };
    let end = context.kernel().find_symbol(&["ftrace_list_end"]);
    let mut at = context.pointer("ftrace_ops_list", head)?;
    findings.looked_at(1);
    for number in 0.. {
        if Some(at) == end || at.is_null() {
            break;
        }
        if number >= MAX_OPS {
            findings.note(format!("list of ftrace_ops: cut after {MAX_OPS}"));
            break;
        }
        if !findings.go_on() {
            break;
        }
        let ops = context.object("ftrace_ops", at)?;
        let flags = ops.number("flags")?;
        findings.looked_at(1);
        for member in ["func", "saved_func"] {
            let function = ops.pointer(member)?;
            let owner = context.owner(function);
            if matches!(owner, Owner::Kernel | Owner::Null | Owner::Generated(_)) {
                continue;
            }
            let redirects = flags & IPMODIFY != 0;
            let (severity, explanation) = match (&owner, redirects) {
                (Owner::Module { .. }, true) => {
                    (Severity::Critical, "a module redirects functions of the kernel")
                }
                (Owner::Module { .. }, false) => {
                    (Severity::Medium, "a module traces functions of the kernel")
                }
                _ => (
                    Severity::Critical,
                    "code that the kernel does not know traces its functions",
                ),
            };
            findings.report_with(|findings| {
                let traced = traced_by(context, findings, &ops);
                Finding::new(severity, format!("ftrace_ops {at} {member}"), explanation)
                    .at(at)
                    .by(owner.module().map(str::to_owned))
                    .with(context.evidence("ftrace_ops", at))
                    .with(context.evidence("function", function))
                    .with(Evidence::value("flags", format_args!("{flags:#x}")))
                    .with(Evidence::value("traced", traced.join(", ")))
            });
        }
        at = ops.pointer("next")?;
    }
    Ok(())
}

/// Names of the functions that an ftrace_ops filters for, at most some.
fn traced_by(context: &Context, findings: &mut Findings, ops: &crate::Object<'_>) -> Vec<String> {
    const SHOWN: usize = 16;
    /// `FTRACE_HASH_MAX_BITS` (kernel/trace/ftrace.c).
    const HASH_BITS: u64 = 12;
    let mut names = Vec::new();
    let mut read = || -> Result<(), LinuxError> {
        let hashes = context.object("ftrace_ops_hash", ops.pointer("func_hash")?)?;
        let hash = context.object("ftrace_hash", hashes.pointer("filter_hash")?)?;
        let (bits, buckets) = (hash.number("size_bits")?, hash.pointer("buckets")?);
        let (node, ip) = (
            context.kernel().offset("ftrace_func_entry", "hlist")?,
            context.kernel().offset("ftrace_func_entry", "ip")?,
        );
        for bucket in 0..1u64 << bits.min(HASH_BITS) {
            // All tables of all users together are bounded: their number is the guest's to choose.
            if !findings.go_on() {
                break;
            }
            let chain = hlist::walk(context.space(), buckets.wrapping_add(bucket * 8), SHOWN);
            findings.went_to(chain.items.len());
            for entry in chain.items {
                let at = context.pointer("ip", entry.wrapping_sub(node).wrapping_add(ip))?;
                names.push(context.name(at).unwrap_or_else(|| at.to_string()));
                if names.len() >= SHOWN {
                    return Ok(());
                }
            }
        }
        Ok(())
    };
    // What was read before an error is still evidence.
    let _ = read();
    if names.is_empty() {
        names.push("every function, or unknown".to_owned());
    }
    names
}

pub(super) const KPROBES: Check = Check {
    name: "kprobes",
    summary: "Kprobes belong to the kernel's own tracing",
    compares: "the handlers of every registered kprobe and kretprobe with the kernel's text",
    why: "A kprobe's handler runs whenever any instruction of the kernel is reached, and may change registers and the way on.",
    techniques: &[Technique::ROOTKIT, Technique::KERNEL_MODULE],
    blind_spots: &[
        "Kprobes of tracefs, perf and BPF have handlers in the kernel; what they do there is not judged.",
    ],
    run: kprobes,
};

fn kprobes(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    for (at, first) in sites::probed(context, findings)? {
        if !findings.go_on() {
            break;
        }
        findings.looked_at(1);
        // Several on one address hang on the list of one that stands for all.
        let head = context.object("kprobe", first)?.member("list")?;
        let offset = context.kernel().offset("kprobe", "list")?;
        let limit = MAX_OPS.min(findings.left());
        let rest = list::walk(context.space(), head, limit);
        findings.went_to(rest.walk.items.len());
        let rest = rest.walk.items.into_iter().map(|node| node.wrapping_sub(offset));
        for probe in std::iter::once(first).chain(rest) {
            let probe = context.object("kprobe", probe)?;
            for member in ["pre_handler", "post_handler"] {
                let handler = probe.pointer(member)?;
                let owner = context.owner(handler);
                if matches!(owner, Owner::Kernel | Owner::Null | Owner::Generated(_)) {
                    continue;
                }
                let (severity, explanation) = match owner {
                    Owner::Module { code: true, .. } => (
                        Severity::Medium,
                        "a module has put a probe into the kernel's code",
                    ),
                    _ => (
                        Severity::Critical,
                        "the probe's handler is no code that the kernel knows",
                    ),
                };
                findings.report_with(|_| {
                    let name = context.name(at).unwrap_or_else(|| at.to_string());
                    Finding::new(severity, format!("kprobe on {name} {member}"), explanation)
                        .at(at)
                        .by(owner.module().map(str::to_owned))
                        .with(context.evidence("struct kprobe", probe.address()))
                        .with(context.evidence("handler", handler))
                        .with(context.code("handler's code", handler, 4))
                });
            }
        }
    }
    // There may be none: the table was looked at.
    findings.looked_at(64);
    Ok(())
}

pub(super) const STATIC_CALLS: Check = Check {
    name: "static-calls",
    summary: "Static calls and tracepoints lead to known code",
    compares: "the function of every static call's key, and of every probe on every tracepoint, with the code that the kernel knows",
    why: "Both are pointers that code is patched to follow; one of them on the way of system calls sees them all.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &["Probes whose functions are a known module's: a module may trace."],
    run: static_calls,
};

fn static_calls(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    for key in sites::static_calls(context, findings).keys {
        let at = Gva(key);
        let name = context.name(at).unwrap_or_else(|| at.to_string());
        let Some(function) = findings.or_note("static calls", context.pointer("static_call_key.func", at))
        else {
            continue;
        };
        findings.looked_at(1);
        // The kernel's own keys may lead into modules (perf, KVM): that is what they are for.
        if !matches!(context.owner(function), Owner::Null | Owner::KernelInit)
            && !context.owner(function).is_code()
        {
            pointers.value(findings, &name, "func", at, function);
        }
    }
    tracepoints(context, findings);
    Ok(())
}

/// Probes on one tracepoint at most.
const MAX_PROBES: u64 = 256;

fn tracepoints(context: &Context, findings: &mut Findings) {
    let symbol = |name| context.kernel().find_symbol(&[name]);
    let bounds = (
        symbol("__start___tracepoints_ptrs"),
        symbol("__stop___tracepoints_ptrs"),
    );
    let (Some(start), Some(stop)) = bounds else {
        findings.note("the kernel does not say where its tracepoints are");
        return;
    };
    let mut tables = vec![("the kernel".to_owned(), start, stop.0.saturating_sub(start.0) / 4)];
    for module in context.modules() {
        let object = context.object("module", module.address);
        let table = object.and_then(|m| Ok((m.pointer("tracepoints_ptrs")?, m.number("num_tracepoints")?)));
        if let Ok((at, count)) = table {
            tables.push((module.name.clone(), at, count));
        }
    }
    for (whose, table, count) in tables {
        let count = count.min(1 << 16);
        for index in 0..count {
            // Place-relative (CONFIG_HAVE_ARCH_PREL32_RELOCATIONS, x86 since 4.19).
            if !findings.go_on() {
                return;
            }
            let at = table.wrapping_add(index * 4);
            let Some(offset) = findings.or_note(&whose, context.space().read_u32(at)) else {
                break;
            };
            let at = at.wrapping_add(i64::from(offset as i32) as u64);
            let what = format!("tracepoints of {whose}");
            let checked = tracepoint(context, findings, at);
            findings.or_note(&what, checked);
        }
    }
}

fn tracepoint(context: &Context, findings: &mut Findings, at: Gva) -> Result<(), LinuxError> {
    let point = context.object("tracepoint", at)?;
    let funcs = point.pointer("funcs")?;
    findings.looked_at(1);
    if funcs.is_null() {
        return Ok(());
    }
    let name = point.text("name", 128)?;
    let element = context.object("tracepoint_func", funcs)?;
    for index in 0..MAX_PROBES {
        if !findings.go_on() {
            break;
        }
        let probe = element.moved(funcs.wrapping_add(index * element.size()));
        let slot = probe.member("func")?;
        let function = probe.pointer("func")?;
        if function.is_null() {
            break;
        }
        let mut pointers = Pointers::new(context);
        pointers.value(findings, &format!("tracepoint {name}"), "probe", slot, function);
    }
    Ok(())
}
