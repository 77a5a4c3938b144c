//! A module that is loaded, held against its file.

use std::collections::BTreeMap;

use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;
use vmsight_linux::module::Module;

use super::judge::{self, Replacement};
use super::{MAX_DIFFERENCES, compare, not_the_same};
use crate::baseline::{
    AlternativeLayout, ModuleFile, Outside, Placed, Relocated, SiteKind, Trusted, differences, differs,
};
use crate::text::Region;
use crate::{Context, Evidence, Finding, Findings, Owner, Severity, code};

/// Pages of copied instructions, to which an optimised kprobe jumps.
const SLOTS: &str = "kprobe instruction slots";

/// No place that is patched is longer, but for alternatives.
const SITE: usize = 32;

/// A loaded module, its file and its code as it is now.
struct Loaded<'m> {
    module: &'m Module,
    file: &'m ModuleFile,
    regions: Vec<&'m Region>,
}

/// What came of it.
#[derive(Default)]
struct Held {
    findings: Vec<Finding>,
    notes: Vec<String>,
    looked_at: usize,
}

/// Holds all modules of which there is a file against it. `probed` are the places of kprobes.
pub(super) fn hold(
    context: &Context,
    findings: &mut Findings,
    trusted: &Trusted,
    regions: &[(&Module, Region)],
    probed: &[u64],
) {
    let loaded: Vec<Loaded<'_>> = context
        .modules()
        .iter()
        .filter_map(|module| {
            let own = regions.iter().filter(|(m, _)| m.address == module.address);
            Some(Loaded {
                module,
                file: trusted.modules.get(&module.name)?,
                regions: own.map(|(_, region)| region).collect(),
            })
        })
        .collect();
    if loaded.is_empty() {
        return;
    }
    let exports = exports(context, &loaded);
    let alternatives = alternatives(context);
    let held: Vec<Held> = loaded
        .par_iter()
        .map(|loaded| {
            let mut held = Held::default();
            one(context, loaded, &exports, alternatives, probed, &mut held);
            held
        })
        .collect();
    for held in held {
        findings.looked_at(held.looked_at);
        held.notes.into_iter().for_each(|note| findings.note(note));
        held.findings
            .into_iter()
            .for_each(|finding| findings.report(finding));
    }
}

