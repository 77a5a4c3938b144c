//! Modules that are loaded and not listed.

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::structures::list;

use super::cross_view::CrossView;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const MODULES: Check = Check {
    name: "hidden-modules",
    summary: "Every loaded module is in the kernel's list and in sysfs",
    compares: "the list of modules (lsmod), the kset behind /sys/module, the tree that finds a module by an \
               address, the lists of modules with bug tables and with type data, and what looks like a struct \
               module in the memory where modules lie",
    why: "A rootkit that is a module takes itself out of the list first: no tool in the guest shows it, and it \
          cannot be unloaded.",
    techniques: &[Technique::ROOTKIT, Technique::KERNEL_MODULE],
    blind_spots: &[
        "Code that was copied elsewhere by a module that was then unloaded: see the checks of function pointers and of memory.",
        "A module whose struct module was wiped and that is in none of the kernel's structures.",
    ],
    run,
};

/// More modules than any kernel holds.
const MAX_MODULES: usize = 1 << 16;
/// Modules that are told of.
const MAX_TOLD: usize = 1 << 10;
/// Nodes of the tree: each module has one for each of its regions.
const MAX_NODES: usize = 1 << 18;
/// Page tables of the area of modules that are visited.
const MAX_TABLES: u64 = 1 << 12;
/// Where x86-64 may load modules (Documentation/arch/x86/x86_64/mm.rst); the image can reach into it.
const MODULE_AREA: std::ops::RangeInclusive<Gva> = Gva(0xffff_ffff_a000_0000)..=Gva(0xffff_ffff_feff_ffff);
const PAGE: usize = 4096;
/// `struct module` is aligned to a cache line.
const ALIGNMENT: usize = 64;
const LISTED: &str = "in the list of modules";
/// `MODULE_STATE_LIVE`. One that is being loaded or unloaded is not everywhere yet, or any more.
const LIVE: u64 = 0;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let listed: Vec<Gva> = context.modules().iter().map(|m| m.address).collect();
    for doubt in context.doubts() {
        findings.note(doubt.clone());
    }
    let mut views = CrossView::default();
    views.whole(LISTED, listed.iter().copied());
    if let Some(found) = findings.or_note("the kset of modules", in_sysfs(context)) {
        unformed(context, findings, &found);
        views.whole("in /sys/module", found);
    }
    if let Some(found) = findings.or_note("the tree of modules", in_tree(context)) {
        views.whole("in the tree by address", found);
    }
    if let Some(found) = findings.or_note("the list of bug tables", with_bugs(context)) {
        views.part("in the list of bug tables", found);
    }
    // Not in kernels without type data of modules.
    if let Ok(found) = with_types(context) {
        views.part("in the list of type data", found);
    }
    match in_memory(context) {
        Ok((found, cut)) => {
            views.part("in the memory of modules", found);
            if let Some(cut) = cut {
                findings.note(cut);
            }
        }
        Err(error) => findings.note(format!("the memory of modules: {error}")),
    }
    findings.looked_at(views.len());
    let missing: Vec<Gva> = views.missing().take(MAX_TOLD).collect();
    for module in missing {
        report(context, findings, &views, module);
    }
    Ok(())
}

/// What is not formed is not in sysfs yet, or any more, and no tool in the guest shows it: the mark alone hides a module.
fn unformed(context: &Context, findings: &mut Findings, in_sysfs: &[Gva]) {
    let marked = context.modules().iter().filter(|m| m.state == "Unformed");
    for module in marked.filter(|m| in_sysfs.contains(&m.address)) {
        let finding = Finding::new(
            Severity::Critical,
            format!("state of module {}", module.name),
            "the module is marked as one that is only being made, and it is in sysfs already: lsmod does not show it",
        );
        findings.report(
            finding
                .at(module.address)
                .by(Some(module.name.clone()))
                .with(Evidence::value("state", module.state)),
        );
    }
}

fn report(context: &Context, findings: &mut Findings, views: &CrossView, address: Gva) {
    let Some(module) = findings.or_note("a module", context.object("module", address)) else {
        return;
    };
    match module.number("state") {
        Ok(LIVE) => {}
        Ok(_) => return,
        Err(error) => return findings.note(format!("module at {address}: {error}")),
    }
    let name = module.array_text("name").unwrap_or_default();
    let lacking = views.lacking(address);
    let hidden = lacking.contains(&LISTED);
    let explanation = format!(
        "the module is loaded and live, and yet not {}{}",
        lacking.join(", not "),
        match hidden {
            true => ": lsmod does not show it",
            false => "",
        }
    );
    let severity = match hidden {
        true => Severity::Critical,
        false => Severity::High,
    };
    let code = match module.has("mem") {
        true => module.pointer("mem[0].base"),
        false => module.pointer("core_layout.base"),
    };
    let mut finding = Finding::new(severity, format!("module {name}"), explanation)
        .at(address)
        .by(Some(name));
    for answer in views.evidence(address) {
        finding = finding.with(answer);
    }
    if let Ok(code) = code {
        finding = finding.with(Evidence::value("code at", code));
    }
    if let Ok(init) = module.pointer("init") {
        finding = finding.with(Evidence::value("init function", init));
    }
    findings.report(finding);
}

