//! Walks and listings of page tables against QEMU's own, on running guests: every page `info tlb` lists, and thousands of
//! addresses through `gva2gpa`.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gva};
use vmsight_lab::qmp::Qmp;
use vmsight_lab::{Guest, Kernel, Machine, Memory, Paging, Spec};
use vmsight_memory::AddressSpace;
use vmsight_target::TargetSpec;

/// A page as QEMU lists it: where it begins, where it leads, and its last entry's flags as QEMU writes them.
type Page = (u64, u64, String);

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// The value after `name=` in what `info registers` prints.
fn register(registers: &str, name: &str) -> u64 {
    let at = registers
        .find(&format!("{name}="))
        .unwrap_or_else(|| panic!("no {name} in {registers}"));
    let value = &registers[at + name.len() + 1..];
    hex(value.split_whitespace().next().unwrap())
}

/// What `info tlb` says: `ffff888000000000: 0000000000000000 XG-DA---W`.
fn pages_of_qemu(qmp: &mut Qmp) -> Vec<Page> {
    let text = qmp.human("info tlb").unwrap();
    text.lines()
        .map(|line| {
            let (gva, rest) = line.trim().split_once(": ").unwrap_or_else(|| panic!("{line:?}"));
            let (gpa, flags) = rest.split_once(' ').unwrap_or_else(|| panic!("{line:?}"));
            (hex(gva), hex(gpa), flags.trim().to_owned())
        })
        .collect()
}

fn pages_of_ours(space: &AddressSpace) -> Vec<Page> {
    let mut list = space.mappings(Gva(0)..=Gva(u64::MAX), 1 << 20);
    let pages = list
        .by_ref()
        .map(|mapping| {
            let mapping = mapping.unwrap();
            let entry = mapping.translation.steps.last().unwrap().value;
            let large = mapping.translation.page_shift > 12;
            // Bit 7 of the last level is not the size: QEMU leaves it out there.
            let flags = [
                ('X', entry >> 63 & 1 != 0),
                ('G', entry >> 8 & 1 != 0),
                ('P', large),
                ('D', entry >> 6 & 1 != 0),
                ('A', entry >> 5 & 1 != 0),
                ('C', entry >> 4 & 1 != 0),
                ('T', entry >> 3 & 1 != 0),
                ('U', entry >> 2 & 1 != 0),
                ('W', entry >> 1 & 1 != 0),
            ];
            let flags = flags.map(|(letter, set)| if set { letter } else { '-' });
            (mapping.gva.0, mapping.translation.gpa.0, flags.iter().collect())
        })
        .collect();
    assert_eq!(
        list.broken(),
        0,
        "a kernel's tables have no reserved bits and lie in memory"
    );
    pages
}

/// Where QEMU says `gva` lies.
fn gva2gpa(qmp: &mut Qmp, gva: u64) -> Option<u64> {
    let text = qmp.human(&format!("gva2gpa {gva:#x}")).unwrap();
    match text.trim().strip_prefix("gpa: ") {
        Some(gpa) => Some(hex(gpa)),
        None => {
            assert_eq!(text.trim(), "Unmapped");
            None
        }
    }
}

/// Addresses in and about the pages: begin, middle, end, neighbours, one bit off; and some from anywhere.
fn addresses(pages: &[Page], space: &AddressSpace) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut all = Vec::new();
    let step = (pages.len() / 700).max(1);
    for (gva, _, _) in pages.iter().step_by(step) {
        let size = space.translate(Gva(*gva)).unwrap().page_size();
        all.extend([
            *gva,
            gva + (random() & (size - 1)),
            gva + (size - 1),
            gva.wrapping_sub(1),
            gva.wrapping_add(size),
            gva ^ (1 << (random() & 63)),
        ]);
    }
    all.extend((0..500).map(|_| random()));
    all.extend((0..500).map(|_| random() >> 17));
    all.extend((0..500).map(|_| random() | 0xffff_8000_0000_0000));
    all
}

fn check(spec: Spec, mode: PagingMode) {
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let target = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let memory = vmsight_target::attach(&target, &Default::default())
        .unwrap_or_else(|e| panic!("{e}"))
        .memory;
    guest
        .paused(|qmp| {
            let registers = qmp.human("info registers")?;
            let [cr0, cr3, cr4, efer] = ["CR0", "CR3", "CR4", "EFER"].map(|name| register(&registers, name));
            assert_eq!(PagingMode::from_control(cr0, cr4, efer), Some(mode));
            let space = AddressSpace::new(memory, mode, Dtb::from_cr3(cr3));

            let pages = pages_of_qemu(qmp);
            assert!(
                pages.len() > 10_000,
                "a kernel maps more than {} pages",
                pages.len()
            );
            let ours = pages_of_ours(&space);
            for (theirs, ours) in pages.iter().zip(&ours) {
                assert_eq!(ours, theirs, "ours, QEMU's");
            }
            assert_eq!(ours.len(), pages.len());

            let (mut mapped, mut unmapped) = (0, 0);
            for gva in addresses(&pages, &space) {
                let theirs = gva2gpa(qmp, gva);
                let ours = space.translate(Gva(gva));
                assert_eq!(ours.map(|t| t.gpa.0).ok(), theirs, "{gva:#x}: {ours:x?}");
                if theirs.is_some() {
                    mapped += 1;
                } else {
                    unmapped += 1;
                }
            }
            assert!(
                mapped > 1500 && unmapped > 1000,
                "{mapped} mapped, {unmapped} not"
            );
            Ok(())
        })
        .unwrap();
}

#[test]
fn four_levels_agree_with_qemu() {
    check(Spec::new(Kernel::V6_1), PagingMode::X86Level4);
}

#[test]
fn five_levels_above_4_gib_agree_with_qemu() {
    let spec = Spec {
        paging: Paging::Five,
        machine: Machine::Q35,
        memory: Memory::Private,
        ..Spec::new(Kernel::V6_12)
    };
    check(spec.memory_mib(5120), PagingMode::X86Level5);
}
