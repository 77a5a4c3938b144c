//! The kernel's log: the lockless ring of kernel/printk/printk_ringbuffer.c (5.10 and later), read beside its writers.
//!
//! A record is a descriptor (state and place of the text), an info (sequence number, time, level) and a block of text. The state is
//! read before and after: a record that was rewritten meanwhile is read again, and skipped with a warning if it will not hold still.

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::{Budget, ROWS};
use crate::layout::{Extent, Field, Place, Spans, layout};
use crate::listing::{Listing, Problem, settled};
use crate::text::{guest_array_text, guest_text};
use crate::{Kernel, LinuxError};

layout! {
    struct RingLayout = "printk_ringbuffer" {
        count_bits: Field<u32> = "desc_ring.count_bits",
        descs: Field<Gva> = "desc_ring.descs",
        infos: Field<Gva> = "desc_ring.infos",
        head_id: Field<u64> = "desc_ring.head_id",
        tail_id: Field<u64> = "desc_ring.tail_id",
        size_bits: Field<u32> = "text_data_ring.size_bits",
        data: Field<Gva> = "text_data_ring.data",
    }
}

layout! {
    struct DescLayout = "prb_desc" {
        state: Field<u64> = "state_var",
        begin: Field<u64> = "text_blk_lpos.begin",
        next: Field<u64> = "text_blk_lpos.next",
    }
}

layout! {
    struct InfoLayout = "printk_info" {
        seq: Field<u64> = "seq",
        ts_nsec: Field<u64> = "ts_nsec",
        text_len: Field<u16> = "text_len",
        facility: Field<u8> = "facility",
        flags: Field<u8> = "flags",
        level: Field<u8> = "level",
        caller_id: Field<u32> = "caller_id",
        comm: Option<Place> = "comm",                    // 6.19, CONFIG_PRINTK_EXECUTION_CTX
        subsystem: Place = "dev_info.subsystem",
        device: Place = "dev_info.device",
    }
}

/// The largest rings that are believed: log_buf_len=2G has 2^31 bytes of text and 2^26 descriptors.
const MAX_COUNT_BITS: u32 = 26;
const MAX_SIZE_BITS: u32 = 31;

/// States in the two highest bits of `state_var` (`enum desc_state`).
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;
const RESERVED: u64 = 0;
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;

/// `LPOS_DATALESS`: an odd position has no text: `NO_LPOS` (3) is an empty line, `FAILED_LPOS` (1) one whose text found no room.
const DATALESS: u64 = 1;
const NO_LPOS: u64 = 3;

/// `enum printk_info_flags`.
const LOG_CONT: u8 = 8;

/// In `caller_id`: the number is a CPU's, not a task's.
const CALLER_IS_CPU: u32 = 1 << 31;

/// One record of the kernel's log.
#[derive(Clone, Debug, Serialize)]
pub struct KernelMessage {
    /// Number of the record since boot.
    pub seq: u64,
    /// Time since boot in microseconds.
    pub time_us: u64,
    /// Facility, 0 for the kernel itself (syslog.h).
    pub facility: u8,
    /// Level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Who wrote it: `T` and a thread id, or `C` and a CPU number for interrupts.
    pub caller: String,
    /// The writer's name, where the kernel records it (6.19 and later).
    pub comm: Option<String>,
    /// The record continues the one before it on the same line.
    pub continued: bool,
    /// The text; may have several lines. `None` where the ring had no room for it.
    pub text: Option<String>,
    /// Subsystem of the device that it is about.
    pub subsystem: Option<String>,
    /// The device, in the notation of `/dev/kmsg`: `b8:0`, `c1:3`, `n2`, `+pci:0000:00:01.0`.
    pub device: Option<String>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Kernel {
    /// The kernel's log as `/dev/kmsg` has it, oldest record first.
    ///
    /// Covers the ring of 5.10 and later.
    ///
    /// # Errors
    /// If the ring cannot be found, or its head cannot be read or makes no sense.
    pub fn kmsg(&self) -> Result<Listing<KernelMessage>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &KernelMessage| row.problems.len(),
            || self.list_kmsg(),
        )
    }

    fn list_kmsg(&self) -> Result<Listing<KernelMessage>, LinuxError> {
        let ring = Ring::open(self)?;
        let mut listing = Listing::default();
        let budget = Budget::default();
        let count = 1u64 << ring.count_bits;
        let span = ring.head_id.wrapping_sub(ring.tail_id) & ID_MASK;
        let first = if span < count {
            ring.tail_id
        } else {
            listing.warn(
                "kernel log: the ring's head and tail contradict each other; every descriptor was looked at",
            );
            ring.head_id.wrapping_sub(count - 1) & ID_MASK
        };
        let last = span.min(count - 1);
        // What came last matters most.
        let skipped = (last + 1).saturating_sub(ROWS as u64);
        if skipped > 0 {
            listing.warn(format!(
                "kernel log: the oldest {skipped} of {} descriptors were not looked at",
                last + 1
            ));
        }
        let mut lost = 0u64;
        for step in skipped..=last {
            match ring.record(first.wrapping_add(step) & ID_MASK) {
                Ok(Record::Message(message)) => {
                    if !budget.row(message.text.as_ref().map_or(0, String::len)) {
                        break;
                    }
                    listing.rows.push(message);
                }
                Ok(Record::Empty) => {}
                Ok(Record::Changing) => lost += 1,
                Err(error) => {
                    listing.warn(format!("kernel log: a record cannot be read: {error}"));
                    lost += 1;
                }
            }
            // A head full of ids that no memory backs must not cost 2^26 failed reads.
            if lost > 4096 && listing.rows.is_empty() {
                listing.warn("kernel log: given up, none of 4096 records could be read");
                break;
            }
        }
        if lost > 0 {
            listing.warn(format!(
                "kernel log: {lost} records were being rewritten or unreadable and are missing"
            ));
        }
        budget
            .warning("kernel log")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }
}

