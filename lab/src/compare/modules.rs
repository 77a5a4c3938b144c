//! Loaded modules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmsight_linux::Kernel;
use vmsight_linux::module::ModuleFields;

use super::{Differences, spelt, symbols};
use crate::truth::{self, Truth};

/// Compares `Kernel::modules` with `/proc/modules`, `/sys/module` and `/proc/vmallocinfo`, the arguments with what the workload gave,
/// and the symbols with `/proc/kallsyms`.
pub fn modules(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.modules(ModuleFields::ALL)?;
    out.complaints("modules", &listing.warnings);
    let seen: Vec<&str> = listing.rows.iter().map(|m| m.name.as_str()).collect();
    let said: Vec<&str> = truth.modules.iter().map(|m| m.name.as_str()).collect();
    out.same("modules", seen, said);
    for said in &truth.modules {
        let Some(row) = listing.rows.iter().find(|m| m.name == said.name) else {
            continue;
        };
        let at = |what: &str| format!("{what} of {}", said.name);
        out.complaints(&at("row"), &row.problems);
        out.same(at("size"), row.size, said.size);
        out.same(at("references"), row.refcount, Some(said.refs));
        out.same(at("users"), &row.used_by, &said.used_by);
        out.same(at("state"), row.state, said.state.as_str());
        out.same(at("address"), row.base.0, said.address);
        out.same(at("taint"), &row.taints, &said.taint);
        out.same(
            at("srcversion"),
            row.srcversion.as_deref().unwrap_or_default(),
            said.srcversion.as_str(),
        );
        out.same(
            at("build id"),
            row.build_id.as_deref().unwrap_or_default(),
            said.build_id.as_str(),
        );
        out.same(
            at("version"),
            row.version.as_deref().unwrap_or_default(),
            said.version.as_str(),
        );
        out.same(
            at("arguments"),
            row.arguments.as_deref().unwrap_or_default(),
            said.arguments.as_str(),
        );
        out.same(at("permanent"), row.permanent, said.permanent);
        ranges(&at, row, said, &truth.system.module_areas, &mut out);
        let sections: BTreeMap<String, u64> = row
            .sections
            .iter()
            .flatten()
            .map(|s| (s.name.clone(), s.address.0))
            .collect();
        out.same(at("sections"), &sections, &said.sections);
        let readable: BTreeSet<&str> = row
            .parameters
            .iter()
            .flatten()
            .filter(|p| p.mode & 0o444 != 0)
            .map(|p| p.name.as_str())
            .collect();
        let names: BTreeSet<&str> = said.parameters.keys().map(String::as_str).collect();
        out.same(at("parameters"), readable, names);
        for (name, value) in &said.parameters {
            let parameter = row.parameters.iter().flatten().find(|p| p.name == *name);
            match parameter {
                // A module that prints its parameter in its own way is believed on its name alone.
                Some(parameter) if parameter.kind == "custom" || parameter.kind == "custom[]" => {}
                Some(parameter) => {
                    out.same(
                        at(&format!("parameter {name}")),
                        parameter.value.clone(),
                        Some(spelt(value)),
                    );
                }
                None => out.differs(at(&format!("parameter {name} is missing"))),
            }
        }
        if let Some(listed) = truth.kallsyms.modules.get(&said.name) {
            let seen = kernel.symbols_of_module(row.address, &Arc::from(said.name.as_str()))?;
            out.complaints(&at("symbols"), &seen.warnings);
            out.same(at("number of symbols"), seen.rows.len() as u64, listed.count);
            let lines = seen
                .rows
                .iter()
                .map(|s| symbols::line(s.address.0, s.kind.to_ascii_lowercase(), &s.name));
            out.same(
                at("digest of the symbols"),
                symbols::digest(lines),
                listed.sha256.as_str(),
            );
        }
    }
    Ok(out)
}

/// Where a module lies. Only the start of its code and the sum of the sizes stand in `/proc/modules`; the rest must be in areas that
/// the kernel has handed out, and must hold the module's sections. Nothing in /proc shows the per-CPU part.
fn ranges(
    at: &dyn Fn(&str) -> String,
    row: &vmsight_linux::module::Module,
    said: &truth::Module,
    areas: &[(u64, u64)],
    out: &mut Differences,
) {
    let ranges: Vec<(u64, u64)> = row
        .ranges
        .iter()
        .filter(|r| r.kind != "percpu")
        .map(|r| (r.base.0, r.base.0 + r.size))
        .collect();
    let sum: u64 = ranges.iter().map(|(from, to)| to - from).sum();
    out.same(at("sum of the ranges"), sum, said.size);
    out.same(
        at("first range"),
        ranges.first().map(|(from, _)| *from),
        Some(said.address),
    );
    for (from, to) in &ranges {
        // The last page of an area is there to be run into.
        let inside = areas
            .iter()
            .any(|(start, end)| start <= from && *to <= end - 4096);
        out.same(at(&format!("range {from:#x} in an area")), inside, true);
    }
    // What was needed to load the module was given back, and its addresses are still shown.
    let gone = |name: &str| name.starts_with(".init") || name == ".symtab" || name == ".strtab";
    for (name, address) in said.sections.iter().filter(|(name, _)| !gone(name)) {
        let inside = ranges.iter().any(|(from, to)| (from..to).contains(&address));
        out.same(at(&format!("section {name} in a range")), inside, true);
    }
}
