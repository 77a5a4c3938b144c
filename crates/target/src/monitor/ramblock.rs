//! `info ramblock` and `gpa2hva`: where in QEMU's own address space guest memory lies.

/// A block of memory that QEMU holds for the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RamBlock {
    /// Its id: the region's name, with the device's path before it for devices (`0000:00:03.0/vm1`).
    pub(crate) id: String,
    /// Bytes in use.
    pub(crate) used: u64,
    /// Where it lies in QEMU, from QEMU 8.1 on.
    pub(crate) hva: Option<u64>,
}

/// Parses the table; lines of another form are left out.
pub(crate) fn parse_ramblocks(text: &str) -> Vec<RamBlock> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<RamBlock> {
    // The id may hold spaces; two words for the page size follow it, then only numbers.
    let words: Vec<&str> = line.split_whitespace().collect();
    let first = words.iter().position(|w| w.starts_with("0x"))?;
    let id = words.get(..first.checked_sub(2)?)?.join(" ");
    let number = |at: usize| u64::from_str_radix(words.get(first + at)?.strip_prefix("0x")?, 16).ok();
    if id.is_empty() {
        return None;
    }
    Some(RamBlock {
        id,
        used: number(1)?,
        hva: number(3).filter(|hva| *hva != 0),
    })
}

/// The address in `Host virtual address for 0x1000 (pc.ram) is 0x7fef4be01000`; `None` where QEMU says that there
/// is no memory.
pub(crate) fn parse_gpa2hva(text: &str) -> Option<u64> {
    let address = text
        .trim()
        .strip_prefix("Host virtual address for")?
        .rsplit_once(" is 0x")?
        .1;
    u64::from_str_radix(address, 16).ok()
}

/// The ids of the memory backends in `info memdev`.
pub(crate) fn parse_memdev(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|l| l.strip_prefix("memory backend: "))
        .map(|id| id.trim_end().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_table() {
        let old = parse_ramblocks(include_str!("captured/qemu7.2-q35-backends.ramblock"));
        let new = parse_ramblocks(include_str!("captured/qemu10.0-q35-backends.ramblock"));
        let sizes = |blocks: &[RamBlock]| blocks.iter().map(|b| (b.id.clone(), b.used)).collect::<Vec<_>>();
        assert_eq!(sizes(&old), sizes(&new));
        assert_eq!(
            old[0],
            RamBlock {
                id: "mem".into(),
                used: 5 << 30,
                hva: None
            }
        );
        assert_eq!(
            new[0],
            RamBlock {
                id: "mem".into(),
                used: 5 << 30,
                hva: Some(0x7fa1_abff_f000)
            }
        );
        assert_eq!(new[1].id, "0000:00:01.0/vm1");
        assert_eq!(old.len(), 10);
    }

    #[test]
    fn answers_of_gpa2hva() {
        let text = "Host virtual address for 0x1000 (pc.ram) is 0x7fef4be01000\n";
        assert_eq!(parse_gpa2hva(text), Some(0x7fef_4be0_1000));
        assert_eq!(parse_gpa2hva("Memory at address 0xa0000 is not RAM\n"), None);
        assert_eq!(
            parse_gpa2hva("No memory is mapped at address 0xdeadbeef000\n"),
            None
        );
        assert_eq!(parse_gpa2hva(""), None);
    }

    #[test]
    fn backends_by_name() {
        let text =
            "memory backend: pc.ram\n  size:  536870912\n  merge: true\n\nmemory backend: d 1\n  size: 1\n\n";
        assert_eq!(parse_memdev(text), ["pc.ram", "d 1"]);
    }

    #[test]
    fn nonsense_gives_nothing() {
        assert!(parse_ramblocks("Block Name PSize\n 0x1 0x2 0x3\n a 0x1\n a b c\n").is_empty());
    }
}
