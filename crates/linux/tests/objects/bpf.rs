//! BPF programs, maps and links.

use vmsight_linux::bpf::BpfObject;
use vmsight_linux::{Kernel, Listing};

use crate::guest::Guest;
use crate::{BAD, timed};

/// A program that uses one map twice, the map, and a link of it; a process has the program open.
struct Loaded {
    guest: Guest,
    program: u64,
    aux: u64,
    map: u64,
    link: u64,
}

fn loaded() -> Loaded {
    let mut guest = Guest::new();
    let user = guest.make("user_struct", &[("uid", 1000)]);
    let map = guest.make(
        "bpf_map",
        &[
            ("map_type", 1),
            ("key_size", 4),
            ("value_size", 16),
            ("max_entries", 64),
            ("map_flags", 1),
            ("id", 1),
            ("refcnt", 2),
        ],
    );
    let maps = guest.space(16);
    guest.put(maps, map);
    guest.put(maps + 8, map);
    let aux = guest.make(
        "bpf_prog_aux",
        &[
            ("refcnt", 1),
            ("used_map_cnt", 2),
            ("used_maps", maps),
            ("id", 1),
            ("verified_insns", 7),
            ("user", user),
            ("load_time", 5_000),
        ],
    );
    let program = guest.make(
        "bpf_prog",
        &[
            ("jited", 1),
            ("type", 8),
            ("len", 6),
            ("jited_len", 40),
            ("tag", 0x0807_0605_0403_0201),
            ("bpf_func", 0xffff_ffff_c000_1000),
            ("aux", aux),
        ],
    );
    let link = guest.make("bpf_cgroup_link", &[("type", 1)]);
    guest.set(link, "bpf_link", "id", 1);
    guest.set(link, "bpf_link", "type", 3);
    guest.set(link, "bpf_link", "prog", program);
    for (name, at) in [("prog_idr", program), ("map_idr", map), ("link_idr", link)] {
        // One entry is the head itself.
        let idr = guest.make("idr", &[("idr_rt.xa_head", at), ("idr_base", 1)]);
        guest.symbol(name, idr);
    }
    let task = guest.process(7, "agent");
    let file = guest.make("file", &[("private_data", program)]);
    guest.open(task, &[file]);
    Loaded {
        guest,
        program,
        aux,
        map,
        link,
    }
}

fn list(kernel: &Kernel) -> Listing<BpfObject> {
    timed(|| kernel.bpf().unwrap())
}

/// Whether a row has a problem of this field.
fn has(row: &BpfObject, field: &str) -> bool {
    row.problems.iter().any(|problem| problem.field == field)
}

#[test]
fn what_is_loaded_is_listed() {
    let Loaded { guest, .. } = loaded();
    let listing = list(&guest.kernel());
    assert_eq!(listing.warnings, [""; 0]);
    let [program, map, link] = listing.rows.as_slice() else {
        panic!("{:?}", listing.rows)
    };
    assert!(
        listing.rows.iter().all(|row| row.problems.is_empty()),
        "{listing:?}"
    );
    // These types have no enumerations: numbers stay numbers.
    assert_eq!(
        (program.kind, program.id, program.type_name.as_str()),
        ("program", 1, "type-8")
    );
    assert_eq!(program.tag.as_deref(), Some("0102030405060708"));
    assert_eq!(
        (program.instructions, program.verified_instructions),
        (Some(6), Some(7))
    );
    assert_eq!((program.jited_size, program.loaded_ns), (Some(40), Some(5_000)));
    assert_eq!((program.uid, &program.maps), (Some(1000), &vec![1, 1]));
    let owners: Vec<_> = program.owners.iter().map(|owner| (owner.pid, owner.fd)).collect();
    assert_eq!(owners, [(7, 0)]);
    assert_eq!((map.kind, map.max_entries, map.flags), ("map", Some(64), Some(1)));
    assert_eq!(
        (link.kind, link.program, link.references),
        ("link", Some(1), Some(0))
    );
}

#[test]
fn counts_and_pointers_that_lie_cost_a_row_no_more_than_a_mark() {
    for bad in BAD {
        let Loaded {
            mut guest,
            program,
            aux,
            map,
            link,
        } = loaded();
        guest.set(aux, "bpf_prog_aux", "used_map_cnt", u64::MAX);
        guest.set(aux, "bpf_prog_aux", "func_cnt", u64::MAX);
        guest.set(aux, "bpf_prog_aux", "func", program);
        guest.set(aux, "bpf_prog_aux", "attach_func_name", bad);
        guest.set(aux, "bpf_prog_aux", "user", bad);
        guest.set(map, "bpf_map", "id", 77);
        guest.set(link, "bpf_link", "prog", bad);
        let rows = list(&guest.kernel()).rows;
        let [program, map, link] = rows.as_slice() else {
            panic!("{rows:?}")
        };
        assert!(has(program, "maps") && has(program, "jited_size"), "{program:?}");
        assert!(has(program, "uid"), "{bad:#x}: {program:?}");
        assert!(has(program, "target") || bad == 0, "{bad:#x}: {program:?}");
        assert!(has(map, "id"), "{map:?}");
        assert!(has(link, "program") || bad == 0, "{bad:#x}: {link:?}");
    }
}

#[test]
fn tables_that_lead_nowhere_leave_the_others() {
    for bad in BAD.into_iter().filter(|bad| *bad != 0) {
        let Loaded { mut guest, aux, .. } = loaded();
        guest.set(aux, "bpf_prog_aux", "used_maps", bad);
        let idr = guest.make("idr", &[("idr_rt.xa_head", bad & !3)]);
        guest.symbol("link_idr", idr);
        let rows = list(&guest.kernel()).rows;
        assert!(rows.len() >= 2 && has(&rows[0], "maps"), "{rows:?}");
    }
    // No table at all is an error that says so.
    let error = Guest::new().kernel().bpf().unwrap_err();
    assert!(error.to_string().contains("no BPF"), "{error}");
}
