//! Framebuffers of DRM: those in the lists of each card's `struct drm_mode_config` (include/drm/drm_mode_config.h), whoever made them.
//!
//! All of it is the module drm's, and so are the types. A buffer whose pages are those of a file without a name (drm_gem_shmem_helper.c,
//! and the drivers of many real cards) is found like any file's; one in a virtual card's own memory (drm_gem_vram_helper.c) has
//! a physical address there.

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::{Gpa, Gva};
use vmsight_linux::structures::{list, xarray};
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::ReadError;
use vmsight_symbols::Types;

use super::{Framebuffer, MAX_ROWS, PixelFormat, Pixels};
use crate::recover::DeviceMemory;
use crate::recover::files::page_cache::PageCache;
use crate::recover::frames::PAGE;
use crate::recover::member::{Member, Structure};

const MODULE: &str = "drm";
/// Cards of a machine, and framebuffers and planes of one card.
const MAX_MINORS: usize = 512;
const MAX_OBJECTS: usize = 1024;
/// The longest name of a driver.
const MAX_NAME: usize = 64;
/// `DRM_MINOR_PRIMARY`, of which each card has one.
const PRIMARY: u64 = 0;
/// `TTM_PL_VRAM` (include/drm/ttm/ttm_placement.h): in the card's own memory.
const IN_VRAM: u64 = 2;

/// Adds the framebuffers of all cards. `left` is how many bytes of pixels may still be looked for.
pub(super) fn framebuffers(
    kernel: &Kernel,
    devices: &DeviceMemory<'_>,
    out: &mut Listing<Framebuffer>,
    left: &mut u64,
) -> Result<(), LinuxError> {
    let module = kernel.module_address(MODULE)?;
    let types = kernel.module_types(MODULE)?;
    let reader = Reader::new(kernel, devices, &types)?;
    let symbols = kernel.symbols_of_module(module, &MODULE.into())?;
    let known: FxHashMap<&str, Gva> = symbols
        .rows
        .iter()
        .map(|symbol| (symbol.name.as_str(), symbol.address))
        .collect();
    // An xarray since 6.12.
    let minors = match (known.get("drm_minors_xa"), known.get("drm_minors_idr")) {
        (Some(at), _) => {
            let head = Structure::of(kernel, "xarray")?.member("xa_head")?;
            let head = head
                .number(kernel.space(), *at)
                .map_err(|source| LinuxError::Read {
                    what: "drm_minors_xa".to_owned(),
                    at: *at,
                    source,
                })?;
            xarray::walk_head(kernel, head, MAX_MINORS)?
        }
        (None, Some(at)) => xarray::walk_idr(kernel, *at)?,
        (None, None) => {
            return Err(LinuxError::NoSymbol {
                name: "drm_minors_xa or drm_minors_idr".to_owned(),
                release: kernel.release().to_owned(),
            });
        }
    };
    if let Some(warning) = minors.end.warning("the cards of DRM") {
        out.warn(warning);
    }
    let mut seen = FxHashSet::default();
    for minor in minors
        .items
        .into_iter()
        .take(MAX_MINORS)
        .filter_map(|e| e.pointer())
    {
        match reader.card(minor) {
            Ok(Some((device, name))) if seen.insert(device) => {
                reader.framebuffers(device, &name, out, left);
            }
            Ok(_) => {}
            Err(error) => out.warn(format!("the card of DRM at {minor}: {error}")),
        }
    }
    Ok(())
}

struct Reader<'k> {
    kernel: &'k Kernel,
    devices: &'k DeviceMemory<'k>,
    cache: PageCache<'k>,
    minor_type: Member,
    minor_index: Member,
    minor_device: Member,
    driver: Member,
    driver_name: Member,
    list: Member,
    planes: Member,
    head: Member,
    number: Member,
    width: Member,
    height: Member,
    format: Member,
    fourcc: Member,
    pitches: Member,
    offsets: Member,
    modifier: Member,
    objects: Member,
    plane_head: Member,
    plane_state: Member,
    plane_crtc: Member,
    plane_framebuffer: Member,
    file: Member,
    mapping: Member,
    vram: Option<Vram>,
}

/// Members for what lies in a virtual card's own memory.
struct Vram {
    /// The manager of that memory, and its physical address.
    manager: Member,
    base: Member,
    object: Member,
    resource: Member,
    place: Member,
    start: Member,
}

