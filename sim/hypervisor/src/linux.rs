//! The boot protocol of Linux on x86 (Documentation/arch/x86/boot.rst): the setup header of a bzImage and the zero page.

use core::ops::Range;

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::e820::{CAPACITY, MemoryMap};

/// Where the setup header begins, in the image and in the zero page.
const HEADER: usize = 0x1f1;
/// The oldest protocol that has all that is used here: the kernel's size in memory (`init_size`).
const OLDEST: u16 = 0x20c;
/// `xloadflags`: the kernel has the 64-bit entry, 0x200 bytes after its begin.
const XLF_KERNEL_64: u16 = 1;
/// Distance of the 64-bit entry from the begin of the loaded kernel.
pub const ENTRY_64: u64 = 0x200;
/// What a loader without a number of its own says it is.
const LOADER_UNDEFINED: u8 = 0xff;

/// Why a file is no kernel that can be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotBootable {
    /// It lacks the header's magic: no bzImage.
    NoHeader,
    /// Its boot protocol is older than 2.12.
    TooOld(u16),
    /// It has no 64-bit entry.
    No64BitEntry,
    /// It is shorter than its header says.
    CutShort,
    /// The command line is longer than the kernel takes, whose limit this is.
    CommandLine(usize),
}

/// A bzImage.
#[derive(Debug, Clone, Copy)]
pub struct Kernel<'a> {
    image: &'a [u8],
    /// Bytes of the part that runs in real mode, which is not used.
    setup: usize,
    /// Bytes that it needs from where it is loaded, to unpack itself.
    pub memory: u64,
    /// Where it wants to be.
    pub preferred: u64,
    /// Whether it may be elsewhere.
    pub relocatable: bool,
    /// What its address must be a multiple of then.
    pub align: u64,
}

impl<'a> Kernel<'a> {
    /// Reads the setup header.
    pub fn parse(image: &'a [u8]) -> Result<Self, NotBootable> {
        if image.get(0x202..0x206) != Some(b"HdrS") {
            return Err(NotBootable::NoHeader);
        }
        let short = NotBootable::CutShort;
        let version = u16_at(image, 0x206).ok_or(short)?;
        if version < OLDEST {
            return Err(NotBootable::TooOld(version));
        }
        if u16_at(image, 0x236).ok_or(short)? & XLF_KERNEL_64 == 0 {
            return Err(NotBootable::No64BitEntry);
        }
        let sectors = match image.get(HEADER) {
            // A zero stands for four, for the sake of very old kernels.
            Some(0) => 4,
            Some(&n) => usize::from(n),
            None => return Err(short),
        };
        let kernel = Self {
            image,
            setup: (sectors + 1) * 512,
            memory: u64::from(u32_at(image, 0x260).ok_or(short)?),
            preferred: u64_at(image, 0x258).ok_or(short)?,
            relocatable: image.get(0x234) == Some(&1),
            align: u64::from(u32_at(image, 0x230).ok_or(short)?),
        };
        let fits = kernel.memory >= kernel.code().len() as u64 && !kernel.code().is_empty();
        if !fits || !kernel.align.is_power_of_two() {
            return Err(short);
        }
        Ok(kernel)
    }