/// The modules in the kset of all modules' kobjects (`module_kset`, kernel/params.c): what `/sys/module` shows.
fn in_sysfs(context: &Context) -> Result<Vec<Gva>, LinuxError> {
    let set = context.pointer("module_kset", context.symbol(&["module_kset"])?)?;
    let head = context.object("kset", set)?.member("list")?;
    let found = list::walk(context.space(), head, MAX_MODULES);
    let mut modules = Vec::new();
    for node in found.walk.items {
        let module = context.container("module_kobject", "kobj.entry", node)?;
        // What is built in has an entry for its parameters, and no module.
        if let Ok(module) = module.pointer("mod")
            && !module.is_null()
        {
            modules.push(module);
        }
    }
    Ok(modules)
}

/// The modules in the tree that finds one by an address (`mod_tree`, kernel/module/tree_lookup.c).
fn in_tree(context: &Context) -> Result<Vec<Gva>, LinuxError> {
    let kernel = context.kernel();
    let root = context.object("mod_tree_root", context.symbol(&["mod_tree"])?)?;
    let mut modules = FxHashSet::default();
    // Two trees with the same nodes: one can be read while the other is changed.
    for tree in 0..2u64 {
        let top = root.member("root.tree")?.wrapping_add(tree * 8);
        let node_of = kernel.offset("mod_tree_node", "node.node")?;
        let size = kernel.offset("rb_node", "rb_left")?.saturating_add(8);
        let mut left = vec![context.pointer("mod_tree", top)?];
        let mut seen = FxHashSet::default();
        while let Some(at) = left.pop() {
            if at.is_null() || seen.len() >= MAX_NODES || !seen.insert(at) {
                continue;
            }
            let node = context.object("rb_node", at)?;
            left.push(node.pointer("rb_left")?);
            left.push(node.pointer("rb_right")?);
            let holder = at.wrapping_sub(node_of).wrapping_sub(tree * size);
            modules.insert(context.object("mod_tree_node", holder)?.pointer("mod")?);
        }
    }
    Ok(modules.into_iter().filter(|module| !module.is_null()).collect())
}

/// The modules in the list of those that may have tables of bugs (`module_bug_list`, lib/bug.c), which is of all modules.
fn with_bugs(context: &Context) -> Result<Vec<Gva>, LinuxError> {
    let offset = context.kernel().offset("module", "bug_list")?;
    let head = context.symbol(&["module_bug_list"])?;
    let found = list::walk(context.space(), head, MAX_MODULES);
    let nodes = found.walk.items.into_iter();
    Ok(nodes.map(|node| node.wrapping_sub(offset)).collect())
}

/// The modules in the list of those with type data of their own (`btf_modules`, kernel/bpf/btf.c).
fn with_types(context: &Context) -> Result<Vec<Gva>, LinuxError> {
    let head = context.symbol(&["btf_modules"])?;
    let mut modules = Vec::new();
    for node in list::walk(context.space(), head, MAX_MODULES).walk.items {
        modules.push(context.container("btf_module", "list", node)?.pointer("module")?);
    }
    Ok(modules)
}

/// What looks like a `struct module` in the memory where modules lie, whether anything leads there or not: its kobject names it as
/// the module that it is of.
fn in_memory(context: &Context) -> Result<(Vec<Gva>, Option<String>), LinuxError> {
    let kernel = context.kernel();
    let own = kernel.offset("module", "mkobj.mod")?;
    let name = kernel.offset("module", "name")?;
    let own = usize::try_from(own).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    let mut cut = None;
    // A structure may begin in one page and end in the next.
    let mut before: Option<(Gva, Box<[u8; PAGE]>)> = None;
    for page in context.space().mappings(MODULE_AREA, MAX_TABLES) {
        let page = match page {
            Ok(page) => page,
            Err(limit) => {
                cut = Some(limit.to_string());
                break;
            }
        };
        let (at, access) = (page.gva, page.translation.access);
        if !access.write || page.translation.page_shift != 12 || kernel.image().contains(at) {
            before = None;
            continue;
        }
        let mut bytes = Box::new([0; PAGE]);
        if context.space().read(at, bytes.as_mut_slice()).is_err() {
            before = None;
            continue;
        }
        let joined = before
            .take()
            .filter(|(start, _)| start.wrapping_add(PAGE as u64) == at);
        for offset in (0..PAGE).step_by(ALIGNMENT) {
            // Where a structure begins whose pointer to itself lies in this page.
            let pointer = offset.wrapping_add(own % ALIGNMENT);
            let Some(value) = bytes.get(pointer..pointer + 8) else {
                continue;
            };
            let value = u64::from_le_bytes(value.try_into().unwrap_or_default());
            let start = at.wrapping_add(pointer as u64).wrapping_sub(own as u64);
            if value != start.0 {
                continue;
            }
            let begins_here = start >= at || joined.as_ref().is_some_and(|(first, _)| start >= *first);
            if begins_here && is_name(context, start.wrapping_add(name)) {
                found.push(start);
            }
        }
        before = Some((at, bytes));
    }
    Ok((found, cut))
}

/// Whether a module's name stands there.
fn is_name(context: &Context, at: Gva) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte == b'-';
    context
        .space()
        .read_cstr(at, 64)
        .is_ok_and(|name| !name.is_empty() && name.iter().all(plain))
}
