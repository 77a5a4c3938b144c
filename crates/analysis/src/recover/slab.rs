//! The slabs of one cache of the kernel's allocator (mm/slub.c), found by the `struct page`s that say they belong to it: the cache
//! itself lists only those with free objects.

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::{Kernel, LinuxError};

use super::frames::{Frames, PAGE};
use super::member::Structure;

/// `struct page`s that are read at once.
const AT_ONCE: u64 = 4096;
/// The largest slab that is believed: 2^10 pages is the largest block the kernel hands out.
const MAX_SLAB: u64 = 4 << 20;
/// Slabs of one cache.
const MAX_SLABS: usize = 1 << 20;

/// One slab: objects in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slab {
    /// Where the first object lies.
    pub(crate) first: Gpa,
    pub(crate) objects: u64,
}

/// The slabs of a cache.
#[derive(Debug)]
pub(crate) struct Slabs {
    /// Bytes from one object to the next.
    pub(crate) stride: u64,
    /// By rising address.
    pub(crate) slabs: Vec<Slab>,
    /// There were more than are believed.
    pub(crate) cut: bool,
}

impl Slabs {
    /// The slabs of the cache whose address the variable `cache` holds.
    pub(crate) fn find(kernel: &Kernel, cache: &str) -> Result<Self, LinuxError> {
        Self::find_at(kernel, cache, kernel.symbol(cache)?)
    }

    /// The slabs of the cache whose address lies at `variable`; `cache` is what messages call it.
    pub(crate) fn find_at(kernel: &Kernel, cache: &str, variable: Gva) -> Result<Self, LinuxError> {
        let frames = Frames::new(kernel)?;
        let layout = Structure::of(kernel, "kmem_cache")?;
        // One of its own since 5.17, a part of the page before.
        let slab = Structure::of(kernel, "slab").or_else(|_| Structure::of(kernel, "page"))?;
        let (owner, count) = (slab.member("slab_cache")?, slab.find("objects"));
        let space = kernel.space();
        let read = |what: &str, at: Gva| {
            let what = what.to_owned();
            move |source| LinuxError::Read { what, at, source }
        };
        let at = space.read_u64(variable).map(Gva).map_err(read(cache, variable))?;
        let number = |path: &str| -> Result<u64, LinuxError> {
            layout.member(path)?.number(space, at).map_err(read(cache, at))
        };
        let (stride, shape) = (number("size")?, number("oo.x")?);
        let pad = layout
            .find("red_left_pad")
            .map_or(Ok(0), |member| member.number(space, at).map_err(read(cache, at)))?;
        if stride == 0 || stride > MAX_SLAB || pad > stride {
            return Err(LinuxError::Implausible {
                what: cache.to_owned(),
                reason: format!("its objects have {stride} bytes"),
            });
        }
        let mut out = Self {
            stride,
            slabs: Vec::new(),
            cut: false,
        };
        let page_size = frames.page_size();
        let mut bytes = vec![0; (AT_ONCE * page_size) as usize];
        for region in kernel.memory().regions() {
            let mut frame = region.start.0 / PAGE;
            let end = region.start.0.saturating_add(region.len) / PAGE;
            while frame < end {
                let many = AT_ONCE.min(end - frame);
                let pages = bytes.get_mut(..(many * page_size) as usize).unwrap_or(&mut []);
                // Where there is no array, there are no slabs.
                space.read_partial(frames.page(Gpa(frame * PAGE)), pages);
                for (nth, page) in pages.chunks_exact(page_size as usize).enumerate() {
                    if owner.of(page) != Some(at.0) {
                        continue;
                    }
                    if out.slabs.len() >= MAX_SLABS {
                        out.cut = true;
                        return Ok(out);
                    }
                    let count = count.and_then(|member| member.of(page)).filter(|&n| n > 0);
                    let objects = count.unwrap_or(shape & 0xffff).min(MAX_SLAB / stride);
                    out.slabs.push(Slab {
                        first: Gpa((frame + nth as u64) * PAGE + pad),
                        objects,
                    });
                }
                frame += many;
            }
        }
        out.slabs.sort_by_key(|slab| slab.first.0);
        Ok(out)
    }

    /// Where all objects lie, used or free.
    pub(crate) fn objects(&self) -> impl Iterator<Item = Gpa> {
        self.slabs
            .iter()
            .flat_map(|slab| (0..slab.objects).map(|nth| Gpa(slab.first.0.saturating_add(nth * self.stride))))
    }

    /// The slab that a physical address lies in.
    fn slab_of(&self, at: Gpa) -> Option<&Slab> {
        let after = self.slabs.partition_point(|slab| slab.first.0 <= at.0);
        let slab = self.slabs.get(after.checked_sub(1)?)?;
        (at.0 - slab.first.0 < slab.objects * self.stride).then_some(slab)
    }

    /// Whether an address lies in one of the slabs.
    pub(crate) fn holds(&self, at: Gpa) -> bool {
        self.slab_of(at).is_some()
    }

    /// Whether an object begins at an address.
    pub(crate) fn is_object(&self, at: Gpa) -> bool {
        self.slab_of(at)
            .is_some_and(|slab| (at.0 - slab.first.0).is_multiple_of(self.stride))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_begin_where_the_stride_says() {
        let slab = |first, objects| Slab {
            first: Gpa(first),
            objects,
        };
        let slabs = Slabs {
            stride: 0x300,
            slabs: vec![slab(0x1000, 5), slab(0x8000, 2)],
            cut: false,
        };
        assert!(slabs.is_object(Gpa(0x1000)) && slabs.is_object(Gpa(0x1c00)) && slabs.is_object(Gpa(0x8300)));
        for other in [0, 0xfff, 0x1001, 0x1f00, 0x8600, u64::MAX] {
            assert!(!slabs.is_object(Gpa(other)), "{other:#x}");
        }
        assert!(slabs.holds(Gpa(0x1eff)) && !slabs.holds(Gpa(0x1f00)));
        assert_eq!(slabs.objects().count(), 7);
    }
}
