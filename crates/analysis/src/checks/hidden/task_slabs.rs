//! Tasks by the memory that they are in, whatever leads there.

use vmsight_arch::Gva;
use vmsight_linux::{Kernel, LinuxError};
use vmsight_symbols::Field;

use crate::Context;

/// Descriptors of pages that are read at once.
const BATCH: u64 = 1 << 10;
/// Tasks in one slab: 15 bits count them (`struct slab`, mm/slab.h).
const MAX_IN_SLAB: u64 = 1 << 15;
/// Tasks that are found in all.
const MAX_TASKS: usize = 4 << 20;
/// `STACK_END_MAGIC` (include/uapi/linux/magic.h), at the end of the stack of every task that was not given back.
const STACK_END: u64 = 0x57ac_6e9d;
const PAGE_SHIFT: u32 = 12;

/// Where what tells a task that lives from one that was given back lies.
struct Shape {
    size: u64,
    stack: u64,
    pid: u64,
    exit_state: u64,
    leader: u64,
}

/// The processes that live in slabs of tasks: each page that is of them has a descriptor that names the cache
/// (`task_struct_cachep`, kernel/fork.c).
pub(super) fn processes(context: &Context) -> Result<Vec<Gva>, LinuxError> {
    let kernel = context.kernel();
    let missing = |what: &str| LinuxError::NotFound(format!("{what} is not known"));
    let direct = kernel
        .image()
        .direct_map
        .ok_or_else(|| missing("where all memory is mapped"))?;
    let cache = context.pointer("task_struct_cachep", context.symbol(&["task_struct_cachep"])?)?;
    let shape = Shape {
        size: context.object("kmem_cache", cache)?.number("size")?,
        stack: kernel.offset("task_struct", "stack")?,
        pid: kernel.offset("task_struct", "pid")?,
        exit_state: kernel.offset("task_struct", "exit_state")?,
        leader: kernel.offset("task_struct", "group_leader")?,
    };
    if shape.size == 0 {
        return Err(missing("the size of a task"));
    }
    let (named, counted) = slab_members(kernel)?;
    let descriptor = kernel
        .types()
        .find_struct("page")
        .and_then(|id| kernel.types().size_of(id))
        .filter(|size| (32..=256).contains(size))
        .ok_or_else(|| missing("the size of a page's descriptor"))?;
    // Before KASLR moves it (arch/x86/include/asm/pgtable_64_types.h), and without KASLR.
    let descriptors = match kernel.find_symbol(&["vmemmap_base"]) {
        Some(at) => context.pointer("vmemmap_base", at)?,
        None => return Err(missing("where the descriptors of pages lie")),
    };
    let mut found = Vec::new();
    let mut buffer = vec![0u8; (BATCH * descriptor) as usize];
    for region in kernel.memory().regions() {
        let (mut page, end) = (region.start.0 >> PAGE_SHIFT, region.end().0 >> PAGE_SHIFT);
        while page < end {
            let many = BATCH.min(end - page);
            let at = descriptors.wrapping_add(page.wrapping_mul(descriptor));
            let Some(bytes) = buffer.get_mut(..(many * descriptor) as usize) else {
                break;
            };
            // Where there is a hole in memory there are no descriptors.
            if context.space().read(at, bytes).is_ok() {
                for (index, one) in bytes.chunks_exact(descriptor as usize).enumerate() {
                    if word(one, named) != cache.0 {
                        continue;
                    }
                    let tasks = counted.extract(word(one, counted.offset)).min(MAX_IN_SLAB);
                    let frame = (page + index as u64) << PAGE_SHIFT;
                    let first = direct.wrapping_add(frame);
                    for number in 0..tasks {
                        let task = first.wrapping_add(number * shape.size);
                        if found.len() < MAX_TASKS && lives(context, &shape, task) {
                            found.push(task);
                        }
                    }
                }
            }
            page += many;
        }
    }
    Ok(found)
}

/// Where a slab's descriptor names its cache, and counts its objects: in `struct slab` since 5.17, before in `struct page`.
fn slab_members(kernel: &Kernel) -> Result<(u64, Field), LinuxError> {
    let of = |structure: &str| {
        let member = |path: &str| kernel.types().member(structure, path);
        Some((member("slab_cache")?.offset, member("objects")?))
    };
    of("slab")
        .or_else(|| of("page"))
        .ok_or_else(|| LinuxError::NoMember {
            structure: "slab or page".to_owned(),
            member: "slab_cache or objects".to_owned(),
            release: kernel.release().to_owned(),
        })
}

fn word(bytes: &[u8], offset: u64) -> u64 {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let read = bytes.get(from..from.saturating_add(8));
    read.map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap_or_default()))
}

/// Whether a process that has not ended is there.
fn lives(context: &Context, shape: &Shape, task: Gva) -> bool {
    let space = context.space();
    let number = |offset: u64| space.read_u32(task.wrapping_add(offset)).unwrap_or(0);
    let pointer = |offset: u64| space.read_u64(task.wrapping_add(offset)).unwrap_or(0);
    pointer(shape.leader) == task.0
        && number(shape.pid) != 0
        && number(shape.exit_state) == 0
        && space
            .read_u64(Gva(pointer(shape.stack)))
            .is_ok_and(|end| end == STACK_END)
}
