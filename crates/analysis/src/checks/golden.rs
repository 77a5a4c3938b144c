//! Code held against a trusted copy.

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use super::sites;
use crate::baseline::{self, DATA, Part, differences};
use crate::text::{self, Region};
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// The check against a [`crate::Baseline`]: for contexts that have one.
pub const GOLDEN: Check = Check {
    name: "golden",
    summary: "Code is as it was when a trusted copy was made (with --golden)",
    compares: "every byte of the text of the kernel and of modules with the copy that `vmsight baseline create` made, or of the kernel \
               with its own file (vmlinuz, vmlinux). What the kernel patches as it boots and while it runs, and addresses that moved with \
               KASLR, are known as what they are",
    why: "It finds what rules cannot: a function that returns at once, a check that is jumped over, a changed constant.",
    techniques: &[Technique::ROOTKIT, Technique::IMPAIR_DEFENSES],
    blind_spots: &[
        "What the copy already held: make it when the guest is known to be good.",
        "Places that the kernel patches itself (static keys, static calls, function tracing): the check text looks at those.",
        "On another model of processor the kernel patches its code otherwise at boot: a copy is for one.",
        "Modules that were not loaded when the copy was made, and all of them where the copy is the kernel's file.",
        "With the kernel's file: places that the kernel patches at boot (alternatives, mitigations).",
    ],
    run: golden,
};

/// What the names of static calls' trampolines begin with (include/linux/static_call_types.h).
const TRAMPOLINE: &str = "__SCT__";

/// Differences of one module or the kernel that are told.
const MAX_DIFFERENCES: usize = 128;

fn golden(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let implausible = |reason: String| LinuxError::Implausible {
        what: "the baseline".to_owned(),
        reason,
    };
    let known = context
        .baseline()
        .ok_or_else(|| implausible("none was given".to_owned()))?;
    let (release, id) = (context.kernel().release(), baseline::kernel_id(context));
    if known.release != release || known.build_id != id {
        return Err(implausible(format!(
            "it is of kernel {} (build-id {}), this is {release} (build-id {id})",
            known.release, known.build_id
        )));
    }
    let mut patched = sites::static_calls(context, findings).sites;
    patched.extend(sites::static_keys(context, findings)?);
    patched.extend(sites::traced(context, findings)?.into_keys());
    patched.extend(sites::probed(context, findings)?.into_iter().map(|(at, _)| at.0));
    // What stands in for a call until it is known where it leads, jumps or returns.
    let symbols = &context.kernel().profile().symbols;
    let trampolines = symbols
        .range(0..u64::MAX)
        .filter(|s| s.name.starts_with(TRAMPOLINE));
    patched.extend(trampolines.map(|s| context.kernel().image().runtime(s.address).0));
    // Where BPF dispatches packets, 5.10 patches a function's begin.
    patched.extend(
        context
            .kernel()
            .find_symbol(&["bpf_dispatcher_xdp_func"])
            .map(|at| at.0),
    );

    let mut now = vec![(String::new(), id, text::kernel(context)?)];
    for (module, region) in text::modules(context) {
        match region {
            Ok(region) => {
                let id = module.build_id.clone().unwrap_or_default();
                now.push((module.name.clone(), id, region));
            }
            Err(why) => findings.note(format!("module {}: {why}", module.name)),
        }
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
    let has_modules = known.parts.iter().any(|part| !part.module.is_empty());
    if !has_modules && !context.modules().is_empty() {
        findings.note("the trusted copy has no modules: only the kernel's own code is held against it");
    }
    for (module, id, region) in &now {
        if !has_modules && !module.is_empty() {
            continue;
        }
        let Some(part) = then(module) else {
            findings.note(format!("module {module} is not in the baseline"));
            continue;
        };
        findings.looked_at(region.functions.len());
        if part.build_id != *id || part.bytes.len() != region.bytes.len() {
            let finding = Finding::new(
                Severity::High,
                format!("module {module}"),
                "the module is not the one that was there",
            )
            .at(Gva(region.start))
            .by(Some(module.clone()))
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
        compare(context, findings, part, region, &patched, &moves);
    }
    Ok(())
}

fn compare(
    context: &Context,
    findings: &mut Findings,
    part: &Part,
    region: &Region,
    patched: &FxHashSet<u64>,
    moves: &FxHashSet<u64>,
) {
    let data = |value: u64| {
        DATA.contains(&value)
            && context
                .space()
                .translate(Gva(value))
                .is_ok_and(|page| !page.access.execute)
    };
    let base = Gva(region.start);
    for range in differences(
        &part.bytes,
        &region.bytes,
        base,
        patched,
        moves,
        &data,
        MAX_DIFFERENCES,
    ) {
        let at = base.wrapping_add(range.start as u64);
        let name = context.name(at).unwrap_or_else(|| at.to_string());
        let shown = range.start..range.end.min(range.start + 32);
        let bytes = |bytes: &[u8], what: &str| Evidence::Bytes {
            what: what.to_owned(),
            at,
            bytes: bytes.get(shown.clone()).unwrap_or_default().to_vec(),
        };
        let finding = Finding::new(
            Severity::High,
            name,
            format!("{} bytes of code are not what they were", range.len()),
        )
        .at(at)
        .by(Some(part.module.clone()).filter(|m| !m.is_empty()))
        .with(bytes(&part.bytes, "bytes then"))
        .with(bytes(&region.bytes, "bytes now"))
        .with(context.code("code now", at, 4));
        findings.report(finding);
    }
}
