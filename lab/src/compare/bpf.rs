//! BPF programs, maps and links.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use anyhow::Result;
use vmsight_linux::Kernel;
use vmsight_linux::bpf::BpfObject;

use super::{Differences, files, holders, spelt};
use crate::truth::Truth;
use crate::truth::bpf::{BpfLink, BpfProgram};

/// Compares `Kernel::bpf` with what `BPF_OBJ_GET_INFO_BY_FD` says of each program, map and link.
pub fn bpf(kernel: &Kernel, truth: &Truth) -> Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.bpf()?;
    out.complaints("BPF", &listing.warnings);
    let said = &truth.bpf;
    let ids = |kind: &str| -> BTreeSet<u32> {
        let of_kind = listing.rows.iter().filter(|row| row.kind == kind);
        of_kind.map(|row| row.id).collect()
    };
    out.same(
        "programs",
        ids("program"),
        said.programs.keys().copied().collect(),
    );
    out.same("maps", ids("map"), said.maps.keys().copied().collect());
    out.same("links", ids("link"), said.links.keys().copied().collect());
    let owners = holders::of_bpf(truth);
    for row in &listing.rows {
        out.complaints(&format!("BPF {} {}", row.kind, row.id), &row.problems);
        let at = |what: &str| format!("{what} of BPF {} {}", row.kind, row.id);
        let held: BTreeSet<String> = row.owners.iter().map(files::owner).collect();
        let holding = owners.get(&(row.kind, row.id)).cloned().unwrap_or_default();
        // The descriptors are some of the references.
        let few = i64::try_from(holding.len()).unwrap_or(0);
        out.near(
            at("references"),
            row.references.is_some_and(|n| n >= few.max(1)),
            row.references,
            few,
        );
        out.same(at("owners"), held, holding);
        if let Some(said) = said.programs.get(&row.id).filter(|_| row.kind == "program") {
            program(&mut out, row, said);
        }
        if let Some(said) = said.maps.get(&row.id).filter(|_| row.kind == "map") {
            out.same(at("type"), row.type_name.as_str(), map_type(said.kind));
            out.same(at("name"), row.name.as_deref(), named(&said.name));
            out.same(at("key size"), row.key_size, Some(said.key_size));
            out.same(at("value size"), row.value_size, Some(said.value_size));
            out.same(at("entries"), row.max_entries, Some(said.max_entries));
            out.same(at("flags"), row.flags, Some(u64::from(said.flags)));
        }
        if let Some(said) = said.links.get(&row.id).filter(|_| row.kind == "link") {
            link(&mut out, truth, row, said);
        }
    }
    Ok(out)
}

fn program(out: &mut Differences, row: &BpfObject, said: &BpfProgram) {
    let at = |what: &str| format!("{what} of BPF program {}", row.id);
    let (kind, attach) = program_type(said.kind);
    out.same(at("type"), row.type_name.as_str(), kind);
    out.same(at("attach type"), row.attach_type.as_deref(), attach);
    out.same(at("name"), row.name.as_deref(), named(&said.name));
    let tag = said.tag.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    out.same(at("tag"), row.tag.as_ref(), Some(&tag));
    out.same(at("time of loading"), row.loaded_ns, Some(said.load_time));
    out.same(at("wall clock"), row.load_time.is_some(), true);
    out.same(at("uid"), row.uid, Some(said.uid));
    out.same(at("instructions"), row.instructions, Some(said.size / 8));
    out.same(
        at("verified instructions"),
        row.verified_instructions,
        said.verified,
    );
    out.same(at("maps"), &row.maps, &said.maps);
    let jited = said.jited_size != 0;
    out.same(
        at("machine code"),
        row.jited_size,
        jited.then_some(u64::from(said.jited_size)),
    );
    out.same(
        at("address"),
        row.jited_address.map(|at| at.0),
        said.functions.first().copied().filter(|_| jited),
    );
}

fn link(out: &mut Differences, truth: &Truth, row: &BpfObject, said: &BpfLink) {
    let at = |what: &str| format!("{what} of BPF link {}", row.id);
    out.same(at("program"), row.program, Some(said.program));
    let number = said.target.unwrap_or(0);
    let (kind, target) = match said.kind {
        1 => ("raw_tracepoint", said.tracepoint.clone()),
        3 => {
            let group = truth.cgroups.iter().find(|group| group.inode == number);
            ("cgroup", group.map(|group| spelt(&group.path)))
        }
        5 => ("netns", Some(format!("net:[{number}]"))),
        6 => {
            let initial = truth.init_net().map(|net| net.interfaces.as_slice());
            let mut all = initial.unwrap_or_default().iter();
            let interface = all.find(|interface| u64::from(interface.index) == number);
            ("xdp", interface.map(|interface| spelt(&interface.name)))
        }
        _ => ("of a type that the workload does not make", None),
    };
    out.same(at("type"), row.type_name.as_str(), kind);
    out.same(at("target"), &row.target, &target);
    if let Some(attach) = said.attach {
        let name = match attach {
            1 => "cgroup_inet_egress",
            36 => "sk_lookup",
            _ => "of a type that the workload does not use",
        };
        out.same(at("attach type"), row.attach_type.as_deref(), Some(name));
    }
}

/// The types of programs that the workload loads, and what it says that it will attach them to (include/uapi/linux/bpf.h).
fn program_type(number: u32) -> (&'static str, Option<&'static str>) {
    match number {
        1 => ("socket_filter", None),
        2 => ("kprobe", None),
        6 => ("xdp", Some("xdp")),
        8 => ("cgroup_skb", Some("cgroup_inet_egress")),
        17 => ("raw_tracepoint", None),
        30 => ("sk_lookup", Some("sk_lookup")),
        _ => ("of a type that the workload does not load", None),
    }
}

fn map_type(number: u32) -> &'static str {
    match number {
        1 => "hash",
        2 => "array",
        _ => "of a type that the workload does not make",
    }
}

fn named(name: &str) -> Option<&str> {
    Some(name).filter(|name| !name.is_empty())
}
