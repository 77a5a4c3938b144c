//! Code held against a trusted copy.

mod judge;
mod module;

use std::ops::Range;

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::module::Module;

use super::sites;
use crate::baseline::{self, Baseline, DATA, Difference, Trusted, differences};
use crate::text::{self, Region};
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique, code};

/// The check against what is [`Trusted`]: for contexts that have something of the kind.
pub const GOLDEN: Check = Check {
    name: "golden",
    summary: "Code is as it was when a trusted copy was made, or as its distribution ships it (with --golden)",
    compares: "every byte of the text of the kernel and of modules with the copy that `vmsight baseline create` made, or with their own \
               files: vmlinuz or vmlinux, each module's .ko, or the distribution's package of both. What the kernel patches as it boots and \
               while it runs, and addresses that moved with KASLR, are known as what they are. Of a module that has a file, read-only data, \
               too; what is patched there is held against what the kernel would put at that place, by the file's own tables",
    why: "It finds what rules cannot: a function that returns at once, a check that is jumped over, a changed constant.",
    techniques: &[Technique::ROOTKIT, Technique::IMPAIR_DEFENSES],
    blind_spots: &[
        "What the copy already held: make it when the guest is known to be good.",
        "Places that the kernel patches itself (static keys, static calls): the check text looks at those.",
        "On another model of processor the kernel patches its code otherwise at boot: a copy is for one.",
        "Modules of which there is no copy: they are named in a note.",
        "With the kernel's file: places that the kernel patches at boot (alternatives, mitigations).",
        "With a module's file: whether what a call leads to has the name that it says, where the guest's own symbols lie; \
         a module that is rewritten for the checking of indirect calls (kCFI), which is noted.",
    ],
    run: golden,
};

/// What the names of static calls' trampolines begin with (include/linux/static_call_types.h).
const TRAMPOLINE: &str = "__SCT__";

/// What the kernel patches, and is in none of its tables: where BPF dispatches packets, 5.10 patches a function's begin; the trampolines of
/// function tracing call the one function that is to be told, or one that tells all.
const PATCHED: [&str; 4] = [
    "bpf_dispatcher_xdp_func",
    "ftrace_call",
    "ftrace_regs_call",
    "ftrace_graph_call",
];
/// Differences of one module or the kernel that are told.
const MAX_DIFFERENCES: usize = 128;
/// Modules that are named in a note.
const MAX_NAMED: usize = 16;

fn golden(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let trusted = context
        .trusted()
        .ok_or_else(|| implausible("none was given".to_owned()))?;
    let mut regions = Vec::new();
    for (module, region) in text::modules(context) {
        match region {
            Ok(region) => regions.push((module, region)),
            Err(why) => findings.note(format!("module {}: {why}", module.name)),
        }
    }
    let probed = sites::probed(context, findings)?.into_iter().map(|(at, _)| at.0);
    let probed: Vec<u64> = probed.collect();
    match &trusted.baseline {
        Some(known) => against_baseline(context, findings, known, trusted, &regions, &probed)?,
        None => findings.note("the kernel's own code is not compared: only modules are given"),
    }
    module::hold(context, findings, trusted, &regions, &probed);
    name_others(context, findings, trusted);
    Ok(())
}

fn implausible(reason: String) -> LinuxError {
    LinuxError::Implausible {
        what: "the baseline".to_owned(),
        reason,
    }
}

/// Says which modules there is no trusted copy of.
fn name_others(context: &Context, findings: &mut Findings, trusted: &Trusted) {
    let parts = trusted.baseline.iter().flat_map(|known| &known.parts);
    let mut known: FxHashSet<&str> = parts.map(|part| part.module.as_str()).collect();
    known.extend(trusted.modules.keys().map(String::as_str));
    let modules = context.modules();
    let others = modules.iter().map(|module| module.name.as_str());
    let others: Vec<&str> = others.filter(|name| !known.contains(name)).collect();
    if others.is_empty() {
        return;
    }
    let mut names = others.get(..MAX_NAMED).unwrap_or(&others).join(", ");
    if others.len() > MAX_NAMED {
        names.push_str(&format!(" and {} more", others.len() - MAX_NAMED));
    }
    findings.note(format!(
        "{} of {} modules are not compared, for there is no trusted copy of them: {names}",
        others.len(),
        modules.len()
    ));
}

