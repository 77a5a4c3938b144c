//! Pixels: how colours are laid out in them, and where they lie.

use std::fmt;
use std::ops::Range;

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::Kernel;
use vmsight_memory::GuestMemory;

use crate::recover::DeviceMemory;
use crate::recover::frames::PAGE;

/// Where a colour's bits are in a pixel, which is little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bits {
    offset: u32,
    length: u32,
}

/// How a pixel says its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PixelFormat {
    /// 2, 3 or 4.
    bytes: u8,
    red: Bits,
    green: Bits,
    blue: Bits,
}

/// The formats of DRM (include/uapi/drm/drm_fourcc.h) that are plain red, green and blue, by name and by the bits' offsets.
const KNOWN: [(&[u8; 4], PixelFormat); 14] = [
    (b"XR24", plain(4, [(16, 8), (8, 8), (0, 8)])),
    (b"AR24", plain(4, [(16, 8), (8, 8), (0, 8)])),
    (b"XB24", plain(4, [(0, 8), (8, 8), (16, 8)])),
    (b"AB24", plain(4, [(0, 8), (8, 8), (16, 8)])),
    (b"RX24", plain(4, [(24, 8), (16, 8), (8, 8)])),
    (b"RA24", plain(4, [(24, 8), (16, 8), (8, 8)])),
    (b"BX24", plain(4, [(8, 8), (16, 8), (24, 8)])),
    (b"BA24", plain(4, [(8, 8), (16, 8), (24, 8)])),
    (b"XR30", plain(4, [(20, 10), (10, 10), (0, 10)])),
    (b"AR30", plain(4, [(20, 10), (10, 10), (0, 10)])),
    (b"RG24", plain(3, [(16, 8), (8, 8), (0, 8)])),
    (b"BG24", plain(3, [(0, 8), (8, 8), (16, 8)])),
    (b"RG16", plain(2, [(11, 5), (5, 6), (0, 5)])),
    (b"XR15", plain(2, [(10, 5), (5, 5), (0, 5)])),
];

const fn plain(bytes: u8, [red, green, blue]: [(u32, u32); 3]) -> PixelFormat {
    const fn bits((offset, length): (u32, u32)) -> Bits {
        Bits { offset, length }
    }
    PixelFormat {
        bytes,
        red: bits(red),
        green: bits(green),
        blue: bits(blue),
    }
}

impl PixelFormat {
    /// The format of DRM that goes by this number.
    pub(super) fn of_fourcc(fourcc: u32) -> Option<Self> {
        let known = KNOWN
            .iter()
            .find(|(name, _)| u32::from_le_bytes(**name) == fourcc);
        known.map(|(_, format)| *format)
    }

    /// The format with these bits: offset and length for red, green and blue. `None` where that cannot be a pixel.
    pub(super) fn new(bits: u64, colours: [(u64, u64); 3]) -> Option<Self> {
        let bytes = match bits {
            15 | 16 => 2,
            24 => 3,
            32 => 4,
            _ => return None,
        };
        let mut out = [Bits { offset: 0, length: 0 }; 3];
        for (to, (offset, length)) in out.iter_mut().zip(colours) {
            let inside =
                (1..=16).contains(&length) && offset <= 32 && offset + length <= u64::from(bytes) * 8;
            *to = inside.then_some(Bits {
                offset: offset as u32,
                length: length as u32,
            })?;
        }
        let [red, green, blue] = out;
        Some(Self {
            bytes,
            red,
            green,
            blue,
        })
    }

    /// Bytes of a pixel.
    pub(super) fn bytes(self) -> u64 {
        self.bytes.into()
    }

    /// The colours of a row of pixels, eight bits each of red, green and blue.
    pub(super) fn colours(self, row: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(row.len() / usize::from(self.bytes) * 3);
        for bytes in row.chunks_exact(self.bytes.into()) {
            let pixel = bytes
                .iter()
                .rev()
                .fold(0, |all, byte| all << 8 | u32::from(*byte));
            out.extend([self.red, self.green, self.blue].map(|bits| bits.of(pixel)));
        }
        out
    }
}

impl Bits {
    /// The colour in eight bits: as much of all that it can be.
    fn of(self, pixel: u32) -> u8 {
        let most = (1u32 << self.length) - 1;
        let value = pixel >> self.offset & most;
        ((value * 255 + most / 2) / most) as u8
    }
}

impl fmt::Display for PixelFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = KNOWN.iter().find(|(_, format)| format == self) {
            return f.write_str(&String::from_utf8_lossy(*name));
        }
        write!(f, "{} bits:", u32::from(self.bytes) * 8)?;
        for (name, bits) in ["r", "g", "b"].iter().zip([self.red, self.green, self.blue]) {
            write!(f, " {name} {}@{}", bits.length, bits.offset)?;
        }
        Ok(())
    }
}

/// Where pixels lie.
#[derive(Clone, Debug)]
pub(super) enum Pixels {
    /// The kernel has them mapped here.
    Mapped(Gva),
    /// In pages, by their number in the buffer, rising.
    Pages(Vec<(u64, Gpa)>),
    /// At this physical address, which is a card's as far as the kernel says.
    Physical(Gpa),
}

/// Whose memory pixels are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The guest's.
    Memory,
    /// A device's, which has this address of theirs.
    Device(Gpa),
}

