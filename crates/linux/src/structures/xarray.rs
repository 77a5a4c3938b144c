//! `struct xarray` (include/linux/xarray.h), `struct idr` and radix trees, which have been the same thing since 4.20.

use std::sync::Arc;

use vmsight_arch::Gva;

use super::{End, MAX_OBJECTS, Seen, Walk};
use crate::layout::{Field, Place, layout};
use crate::{Kernel, LinuxError};

layout! {
    /// `struct xa_node`.
    pub(crate) struct XaNodeLayout = "xa_node" {
        shift: Field<u8> = "shift",
        slots: Place = "slots",
    }
}

layout! {
    /// `struct idr`: an xarray whose indices start at `idr_base`.
    pub(crate) struct IdrLayout = "idr" {
        base: Option<Field<u32>> = "idr_base",
        head: Field<u64> = "idr_rt.xa_head" | "idr_rt.rnode",
    }
}

/// One entry: its index and what is stored there (a pointer with its tag bits, or a value entry, whose lowest bit is set).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The index.
    pub index: u64,
    /// The raw entry.
    pub value: u64,
    /// How many indices from `index` on it stands for: a large folio is stored once, for all its pages.
    pub count: u64,
}

impl Entry {
    /// The pointer stored, without the two tag bits. `None` for value entries.
    pub fn pointer(&self) -> Option<Gva> {
        (self.value & 1 == 0).then_some(Gva(self.value & !3))
    }
}

/// The entries of the `struct idr` at `at`, by rising id.
pub fn walk_idr(kernel: &Kernel, at: Gva) -> Result<Walk<Entry>, LinuxError> {
    let layout: Arc<IdrLayout> = kernel.layout()?;
    let head = layout
        .head
        .read(kernel.space(), at)
        .map_err(LinuxError::read("an IDR's head", at))?;
    let base = match &layout.base {
        Some(field) => field
            .read(kernel.space(), at)
            .map_err(LinuxError::read("an IDR's base", at))?,
        None => 0,
    };
    let mut walk = walk_head(kernel, head, MAX_OBJECTS)?;
    for entry in &mut walk.items {
        entry.index = entry.index.wrapping_add(u64::from(base));
    }
    Ok(walk)
}

/// Internal entries have the low bits 10 and, if they are pointers to nodes, lie above the first page (`xa_is_node`).
fn node(entry: u64) -> Option<Gva> {
    (entry & 3 == 2 && entry > 4096).then(|| Gva(entry - 2))
}

/// The entries below a head (`xa_head`'s value). At most `limit`.
pub fn walk_head(kernel: &Kernel, head: u64, limit: usize) -> Result<Walk<Entry>, LinuxError> {
    let mut out = Walk::<Entry>::new();
    if head == 0 {
        return Ok(out);
    }
    let Some(top) = node(head) else {
        if head & 3 != 2 {
            out.items.push(Entry {
                index: 0,
                value: head,
                count: 1,
            });
        }
        return Ok(out);
    };
    let layout: Arc<XaNodeLayout> = kernel.layout()?;
    // XA_CHUNK_SIZE is 64, or 16 with CONFIG_BASE_SMALL.
    let slots = (layout.slots.size() / 8).min(64);
    let mut seen = Seen::default();
    // Depth first by a stack of (node, index of its first slot, shift that it must have less than).
    let mut stack = vec![(top, 0u64, u8::MAX)];
    while let Some((at, base, above)) = stack.pop() {
        if !seen.insert(at) {
            out.end = End::Cycle { at };
            break;
        }
        let mut bytes = [0u8; 64 * 8];
        let wanted = bytes.get_mut(..slots as usize * 8).unwrap_or(&mut []);
        let read = layout.shift.read(kernel.space(), at).and_then(|shift| {
            kernel.space().read(layout.slots.at(at), wanted)?;
            Ok(shift)
        });
        let shift = match read {
            Ok(shift) => shift,
            Err(error) => {
                out.end = End::Unreadable { at, error };
                break;
            }
        };
        if shift >= above || shift > 60 {
            out.end = End::Broken {
                at,
                reason: "an xarray node's shift does not fall from level to level",
            };
            break;
        }
        let mut below = Vec::new();
        for (slot, chunk) in wanted.chunks_exact(8).enumerate() {
            let value = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
            let index = base.wrapping_add((slot as u64) << shift);
            if value == 0 {
                continue;
            }
            match node(value) {
                Some(child) if shift > 0 => below.push((child, index, shift)),
                // A sibling entry lengthens the one before it (`xa_is_sibling`).
                _ if value & 3 == 2 && value >> 2 < slots => {
                    if let Some(last) = out.items.last_mut()
                        && last.index.checked_add(last.count) == Some(index)
                    {
                        last.count = last.count.saturating_add(1 << shift);
                    }
                }
                // Retry and zero entries (internal, not nodes) stand for no object of their own.
                _ if value & 3 == 2 => {}
                _ => {
                    if out.items.len() >= limit {
                        out.end = End::Bound { limit };
                        return Ok(out);
                    }
                    out.items.push(Entry {
                        index,
                        value,
                        count: 1 << shift,
                    });
                }
            }
        }
        if stack.len() + below.len() > MAX_OBJECTS {
            out.end = End::Bound { limit: MAX_OBJECTS };
            break;
        }
        stack.extend(below.into_iter().rev());
    }
    out.items.sort_unstable_by_key(|e| e.index);
    Ok(out)
}