impl Vram {
    /// `None` where no such driver is loaded.
    fn new(kernel: &Kernel, types: &Types) -> Option<Self> {
        let helper = kernel.module_types("drm_vram_helper").ok()?;
        let ttm = kernel.module_types("ttm").ok()?;
        let release = kernel.release();
        let object = Structure::within(&ttm, release, "ttm_buffer_object").ok()?;
        let resource = Structure::within(&ttm, release, "ttm_resource").ok()?;
        Some(Self {
            manager: Structure::within(types, release, "drm_device")
                .ok()?
                .find("vram_mm")?,
            base: Structure::within(&helper, release, "drm_vram_mm")
                .ok()?
                .find("vram_base")?,
            object: object.find("base")?,
            resource: object.find("resource")?,
            place: resource.find("mem_type")?,
            start: resource.find("start")?,
        })
    }

    /// Where a buffer lies that this memory's manager has; `None` for what it does not manage.
    fn place(&self, kernel: &Kernel, device: Gva, gem: Gva) -> Result<Option<Place>, ReadError> {
        let space = kernel.space();
        let manager = self.manager.pointer(space, device)?;
        if manager.is_null() {
            return Ok(None);
        }
        let resource = self.resource.pointer(space, self.object.container(gem))?;
        if resource.is_null() || self.place.number(space, resource)? != IN_VRAM {
            return Ok(Some(Place::Elsewhere));
        }
        let first = self.start.number(space, resource)?.saturating_mul(PAGE);
        let base = self.base.number(space, manager)?;
        Ok(Some(
            base.checked_add(first)
                .map_or(Place::Elsewhere, |at| Place::Device(Gpa(at))),
        ))
    }
}

/// Where a managed buffer lies.
enum Place {
    /// In the card's memory.
    Device(Gpa),
    /// Not there, or not yet.
    Elsewhere,
}

impl<'k> Reader<'k> {
    fn new(kernel: &'k Kernel, devices: &'k DeviceMemory<'k>, types: &Types) -> Result<Self, LinuxError> {
        let of = |name| Structure::within(types, kernel.release(), name);
        let (minor, device) = (of("drm_minor")?, of("drm_device")?);
        let (framebuffer, plane) = (of("drm_framebuffer")?, of("drm_plane")?);
        let state = of("drm_plane_state")?;
        Ok(Self {
            kernel,
            devices,
            cache: PageCache::new(kernel)?,
            minor_type: minor.member("type")?,
            minor_index: minor.member("index")?,
            minor_device: minor.member("dev")?,
            driver: device.member("driver")?,
            driver_name: of("drm_driver")?.member("name")?,
            list: device.member("mode_config.fb_list")?,
            planes: device.member("mode_config.plane_list")?,
            head: framebuffer.member("head")?,
            number: framebuffer.member("base.id")?,
            width: framebuffer.member("width")?,
            height: framebuffer.member("height")?,
            format: framebuffer.member("format")?,
            fourcc: of("drm_format_info")?.member("format")?,
            pitches: framebuffer.member("pitches")?,
            offsets: framebuffer.member("offsets")?,
            modifier: framebuffer.member("modifier")?,
            objects: framebuffer.member("obj")?,
            plane_head: plane.member("head")?,
            plane_state: plane.member("state")?,
            plane_crtc: state.member("crtc")?,
            plane_framebuffer: state.member("fb")?,
            file: of("drm_gem_object")?.member("filp")?,
            mapping: Structure::of(kernel, "file")?.member("f_mapping")?,
            vram: Vram::new(kernel, types),
        })
    }

    /// The card of a minor and what it is called there; `None` for a card's other minors.
    fn card(&self, minor: Gva) -> Result<Option<(Gva, String)>, ReadError> {
        let space = self.kernel.space();
        if self.minor_type.number(space, minor)? != PRIMARY {
            return Ok(None);
        }
        let index = self.minor_index.number(space, minor)?;
        Ok(Some((
            self.minor_device.pointer(space, minor)?,
            format!("card{index}"),
        )))
    }

