//! What is on the screen: framebuffers as pictures. Those of fbdev (drivers/video/fbdev/core/fbmem.c), on which the kernel's consoles are
//! drawn, and those of DRM (drivers/gpu/drm/drm_framebuffer.c), on which X and Wayland draw.
//!
//! A picture can be got back where its pixels are in the guest's memory: emulated on top of DRM, fbdev draws into ordinary memory, from
//! where a driver takes it to the card; and drivers of virtual cards keep their buffers in memory of files that have no name. Pixels
//! that only a card has (VESA's and EFI's framebuffers, those of bochs) are read there, where the target gives the card's memory; where
//! it does not they are said to be there, and no picture is made up.

mod drm;
mod fbdev;
mod pixels;
mod write;

use std::path::PathBuf;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::listing::address;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::GuestMemory;

use super::DeviceMemory;
use pixels::{PixelFormat, Pixels, Place};
pub use write::write;

/// Pixels of a side: `MAX_WIDTH` and `MAX_HEIGHT` of no driver are higher.
const MAX_SIDE: u64 = 16384;
/// Bytes of one framebuffer, and of all: a guest that lies may have many and large ones.
const MAX_BYTES: u64 = 256 << 20;
const MAX_TOTAL: u64 = 1 << 30;
/// Framebuffers of one listing.
const MAX_ROWS: usize = 1024;

/// One framebuffer.
#[derive(Clone, Debug, Serialize)]
pub struct Framebuffer {
    /// `fb0` of fbdev; `card0/42` of DRM: the card, and the number that the framebuffer has there.
    pub name: String,
    /// `fbdev` or `drm`.
    pub kind: &'static str,
    /// What drives it: `virtio_gpudrmfb`, `EFI VGA`; of DRM the driver's name.
    pub driver: String,
    /// It is on a screen, as far as the kernel says: of DRM, on a plane that a screen is fed from. `None` for fbdev.
    pub shown: Option<bool>,
    /// Columns of pixels.
    pub width: u64,
    /// Rows of pixels.
    pub height: u64,
    /// How pixels are laid out: DRM's name for it (`XR24`: 32 bits, 8 each of red, green and blue), or the bits of each colour.
    pub format: String,
    /// Bytes from the begin of a row to that of the next one.
    pub stride: u64,
    /// Where the pixels are: `memory`; `device` where they are a graphics card's, read or not; `None` where that could not be found out.
    pub pixels_in: Option<&'static str>,
    /// The first pixel in the kernel's address space, where it is mapped there.
    #[serde(serialize_with = "address::gva_opt")]
    pub pixels_at: Option<Gva>,
    /// The `struct fb_info` or `struct drm_framebuffer`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What keeps it from being a picture, or a whole one.
    pub problems: Vec<Problem>,
    #[serde(skip)]
    picture: Option<Picture>,
}

/// What a picture is made from.
#[derive(Clone, Debug)]
struct Picture {
    format: PixelFormat,
    pixels: Pixels,
    /// What they are read from.
    memory: GuestMemory,
    /// Of the first pixel, in bytes from the begin of the pixels.
    offset: u64,
}

/// What became of one framebuffer.
#[derive(Clone, Debug, Serialize)]
pub struct WrittenPicture {
    /// The framebuffer in the guest.
    #[serde(flatten)]
    pub framebuffer: Framebuffer,
    /// Where it was written, below the folder.
    pub output: Option<PathBuf>,
    /// Pixels that are in no memory; they are magenta in the picture.
    pub missing: u64,
    /// SHA-256 of the file.
    pub sha256: Option<String>,
    /// Why there is no picture.
    pub failure: Option<String>,
}

/// The framebuffers of a guest: fbdev's, then those of DRM. `devices` is asked where pixels are only a graphics card's.
///
/// # Errors
/// If the kernel knows no framebuffers at all (built without CONFIG_FB and DRM not loaded), or its types lack a member.
pub fn framebuffers(kernel: &Kernel, devices: &DeviceMemory<'_>) -> Result<Listing<Framebuffer>, LinuxError> {
    let mut out = Listing::default();
    let mut left = MAX_TOTAL;
    let fbdev = fbdev::framebuffers(kernel, devices, &mut out, &mut left);
    match (fbdev, drm::framebuffers(kernel, devices, &mut out, &mut left)) {
        (Err(error), Err(_)) => return Err(error),
        (Err(error), Ok(())) => out.warn(format!("framebuffers of fbdev: {error}")),
        // Without the module there are none.
        (Ok(()), Err(LinuxError::NotFound(_))) | (Ok(()), Ok(())) => {}
        (Ok(()), Err(error)) => out.warn(format!("framebuffers of DRM: {error}")),
    }
    Ok(out)
}

impl Framebuffer {
    /// One of which nothing is known yet but where it is.
    fn at(kind: &'static str, name: String, address: Gva) -> Self {
        Self {
            name,
            kind,
            driver: String::new(),
            shown: None,
            width: 0,
            height: 0,
            format: String::new(),
            stride: 0,
            pixels_in: None,
            pixels_at: None,
            address,
            problems: Vec::new(),
            picture: None,
        }
    }

    /// How many bytes it has from its first pixel, which is `offset` bytes behind the begin of the pixels, if that can be and does not go
    /// beyond what is left of all; what is wrong is noted.
    fn size(&mut self, format: PixelFormat, offset: u64, left: &mut u64) -> Option<u64> {
        let row = self.width.saturating_mul(format.bytes());
        let all = self.stride.saturating_mul(self.height);
        let sides = 1..=MAX_SIDE;
        let possible = sides.contains(&self.width)
            && sides.contains(&self.height)
            && row <= self.stride
            && all <= MAX_BYTES
            && offset <= MAX_BYTES;
        let reason = match (possible, left.checked_sub(all)) {
            (true, Some(rest)) => {
                *left = rest;
                return Some(all);
            }
            (true, None) => "cut: the framebuffers are too large altogether".to_owned(),
            (false, _) => format!(
                "{} x {} pixels in rows of {} bytes are no picture that can be",
                self.width, self.height, self.stride
            ),
        };
        self.problems.push(Problem::new("width", reason));
        None
    }

    /// Takes the pixels, `size` bytes from `offset` on, for this framebuffer's.
    fn paint(
        &mut self,
        kernel: &Kernel,
        devices: &DeviceMemory<'_>,
        format: PixelFormat,
        pixels: Pixels,
        (offset, size): (u64, u64),
    ) {
        let (place, memory) = match pixels.place(kernel, devices, offset, size) {
            Ok(Place::Memory) => ("memory", Ok(kernel.memory().clone())),
            Ok(Place::Device(gpa)) => ("device", devices.at(kernel, gpa)),
            Err(reason) => return self.problems.push(Problem::new("pixels_in", reason)),
        };
        self.pixels_in = Some(place);
        match memory {
            Ok(memory) => {
                self.picture = Some(Picture {
                    format,
                    pixels,
                    memory,
                    offset,
                });
            }
            Err(why) => {
                let reason = format!("in the memory of the graphics card, which is out of reach: {why}");
                self.problems.push(Problem::new("pixels_in", reason));
            }
        }
    }
}
