//! How much memory a process has.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::layouts::{MmLayout, PercpuCounterLayout};
use crate::layout::Buffer;
use crate::{Kernel, LinuxError};

// `enum { MM_FILEPAGES, MM_ANONPAGES, MM_SWAPENTS, MM_SHMEMPAGES, NR_MM_COUNTERS }`: this order since 4.5 (linux/mm_types_task.h).
const MM_SWAPENTS: usize = 2;
const COUNTERS: usize = 4;

/// Reads the page counters of `mm_struct`s.
#[derive(Debug)]
pub(crate) struct RssReader {
    kernel: Kernel,
    kind: RssKind,
}

#[derive(Debug)]
enum RssKind {
    /// Up to 6.1: plain counters.
    Plain { offset: u64 },
    /// Since 6.2: `struct percpu_counter`s.
    PerCpu { counter: Arc<PercpuCounterLayout> },
}

/// Pages resident and swapped out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pages {
    pub(crate) resident: u64,
    pub(crate) swapped: u64,
}

impl RssReader {
    pub(crate) fn new(kernel: &Kernel, mm: &MmLayout) -> Result<Self, LinuxError> {
        let kind = match &mm.rss_counts {
            Some(counts) => RssKind::Plain {
                offset: counts.offset() - mm.rss_stat.offset().min(counts.offset()),
            },
            None => {
                kernel.per_cpu()?;
                RssKind::PerCpu {
                    counter: kernel.layout()?,
                }
            }
        };
        Ok(Self {
            kernel: kernel.clone(),
            kind,
        })
    }

    /// The counters of the `mm_struct` in `buffer`.
    ///
    /// Since 6.2 the kernel's own /proc shows the shared part of the counters alone and can be off by some dozens of pages for each
    /// CPU; here the CPUs' parts are added, which is exact. Up to 6.1 each thread holds back up to 64 pages, which are not added.
    pub(crate) fn pages(&self, mm: &MmLayout, buffer: &Buffer) -> Result<Pages, ReadError> {
        let raw = mm.rss_stat.of(buffer);
        let word = |offset: usize| {
            raw.get(offset..offset + 8)
                .map_or(0, |b| i64::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        let mut counts = [0i64; COUNTERS];
        match &self.kind {
            RssKind::Plain { offset } => {
                for (index, count) in counts.iter_mut().enumerate() {
                    *count = word(*offset as usize + index * 8);
                }
            }
            RssKind::PerCpu { counter } => {
                let Ok(per_cpu) = self.kernel.per_cpu() else {
                    return Ok(Pages::default());
                };
                let size = counter.size.min(1 << 12) as usize;
                for (index, count) in counts.iter_mut().enumerate() {
                    let at = |offset: u64| index * size + (offset as usize).min(1 << 12);
                    *count = word(at(counter.count.extent().offset));
                    let counters = word(at(counter.counters.extent().offset)) as u64;
                    if counters != 0 {
                        for (_, copy) in per_cpu.copies(Gva(counters)) {
                            *count =
                                count.wrapping_add(i64::from(self.kernel.space().read_u32(copy)? as i32));
                        }
                    }
                }
            }
        }
        let positive = |n: i64| n.max(0) as u64;
        let swapped = positive(counts.get(MM_SWAPENTS).copied().unwrap_or(0));
        let resident = counts
            .iter()
            .enumerate()
            .filter(|&(i, _)| i != MM_SWAPENTS)
            .fold(0i64, |sum, (_, &n)| sum.wrapping_add(n));
        Ok(Pages {
            resident: positive(resident),
            swapped,
        })
    }
}
