//! Maple trees and xarrays that lie.

use std::time::{Duration, Instant};

use vmsight_linux::Listing;

use crate::synthetic::{DIRECT_MAP, Guest, offset};
use crate::three;

/// The mappings of the process 1 over a maple tree whose root is what `build` makes.
fn maps_of(build: impl FnOnce(&mut Guest) -> u64) -> Listing<vmsight_linux::Mapping> {
    let (mut guest, [a, ..]) = three();
    let (mm, _) = guest.user_memory(a, b"x\0", b"");
    let root = build(&mut guest);
    guest.put(
        mm + offset("mm_struct", "mm_mt") + offset("maple_tree", "ma_root"),
        root,
    );
    let start = Instant::now();
    let listing = guest.kernel().maps(1).unwrap();
    assert!(start.elapsed() < Duration::from_secs(60));
    listing
}

/// The pointer to a maple tree's root node of a type (1 leaf, 2 range, 3 arange).
pub(crate) fn maple(node: u64, kind: u64) -> u64 {
    child(node, kind) | 2
}

/// The pointer to a node in another's slot.
fn child(node: u64, kind: u64) -> u64 {
    node | kind << 3 | 4
}

#[test]
fn an_honest_maple_tree_is_listed_whole() {
    let listing = maps_of(|guest| {
        let areas: Vec<u64> = (0..3).map(|_| guest.alloc("vm_area_struct")).collect();
        for (index, &area) in areas.iter().enumerate() {
            let start = 0x1000 + 0x2000 * index as u64;
            guest.set(area, "vm_area_struct", "vm_start", start);
            guest.set(area, "vm_area_struct", "vm_end", start + 0x1000);
            guest.set(area, "vm_area_struct", "vm_flags", 0x75);
            guest.set(area, "vm_area_struct", "vm_mm", 1);
        }
        let (low, high) = (guest.space(256, 256), guest.space(256, 256));
        // Gap, area, gap, area | gap, area, gap to the end.
        for (index, (pivot, slot)) in [(0xfff, 0), (0x1fff, areas[0]), (0x2fff, 0), (0x3fff, areas[1])]
            .iter()
            .enumerate()
        {
            guest.put(low + 8 + index as u64 * 8, *pivot);
            guest.put(low + 128 + index as u64 * 8, *slot);
        }
        for (index, (pivot, slot)) in [(0x4fff, 0), (0x5fff, areas[2]), (u64::MAX, 0)]
            .iter()
            .enumerate()
        {
            guest.put(high + 8 + index as u64 * 8, *pivot);
            guest.put(high + 128 + index as u64 * 8, *slot);
        }
        let root = guest.space(256, 256);
        guest.put(root + 8, 0x3fff);
        guest.put(root + 80, child(low, 1));
        guest.put(root + 88, child(high, 1));
        maple(root, 3)
    });
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let rows: Vec<_> = listing
        .rows
        .iter()
        .map(|r| (r.start.0, r.end.0, r.perms.as_str()))
        .collect();
    assert_eq!(
        rows,
        [
            (0x1000, 0x2000, "r-xp"),
            (0x3000, 0x4000, "r-xp"),
            (0x5000, 0x6000, "r-xp")
        ]
    );
}

#[test]
fn maple_trees_that_lie_are_cut() {
    // A node that is its own child.
    let cyclic = maps_of(|guest| {
        let node = guest.space(256, 256);
        guest.put(node + 80, child(node, 3));
        maple(node, 3)
    });
    assert!(
        cyclic.warnings.iter().any(|w| w.contains("cycle")),
        "{:?}",
        cyclic.warnings
    );
    // Falling pivots, unknown type, null node, node outside memory.
    let falling = maps_of(|guest| {
        let node = guest.space(256, 256);
        guest.put(node + 8, 0x5000);
        guest.put(node + 16, 0x1000);
        maple(node, 1)
    });
    assert!(
        falling.warnings.iter().any(|w| w.contains("do not rise")),
        "{:?}",
        falling.warnings
    );
    for root in [
        maple(DIRECT_MAP + 0x10_0000, 9),
        maple(0x1000, 1),
        maple(DIRECT_MAP + (1 << 29), 1),
        u64::MAX - 1,
    ] {
        let listing = maps_of(|_| root);
        assert!(
            listing.warnings.iter().any(|w| w.contains("cut")),
            "{root:#x}: {:?}",
            listing.warnings
        );
    }
}