enum Record {
    Message(KernelMessage),
    /// Reserved by a writer, or free for reuse.
    Empty,
    /// Changed while it was read, more than once.
    Changing,
}

struct Ring<'k> {
    kernel: &'k Kernel,
    desc: Arc<DescLayout>,
    info: Arc<InfoLayout>,
    info_spans: Spans,
    count_bits: u32,
    descs: Gva,
    infos: Gva,
    head_id: u64,
    tail_id: u64,
    size_bits: u32,
    data: Gva,
}

impl<'k> Ring<'k> {
    fn open(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let layout: Arc<RingLayout> = kernel.layout()?;
        let space = kernel.space();
        // `prb` is the pointer to the ring in use; a kernel that names only the rings themselves uses the static one until the dynamic
        // one is filled, which is early in boot.
        let at = match kernel.symbol("prb") {
            Ok(pointer) => Gva(space
                .read_u64(pointer)
                .map_err(LinuxError::read("prb", pointer))?),
            Err(missing) => kernel
                .symbol("printk_rb_dynamic")
                .ok()
                .filter(|&ring| layout.descs.read(space, ring).is_ok_and(|descs| !descs.is_null()))
                .or_else(|| kernel.symbol("printk_rb_static").ok())
                .ok_or(missing)?,
        };
        let ring = Self {
            kernel,
            desc: kernel.layout()?,
            info_spans: {
                let release = kernel.release();
                let l: Arc<InfoLayout> = kernel.layout()?;
                let whole = [Extent {
                    offset: 0,
                    size: l.size,
                }];
                Spans::covering("printk_info", release, whole)?
            },
            info: kernel.layout()?,
            count_bits: layout
                .count_bits
                .read(space, at)
                .map_err(LinuxError::read("printk ring", at))?,
            descs: layout
                .descs
                .read(space, at)
                .map_err(LinuxError::read("printk ring", at))?,
            infos: layout
                .infos
                .read(space, at)
                .map_err(LinuxError::read("printk ring", at))?,
            head_id: layout
                .head_id
                .read(space, at)
                .map_err(LinuxError::read("printk ring", at))?
                & ID_MASK,
            tail_id: layout
                .tail_id
                .read(space, at)
                .map_err(LinuxError::read("printk ring", at))?
                & ID_MASK,
            size_bits: layout
                .size_bits
                .read(space, at)
                .map_err(LinuxError::read("printk ring", at))?,
            data: layout
                .data
                .read(space, at)
                .map_err(LinuxError::read("printk ring", at))?,
        };
        if ring.count_bits > MAX_COUNT_BITS || ring.size_bits > MAX_SIZE_BITS || ring.size_bits < 4 {
            return Err(LinuxError::Implausible {
                what: format!("the kernel log's ring at {at}"),
                reason: format!(
                    "2^{} descriptors and 2^{} bytes of text",
                    ring.count_bits, ring.size_bits
                ),
            });
        }
        Ok(ring)
    }

    fn record(&self, id: u64) -> Result<Record, ReadError> {
        for _ in 0..3 {
            if let Some(record) = self.try_record(id)? {
                return Ok(record);
            }
        }
        Ok(Record::Changing)
    }

