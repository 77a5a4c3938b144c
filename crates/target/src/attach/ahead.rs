//! What is looked at while the monitor is being asked.
//!
//! QEMU takes milliseconds to tell its layout, which is nearly always the likeliest of those that can be deduced. So the
//! caller is shown that one meanwhile, and told afterwards whether it was a part of the real one.

use vmsight_memory::GuestMemory;

use super::AttachOptions;
use crate::VmInfo;
use crate::host::maps::Mapping;
use crate::host::process::Process;
use crate::layout::backing::{self, Opened};
use crate::layout::{HostRange, deduce};

/// Is shown a part of the guest's memory as it most likely lies, before it is known how it lies:
/// [`Target::ahead`](crate::Target::ahead) says whether that was right. Nothing it finds may be believed or shown otherwise.
pub type Ahead<'a> = dyn Fn(&GuestMemory) + 'a;

/// Where a PC shows its screen and its firmware instead of memory. What lies behind is not looked at: nobody uses it, and of
/// shared memory that was never touched each page would come to be.
const NO_MEMORY: (u64, u64) = (0xa_0000, 0x10_0000);

/// What was shown.
pub(super) struct Guess {
    ranges: Vec<HostRange>,
    /// The files that were mapped for it.
    pub(super) opened: Opened,
}

impl Guess {
    /// Shows the likeliest layout to who wants to look ahead, if there is one.
    pub(super) fn show(info: &VmInfo, options: &AttachOptions<'_>) -> Option<Self> {
        let ahead = options.ahead?;
        let maps = info.maps.as_deref()?;
        let ranges = likely(info, maps)?;
        let mut opened = Opened::default();
        let process = Process { pid: info.pid };
        let built = backing::build(process, maps, &ranges, options.write, &mut opened).ok()?;
        ahead(&built.memory);
        Some(Self { ranges, opened })
    }

    /// Whether all of it is a part of `layout`, whose neighbours are joined.
    pub(super) fn is_part_of(&self, layout: &[HostRange]) -> bool {
        self.ranges.iter().all(|guessed| {
            layout.iter().any(|range| {
                let at = guessed.gpa.checked_sub(range.gpa);
                at.is_some_and(|at| {
                    range.hva.checked_add(at) == Some(guessed.hva)
                        && at.checked_add(guessed.len).is_some_and(|end| end <= range.len)
                })
            })
        })
    }
}

fn likely(info: &VmInfo, maps: &[Mapping]) -> Option<Vec<HostRange>> {
    let candidate = deduce::candidates(info, maps).ok()?.into_iter().next()?;
    let (from, to) = NO_MEMORY;
    let part = |range: &HostRange, start: u64, end: u64| {
        let (start, end) = (range.gpa.max(start), range.gpa.saturating_add(range.len).min(end));
        (start < end).then(|| HostRange {
            gpa: start,
            len: end - start,
            hva: range.hva.saturating_add(start - range.gpa),
        })
    };
    let around = |range: &HostRange| [part(range, 0, from), part(range, to, u64::MAX)];
    Some(candidate.ranges.iter().flat_map(around).flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Vmm;
    use crate::host::maps;

    fn range(gpa: u64, len: u64, hva: u64) -> HostRange {
        HostRange { gpa, len, hva }
    }

    #[test]
    fn a_guess_is_right_where_every_byte_of_it_is_told_to_lie_there() {
        let guess = |ranges: &[HostRange]| Guess {
            ranges: ranges.to_vec(),
            opened: Opened::default(),
        };
        let told = [
            range(0, 0xa_0000, 0x7000_0000),
            range(0x10_0000, 0x70_0000, 0x7010_0000),
        ];
        assert!(guess(&told).is_part_of(&told));
        assert!(guess(&[range(0x20_0000, 0x60_0000, 0x7020_0000)]).is_part_of(&told));
        for wrong in [
            range(0x20_0000, 0x60_0001, 0x7020_0000),
            range(0x20_0000, 0x1000, 0x7020_1000),
            range(0xa_0000, 0x1000, 0x700a_0000),
            range(0x9_f000, 0x2000, 0x7009_f000),
            range(0x1_0000_0000, 0x1000, 0x7010_0000),
            range(0x20_0000, u64::MAX, 0x7020_0000),
        ] {
            assert!(!guess(&[told[0], wrong]).is_part_of(&told), "{wrong}");
        }
        assert!(!guess(&told).is_part_of(&[]));
    }

    #[test]
    fn what_a_pc_has_no_memory_for_is_left_out() {
        let mut info = VmInfo::new(Vmm::Other, 1, "x");
        info.memory_bytes = Some(64 << 20);
        let maps = maps::parse("7f0000000000-7f0004000000 rw-p 0 00:00 0 \n");
        let ranges = likely(&info, &maps).unwrap();
        assert_eq!(
            ranges,
            [
                range(0, 0xa_0000, 0x7f00_0000_0000),
                range(0x10_0000, 0x3f0_0000, 0x7f00_0010_0000)
            ]
        );
    }
}