/// A guest whose `btf_idr` has the root `head`, made by `build`; the types of module "probe" in it.
fn module_types_of(
    build: impl FnOnce(&mut Guest, u64) -> u64,
) -> Result<vmsight_symbols::Types, vmsight_linux::LinuxError> {
    let (mut guest, _) = three();
    let base = guest.kernel().types().clone();
    let mut types = vmsight_symbols::types::Builder::over(&base).unwrap();
    types.add(&vmsight_symbols::types::Def::Struct {
        name: "probe_state",
        size: 24,
        members: &[],
    });
    let blob = types.into_bytes().unwrap();
    let data = guest.space(blob.len() as u64, 8);
    guest.put_bytes(data, &blob);
    let btf = guest.alloc("btf");
    guest.set(btf, "btf", "data", data);
    guest.set(btf, "btf", "data_size", blob.len() as u64);
    guest.set(btf, "btf", "kernel_btf", 1);
    guest.put_bytes(btf + offset("btf", "name"), b"probe\0");
    let idr = guest.alloc("idr");
    guest.symbol("btf_idr", idr);
    let head = build(&mut guest, btf);
    guest.put(idr + offset("idr", "idr_rt.xa_head"), head);
    let start = Instant::now();
    let found = guest.kernel().module_types("probe");
    assert!(start.elapsed() < Duration::from_secs(60));
    found
}

fn xa_node(guest: &mut Guest, shift: u64, slots: &[(u64, u64)]) -> u64 {
    let node = guest.alloc("xa_node");
    guest.set(node, "xa_node", "shift", shift);
    for (slot, value) in slots {
        guest.put(node + offset("xa_node", "slots") + slot * 8, *value);
    }
    node | 2
}

#[test]
fn the_types_of_a_module_are_found_in_a_tree_of_any_depth() {
    let flat = module_types_of(|_, btf| btf).unwrap();
    let types = flat.find_struct("probe_state").unwrap();
    assert_eq!(flat.size_of(types), Some(24));
    assert!(
        flat.find_struct("task_struct").is_some(),
        "the kernel's own types are below"
    );
    let deep = module_types_of(|guest, btf| {
        // A value entry, a sibling entry and another module's slot in between stand for nothing.
        let leaf = xa_node(guest, 0, &[(0, 3), (5, 6), (63, btf)]);
        let inner = xa_node(guest, 6, &[(1, leaf)]);
        xa_node(guest, 12, &[(2, inner)])
    });
    assert!(deep.unwrap().find_struct("probe_state").is_some());
}

#[test]
fn an_entry_of_an_xarray_counts_the_indices_that_it_stands_for() {
    use vmsight_linux::structures::xarray::{Entry, walk_head};
    let mut guest = Guest::new(8);
    let sibling_of = |slot: u64| slot << 2 | 2;
    let pages = [
        (4, 0x1000),
        (5, sibling_of(4)),
        (6, sibling_of(4)),
        (8, 0x2000),
        (10, 7),
    ];
    let leaf = xa_node(&mut guest, 0, &pages);
    // A folio of 128 pages is stored one level up; the sibling of nothing is no entry.
    let folios = [(1, leaf), (3, sibling_of(0)), (4, 0x3000), (5, sibling_of(4))];
    let head = xa_node(&mut guest, 6, &folios);
    let walk = walk_head(&guest.kernel(), head, 100).unwrap();
    assert!(walk.end.is_complete());
    let entry = |index, value, count| Entry { index, value, count };
    let expected = [
        entry(68, 0x1000, 3),
        entry(72, 0x2000, 1),
        entry(74, 7, 1),
        entry(256, 0x3000, 128),
    ];
    assert_eq!(walk.items, expected);
}

#[test]
fn xarrays_that_lie_are_cut() {
    let own_child = module_types_of(|guest, _| {
        let node = xa_node(guest, 6, &[]);
        guest.put((node - 2) + offset("xa_node", "slots"), node);
        node
    });
    assert!(own_child.unwrap_err().to_string().contains("cut"));
    for head in [
        u64::MAX - 1,
        0xdead_0000_0000_0102,
        DIRECT_MAP + (1 << 29) + 2,
        6,
        1,
        0,
    ] {
        assert!(module_types_of(|_, _| head).is_err(), "{head:#x}");
    }
    let endless = module_types_of(|guest, btf| {
        guest.set(btf, "btf", "data_size", 0xffff_ffff);
        btf
    });
    assert!(endless.unwrap_err().to_string().contains("4294967295 bytes"));
}
