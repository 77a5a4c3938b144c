//! The caches of the kernel's allocator, as /proc/slabinfo has them (mm/slub.c).

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::layout::{Field, Place, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::structures::list;
use crate::text::guest_text;
use crate::{Kernel, LinuxError};

/// Caches; a machine with everything loaded has some hundred.
const MAX_CACHES: usize = 1 << 14;
/// Bytes of a name.
const MAX_NAME: usize = 256;
/// Nodes of a machine: `1 << NODES_SHIFT` (include/linux/numa.h), 10 at most.
const MAX_NODES: u32 = 1 << 10;
/// Slabs with free objects that are looked at, in all caches together. A node keeps few that are empty, but lists all that are in part.
const MAX_PARTIAL: usize = 1 << 20;
/// Bytes of a page.
const PAGE: u64 = 4096;

layout! {
    struct CacheLayout = "kmem_cache" {
        list: Place = "list",
        name: Field<Gva> = "name",
        stride: Field<u32> = "size",
        object_size: Field<u32> = "object_size",
        align: Field<u32> = "align",
        flags: Field<u64> = "flags",
        /// Objects in the lower half, the order of the block of pages in the upper one.
        order_objects: Field<u32> = "oo.x",
        constructor: Field<Gva> = "ctor",
        nodes: Place = "node" | "per_node",     // the latter in 7.2
    }
}

layout! {
    /// What a cache has for each node in 7.2; before, that is the address of its `struct kmem_cache_node` alone.
    struct PerNodeLayout = "kmem_cache_per_node_ptrs" {
        node: Field<Gva> = "node",
    }
}

layout! {
    struct NodeLayout = "kmem_cache_node" {
        partial: Place = "partial",
        /// Only with `CONFIG_SLUB_DEBUG`, as in every kernel of Debian's. A node's counts are nowhere else.
        slabs: Option<Field<u64>> = "nr_slabs.counter",
        objects: Option<Field<u64>> = "total_objects.counter",
    }
}

layout! {
    /// One of its own since 5.17, a part of the page before.
    struct SlabLayout = "slab" | "page" {
        list: Place = "slab_list",
        used: Field<u64> = "inuse",
        objects: Field<u64> = "objects",
    }
}

/// A cache of the kernel's allocator: memory for objects of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct SlabCache {
    /// What it is called. Caches of objects of one size may be one, under the name of the first.
    pub name: Option<String>,
    /// Bytes of an object, as who made the cache asked for.
    pub object_size: u32,
    /// Bytes from one object to the next.
    pub size: u32,
    /// What an object's address is a multiple of.
    pub align: u32,
    /// Objects in one slab.
    pub objects_per_slab: u32,
    /// Pages of 4 KiB in one slab.
    pub pages_per_slab: u32,
    /// Slabs, where the kernel counts them (`CONFIG_SLUB_DEBUG`).
    pub slabs: Option<u64>,
    /// Objects that there is room for in these slabs.
    pub objects: Option<u64>,
    /// Objects in use. As in /proc/slabinfo those count as used that a CPU, its list of slabs or its sheaves keep for their next user.
    pub active: Option<u64>,
    /// Memory of all slabs in bytes.
    pub bytes: Option<u64>,
    /// `SLAB_*` (include/linux/slab.h and mm/slab.h), as they are in this kernel.
    #[serde(serialize_with = "hex_flags")]
    pub flags: u64,
    /// What is called for each object of a new slab.
    #[serde(serialize_with = "address::gva_opt")]
    pub constructor: Option<Gva>,
    /// Its `struct kmem_cache`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // What serde asks for.
fn hex_flags<S: serde::Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    address::hex(value, serializer)
}

/// What the nodes of a cache hold together.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    slabs: u64,
    objects: u64,
    free: u64,
}

struct Reader<'a> {
    kernel: &'a Kernel,
    cache: Arc<CacheLayout>,
    node: Arc<NodeLayout>,
    slab: Arc<SlabLayout>,
    /// Bytes from a node's entry in a cache to the next, and where in it its address lies.
    stride: u64,
    address: u64,
    nodes: u32,
    /// Slabs that may still be looked at.
    left: usize,
}