    fn framebuffers(&self, device: Gva, card: &str, out: &mut Listing<Framebuffer>, left: &mut u64) {
        let space = self.kernel.space();
        let driver = self
            .driver
            .pointer(space, device)
            .and_then(|driver| self.driver_name.pointer(space, driver))
            .and_then(|name| space.read_cstr(name, MAX_NAME))
            .map(|name| guest_text(&name))
            .unwrap_or_default();
        let shown = self.shown(device, card, out);
        let found = list::walk(space, self.list.at(device), MAX_OBJECTS).walk;
        if let Some(warning) = found.end.warning(&format!("framebuffers of {card}")) {
            out.warn(warning);
        }
        for node in found.items {
            if out.rows.len() >= MAX_ROWS {
                return out.warn(format!("framebuffers: cut after {MAX_ROWS}"));
            }
            let at = self.head.container(node);
            let mut row = Framebuffer::at("drm", card.to_owned(), at);
            row.driver = driver.clone();
            row.shown = Some(shown.contains(&at));
            if let Err(error) = self.read(device, card, &mut row, left) {
                row.problems.push(Problem::read("width", &error));
            }
            out.rows.push(row);
        }
    }

    /// The framebuffers that screens are fed from.
    fn shown(&self, device: Gva, card: &str, out: &mut Listing<Framebuffer>) -> FxHashSet<Gva> {
        let space = self.kernel.space();
        let planes = list::walk(space, self.planes.at(device), MAX_OBJECTS).walk;
        if let Some(warning) = planes.end.warning(&format!("planes of {card}")) {
            out.warn(warning);
        }
        let of_plane = |node: Gva| {
            let state = self
                .plane_state
                .pointer(space, self.plane_head.container(node))
                .ok()?;
            let crtc = self.plane_crtc.pointer(space, state).ok()?;
            let framebuffer = self.plane_framebuffer.pointer(space, state).ok()?;
            (!crtc.is_null()).then_some(framebuffer)
        };
        planes.items.into_iter().filter_map(of_plane).collect()
    }

    fn read(&self, device: Gva, card: &str, row: &mut Framebuffer, left: &mut u64) -> Result<(), ReadError> {
        let (space, at) = (self.kernel.space(), row.address);
        row.name = format!("{card}/{}", self.number.number(space, at)?);
        row.width = self.width.number(space, at)?;
        row.height = self.height.number(space, at)?;
        row.stride = u64::from(space.read_u32(self.pitches.at(at))?);
        let info = self.format.pointer(space, at)?;
        let fourcc = self.fourcc.number(space, info)? as u32;
        row.format = guest_text(&fourcc.to_le_bytes());
        let problem = match (PixelFormat::of_fourcc(fourcc), self.modifier.number(space, at)?) {
            (Some(format), 0) => {
                let offset = u64::from(space.read_u32(self.offsets.at(at))?);
                let gem = self.objects.pointer(space, at)?;
                let Some(size) = row.size(format, offset, left) else {
                    return Ok(());
                };
                if let Some(pixels) = self.pixels(device, gem, offset.saturating_add(size))? {
                    row.paint(self.kernel, self.devices, format, pixels, (offset, size));
                    return Ok(());
                }
                Problem::new(
                    "pixels_in",
                    "its driver keeps them in a way that is not known here",
                )
            }
            (Some(_), _) => Problem::new("format", "its pixels are laid out in tiles or compressed"),
            (None, _) => Problem::new("format", "its pixels are no plain red, green and blue"),
        };
        row.problems.push(problem);
        Ok(())
    }

    /// Where the pixels of a buffer lie, which has at least so many bytes.
    fn pixels(&self, device: Gva, gem: Gva, size: u64) -> Result<Option<Pixels>, ReadError> {
        let space = self.kernel.space();
        if gem.is_null() {
            return Ok(None);
        }
        // A buffer in the card's memory has a file, too, with nothing in it.
        if let Some(vram) = &self.vram
            && let Some(place) = vram.place(self.kernel, device, gem)?
        {
            return Ok(match place {
                Place::Device(at) => Some(Pixels::Physical(at)),
                Place::Elsewhere => None,
            });
        }
        let file = self.file.pointer(space, gem)?;
        if file.is_null() {
            return Ok(None);
        }
        let mapping = self.mapping.pointer(space, file)?;
        let limit = size.div_ceil(PAGE) as usize;
        let Ok(found) = self.cache.pages(mapping, limit) else {
            return Ok(None);
        };
        let mut pages = Vec::new();
        for stretch in found.stretches {
            let left = limit.saturating_sub(pages.len()) as u64;
            pages.extend((0..stretch.count.min(left)).filter_map(|nth| {
                let gpa = stretch.gpa.0.checked_add(nth * PAGE)?;
                Some((stretch.index.checked_add(nth)?, Gpa(gpa)))
            }));
        }
        pages.sort_unstable_by_key(|(index, _)| *index);
        Ok(Some(Pixels::Pages(pages)))
    }
}
