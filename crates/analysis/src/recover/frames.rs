//! `struct page`s and the page frames that they stand for, and where the kernel sees each frame.

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::{Kernel, LinuxError};

use super::member::Structure;

/// The unit of physical memory.
pub(crate) const PAGE: u64 = 4096;
/// Where KASLR does not move them, with four and with five levels of tables (Documentation/arch/x86/x86_64/mm.rst): the array of
/// all `struct page`s, and the map of all physical memory.
const VMEMMAP: [u64; 2] = [0xffff_ea00_0000_0000, 0xffd4_0000_0000_0000];
const DIRECT_MAP: [u64; 2] = [0xffff_8880_0000_0000, 0xff11_0000_0000_0000];

/// How page frames, their `struct page`s and the kernel's addresses of them belong together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frames {
    vmemmap: u64,
    direct_map: u64,
    page_size: u64,
}

impl Frames {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let five = usize::from(kernel.image().mode.levels() > 4);
        let base = |symbol: &str, otherwise: [u64; 2]| match kernel.find_symbol(&[symbol]) {
            Some(at) => kernel.space().read_u64(at).map_err(|source| LinuxError::Read {
                what: symbol.to_owned(),
                at,
                source,
            }),
            None => Ok(otherwise.get(five).copied().unwrap_or(0)),
        };
        Ok(Self {
            vmemmap: base("vmemmap_base", VMEMMAP)?,
            direct_map: base("page_offset_base", DIRECT_MAP)?,
            page_size: Structure::of(kernel, "page")?.size().max(1),
        })
    }

    /// Bytes of a `struct page`.
    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The page frame of a `struct page`.
    pub(crate) fn frame(&self, page: Gva) -> Option<Gpa> {
        let offset = page.0.checked_sub(self.vmemmap)?;
        if !offset.is_multiple_of(self.page_size) {
            return None;
        }
        (offset / self.page_size).checked_mul(PAGE).map(Gpa)
    }

    /// The `struct page` of a page frame.
    pub(crate) fn page(&self, frame: Gpa) -> Gva {
        let offset = (frame.0 / PAGE).wrapping_mul(self.page_size);
        Gva(self.vmemmap.wrapping_add(offset))
    }

    /// Where the kernel sees a physical address.
    pub(crate) fn seen(&self, gpa: Gpa) -> Gva {
        Gva(self.direct_map.wrapping_add(gpa.0))
    }

    /// The physical address behind an address in the kernel's map of all of them.
    pub(crate) fn behind(&self, gva: Gva) -> Option<Gpa> {
        gva.0.checked_sub(self.direct_map).map(Gpa)
    }
}
