//! Whose a page of physical memory is: what tells of bytes found there who has them.
//!
//! A reverse map is made only of the pages that are asked for: one walk through the page tables of all processes, one through the
//! kernel's own areas, and for what neither maps, the page's `struct page`.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::Serialize;
use vmsight_arch::{Gpa, Gva};
use vmsight_linux::{Kernel, LinuxError};
use vmsight_memory::AddressSpace;

use crate::Object;

/// Page tables visited of one process: as many as 4 TiB of small pages need.
const MAX_TABLES: u64 = 1 << 21;
/// Those that one page shows.
const MAX_HOLDERS: usize = 256;
/// The first address that no process has, with five levels of tables.
const USER_END: u64 = 0x00ff_ffff_ffff_ffff;
/// What of the kernel lies in its image: code, data, and what was given back of it after boot.
const IMAGE: &str = "kernel image";
/// What is mapped page by page, and where modules and generated code lie.
const VMALLOC: &str = "vmalloc";
const MODULE_AREA: &str = "module area";
/// Where x86-64 has its image, its modules and generated code (Documentation/arch/x86/x86_64/mm.rst).
const MODULES: RangeInclusive<Gva> = Gva(0xffff_ffff_8000_0000)..=Gva(0xffff_ffff_feff_ffff);

/// Who has a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// A process has it mapped.
    Process,
    /// The kernel uses it.
    Kernel,
    /// It holds part of a file that no process has mapped.
    Cache,
    /// Nobody: it was given back, with what it held.
    Free,
    /// That could not be told.
    Unknown,
}

impl Owner {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Owner::Process => "process",
            Owner::Kernel => "kernel",
            Owner::Cache => "page cache",
            Owner::Free => "free page",
            Owner::Unknown => "unknown",
        }
    }
}

/// One that has a page, and as what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// What it is.
    pub owner: Owner,
    /// The process.
    pub pid: Option<i32>,
    /// The process's name.
    pub name: Option<String>,
    /// Where the page begins for it.
    pub gva: Option<Gva>,
    /// What it lies in: the mapping's file or name, `slab kmalloc-512`, `vmalloc`, …
    pub place: Option<String>,
}

impl Holder {
    /// The kernel, where it has mapped `gva` elsewhere than in its map of all memory.
    pub fn of_kernel_area(kernel: &Kernel, gva: Gva) -> Self {
        let place = match MODULES.contains(&gva) {
            true if kernel.image().contains(gva) => IMAGE,
            true => MODULE_AREA,
            false => VMALLOC,
        };
        Self {
            owner: Owner::Kernel,
            pid: None,
            name: None,
            gva: Some(gva),
            place: Some(place.to_owned()),
        }
    }

    /// The processes among `holders` that have a page besides its first holder.
    pub fn shared_with(holders: &[Self]) -> Vec<i32> {
        let first = holders.first().and_then(|holder| holder.pid);
        let others = holders.iter().skip(1).filter_map(|holder| holder.pid);
        let mut pids: Vec<i32> = others.filter(|pid| Some(*pid) != first).collect();
        pids.dedup();
        pids
    }

    /// Whether it is the kernel, in its image, its modules or its vmalloc area.
    pub fn in_area(&self) -> bool {
        let areas = [IMAGE, MODULE_AREA, VMALLOC];
        self.owner == Owner::Kernel && self.place.as_deref().is_some_and(|place| areas.contains(&place))
    }
}

/// Holders of pages.
#[derive(Debug, Default)]
pub struct Frames {
    holders: BTreeMap<u64, Vec<Holder>>,
    /// What could not be looked at.
    pub notes: Vec<String>,
    spaces: BTreeMap<i32, AddressSpace>,
}

impl Frames {
    /// Finds who has the pages in which these addresses lie.
    pub fn find(kernel: &Kernel, addresses: impl IntoIterator<Item = Gpa>) -> Self {
        let mut frames = Frames::default();
        for gpa in addresses {
            frames.holders.entry(gpa.gfn().0).or_default();
        }
        if frames.holders.is_empty() {
            return frames;
        }
        if let Err(error) = frames.processes(kernel) {
            frames.notes.push(format!("processes: {error}"));
        }
        frames.kernel(kernel);
        frames
    }

    /// Who has the page of this address; at least one, who may be unknown.
    pub fn of(&self, gpa: Gpa) -> &[Holder] {
        self.holders.get(&gpa.gfn().0).map_or(&[], Vec::as_slice)
    }

