//! VGA's text mode (drivers/video/console/vgacon.c): the console in front has its cells in the card's memory only.
//!
//! The kernel sees them through a window in the first MiB, a character and its attribute side by side. A VGA has them in planes:
//! characters in plane 0, attributes in plane 1, the font in plane 2. QEMU keeps the four planes' bytes of one address side by side
//! (hw/display/vga.c), so that cell n of the window is at byte 4n of the card's memory, which the guest also has at the card's first
//! memory BAR.

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::{Kernel, LinuxError};
use vmsight_memory::ReadError;

use super::devices::DeviceMemory;
use super::member::{Member, Structure};

/// Where the window may be: of monochrome cards at its begin, of others (`VGA_COLOR`) in its second half.
const WINDOW: u64 = 0xb_0000;
const COLOUR: u64 = 0xb_8000;
const END: u64 = 0xc_0000;
/// `IORESOURCE_MEM` (include/linux/ioport.h).
const MEMORY: u64 = 0x200;
/// `PCI_STD_NUM_BARS`.
const BARS: u64 = 6;
/// Planes of a VGA.
const PLANES: usize = 4;

/// The `length` bytes of cells that the kernel has at `origin`, as it would read them there, or why they cannot be had.
pub(super) fn cells(
    kernel: &Kernel,
    devices: &DeviceMemory<'_>,
    origin: Gva,
    length: u64,
) -> Result<Vec<u8>, String> {
    let window = kernel.space().translate(origin).map_err(|e| e.to_string())?.gpa;
    let inside = window.0 >= WINDOW && window.0 % 2 == 0 && window.0 < END && length <= END - window.0;
    if !inside {
        return Err(format!(
            "{length} bytes at {window} are no cells in the window of VGA's text mode"
        ));
    }
    let base = if window.0 < COLOUR { WINDOW } else { COLOUR };
    let mut why = None;
    for bar in bars(kernel).map_err(|error| error.to_string())? {
        let memory = match devices.at(kernel, bar) {
            Ok(memory) => memory,
            Err(reason) => {
                // Its first one is where the screen is.
                why.get_or_insert(reason);
                continue;
            }
        };
        let mut planes = vec![0; length as usize / 2 * PLANES];
        let at = bar.wrapping_add((window.0 - base) / 2 * PLANES as u64);
        memory.read(at, &mut planes).map_err(|error| error.to_string())?;
        let cells = planes.chunks_exact(PLANES);
        return Ok(cells.flat_map(|cell| cell.iter().take(2).copied()).collect());
    }
    Err(why.unwrap_or_else(|| {
        "the card that has VGA's text mode has no memory in the guest's address space".to_owned()
    }))
}

/// Where the guest has put the memory of the card that owns VGA's text mode.
fn bars(kernel: &Kernel) -> Result<Vec<Gpa>, LinuxError> {
    let space = kernel.space();
    let symbol = kernel.symbol("vga_default")?;
    let device = Structure::of(kernel, "pci_dev")?.member("resource")?;
    let resource = Structure::of(kernel, "resource")?;
    let (start, flags) = (resource.member("start")?, resource.member("flags")?);
    let of = |card: Gva, number: u64| -> Result<Option<Gpa>, ReadError> {
        let at = device.at(card).wrapping_add(number * resource.size());
        let number = |member: &Member| member.number(space, at);
        let (start, flags) = (number(&start)?, number(&flags)?);
        Ok((flags & MEMORY != 0 && start != 0).then_some(Gpa(start)))
    };
    let failed = |source| LinuxError::Read {
        what: "vga_default".to_owned(),
        at: symbol,
        source,
    };
    let card = Gva(space.read_u64(symbol).map_err(failed)?);
    if card.is_null() {
        return Ok(Vec::new());
    }
    let found: Result<Vec<_>, _> = (0..BARS).map(|number| of(card, number)).collect();
    Ok(found.map_err(failed)?.into_iter().flatten().collect())
}