/// Holds the kernel, and modules that have no file of their own, against how they were.
fn against_baseline(
    context: &Context,
    findings: &mut Findings,
    known: &Baseline,
    trusted: &Trusted,
    regions: &[(&Module, Region)],
    probed: &[u64],
) -> Result<(), LinuxError> {
    let (release, id) = (context.kernel().release(), baseline::kernel_id(context));
    if known.release != release || known.build_id != id {
        return Err(implausible(format!(
            "it is of kernel {} (build-id {}), this is {release} (build-id {id})",
            known.release, known.build_id
        )));
    }
    let mut patched = sites::static_calls(context, findings).sites;
    patched.extend(sites::static_keys(context, findings)?);
    patched.extend(probed);
    let kernel = text::kernel(context)?;
    // The guest says where it traces; that is no leave to have anything else there.
    let traced = sites::traced(context, findings)?.into_keys();
    let regions_of_all = || regions.iter().map(|(_, region)| region).chain([&kernel]);
    patched.extend(traced.filter(|at| {
        let region = regions_of_all().find(|region| (region.start..region.end()).contains(at));
        region.is_some_and(|region| judge::may_be_traced(context, *at, region.slice(*at, region.end())))
    }));
    // What stands in for a call until it is known where it leads, jumps or returns.
    let symbols = &context.kernel().profile().symbols;
    let trampolines = symbols
        .range(0..u64::MAX)
        .filter(|s| s.name.starts_with(TRAMPOLINE));
    patched.extend(trampolines.map(|s| context.kernel().image().runtime(s.address).0));
    let places = PATCHED
        .iter()
        .filter_map(|name| context.kernel().find_symbol(&[name]));
    patched.extend(places.map(|at| at.0));

    let mut now = vec![("", id, &kernel)];
    for (module, region) in regions {
        let id = module.build_id.clone().unwrap_or_default();
        now.push((module.name.as_str(), id, region));
    }
    let then = |module: &str| known.parts.iter().find(|p| p.module == *module);
    // How far each has moved: what refers to it from elsewhere has changed by that, or by the difference of two.
    let mut moved: FxHashSet<u64> = now
        .iter()
        .filter_map(|(module, _, region)| Some(region.start.wrapping_sub(then(module)?.base.0)))
        .collect();
    for module in context.modules() {
        let old = then(&module.name).map_or(&[][..], |part| part.areas.as_slice());
        for (kind, base) in baseline::areas(module) {
            let old = old.iter().find(|(k, _)| *k == kind);
            moved.extend(old.map(|(_, old)| base.0.wrapping_sub(old.0)));
        }
    }
    for (module, id, region) in &now {
        let Some(part) = then(module).filter(|_| !trusted.modules.contains_key(*module)) else {
            continue;
        };
        findings.looked_at(region.functions.len());
        let name = Some(*module).filter(|name| !name.is_empty());
        if part.build_id != *id || part.bytes.len() != region.bytes.len() {
            let finding = Finding::new(
                Severity::High,
                format!("module {module}"),
                "the module is not the one that was there",
            )
            .at(Gva(region.start))
            .by(name.map(str::to_owned))
            .with(Evidence::value("build-id then", &part.build_id))
            .with(Evidence::value("build-id now", id))
            .with(Evidence::value("bytes of code then", part.bytes.len()))
            .with(Evidence::value("bytes of code now", region.bytes.len()));
            findings.report(finding);
            continue;
        }
        let own = region.start.wrapping_sub(part.base.0);
        let mut moves: FxHashSet<u64> = moved.iter().flat_map(|by| [*by, by.wrapping_sub(own)]).collect();
        // What lies still (per-CPU data before 6.15), as seen from here.
        moves.insert(own.wrapping_neg());
        let data = |value: u64| {
            DATA.contains(&value)
                && context
                    .space()
                    .translate(Gva(value))
                    .is_ok_and(|page| !page.access.execute)
        };
        let changed = differences(
            &part.bytes,
            &region.bytes,
            Gva(region.start),
            &patched,
            &moves,
            &data,
            MAX_DIFFERENCES,
        );
        for range in changed {
            findings.report(compare(context, name, &part.bytes, region, range));
        }
    }
    Ok(())
}

/// A module that is another than the one of its file.
fn not_the_same(module: &Module, difference: &Difference) -> Finding {
    let what = difference.what;
    Finding::new(
        Severity::High,
        format!("module {}", module.name),
        "the module is not the one that its distribution ships",
    )
    .at(module.base)
    .by(Some(module.name.clone()))
    .with(Evidence::value(format!("{what} in its file"), &difference.file))
    .with(Evidence::value(format!("{what} now"), &difference.guest))
}

/// Code that has changed, with what was there and what is.
fn compare(
    context: &Context,
    module: Option<&str>,
    then: &[u8],
    region: &Region,
    range: Range<usize>,
) -> Finding {
    let at = Gva(region.start).wrapping_add(range.start as u64);
    let name = context.name(at).unwrap_or_else(|| at.to_string());
    let shown = range.start..range.end.min(range.start + 32);
    let bytes = |bytes: &[u8], what: &str| Evidence::Bytes {
        what: what.to_owned(),
        at,
        bytes: bytes.get(shown.clone()).unwrap_or_default().to_vec(),
    };
    let before = then.get(range.start..then.len().min(range.start + 32));
    Finding::new(
        Severity::High,
        name,
        format!("{} bytes of code are not what they were", range.len()),
    )
    .at(at)
    .by(module.map(str::to_owned))
    .with(bytes(then, "bytes then"))
    .with(bytes(&region.bytes, "bytes now"))
    .with(code::of_bytes("code then", at, before.unwrap_or_default()))
    .with(context.code("code now", at, 4))
}
