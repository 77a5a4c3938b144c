//! Loaded modules.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmsight_linux::Kernel;
use vmsight_linux::module::ModuleFields;

use super::{Differences, spelt};
use crate::truth::Truth;

/// Compares `Kernel::modules` with `/proc/modules` and `/sys/module`, and the number of symbols with `/proc/kallsyms`.
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
        let sections: BTreeMap<String, u64> = row
            .sections
            .iter()
            .flatten()
            .map(|s| (s.name.clone(), s.address.0))
            .collect();
        out.same(at("sections"), &sections, &said.sections);
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
        if let Some(symbols) = truth.kallsyms.modules.get(&said.name) {
            let seen = kernel.symbols_of_module(row.address, &Arc::from(said.name.as_str()))?;
            out.complaints(&at("symbols"), &seen.warnings);
            out.same(at("number of symbols"), seen.rows.len() as u64, symbols.count);
        }
    }
    Ok(out)
}
