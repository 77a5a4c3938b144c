//! Raw images: bytes without a header. Which address a byte belongs to must be known from elsewhere.

use super::cover::Cover;
use std::fmt;

/// 4 GiB: where memory goes on above the hole that x86 machines keep for devices.
const HIGH: u64 = 1 << 32;

/// How a raw image lies in the guest's physical memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum RawLayout {
    /// The byte at offset x is the one at address x: `pmemsave`, or any machine too small to have a hole.
    #[default]
    Flat,
    /// The order of the hypervisor's RAM, which has no hole: `below` bytes from address 0, the rest from 4 GiB on. So are
    /// memory backend files of QEMU and the memory files of Firecracker snapshots.
    Split {
        /// Bytes of memory below 4 GiB.
        below: u64,
    },
}

impl fmt::Display for RawLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flat => write!(f, "flat"),
            Self::Split { below } => write!(f, "split at {below:#x}"),
        }
    }
}

/// Where known machines end their memory below 4 GiB:
/// 2 GiB QEMU q35, 3 GiB QEMU pc and Cloud Hypervisor, 3.25 GiB Firecracker and crosvm, 3.5 GiB QEMU microvm and old pc,
/// 2.75 GiB old q35 (QEMU `hw/i386/pc_q35.c`, `pc_piix.c`, `microvm.c`).
const SPLITS: [u64; 5] = [0x8000_0000, 0xc000_0000, 0xd000_0000, 0xe000_0000, 0xb000_0000];

/// The layouts that an image of `len` bytes can have, the likely ones first. The bytes do not say which it is: try them in
/// order, and take the one in which the kernel and its page tables are found.
pub fn raw_layouts(len: u64) -> Vec<RawLayout> {
    let splits = SPLITS
        .into_iter()
        .filter(|&below| below < len)
        .map(|below| RawLayout::Split { below });
    std::iter::once(RawLayout::Flat).chain(splits).collect()
}

pub(super) fn parse(layout: RawLayout, file_len: u64, cover: &mut Cover, notes: &mut Vec<String>) {
    if !file_len.is_multiple_of(4096) {
        notes.push(format!(
            "the image of {file_len:#x} bytes does not end at a page: it may be cut"
        ));
    }
    match layout {
        RawLayout::Split { below } if below < file_len => {
            let below = below.min(HIGH);
            cover.add(0, below, 0, below);
            cover.add(HIGH, file_len - below, below, file_len - below);
        }
        RawLayout::Split { .. } | RawLayout::Flat => cover.add(0, file_len, 0, file_len),
    }
}
