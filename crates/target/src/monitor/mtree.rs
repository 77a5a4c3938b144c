//! `info mtree -f`: what lies where in guest-physical memory.

/// Most ranges taken from a flat view: a machine has tens, with thousands of assigned devices thousands.
const MAX_RANGES: usize = 64 * 1024;

/// A range of guest-physical memory and the block behind it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct FlatRange {
    /// Its first guest-physical address.
    pub(crate) gpa: u64,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// `ram`, `rom`, `romd`, `i/o`, `ramd`, with `nv-` before it for non-volatile memory.
    pub(crate) kind: String,
    /// The memory region's name.
    pub(crate) block: String,
    /// Where in that region it starts.
    pub(crate) offset: u64,
}

/// The ranges of the address space called `memory` that are main memory: made of one of `backends`, or of the
/// machine's own `….ram`. Device memory (video, option ROMs, assigned devices) is left out. `None` where the
/// text has no such address space.
///
/// Ranges that the chipset shows to the guest read-only (shadowed BIOS) are main memory too.
pub(crate) fn guest_memory(text: &str, backends: &[String]) -> Option<Vec<FlatRange>> {
    let view = flat_view(text, "memory")?;
    Some(
        view.filter_map(parse_range)
            .take(MAX_RANGES)
            .filter(|r| {
                matches!(r.kind.trim_start_matches("nv-"), "ram" | "rom" | "romd")
                    && is_main(&r.block, backends)
            })
            .collect(),
    )
}

/// The ranges of that address space behind which devices have plain memory of their own, which a graphics card has for what it
/// shows. Not what an assigned device has (`ramd`): to read there may have effects.
pub(crate) fn device_memory(text: &str, backends: &[String]) -> Option<Vec<FlatRange>> {
    let view = flat_view(text, "memory")?;
    Some(
        view.filter_map(parse_range)
            .take(MAX_RANGES)
            .filter(|r| r.kind == "ram" && !is_main(&r.block, backends))
            .collect(),
    )
}

/// Whether a memory region is one of `backends`, or the machine's own memory.
fn is_main(name: &str, backends: &[String]) -> bool {
    // QEMU before 5.0 had no backend object for the default memory; machine types from before 4.0 name
    // regions by path (/objects/mem).
    backends
        .iter()
        .any(|b| name == b || name.strip_suffix(b.as_str()).is_some_and(|r| r.ends_with('/')))
        || (name.ends_with(".ram") && !name.contains('/'))
}

/// The lines of the flat view that the address space `name` uses.
fn flat_view<'a>(text: &'a str, name: &str) -> Option<impl Iterator<Item = &'a str>> {
    let wanted = format!(" AS \"{name}\",");
    let view = text
        .split("FlatView #")
        .find(|v| v.lines().any(|l| l.starts_with(&wanted)))?;
    Some(view.lines().skip(1))
}