    /// What is to be loaded.
    pub fn code(&self) -> &'a [u8] {
        self.image.get(self.setup..).unwrap_or_default()
    }

    /// Where it can be loaded beside `avoid`.
    pub fn place(&self, map: &MemoryMap, avoid: &[Range<u64>]) -> Option<u64> {
        if self.relocatable {
            return map.find(self.preferred, self.memory, self.align, avoid);
        }
        let range = self.preferred..self.preferred.checked_add(self.memory)?;
        let free = avoid.iter().all(|a| a.end <= range.start || range.end <= a.start);
        (free && map.is_ram(&range)).then_some(self.preferred)
    }

    /// Fills the zero page. `command_line` is where it lies in memory and its length without the zero at its end.
    pub fn zero_page(
        &self,
        page: &mut [u8; 4096],
        map: &MemoryMap,
        initrd: Range<u64>,
        command_line: (u64, usize),
    ) -> Result<(), NotBootable> {
        let limit = u32_at(self.image, 0x238).ok_or(NotBootable::CutShort)? as usize;
        if command_line.1 > limit {
            return Err(NotBootable::CommandLine(limit));
        }
        page.fill(0);
        // The header ends where the jump at 0x200 goes to.
        let jump = usize::from(*self.image.get(0x201).ok_or(NotBootable::CutShort)?);
        let header = HEADER..(0x202 + jump).min(0x290);
        let source = self.image.get(header.clone()).ok_or(NotBootable::CutShort)?;
        page.get_mut(header)
            .ok_or(NotBootable::CutShort)?
            .copy_from_slice(source);
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(slot) = page.get_mut(at..at + bytes.len()) {
                slot.copy_from_slice(bytes);
            }
        };
        // A text screen of 80 by 25 (screen_info: mode, columns, lines, is VGA, points).
        put(0x06, &[3, 80]);
        put(0x0e, &[25, 1, 16]);
        put(0x210, &[LOADER_UNDEFINED]);
        let low = |value: u64| (value as u32).to_le_bytes();
        let high = |value: u64| ((value >> 32) as u32).to_le_bytes();
        let length = initrd.end.saturating_sub(initrd.start);
        put(0x218, &low(initrd.start));
        put(0x21c, &low(length));
        put(0x0c0, &high(initrd.start));
        put(0x0c4, &high(length));
        put(0x228, &low(command_line.0));
        put(0x0c8, &high(command_line.0));
        let entries = map.entries();
        put(0x1e8, &[entries.len().min(CAPACITY) as u8]);
        for (n, entry) in entries.iter().enumerate().take(CAPACITY) {
            let at = 0x2d0 + n * 20;
            put(at, &entry.range.start.to_le_bytes());
            put(
                at + 8,
                &entry.range.end.saturating_sub(entry.range.start).to_le_bytes(),
            );
            put(at + 16, &entry.kind.0.to_le_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::e820::Kind;

    fn image() -> Vec<u8> {
        let mut image = std::vec![0u8; 1024 + 64];
        image[HEADER] = 1;
        image[0x200..0x202].copy_from_slice(&[0xeb, 0x66]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
        image[0x234] = 1;
        image[0x236] = 1;
        image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x200_0000u32.to_le_bytes());
        image[1024] = 0x90;
        image
    }

    fn map() -> MemoryMap {
        let mut map = MemoryMap::default();
        map.add(0x10_0000..0x1000_0000, Kind::RAM);
        map
    }

    #[test]
    fn the_header_is_read() {
        let image = image();
        let kernel = Kernel::parse(&image).unwrap();
        assert_eq!(kernel.code().len(), 64);
        assert_eq!(kernel.place(&map(), &[]), Some(0x100_0000));
        let in_the_way = [0x120_0000..0x120_1000, 0x900_0000..0x900_1000];
        assert_eq!(kernel.place(&map(), &in_the_way), Some(0x140_0000));
        let fixed = Kernel {
            relocatable: false,
            ..kernel
        };
        assert_eq!(fixed.place(&map(), &[]), Some(0x100_0000));
        assert_eq!(fixed.place(&map(), &in_the_way), None);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert_eq!(Kernel::parse(b"MZ").unwrap_err(), NotBootable::NoHeader);
        let mut old = image();
        old[0x206..0x208].copy_from_slice(&0x20bu16.to_le_bytes());
        assert_eq!(Kernel::parse(&old).unwrap_err(), NotBootable::TooOld(0x20b));
        let mut narrow = image();
        narrow[0x236] = 0;
        assert_eq!(Kernel::parse(&narrow).unwrap_err(), NotBootable::No64BitEntry);
        let whole = image();
        for length in 0..=1024 {
            assert!(Kernel::parse(&whole[..length]).is_err());
        }
    }

    #[test]
    fn the_zero_page_says_what_there_is() {
        let image = image();
        let kernel = Kernel::parse(&image).unwrap();
        let mut page = [0xff; 4096];
        let initrd = 0x1_2345_6000..0x1_2345_6100;
        kernel
            .zero_page(&mut page, &map(), initrd.clone(), (0x1_1000, 5))
            .unwrap();
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(u32_at(&page, 0x218), Some(0x2345_6000));
        assert_eq!(u32_at(&page, 0xc0), Some(1));
        assert_eq!(u32_at(&page, 0x21c), Some(0x100));
        assert_eq!(u32_at(&page, 0x228), Some(0x1_1000));
        assert_eq!(page[0x1e8], 1);
        assert_eq!(u64_at(&page, 0x2d0), Some(0x10_0000));
        assert_eq!(u64_at(&page, 0x2d8), Some(0xff0_0000));
        let long = kernel.zero_page(&mut page, &map(), initrd, (0x1_1000, 2048));
        assert_eq!(long, Err(NotBootable::CommandLine(2047)));
    }
}
