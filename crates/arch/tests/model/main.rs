//! Walks and listings against a model: a plain map of pages, and a writer of tables that shares nothing with the
//! walkers but the manuals.

#![allow(clippy::unwrap_used, reason = "a test")]

mod corrupt;
mod writer;

use proptest::collection::vec;
use proptest::prelude::*;
use vmsight_arch::paging::{Cursor, FaultReason, Progress, TableMemory, mappings, resolve, walk};
use vmsight_arch::{Dtb, Gpa, Gva};

use writer::{MODES, Page, Rights, Space};

fn rights() -> impl Strategy<Value = Rights> {
    any::<[bool; 7]>().prop_map(
        |[write, user, execute, user_execute, accessed, dirty, global]| Rights {
            write,
            user,
            execute,
            user_execute,
            accessed,
            dirty,
            global,
        },
    )
}

/// A page asked for: where (a neighbourhood, and bits within it), which of the mode's page sizes, where to, rights.
#[derive(Clone, Debug)]
struct Wish {
    near: u8,
    bits: u64,
    size: u8,
    gpa: u64,
    rights: Rights,
    tables: Rights,
}

fn wish() -> impl Strategy<Value = Wish> {
    (
        any::<u8>(),
        any::<u64>(),
        any::<u8>(),
        any::<u64>(),
        rights(),
        rights(),
    )
        .prop_map(|(near, bits, size, gpa, rights, tables)| Wish {
            near,
            bits,
            size,
            gpa,
            rights,
            tables,
        })
}

/// Turns wishes into pages: few neighbourhoods, so that tables are shared and pages lie side by side.
fn build(mode: usize, wishes: &[Wish]) -> Space {
    let spec = &MODES[mode % MODES.len()];
    let mut space = Space::new(spec);
    for w in wishes {
        // The neighbourhood decides the high bits; the middle varies by a few entries of each level.
        let top = spec.va_bits - 1;
        let base = match w.near % 6 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << top,
            3 => (1 << top) - 1,
            4 => 0x5a5a_5a5a_5a5a_5a5a,
            _ => w.bits.rotate_left(17),
        };
        let mut va = base;
        for level in &spec.levels {
            // Add 0..4 entries at each level, so that holes and neighbours both occur.
            va = va.wrapping_add(((w.bits >> (level.shift / 3)) & 3) << level.shift);
        }
        let sizes = spec.page_shifts();
        let shift = sizes[usize::from(w.size) % sizes.len()];
        space.map(va, shift, w.gpa, w.rights, w.tables);
    }
    space
}

/// The same walk, one entry at a time.
fn stepwise(space: &Space, gva: u64) -> Result<Gpa, (FaultReason, u8)> {
    let mode = space.spec.mode;
    let mut at = Cursor::new(mode, Dtb(space.root), Gva(gva)).ok_or((FaultReason::NonCanonical, 0))?;
    loop {
        let value = match mode.entry_size() {
            4 => space.entry_u32(at.entry_gpa()).map(u64::from),
            _ => space.entry_u64(at.entry_gpa()),
        };
        let level = at.level();
        match at.feed(value.ok_or((FaultReason::Unbacked, level))?) {
            Progress::Table => assert_eq!(at.level(), level - 1),
            Progress::Page(page) => {
                assert_eq!(
                    walk(mode, space, Dtb(space.root), Gva(gva)).map(|t| t.steps),
                    Ok(*at.steps())
                );
                return Ok(page.gpa);
            }
            Progress::Fault(reason) => return Err((reason, level)),
        }
    }
}