    /// One try; `None` if the descriptor changed while the record was read.
    fn try_record(&self, id: u64) -> Result<Option<Record>, ReadError> {
        let space = self.kernel.space();
        let index = id & ((1 << self.count_bits) - 1);
        let desc = self.descs.wrapping_add(index.wrapping_mul(self.desc.size));
        let info = self.infos.wrapping_add(index.wrapping_mul(self.info.size));
        let state = self.desc.state.read(space, desc)?;
        if state & ID_MASK != id {
            // The descriptor was recycled since the head and tail were read, or never used.
            return Ok(Some(Record::Empty));
        }
        let kind = state >> STATE_SHIFT;
        if kind == RESERVED || (kind != COMMITTED && kind != FINALIZED) {
            return Ok(Some(Record::Empty));
        }
        let (begin, next) = (
            self.desc.begin.read(space, desc)?,
            self.desc.next.read(space, desc)?,
        );
        let mut buffer = self.info_spans.buffer();
        self.info_spans.read(space, info, &mut buffer)?;
        let mut problems = Vec::new();
        let text = match self.text(id, begin, next, usize::from(self.info.text_len.of(&buffer))) {
            Ok(text) => text,
            Err(reason) => {
                problems.push(Problem::new("text", reason));
                None
            }
        };
        if self.desc.state.read(space, desc)? != state {
            return Ok(None);
        }
        if kind == COMMITTED {
            problems.push(Problem::new("text", "its writer may still be adding to it"));
        }
        let caller = self.info.caller_id.of(&buffer);
        let some = |text: String| (!text.is_empty()).then_some(text);
        Ok(Some(Record::Message(KernelMessage {
            seq: self.info.seq.of(&buffer),
            time_us: self.info.ts_nsec.of(&buffer) / 1000,
            facility: self.info.facility.of(&buffer),
            level: self.info.level.of(&buffer),
            caller: if caller & CALLER_IS_CPU != 0 {
                format!("C{}", caller & !CALLER_IS_CPU)
            } else {
                format!("T{caller}")
            },
            comm: self
                .info
                .comm
                .and_then(|comm| some(guest_array_text(comm.of(&buffer)))),
            continued: self.info.flags.of(&buffer) & LOG_CONT != 0,
            text,
            subsystem: some(guest_array_text(self.info.subsystem.of(&buffer))),
            device: some(guest_array_text(self.info.device.of(&buffer))),
            problems,
        })))
    }

    /// The text of record `id` between two positions in the text ring, `None` where the writer found no room for it.
    fn text(&self, id: u64, begin: u64, next: u64, len: usize) -> Result<Option<String>, String> {
        if begin & DATALESS != 0 && next & DATALESS != 0 {
            return Ok(if begin == NO_LPOS && next == NO_LPOS {
                Some(String::new())
            } else {
                None
            });
        }
        let Some((offset, block)) = block(begin, next, self.size_bits) else {
            return Err(format!(
                "its place in the ring, {begin:#x} to {next:#x}, makes no sense"
            ));
        };
        let space = self.kernel.space();
        let at = self.data.wrapping_add(offset);
        // The block starts with the id of its record.
        let owner = space.read_u64(at).map_err(|e| e.to_string())?;
        if owner != id {
            return Err("overwritten by a later record".to_owned());
        }
        let mut text = vec![0; len.min(block.saturating_sub(8) as usize)];
        space
            .read(at.wrapping_add(8), &mut text)
            .map_err(|e| e.to_string())?;
        Ok(Some(guest_text(&text)))
    }
}

/// Where the block between two logical positions lies in a ring of `2^size_bits` bytes: offset and length. A block that would pass the
/// ring's end starts over at its beginning.
fn block(begin: u64, next: u64, size_bits: u32) -> Option<(u64, u64)> {
    let size = 1u64 << size_bits;
    let mask = size - 1;
    let (first, last) = (begin >> size_bits, next >> size_bits);
    let (offset, len) = if first == last && begin < next {
        (begin & mask, next - begin)
    } else if first.wrapping_add(1) & (u64::MAX >> size_bits) == last {
        match next & mask {
            // Since 6.18 a block may end exactly where the ring does.
            0 => (begin & mask, size - (begin & mask)),
            len => (0, len),
        }
    } else {
        return None;
    };
    (len > 8 && offset + len <= size).then_some((offset, len))
}

#[cfg(test)]
mod tests {
    use super::block;

    #[test]
    fn blocks_are_found_on_both_sides_of_the_rings_end() {
        assert_eq!(block(0x100, 0x140, 10), Some((0x100, 0x40)));
        assert_eq!(block(0x500, 0x540, 10), Some((0x100, 0x40)));
        // Wraps: 0x3f0 is the last 16 bytes of the first round, the block lies at the start of the second.
        assert_eq!(block(0x3f0, 0x440, 10), Some((0, 0x40)));
        assert_eq!(block(0x3c0, 0x400, 10), Some((0x3c0, 0x40)));
    }

    #[test]
    fn impossible_blocks_are_refused() {
        assert_eq!(block(0x100, 0x100, 10), None);
        assert_eq!(block(0x140, 0x100, 10), None);
        assert_eq!(block(0x100, 0x104, 10), None);
        assert_eq!(block(0x100, 0x900, 10), None);
        assert_eq!(block(u64::MAX - 1, 0, 31), None);
        assert_eq!(block(0, u64::MAX, 31), None);
    }
}
