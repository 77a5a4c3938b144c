//! Framebuffers of fbdev: `registered_fb` and its `struct fb_info`s (include/linux/fb.h).

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::ReadError;

use super::{Framebuffer, PixelFormat, Pixels};
use crate::recover::DeviceMemory;
use crate::recover::member::{Member, Structure};

/// `FB_MAX` (include/uapi/linux/fb.h).
const MAX: u64 = 32;
/// `FB_VISUAL_TRUECOLOR` and `FB_VISUAL_DIRECTCOLOR`: a pixel says its colour itself.
const TRUE_COLOUR: [u64; 2] = [2, 4];
/// Bytes of `fb_fix_screeninfo.id`.
const ID: usize = 16;

/// Members of `struct fb_info`.
struct Members {
    id: Member,
    visual: Member,
    stride: Member,
    physical: Member,
    width: Member,
    height: Member,
    x: Member,
    y: Member,
    bits: Member,
    colours: [(Member, Member); 3],
    base: Member,
}

/// Adds the framebuffers of fbdev. `left` is how many bytes of pixels may still be looked for.
pub(super) fn framebuffers(
    kernel: &Kernel,
    devices: &DeviceMemory<'_>,
    out: &mut Listing<Framebuffer>,
    left: &mut u64,
) -> Result<(), LinuxError> {
    let table = kernel.symbol("registered_fb")?;
    let info = Structure::of(kernel, "fb_info")?;
    let colour = |name: &str| -> Result<(Member, Member), LinuxError> {
        Ok((
            info.member(&format!("var.{name}.offset"))?,
            info.member(&format!("var.{name}.length"))?,
        ))
    };
    let members = Members {
        id: info.member("fix.id")?,
        visual: info.member("fix.visual")?,
        stride: info.member("fix.line_length")?,
        physical: info.member("fix.smem_start")?,
        width: info.member("var.xres")?,
        height: info.member("var.yres")?,
        x: info.member("var.xoffset")?,
        y: info.member("var.yoffset")?,
        bits: info.member("var.bits_per_pixel")?,
        colours: [colour("red")?, colour("green")?, colour("blue")?],
        base: info.member("screen_base")?,
    };
    for number in 0..MAX {
        match kernel.space().read_u64(table.wrapping_add(number * 8)) {
            Ok(0) => {}
            Ok(at) => {
                let mut row = Framebuffer::at("fbdev", format!("fb{number}"), Gva(at));
                if let Err(error) = members.read(kernel, devices, &mut row, left) {
                    row.problems.push(Problem::read("width", &error));
                }
                out.rows.push(row);
            }
            Err(error) => {
                out.warn(format!(
                    "framebuffers of fbdev: cut, the table cannot be read: {error}"
                ));
                break;
            }
        }
    }
    Ok(())
}

impl Members {
    fn read(
        &self,
        kernel: &Kernel,
        devices: &DeviceMemory<'_>,
        row: &mut Framebuffer,
        left: &mut u64,
    ) -> Result<(), ReadError> {
        let (space, at) = (kernel.space(), row.address);
        row.driver = guest_text(&space.read_cstr(self.id.at(at), ID)?);
        row.width = self.width.number(space, at)?;
        row.height = self.height.number(space, at)?;
        row.stride = self.stride.number(space, at)?;
        let base = self.base.pointer(space, at)?;
        row.pixels_at = (!base.is_null()).then_some(base);
        let mut colours = [(0, 0); 3];
        for (to, (offset, length)) in colours.iter_mut().zip(&self.colours) {
            *to = (offset.number(space, at)?, length.number(space, at)?);
        }
        let bits = self.bits.number(space, at)?;
        let format = match TRUE_COLOUR.contains(&self.visual.number(space, at)?) {
            true => PixelFormat::new(bits, colours),
            false => None,
        };
        let Some(format) = format else {
            row.format = format!("{bits} bits");
            let reason = "its pixels are no plain red, green and blue";
            row.problems.push(Problem::new("format", reason));
            return Ok(());
        };
        row.format = format.to_string();
        // What is shown may be a part of what there is.
        let down = self.y.number(space, at)?.saturating_mul(row.stride);
        let right = self.x.number(space, at)?.saturating_mul(format.bytes());
        let offset = down.saturating_add(right);
        let Some(size) = row.size(format, offset, left) else {
            return Ok(());
        };
        let physical = Gpa(self.physical.number(space, at)?);
        // Where a card has them the kernel maps the card's memory, and says where that is; where it maps its own, it says nothing.
        let mapped = |base: &Gva| space.translate(*base).is_ok_and(|found| found.gpa == physical);
        let pixels = match row.pixels_at {
            Some(base) if physical.0 == 0 || !mapped(&base) => Pixels::Mapped(base),
            _ => Pixels::Physical(physical),
        };
        row.paint(kernel, devices, format, pixels, (offset, size));
        Ok(())
    }
}
