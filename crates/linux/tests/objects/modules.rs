//! Loaded modules.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmsight_linux::Listing;
use vmsight_linux::module::{Module, ModuleFields};

use crate::guest::{Guest, offset};
use crate::{BAD, timed};

fn module(guest: &mut Guest, name: &[u8]) -> u64 {
    let module = guest.make("module", &[("refcnt.counter", 3), ("taints", 0x3000)]);
    guest.put_bytes(module + offset("module", "name"), name);
    let users = module + offset("module", "source_list");
    guest.list(users, &[]);
    let memory = module + offset("module", "mem");
    guest.set(memory, "module_memory", "base", 0xffff_ffff_c000_0000);
    guest.set(memory, "module_memory", "size", 0x4000);
    module
}

/// Two modules; the second uses the first.
fn two() -> (Guest, [u64; 2]) {
    let mut guest = Guest::new();
    let head = guest.space(16);
    let (first, second) = (module(&mut guest, b"first"), module(&mut guest, b"sec\x1bond"));
    let link = offset("module", "list");
    guest.list(head, &[first + link, second + link]);
    guest.symbol("modules", head);
    let usage = guest.make("module_use", &[("source", second)]);
    let users = first + offset("module", "source_list");
    guest.list(users, &[usage + offset("module_use", "source_list")]);
    (guest, [first, second])
}

fn modules(guest: &Guest) -> Listing<Module> {
    let kernel = guest.kernel();
    timed(|| kernel.modules(ModuleFields::ALL).unwrap())
}

#[test]
fn an_honest_list_is_whole() {
    let (mut guest, [first, _]) = two();
    let get = 0xffff_8880_0000_f000;
    guest.symbol("param_get_int", get);
    let ops = guest.make("kernel_param_ops", &[("get", get)]);
    let (name, value) = (guest.text(b"debug"), guest.space(8));
    guest.put(value, u64::from(-5i32 as u32));
    let parameter = guest.make(
        "kernel_param",
        &[("name", name), ("ops", ops), ("perm", 0o644), ("arg", value)],
    );
    guest.set(first, "module", "kp", parameter);
    guest.set(first, "module", "num_kp", 1);
    let listing = modules(&guest);
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let [a, b] = listing.rows.as_slice() else {
        panic!("{:?}", listing.rows)
    };
    assert_eq!(
        (a.name.as_str(), a.refcount, a.size, a.taints.as_str()),
        ("first", Some(2), 0x4000, "OE")
    );
    assert_eq!(
        (a.used_by.as_slice(), a.state),
        (["sec\u{1b}ond".to_owned()].as_slice(), "Live")
    );
    let parameters = a.parameters.as_ref().unwrap();
    assert_eq!(
        (parameters[0].name.as_str(), parameters[0].value.as_deref()),
        ("debug", Some("-5"))
    );
    assert!(a.problems.is_empty() && b.problems.is_empty() && b.used_by.is_empty());
    let kernel = guest.kernel();
    assert_eq!(kernel.module_address("first").unwrap().0, first);
    assert!(kernel.module_address("third").is_err());
}

#[test]
fn a_list_that_loops_shows_each_module_once() {
    let (mut guest, [first, second]) = two();
    let link = offset("module", "list");
    guest.put(second + link, first + link);
    let listing = modules(&guest);
    assert_eq!(listing.rows.len(), 2);
    assert!(
        listing.warnings.iter().any(|w| w.contains("cycle")),
        "{:?}",
        listing.warnings
    );
    guest.put(second + link, second + link);
    assert_eq!(modules(&guest).rows.len(), 2);
    for bad in BAD {
        guest.put(second + link, bad);
        let listing = modules(&guest);
        assert!(
            !listing.rows.is_empty() && !listing.warnings.is_empty(),
            "{bad:#x}"
        );
    }
}

