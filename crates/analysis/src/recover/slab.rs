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

/// How a cache lays objects into a block of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Bytes of the block, which lies at a multiple of them.
    bytes: u64,
    objects: u64,
}

impl Shape {
    /// What `struct kmem_cache_order_objects` says (`OO_SHIFT` of mm/slub.c).
    fn of(word: u64, stride: u64) -> Self {
        let order = (word >> 16).min(u64::from(MAX_SLAB.ilog2() - PAGE.ilog2()));
        let bytes = PAGE << order;
        Self {
            bytes,
            objects: (word & 0xffff).min(bytes / stride.max(1)),
        }
    }
}

/// The slabs of a cache.
#[derive(Debug)]
pub(crate) struct Slabs {
    /// Bytes from one object to the next.
    pub(crate) stride: u64,
    /// Bytes before the first object.
    pad: u64,
    /// Of a slab as the cache wants it, and as it takes it where memory is short.
    shapes: [Shape; 2],
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
        let mut found = Self::find_all(kernel, &[(cache, variable)])?;
        found.pop().ok_or_else(|| LinuxError::Implausible {
            what: cache.to_owned(),
            reason: "it is nowhere".to_owned(),
        })
    }

    /// The slabs of several caches, each as with [`Self::find_at`], in the same order: memory is gone through once for all of them. Of two
    /// that are one and the same the first has the slabs.
    pub(crate) fn find_all(kernel: &Kernel, caches: &[(&str, Gva)]) -> Result<Vec<Self>, LinuxError> {
        let frames = Frames::new(kernel)?;
        // One of its own since 5.17, a part of the page before.
        let slab = Structure::of(kernel, "slab").or_else(|_| Structure::of(kernel, "page"))?;
        let (owner, count) = (slab.member("slab_cache")?, slab.find("objects"));
        let space = kernel.space();
        let mut out = Vec::new();
        for (cache, variable) in caches {
            out.push(Cache::read(kernel, cache, *variable)?);
        }
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
                    let named = owner.of(page);
                    let Some(cache) = out.iter_mut().find(|cache| named == Some(cache.at.0)) else {
                        continue;
                    };
                    let count = count.and_then(|member| member.of(page)).filter(|&n| n > 0);
                    cache.add((frame + nth as u64) * PAGE, count);
                }
                frame += many;
            }
        }
        let slabs = out.into_iter().map(|cache| {
            let mut slabs = cache.slabs;
            slabs.slabs.sort_by_key(|slab| slab.first.0);
            slabs
        });
        Ok(slabs.collect())
    }

    /// Where all objects lie, used or free.
    pub(crate) fn objects(&self) -> impl Iterator<Item = Gpa> {
        self.slabs
            .iter()
            .flat_map(|slab| (0..slab.objects).map(|nth| Gpa(slab.first.0.saturating_add(nth * self.stride))))
    }

    /// Where objects lie or lay in memory from `start` to `end`, if any of its blocks is a slab of this cache or was one.
    pub(crate) fn places(&self, start: Gpa, end: Gpa) -> impl Iterator<Item = Gpa> {
        let [wanted, least] = self.shapes;
        let (stride, pad) = (self.stride, self.pad);
        let of_shape = move |shape: Shape| {
            let first = start.0.checked_next_multiple_of(shape.bytes).unwrap_or(end.0);
            let blocks = end.0.saturating_sub(first) / shape.bytes;
            (0..blocks).flat_map(move |block| {
                let block = first + block * shape.bytes;
                (0..shape.objects).map(move |nth| block + pad + nth * stride)
            })
        };
        let twice = move |at: u64| {
            let within = (at - pad) % wanted.bytes;
            let block = at - pad - within;
            let is_whole = block >= start.0 && end.0.saturating_sub(block) >= wanted.bytes;
            is_whole && within.is_multiple_of(stride) && within / stride < wanted.objects
        };
        let others = of_shape(least).filter(move |at| !twice(*at));
        of_shape(wanted).chain(others).map(Gpa)
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

/// A cache whose slabs are being looked for.
struct Cache {
    /// The `struct kmem_cache`.
    at: Gva,
    /// `kmem_cache.oo`.
    shape: u64,
    /// Bytes that its slabs may still have: all of them lie in memory, side by side.
    left: u64,
    slabs: Slabs,
}

impl Cache {
    fn read(kernel: &Kernel, cache: &str, variable: Gva) -> Result<Self, LinuxError> {
        let layout = Structure::of(kernel, "kmem_cache")?;
        let space = kernel.space();
        let read = |what: &str, at: Gva| {
            let what = what.to_owned();
            move |source| LinuxError::Read { what, at, source }
        };
        let at = space.read_u64(variable).map(Gva).map_err(read(cache, variable))?;
        let number = |path: &str| -> Result<u64, LinuxError> {
            layout.member(path)?.number(space, at).map_err(read(cache, at))
        };
        let (stride, shape, least) = (number("size")?, number("oo.x")?, number("min.x")?);
        let pad = layout
            .find("red_left_pad")
            .map_or(Ok(0), |member| member.number(space, at).map_err(read(cache, at)))?;
        if stride == 0 || stride > MAX_SLAB || pad > stride {
            return Err(LinuxError::Implausible {
                what: cache.to_owned(),
                reason: format!("its objects have {stride} bytes"),
            });
        }
        Ok(Self {
            at,
            shape,
            left: kernel.memory().size(),
            slabs: Slabs {
                stride,
                pad,
                shapes: [shape, least].map(|word| Shape::of(word, stride)),
                slabs: Vec::new(),
                cut: false,
            },
        })
    }

    /// Adds the slab whose first page lies at a physical address.
    fn add(&mut self, page: u64, count: Option<u64>) {
        let slabs = &mut self.slabs;
        let objects = count.unwrap_or(self.shape & 0xffff).min(MAX_SLAB / slabs.stride);
        let bytes = objects.saturating_mul(slabs.stride);
        if bytes > self.left || slabs.slabs.len() >= MAX_SLABS {
            slabs.cut = true;
            return;
        }
        self.left -= bytes;
        slabs.slabs.push(Slab {
            first: Gpa(page + slabs.pad),
            objects,
        });
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
            pad: 0,
            shapes: [Shape::of(5, 0x300); 2],
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

    #[test]
    fn places_are_those_of_blocks_of_both_sizes_once() {
        let slabs = |pad| Slabs {
            stride: 0x2400,
            pad,
            // Three objects in eight pages, one in four.
            shapes: [(3 << 16) | 3, (2 << 16) | 1].map(|word| Shape::of(word, 0x2400)),
            slabs: Vec::new(),
            cut: false,
        };
        let places = |pad, start, end| {
            slabs(pad)
                .places(Gpa(start), Gpa(end))
                .map(|at| at.0)
                .collect::<Vec<_>>()
        };
        let wanted = [0x8000, 0xa400, 0xc800, 0x1_0000, 0x1_2400, 0x1_4800];
        let least = [0x4000, 0xc000, 0x1_4000];
        assert_eq!(places(0, 0x3000, 0x1_8fff), [&wanted[..], &least[..]].concat());
        assert_eq!(places(0x40, 0x8000, 0xc000), [0x8040]);
        assert_eq!(places(0, 0x9000, 0x9000), [0; 0]);
        assert_eq!(places(0, u64::MAX - 0x100, u64::MAX), [0; 0]);
    }

    #[test]
    fn shapes_of_nonsense_are_small() {
        for word in [0, u64::MAX, 0xffff, 1 << 40] {
            for stride in [1, 64, MAX_SLAB] {
                let shape = Shape::of(word, stride);
                assert!(shape.bytes <= MAX_SLAB && shape.objects * stride <= shape.bytes);
            }
        }
    }
}