/// What modules export: by their files, where there are such; of others what the kernel keeps of their symbols.
fn exports(context: &Context, loaded: &[Loaded<'_>]) -> FxHashMap<String, u64> {
    let mut exports = FxHashMap::default();
    for loaded in loaded {
        let sections = sections(loaded.module);
        let placed = loaded.file.placed(&Outside {
            sections: &sections,
            per_cpu: per_cpu(loaded.module),
            symbol: &|_| None,
        });
        exports.extend(placed.exports().map(|(name, at)| (name.to_owned(), at)));
    }
    let with_file: FxHashSet<&str> = loaded.iter().map(|l| l.module.name.as_str()).collect();
    for symbol in context.module_symbols() {
        if !with_file.contains(&*symbol.module) {
            exports.entry(symbol.name.clone()).or_insert(symbol.address.0);
        }
    }
    exports
}

fn sections(module: &Module) -> Vec<(&str, Gva)> {
    let sections = module.sections.as_deref().unwrap_or_default().iter();
    sections.map(|s| (s.name.as_str(), s.address)).collect()
}

fn per_cpu(module: &Module) -> Option<Gva> {
    let range = module.ranges.iter().find(|r| r.kind == "percpu");
    range.map(|range| range.base)
}

/// What the kernel exports by this name: of several symbols the global one.
fn of_kernel(context: &Context, name: &str) -> Option<u64> {
    let symbols = &context.kernel().profile().symbols;
    let mut found = symbols.find(name);
    let global = found.find(|symbol| symbol.kind.is_ascii_uppercase())?;
    Some(context.kernel().image().runtime(global.address).0)
}

fn alternatives(context: &Context) -> Option<AlternativeLayout> {
    let entry = context.object("alt_instr", Gva(0)).ok()?;
    let member = |name: &str| Some(entry.member(name).ok()?.0 as usize);
    Some(AlternativeLayout {
        size: entry.size() as usize,
        length: member("instrlen")?,
        replacement_length: member("replacementlen")?,
    })
}

fn one(
    context: &Context,
    loaded: &Loaded<'_>,
    exports: &FxHashMap<String, u64>,
    alternatives: Option<AlternativeLayout>,
    probed: &[u64],
    held: &mut Held,
) {
    let (module, file) = (loaded.module, loaded.file);
    if let Some(difference) = differs(context, module, file) {
        held.findings.push(not_the_same(module, &difference));
        return;
    }
    let note = |what: String| format!("module {}: {what}", module.name);
    if file.is_rewritten() {
        let why =
            "not compared: it is built for the checking of indirect calls, for which the kernel rewrites it";
        held.notes.push(note(why.to_owned()));
        return;
    }
    let sections = sections(module);
    let placed = file.placed(&Outside {
        sections: &sections,
        per_cpu: per_cpu(module),
        symbol: &|name| of_kernel(context, name).or_else(|| exports.get(name).copied()),
    });
    for section in placed.missing() {
        let what = format!("the kernel does not say where its section {section} lies: not compared");
        held.notes.push(note(what));
    }
    let mut unknown = 0;
    let mut code: Vec<Relocated> = placed.code().collect();
    for region in &loaded.regions {
        held.looked_at += region.functions.len();
        let here = |section: &Relocated| {
            let end = section.at.0.saturating_add(section.bytes.len() as u64);
            section.at.0 >= region.start && end <= region.end()
        };
        let (inside, outside) = code.into_iter().partition(here);
        code = outside;
        let mut then = laid_out(region, &inside, &mut unknown);
        take_patched(context, &placed, region, alternatives, &mut then);
        take_probed(context, region, probed, &mut then);
        let none = FxHashSet::default();
        let changed = differences(
            &then,
            &region.bytes,
            Gva(region.start),
            &none,
            &none,
            &|_| false,
            MAX_DIFFERENCES,
        );
        for range in changed {
            let finding = compare(context, Some(&module.name), &then, region, range);
            held.findings.push(finding);
        }
    }
    for section in code {
        let finding = Finding::new(
            Severity::High,
            format!("section {} of module {}", section.name, module.name),
            "code lies where the module has none",
        );
        held.findings
            .push(finding.at(section.at).by(Some(module.name.clone())));
    }
    for section in placed.constants() {
        constants(context, module, section, &mut unknown, held);
    }
    if unknown > 0 {
        let what = format!("{unknown} places refer to what nobody is known to export: not compared");
        held.notes.push(note(what));
    }
}

/// The code as the loader lays it out: sections, and nothing between them.
fn laid_out(region: &Region, sections: &[Relocated], unknown: &mut usize) -> Vec<u8> {
    // What fills the gaps up is of no matter, as long as nothing does that would run.
    let filler = |byte: &u8| if *byte == 0xcc { 0xcc } else { 0 };
    let mut then: Vec<u8> = region.bytes.iter().map(filler).collect();
    for section in sections {
        let at = section.at.0.wrapping_sub(region.start) as usize;
        take(&mut then, at, &section.bytes);
        for place in &section.unknown {
            *unknown += 1;
            let now = region.bytes.get(at + place.start..at + place.end);
            take(&mut then, at + place.start, now.unwrap_or_default());
        }
    }
    then
}

fn take(then: &mut [u8], at: usize, bytes: &[u8]) {
    let to = at.checked_add(bytes.len()).and_then(|end| then.get_mut(at..end));
    if let Some(to) = to {
        to.copy_from_slice(bytes);
    }
}

/// Takes over what the kernel has patched where the file says that it does, if it is what it would put there.
fn take_patched(
    context: &Context,
    placed: &Placed<'_>,
    region: &Region,
    alternatives: Option<AlternativeLayout>,
    then: &mut [u8],
) {
    let offset = |at: u64| {
        let offset = usize::try_from(at.checked_sub(region.start)?).ok()?;
        (offset < region.bytes.len()).then_some(offset)
    };
    // Places at which other instructions may stand: how many bytes, and which.
    let mut others: BTreeMap<u64, (usize, Vec<Replacement>)> = BTreeMap::new();
    for site in placed.sites(alternatives) {
        if let SiteKind::Alternative {
            length,
            replacement,
            replacement_length,
        } = site.kind
        {
            let (longest, all) = others.entry(site.at).or_default();
            *longest = length.max(*longest);
            all.push(Replacement {
                at: replacement,
                length: replacement_length,
            });
            continue;
        }
        let Some(at) = offset(site.at) else { continue };
        let (old, now) = (then.get(at..), region.bytes.get(at..));
        let (Some(old), Some(now)) = (old, now) else {
            continue;
        };
        if old.get(..SITE).is_some_and(|old| now.starts_with(old)) {
            continue;
        }
        if let Some(length) = judge::accepted(context, &site, old, now) {
            let now = now.get(..length).unwrap_or_default();
            take(then, at, now);
        } else if site.kind == SiteKind::Traced {
            // The file has a call of what is nowhere: this is what was there.
            take(then, at, &judge::UNTRACED);
        }
    }
    // One may lie in another: what was right of the inner one makes the outer one right.
    for _ in 0..2 {
        for (at, (length, all)) in &others {
            let Some(offset) = offset(*at) else { continue };
            let (Some(old), Some(now)) = (then.get(offset..), region.bytes.get(offset..)) else {
                continue;
            };
            if judge::is_alternative(context, region, (*at, *length), old, now, all) {
                let now = now.get(..*length).unwrap_or_default();
                take(then, offset, now);
            }
        }
    }
}

/// A kprobe is a breakpoint, or a jump to the copied instructions.
fn take_probed(context: &Context, region: &Region, probed: &[u64], then: &mut [u8]) {
    for at in probed {
        let Some(offset) = at.checked_sub(region.start).map(|offset| offset as usize) else {
            continue;
        };
        let Some(now) = region.bytes.get(offset..) else {
            continue;
        };
        let jump = code::instructions(now, Gva(*at))
            .next()
            .as_ref()
            .and_then(code::branch);
        let length = match now {
            [0xcc, ..] => 1,
            [0xe9, ..] if jump.is_some_and(|to| context.owner(to) == Owner::Generated(SLOTS.into())) => 5,
            _ => continue,
        };
        take(then, offset, now.get(..length).unwrap_or_default());
    }
}

/// Read-only data: nobody writes there once the module is loaded.
fn constants(context: &Context, module: &Module, section: Relocated, unknown: &mut usize, held: &mut Held) {
    let now = match code::read(context, section.at, section.bytes.len()) {
        Ok(now) => now,
        Err(why) => {
            held.notes
                .push(format!("module {}: section {}: {why}", module.name, section.name));
            return;
        }
    };
    held.looked_at += 1;
    let mut then = section.bytes;
    for place in &section.unknown {
        *unknown += 1;
        take(&mut then, place.start, now.get(place.clone()).unwrap_or_default());
    }
    let none = FxHashSet::default();
    for range in differences(&then, &now, section.at, &none, &none, &|_| false, MAX_DIFFERENCES) {
        let pointer = section
            .pointers
            .iter()
            .find(|at| (**at..**at + 8).contains(&range.start));
        let start = pointer.copied().unwrap_or(range.start);
        let end = pointer.map_or(range.end.min(start + 32), |at| at + 8);
        let at = section.at.wrapping_add(start as u64);
        let bytes = |what: &str, bytes: &[u8]| Evidence::Bytes {
            what: what.to_owned(),
            at,
            bytes: bytes.get(start..end).unwrap_or_default().to_vec(),
        };
        let mut finding = Finding::new(
            Severity::High,
            context.name(at).unwrap_or_else(|| at.to_string()),
            format!("{} bytes of read-only data are not what they were", range.len()),
        )
        .at(at)
        .by(Some(module.name.clone()))
        .with(bytes("bytes then", &then))
        .with(bytes("bytes now", &now));
        if pointer.is_some() {
            let word = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.get(start..end)?.try_into().ok()?));
            for (what, bytes) in [("led to", &then), ("leads to", &now)] {
                if let Some(to) = word(bytes) {
                    finding = finding.with(context.evidence(what, Gva(to)));
                }
            }
        }
        held.findings.push(finding);
    }
}