    /// The memory of one of the processes that were found.
    pub fn space(&self, pid: i32) -> Option<&AddressSpace> {
        self.spaces.get(&pid)
    }

    fn processes(&mut self, kernel: &Kernel) -> Result<(), LinuxError> {
        let listing = kernel.all_maps()?;
        self.notes.extend(listing.warnings);
        for process in &listing.rows {
            let space = match kernel.process_space(process.pid) {
                Ok(Some(space)) => space,
                Ok(None) => continue,
                Err(error) => {
                    self.notes
                        .push(format!("memory of process {}: {error}", process.pid));
                    continue;
                }
            };
            let place = |gva: Gva| {
                let maps = &process.maps.rows;
                let map = maps.iter().find(|m| m.start <= gva && gva < m.end)?;
                Some(map.path.clone().unwrap_or_else(|| "anonymous memory".to_owned()))
            };
            let found = self.walk(&space, Gva(0)..=Gva(USER_END), |gva| Holder {
                owner: Owner::Process,
                pid: Some(process.pid),
                name: Some(process.name.clone()),
                gva: Some(gva),
                place: place(gva),
            });
            if found {
                self.spaces.insert(process.pid, space);
            }
        }
        Ok(())
    }

    /// Notes of each page asked for that `space` maps who has it. Whether there was one.
    fn walk(
        &mut self,
        space: &AddressSpace,
        range: RangeInclusive<Gva>,
        holder: impl Fn(Gva) -> Holder,
    ) -> bool {
        let mut any = false;
        for mapping in space.mappings(range, MAX_TABLES) {
            let mapping = match mapping {
                Ok(mapping) => mapping,
                Err(limit) => {
                    self.notes.push(limit.to_string());
                    break;
                }
            };
            let first = mapping.translation.gpa.gfn().0;
            let pages = mapping.translation.page_size() >> 12;
            for (gfn, holders) in self.holders.range_mut(first..first.saturating_add(pages)) {
                let gva = mapping.gva.wrapping_add((gfn - first) << 12);
                if holders.len() < MAX_HOLDERS {
                    holders.push(holder(gva));
                    any = true;
                }
            }
        }
        any
    }

    fn kernel(&mut self, kernel: &Kernel) {
        let space = kernel.space().clone();
        let of_kernel = |gva: Gva| Holder::of_kernel_area(kernel, gva);
        // KASLR puts the image anywhere in the first GiB of the last area.
        for area in kernel_areas(kernel) {
            self.walk(&space, area, of_kernel);
        }
        let image = kernel.image();
        let pages = match Pages::new(kernel) {
            Ok(pages) => Some(pages),
            Err(error) => {
                self.notes.push(format!("what pages are used for: {error}"));
                None
            }
        };
        for (gfn, holders) in &mut self.holders {
            let is_image = |holder: &Holder| holder.place.as_deref() == Some(IMAGE);
            let given_back = || pages.as_ref().is_some_and(|pages| pages.is_allocators(*gfn));
            // What was given back of the image after boot may still be mapped there, and is others' by now.
            if holders.iter().any(is_image) && given_back() {
                holders.retain(|holder| !is_image(holder));
            }
            if !holders.is_empty() {
                continue;
            }
            let gpa = Gpa(gfn << 12);
            let within = gpa.0.wrapping_sub(image.phys.0);
            let mut holder = match pages.as_ref().map(|pages| pages.look(*gfn)) {
                Some(Ok((owner, place))) => Holder {
                    owner,
                    place,
                    ..UNKNOWN
                },
                Some(Err(_)) | None => UNKNOWN,
            };
            let may_be = matches!(holder.owner, Owner::Kernel | Owner::Unknown);
            if within < image.len && may_be && !given_back() {
                holder = of_kernel(image.text.wrapping_add(within));
            }
            if holder.owner != Owner::Free && holder.gva.is_none() {
                holder.gva = image.direct_map.map(|base| base.wrapping_add(gpa.0));
            }
            holders.push(holder);
        }
    }
}

const UNKNOWN: Holder = Holder {
    owner: Owner::Unknown,
    pid: None,
    name: None,
    gva: None,
    place: None,
};

/// Where the kernel maps what is not only a part of its map of all memory: vmalloc, its image and modules. By rising address.
pub(crate) fn kernel_areas(kernel: &Kernel) -> impl Iterator<Item = RangeInclusive<Gva>> {
    vmalloc(kernel).into_iter().chain([MODULES])
}