#[test]
fn impossible_counts_are_capped_and_said() {
    let (mut guest, [first, second]) = two();
    guest.set(first, "module", "num_kp", u64::from(u32::MAX));
    guest.set(first, "module", "kp", first);
    let attrs = guest.make("module_sect_attrs", &[("nsections", u64::from(u32::MAX))]);
    guest.set(first, "module", "sect_attrs", attrs);
    let table = guest.make(
        "mod_kallsyms",
        &[
            ("num_symtab", u64::from(u32::MAX)),
            ("symtab", first),
            ("strtab", first),
        ],
    );
    guest.set(second, "module", "kallsyms", table);
    guest.put_bytes(second + offset("module", "name"), &[b'x'; 56]);
    let listing = modules(&guest);
    assert_eq!(listing.rows.len(), 2);
    let a = &listing.rows[0];
    assert!(
        a.problems.iter().any(|p| p.field == "parameters"),
        "{:?}",
        a.problems
    );
    assert!(
        a.problems.iter().any(|p| p.field == "sections"),
        "{:?}",
        a.problems
    );
    assert_eq!(listing.rows[1].name.len(), 56);
    let kernel = guest.kernel();
    let symbols = timed(|| kernel.module_symbols().unwrap());
    assert!(!symbols.warnings.is_empty());
}

#[test]
fn broken_pointers_cost_their_own_field() {
    for bad in BAD {
        for member in [
            "version",
            "srcversion",
            "args",
            "kp",
            "sect_attrs",
            "kallsyms",
            "init",
            "exit",
        ] {
            let (mut guest, [first, _]) = two();
            guest.set(first, "module", "num_kp", 2);
            guest.set(first, "module", member, bad);
            let users = first + offset("module", "source_list");
            guest.put(users, bad);
            let listing = modules(&guest);
            assert_eq!(listing.rows.len(), 2, "{member} {bad:#x}");
            assert_eq!(listing.rows[0].name, "first");
            assert!(
                listing.rows[0].problems.iter().any(|p| p.field == "used_by"),
                "{:?}",
                listing.rows[0].problems
            );
            let kernel = guest.kernel();
            let _ = timed(|| kernel.module_symbols());
        }
    }
}

#[test]
fn modules_that_share_their_symbols_do_not_fill_the_memory() {
    const SYMBOLS: u64 = 30_000;
    let mut guest = Guest::new();
    let head = guest.space(16);
    let name = guest.text(&[b's'; 511]);
    let symbols = guest.space(SYMBOLS * 24);
    for index in 0..SYMBOLS {
        // Elf64_Sym: the name is the first of the table of strings, the section number 1.
        guest.put(symbols + index * 24, 1 << 48);
    }
    let table = guest.make(
        "mod_kallsyms",
        &[("symtab", symbols), ("num_symtab", SYMBOLS), ("strtab", name)],
    );
    let modules: Vec<u64> = (0..20)
        .map(|_| {
            let at = module(&mut guest, b"twin");
            guest.set(at, "module", "kallsyms", table);
            at + offset("module", "list")
        })
        .collect();
    guest.list(head, &modules);
    guest.symbol("modules", head);
    let kernel = guest.kernel();
    let listing = kernel.module_symbols().unwrap();
    let held: usize = listing.rows.iter().map(|row| row.name.len()).sum();
    assert!(held > 250 << 20 && held <= 256 << 20, "{held} bytes");
    assert!(
        listing.warnings.iter().any(|w| w.contains("256 MiB")),
        "{:?}",
        listing.warnings
    );
}

#[test]
fn a_list_that_is_rewritten_while_it_is_read_is_whole_or_marked() {
    let (guest, [first, second]) = two();
    let (kernel, memory) = guest.live();
    let link = offset("module", "list");
    let (head, cycle) = (guest.get(second + link), first + link);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for value in [cycle, head] {
                    memory
                        .write(Guest::physical(second + link), &value.to_le_bytes())
                        .unwrap();
                    std::thread::yield_now();
                }
            }
        });
        let start = Instant::now();
        let mut whole = 0;
        while start.elapsed() < Duration::from_millis(500) {
            let listing = kernel.modules(ModuleFields::default()).unwrap();
            assert_eq!(listing.rows.len(), 2);
            whole += usize::from(listing.warnings.is_empty());
            assert!(
                listing.warnings.iter().all(|w| w.contains("module list")),
                "{:?}",
                listing.warnings
            );
        }
        stop.store(true, Ordering::Relaxed);
        assert!(whole > 0, "never once a settled list");
    });
}