fn check_one(space: &Space, gva: u64) -> Result<(), TestCaseError> {
    let mode = space.spec.mode;
    let got = walk(mode, space, Dtb(space.root), Gva(gva));
    let quick = resolve(mode, space, Dtb(space.root), Gva(gva));
    prop_assert_eq!(
        quick.map(|r| (r.gpa, r.page_shift)),
        got.ok().map(|t| (t.gpa, t.page_shift))
    );
    prop_assert_eq!(
        stepwise(space, gva),
        got.map(|t| t.gpa).map_err(|f| (f.reason, f.level))
    );
    match (space.expect(gva), got) {
        (Some((start, page)), Ok(t)) => {
            prop_assert_eq!(t.gpa.0, page.gpa + (gva - start), "{:#x}", gva);
            prop_assert_eq!(u32::from(t.page_shift), page.shift);
            prop_assert_eq!(Rights::of(t.access), page.rights, "{:#x}", gva);
            prop_assert_eq!(
                t.steps.len(),
                space.spec.levels.iter().filter(|l| l.shift >= page.shift).count()
            );
        }
        (None, Err(fault)) => {
            let want = if space.canonical(gva) {
                FaultReason::NotPresent
            } else {
                FaultReason::NonCanonical
            };
            prop_assert_eq!(fault.reason, want, "{:#x}", gva);
            prop_assert_eq!(fault.gva, Gva(gva));
            if want == FaultReason::NotPresent {
                prop_assert_eq!(
                    Some(u32::from(fault.level)),
                    space.absent_level(gva),
                    "{:#x}",
                    gva
                );
                prop_assert_eq!(fault.entry(), Some(0));
            }
        }
        (want, got) => prop_assert!(false, "{gva:#x}: the model says {want:x?}, the walk {got:x?}"),
    }
    Ok(())
}

fn check_list(space: &Space, start: u64, end: u64) -> Result<(), TestCaseError> {
    let mut list = mappings(
        space.spec.mode,
        space,
        Dtb(space.root),
        Gva(start)..=Gva(end),
        1 << 20,
    );
    let mut got = Vec::new();
    for item in list.by_ref() {
        let m = item.map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert_eq!(
            Ok(m.translation),
            walk(space.spec.mode, space, Dtb(space.root), m.gva)
        );
        let rights = Rights::of(m.translation.access);
        got.push((
            m.gva.0,
            Page {
                gpa: m.translation.gpa.0,
                shift: m.translation.page_shift.into(),
                rights,
            },
        ));
    }
    prop_assert_eq!(list.broken(), 0);
    prop_assert!(list.tables() <= space.tables() + 1, "each table is visited once");
    let want: Vec<_> = space.touching(start, end).collect();
    prop_assert_eq!(got, want);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn walks_agree_with_the_model(
        mode in 0..MODES.len(),
        wishes in vec(wish(), 0..40),
        others in vec(any::<u64>(), 8),
    ) {
        let space = build(mode, &wishes);
        let pages: Vec<_> = space.touching(0, u64::MAX).collect();
        for (start, page) in pages {
            let size = 1u64 << page.shift;
            check_one(&space, start)?;
            check_one(&space, start + (size - 1))?;
            check_one(&space, start.wrapping_sub(1))?;
            check_one(&space, start.wrapping_add(size))?;
            for other in &others {
                check_one(&space, start + (other & (size - 1)))?;
                // One bit off, anywhere in the address.
                check_one(&space, start ^ (1 << (other & 63)))?;
            }
        }
        for other in others {
            check_one(&space, other)?;
        }
    }

    #[test]
    fn listings_agree_with_the_model(
        mode in 0..MODES.len(),
        wishes in vec(wish(), 0..40),
        cuts in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), -2i64..3, -2i64..3), 6),
    ) {
        let space = build(mode, &wishes);
        for (start, end) in space.halves() {
            check_list(&space, start, end)?;
        }
        // Ranges that begin and end in, at and beside pages.
        let edges: Vec<u64> = space
            .touching(0, u64::MAX)
            .flat_map(|(start, p)| [start, start + (1 << p.shift) / 2, start + ((1 << p.shift) - 1)])
            .chain([0, u64::MAX])
            .collect();
        for (a, b, near_a, near_b) in cuts {
            let a = a.get(&edges).wrapping_add_signed(near_a);
            let b = b.get(&edges).wrapping_add_signed(near_b);
            let (start, end) = (a.min(b), a.max(b));
            if space.same_half(start, end) {
                check_list(&space, start, end)?;
            }
        }
    }
}