/// Where the kernel maps what it gets with vmalloc: 32 TiB with four levels of tables, 12,800 TiB with five
/// (Documentation/arch/x86/x86_64/mm.rst).
fn vmalloc(kernel: &Kernel) -> Option<RangeInclusive<Gva>> {
    const FOUR: u64 = 32 << 40;
    const FIVE: u64 = 12_800 << 40;
    let at = kernel.find_symbol(&["vmalloc_base"])?;
    let base = kernel.space().read_u64(at).ok()?;
    let length = match kernel.image().mode {
        vmsight_arch::paging::PagingMode::X86Level5 => FIVE,
        _ => FOUR,
    };
    Some(Gva(base)..=Gva(base.checked_add(length - 1)?))
}

/// The kernel's array of `struct page`.
struct Pages<'k> {
    kernel: &'k Kernel,
    base: Gva,
    size: u64,
    /// `PG_reserved`, a bit of the flags: the page was never the allocator's, as those of the image are not.
    reserved_flag: Option<u64>,
    /// `PG_slab`, a bit of the flags up to 6.9.
    slab_flag: Option<u64>,
    /// `PGTY_slab`, the upper byte of the page's type since.
    slab_type: Option<u64>,
}

impl<'k> Pages<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let at = kernel.symbol("vmemmap_base")?;
        let base = kernel.space().read_u64(at);
        let base = base.map_err(|source| LinuxError::Read {
            what: "vmemmap_base".to_owned(),
            at,
            source,
        })?;
        let types = kernel.types();
        let value = |enumeration: &str, name: &str| {
            let mut all = types.enumerators(types.find_enum(enumeration)?);
            all.find(|e| e.name == name)
                .and_then(|e| u64::try_from(e.value).ok())
        };
        Ok(Self {
            kernel,
            base: Gva(base),
            size: Object::new(kernel, "page", Gva(0))?.size(),
            reserved_flag: value("pageflags", "PG_reserved"),
            slab_flag: value("pageflags", "PG_slab"),
            slab_type: value("pagetype", "PGTY_slab"),
        })
    }

    /// Whether the kernel's allocator has given a page out, or could.
    fn is_allocators(&self, gfn: u64) -> bool {
        let at = self.base.wrapping_add(gfn.wrapping_mul(self.size));
        let flags = Object::new(self.kernel, "page", at).and_then(|page| page.number("flags|flags.f"));
        match (flags, self.reserved_flag) {
            (Ok(flags), Some(bit)) if bit < 64 => flags >> bit & 1 == 0,
            _ => false,
        }
    }

    /// What a page is used for, where no tables but the kernel's map of all memory have it.
    fn look(&self, gfn: u64) -> Result<(Owner, Option<String>), LinuxError> {
        let page = Object::new(
            self.kernel,
            "page",
            self.base.wrapping_add(gfn.wrapping_mul(self.size)),
        )?;
        // A page that belongs to a larger one points to its first; the lowest bit says that it does.
        let head = match page.number("compound_head|compound_info")? {
            head if head & 1 == 1 => page.moved(Gva(head & !1)),
            _ => page,
        };
        let flags = head.number("flags|flags.f")?;
        let by_flag = self
            .slab_flag
            .is_some_and(|bit| bit < 64 && flags >> bit & 1 == 1);
        let kind = head.number("page_type").unwrap_or(u64::MAX);
        let by_type = self
            .slab_type
            .is_some_and(|slab| slab < 256 && kind >> 24 & 0xff == slab);
        if by_type || (by_flag && self.slab_type.is_none()) {
            return Ok((Owner::Kernel, Some(format!("slab {}", self.slab(&head)?))));
        }
        if head.number("_refcount.counter")? == 0 {
            return Ok((Owner::Free, None));
        }
        // The lowest bits say what the pointer is to; a page of a file's has none set.
        let mapping = head.number("mapping")?;
        Ok(match mapping & 3 {
            0 if mapping >> 63 == 1 => (Owner::Cache, None),
            1 => (
                Owner::Unknown,
                Some("anonymous memory that no process maps".to_owned()),
            ),
            _ => (Owner::Kernel, None),
        })
    }

    /// The name of the cache that a slab is of.
    fn slab(&self, page: &Object<'_>) -> Result<String, LinuxError> {
        let at = page.address();
        let slab = Object::new(self.kernel, "slab", at).or_else(|_| Object::new(self.kernel, "page", at))?;
        let cache = Object::new(self.kernel, "kmem_cache", slab.pointer("slab_cache")?)?;
        cache.text("name", 64)
    }
}