/// `  0000000000100000-000000001fffffff (prio 0, ram): pc.ram @0000000000100000 KVM`
fn parse_range(line: &str) -> Option<FlatRange> {
    let (range, rest) = line.strip_prefix("  ")?.split_once(" (prio ")?;
    let (start, last) = range.split_once('-')?;
    let (start, last) = (
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(last, 16).ok()?,
    );
    let (kind, name) = rest.split_once(", ")?.1.split_once("): ")?;
    // An accelerator that has the range as a slot of its own adds its name.
    let name = ["KVM", "HVF", "WHPX", "MSHV", "NVMM"]
        .iter()
        .find_map(|a| name.strip_suffix(a)?.strip_suffix(' '))
        .unwrap_or(name);
    let (block, offset) = match name.rsplit_once(" @") {
        Some((block, offset)) => (block, u64::from_str_radix(offset, 16).ok()?),
        None => (name, 0),
    };
    Some(FlatRange {
        gpa: start,
        len: last.checked_sub(start)?.checked_add(1)?,
        kind: kind.to_owned(),
        block: block.to_owned(),
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(text: &str, backends: &[&str]) -> Vec<(u64, u64, String, u64)> {
        let backends: Vec<String> = backends.iter().map(|s| (*s).to_owned()).collect();
        let ranges = guest_memory(text, &backends).unwrap();
        ranges
            .into_iter()
            .map(|r| (r.gpa, r.gpa + r.len, r.block, r.offset))
            .collect()
    }

    #[test]
    fn q35_with_several_backends() {
        for text in [
            include_str!("captured/qemu7.2-q35-backends.mtree"),
            include_str!("captured/qemu10.0-q35-backends.mtree"),
        ] {
            assert_eq!(
                spans(text, &["vm1", "d1", "mem"]),
                [
                    (0, 0xa0000, "mem".into(), 0),
                    (0x10_0000, 0x8000_0000, "mem".into(), 0x10_0000),
                    (0x1_0000_0000, 0x1_c000_0000, "mem".into(), 0x8000_0000),
                    (0x1_c000_0000, 0x1_d000_0000, "d1".into(), 0),
                    (0x1_d000_0000, 0x2_1000_0000, "vm1".into(), 0),
                ]
            );
        }
    }

    #[test]
    fn pc_after_its_bios_has_shadowed_rom_and_no_video_memory() {
        for text in [
            include_str!("captured/qemu7.2-pc-booted.mtree"),
            include_str!("captured/qemu10.0-pc-booted.mtree"),
        ] {
            let all = spans(text, &["pc.ram"]);
            assert!(
                all.iter()
                    .all(|(start, _, block, offset)| block == "pc.ram" && start == offset),
                "{all:x?}"
            );
            let bytes: u64 = all.iter().map(|(start, end, ..)| end - start).sum();
            assert_eq!(bytes, (512 << 20) - 0x20000, "all but the window of the VGA");
            // The default memory of a QEMU that knows no backend of that name.
            assert_eq!(spans(text, &[]), all);
        }
    }

    #[test]
    fn a_card_has_memory_where_the_guest_put_it() {
        let of = |text| {
            let ranges = device_memory(text, &["pc.ram".to_owned()]).unwrap();
            let card = ranges.into_iter().map(|r| (r.gpa, r.len, r.block, r.offset));
            card.collect::<Vec<_>>()
        };
        for text in [
            include_str!("captured/qemu7.2-pc-booted.mtree"),
            include_str!("captured/qemu10.0-pc-booted.mtree"),
        ] {
            assert_eq!(of(text), [(0xfd00_0000, 0x100_0000, "vga.vram".into(), 0)]);
        }
        // Before firmware has run, it is nowhere.
        let early = include_str!("captured/qemu10.0-q35-backends.mtree");
        assert_eq!(
            device_memory(early, &["vm1", "d1", "mem"].map(str::to_owned)),
            Some(Vec::new())
        );
        let assigned = "FlatView #0\n AS \"memory\", root: system\n  0-fff (prio 0, ramd): 0000:01:00.0 BAR 0 mmaps[0]\n";
        assert!(of(assigned).is_empty());
    }

    #[test]
    fn suffixes_of_kvm_and_old_names() {
        let range = |line| parse_range(line).map(|r| (r.block, r.offset, r.kind));
        assert_eq!(
            range("  0000000000100000-000000001fffffff (prio 0, ram): pc.ram @0000000000100000 KVM"),
            Some(("pc.ram".into(), 0x10_0000, "ram".into()))
        );
        assert_eq!(
            range("  0000000140000000-000000017fffffff (prio 0, nv-ram): nvd1 KVM"),
            Some(("nvd1".into(), 0, "nv-ram".into()))
        );
        let old = "FlatView #0\n AS \"memory\", root: system\n  0000000000000000-0000000000000fff (prio 0, ram): /objects/mem\n";
        assert_eq!(spans(old, &["mem"]), [(0, 0x1000, "/objects/mem".into(), 0)]);
        assert!(spans(old, &["em"]).is_empty());
    }

    #[test]
    fn nonsense_gives_nothing() {
        assert!(guest_memory("", &[]).is_none() && device_memory("", &[]).is_none());
        assert!(guest_memory("FlatView #0\n AS \"I/O\", root: io\n", &[]).is_none());
        let broken = "FlatView #0\n AS \"memory\", root: system\n  5-4 (prio 0, ram): a.ram\n  0-ffffffffffffffff (prio 0, ram): a.ram\n  zz\n";
        assert!(spans(broken, &[]).is_empty());
    }
}