impl Kernel {
    /// The caches of the kernel's allocator, as /proc/slabinfo shows them to root, in the order in which they are listed there.
    ///
    /// Kernels 5.10 to the newest, with SLUB: Debian has had no other allocator.
    ///
    /// # Errors
    /// If the kernel's symbols or types lack what is needed.
    pub fn slab_caches(&self) -> Result<Listing<SlabCache>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &SlabCache| row.problems.len(),
            || self.list_slab_caches(),
        )
    }

    fn list_slab_caches(&self) -> Result<Listing<SlabCache>, LinuxError> {
        let nodes = match self.find_symbol(&["nr_node_ids"]) {
            // Only kernels for more than one node have the variable (include/linux/nodemask.h).
            None => 1,
            Some(at) => self
                .space()
                .read_u32(at)
                .map_err(LinuxError::read("how many nodes there are", at))?,
        };
        let per_node: Option<Arc<PerNodeLayout>> = self.layout().ok();
        let (stride, address) = per_node.map_or((8, 0), |entry| (entry.size, entry.node.extent().offset));
        let mut reader = Reader {
            kernel: self,
            stride,
            address,
            cache: self.layout()?,
            node: self.layout()?,
            slab: self.layout()?,
            nodes: nodes.min(MAX_NODES),
            left: MAX_PARTIAL,
        };
        let walk = list::walk(self.space(), self.symbol("slab_caches")?, MAX_CACHES).walk;
        let mut listing = Listing::default();
        if let Some(warning) = walk.end.warning("list of caches") {
            listing.warn(warning);
        }
        for link in walk.items {
            let at = reader.cache.list.container(link);
            match reader.row(at) {
                Ok(row) => listing.rows.push(row),
                Err(error) => listing.warn(format!("caches: the one at {at} cannot be read: {error}")),
            }
        }
        Ok(listing)
    }
}

impl Reader<'_> {
    fn row(&mut self, at: Gva) -> Result<SlabCache, ReadError> {
        let space = self.kernel.space();
        let cache = Arc::clone(&self.cache);
        let word = cache.order_objects.read(space, at)?;
        let constructor = cache.constructor.read(space, at)?;
        let mut row = SlabCache {
            name: None,
            object_size: cache.object_size.read(space, at)?,
            size: cache.stride.read(space, at)?,
            align: cache.align.read(space, at)?,
            objects_per_slab: word & 0xffff,
            // The largest block of pages that the kernel hands out has 2^10 (MAX_ORDER of include/linux/mmzone.h).
            pages_per_slab: 1 << (word >> 16).min(10),
            slabs: None,
            objects: None,
            active: None,
            bytes: None,
            flags: cache.flags.read(space, at)?,
            constructor: (!constructor.is_null()).then_some(constructor),
            address: at,
            problems: Vec::new(),
        };
        match space.read_cstr(cache.name.read(space, at)?, MAX_NAME) {
            Ok(name) => row.name = Some(guest_text(&name)),
            Err(error) => row.problems.push(Problem::read("name", &error)),
        }
        match self.held(cache.nodes.at(at)) {
            Ok(Some(held)) => {
                row.slabs = Some(held.slabs);
                row.objects = Some(held.objects);
                row.bytes = Some(held.slabs.saturating_mul(u64::from(row.pages_per_slab) * PAGE));
                match held.objects.checked_sub(held.free) {
                    Some(active) => row.active = Some(active),
                    None => row.problems.push(Problem::new(
                        "active",
                        format!("{} of {} objects would be free", held.free, held.objects),
                    )),
                }
            }
            Ok(None) => {}
            Err(problem) => row.problems.push(problem),
        }
        Ok(row)
    }

    /// What the nodes whose array begins at `nodes` hold; nothing where the kernel does not count it.
    fn held(&mut self, nodes: Gva) -> Result<Option<Held>, Problem> {
        let (Some(slabs), Some(objects)) = (self.node.slabs, self.node.objects) else {
            return Ok(None);
        };
        let space = self.kernel.space();
        let unread = |error: ReadError| Problem::read("slabs", &error);
        let mut out = Held::default();
        for nth in 0..self.nodes {
            let entry = u64::from(nth)
                .wrapping_mul(self.stride)
                .wrapping_add(self.address);
            let node = space.read_u64(nodes.wrapping_add(entry)).map_err(unread)?;
            let node = Gva(node);
            // Of a node without memory.
            if node.is_null() {
                continue;
            }
            let count = slabs.read(space, node).map_err(unread)?;
            out.slabs = out.slabs.saturating_add(count);
            out.objects = out
                .objects
                .saturating_add(objects.read(space, node).map_err(unread)?);
            // All that are listed are counted, but for those that come and go while this is read.
            let walk = list::walk(space, self.node.partial.at(node), self.left).walk;
            if let Some(warning) = walk.end.warning("slabs with free objects") {
                return Err(Problem::new("slabs", warning));
            }
            self.left = self.left.saturating_sub(walk.items.len());
            for link in walk.items {
                let slab = self.slab.list.container(link);
                let used = self.slab.used.read(space, slab).map_err(unread)?;
                let room = self.slab.objects.read(space, slab).map_err(unread)?;
                out.free = out.free.saturating_add(room.saturating_sub(used));
            }
        }
        Ok(Some(out))
    }
}