impl Pixels {
    /// Where the byte `offset` lies.
    fn gpa(&self, kernel: &Kernel, offset: u64) -> Option<Gpa> {
        match self {
            Self::Mapped(start) => {
                let at = start.wrapping_add(offset);
                kernel.space().translate(at).ok().map(|found| found.gpa)
            }
            Self::Pages(pages) => {
                let nth = pages
                    .binary_search_by_key(&(offset / PAGE), |(index, _)| *index)
                    .ok()?;
                let (_, frame) = pages.get(nth)?;
                Some(Gpa(frame.0.checked_add(offset % PAGE)?))
            }
            Self::Physical(start) => Some(Gpa(start.0.checked_add(offset)?)),
        }
    }

    /// How many bytes from the byte `offset` on lie in one page.
    fn within(&self, offset: u64) -> u64 {
        let start = match self {
            Self::Mapped(start) => start.0,
            Self::Pages(_) => 0,
            Self::Physical(start) => start.0,
        };
        PAGE - start.wrapping_add(offset) % PAGE
    }

    /// The guest's memory if any of these bytes is there, a device's if all that are anywhere are elsewhere.
    ///
    /// # Errors
    /// Where they are nowhere.
    pub(super) fn place(
        &self,
        kernel: &Kernel,
        devices: &DeviceMemory<'_>,
        offset: u64,
        length: u64,
    ) -> Result<Place, &'static str> {
        if let Self::Physical(start) = self {
            let gpa = Gpa(start
                .0
                .checked_add(offset)
                .ok_or("its pixels pass the end of memory")?);
            return Ok(match devices.is_ram(kernel, gpa) {
                true => Place::Memory,
                false => Place::Device(gpa),
            });
        }
        let (mut at, end) = (offset, offset.saturating_add(length));
        let mut elsewhere = None;
        while at < end {
            match self.gpa(kernel, at) {
                Some(gpa) if kernel.memory().region_of(gpa).is_some() => return Ok(Place::Memory),
                Some(gpa) => elsewhere = elsewhere.or(Some(gpa)),
                None => {}
            }
            at = at.saturating_add(self.within(at));
        }
        elsewhere
            .map(Place::Device)
            .ok_or("none of its pixels are mapped or in memory")
    }

    /// Reads from the byte `offset` on out of `memory`, and gives what could not be read: it is left as it was.
    pub(super) fn read(
        &self,
        kernel: &Kernel,
        memory: &GuestMemory,
        offset: u64,
        to: &mut [u8],
    ) -> Vec<Range<usize>> {
        let mut missing = Vec::new();
        let mut done = 0;
        while done < to.len() {
            let at = offset.saturating_add(done as u64);
            let end = to.len().min(done + self.within(at) as usize);
            let part = to.get_mut(done..end).unwrap_or(&mut []);
            let read = self
                .gpa(kernel, at)
                .is_some_and(|gpa| memory.read(gpa, part).is_ok());
            if !read {
                missing.push(done..end);
            }
            done = end;
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fourcc(name: &[u8; 4]) -> PixelFormat {
        PixelFormat::of_fourcc(u32::from_le_bytes(*name)).unwrap()
    }

    #[test]
    fn each_format_has_its_colours_where_it_says() {
        let pixel = [0x11, 0x22, 0x33, 0x44];
        assert_eq!(fourcc(b"XR24").colours(&pixel), [0x33, 0x22, 0x11]);
        assert_eq!(fourcc(b"XB24").colours(&pixel), [0x11, 0x22, 0x33]);
        assert_eq!(fourcc(b"RX24").colours(&pixel), [0x44, 0x33, 0x22]);
        assert_eq!(fourcc(b"BX24").colours(&pixel), [0x22, 0x33, 0x44]);
        assert_eq!(
            fourcc(b"RG24").colours(&[1, 2, 3, 4, 5, 6, 7]),
            [3, 2, 1, 6, 5, 4]
        );
        // Red of five bits, green of six.
        assert_eq!(
            fourcc(b"RG16").colours(&[0x00, 0xf8, 0xe0, 0x07]),
            [255, 0, 0, 0, 255, 0]
        );
        assert_eq!(fourcc(b"XR30").colours(&[0xff, 0x03, 0x00, 0x20]), [128, 0, 255]);
        for (name, ..) in KNOWN {
            assert!(PixelFormat::of_fourcc(u32::from_le_bytes(*name)).is_some());
        }
        assert_eq!(PixelFormat::of_fourcc(u32::from_le_bytes(*b"NV12")), None);
    }

    #[test]
    fn bits_beside_the_pixel_are_no_format() {
        let rgb = [(16, 8), (8, 8), (0, 8)];
        assert_eq!(PixelFormat::new(32, rgb).unwrap().to_string(), "XR24");
        assert_eq!(
            PixelFormat::new(32, [(22, 10), (12, 10), (2, 10)])
                .unwrap()
                .to_string(),
            "32 bits: r 10@22 g 10@12 b 10@2"
        );
        assert_eq!(PixelFormat::new(16, rgb), None);
        assert_eq!(PixelFormat::new(8, [(0, 8), (0, 8), (0, 8)]), None);
        for wrong in [(32, 1), (0, 0), (0, 17), (u64::MAX, 8), (8, u64::MAX)] {
            assert_eq!(PixelFormat::new(32, [wrong, (8, 8), (0, 8)]), None, "{wrong:?}");
        }
    }
}
