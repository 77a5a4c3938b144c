//! ELF images in processes: the program, its libraries, what lies in memory of no file.

use std::ops::Range;

use object::elf::{ET_DYN, ET_EXEC, FileHeader64, PT_LOAD, ProgramHeader64};
use object::{LittleEndian as LE, pod};
use rustc_hash::FxHashMap;
use vmsight_arch::{Gpa, Gva};
use vmsight_linux::{Kernel, LinuxError, Mapping, ProcessMaps};
use vmsight_memory::{AddressSpace, ReadError};

use super::file::PROGRAM_HEADER;
use crate::recover::files::page_cache::{PageCache, Pages};
use crate::recover::frames::PAGE;
use crate::recover::member::{Member, Structure};

/// Program headers of one image; programs have about a dozen.
const MAX_SEGMENTS: u16 = 128;
/// The largest image that is believed, and the longest file that is made of one.
pub(super) const MAX_IMAGE: u64 = 16 << 30;
/// What a page costs of what may be looked at that is not there, in bytes, and what a stretch of pages of a file does.
const ABSENT: u64 = 64;

/// The members that lead from a process's mappings to the files behind them.
pub(super) struct Files {
    file: Member,
    mapping: Member,
    mm: Member,
    exe: Member,
}

impl Files {
    pub(super) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            file: Structure::of(kernel, "vm_area_struct")?.member("vm_file")?,
            mapping: Structure::of(kernel, "file")?.member("f_mapping")?,
            mm: Structure::of(kernel, "task_struct")?.member("mm")?,
            exe: Structure::of(kernel, "mm_struct")?.member("exe_file")?,
        })
    }

    /// The `struct file` of a mapping; null where it has none.
    fn of(&self, kernel: &Kernel, map: &Mapping) -> Gva {
        self.file.pointer(kernel.space(), map.vma).unwrap_or(Gva(0))
    }

    /// The `struct file` that the process executes.
    fn program(&self, kernel: &Kernel, task: Gva) -> Result<Gva, ReadError> {
        let mm = self.mm.pointer(kernel.space(), task)?;
        self.exe.pointer(kernel.space(), mm)
    }

    /// What sort of image begins with a mapping.
    pub(super) fn kind(&self, kernel: &Kernel, process: &ProcessMaps, map: &Mapping) -> &'static str {
        let file = self.of(kernel, map);
        match map.path.as_deref() {
            Some("[vdso]") => "vdso",
            _ if file.is_null() => "memory",
            _ if self
                .program(kernel, process.task)
                .is_ok_and(|program| program == file) =>
            {
                "program"
            }
            _ => "library",
        }
    }
}

/// The memory of a process, with the pages of its files that it has not touched yet.
pub(super) struct Memory<'k> {
    kernel: &'k Kernel,
    space: AddressSpace,
    areas: Vec<Area>,
    cache: &'k PageCache<'k>,
    known: FxHashMap<u64, Pages>,
    /// Bytes that came from the page cache and not from the process's own tables.
    pub(super) from_cache: u64,
}

/// A mapping: from where to where, and where in which `address_space` its file's pages are.
struct Area {
    start: u64,
    end: u64,
    file: Option<(Gva, u64)>,
}

impl<'k> Memory<'k> {
    /// The memory of a process. `None` where it has none.
    pub(super) fn of(
        kernel: &'k Kernel,
        files: &Files,
        cache: &'k PageCache<'k>,
        process: &ProcessMaps,
    ) -> Result<Option<Self>, LinuxError> {
        let Some(space) = kernel.process_space(process.pid)? else {
            return Ok(None);
        };
        let mut areas: Vec<Area> = process
            .maps
            .rows
            .iter()
            .map(|map| {
                let file = files.of(kernel, map);
                let mapping = (!file.is_null()).then(|| files.mapping.pointer(kernel.space(), file));
                Area {
                    start: map.start.0,
                    end: map.end.0,
                    file: mapping.and_then(Result::ok).map(|mapping| (mapping, map.offset)),
                }
            })
            .collect();
        areas.sort_by_key(|area| area.start);
        // Of a guest that lies, too, one ends before the next begins: by that they are searched.
        let mut end = 0;
        areas.retain(|area| {
            let fits = area.start >= end && area.end > area.start;
            if fits {
                end = area.end;
            }
            fits
        });
        Ok(Some(Self {
            kernel,
            space,
            areas,
            cache,
            known: FxHashMap::default(),
            from_cache: 0,
        }))
    }

    /// Fills `to` from an address on. Gives the parts that are not in memory, which are zeros; `allowed` is what it cost.
    pub(super) fn fill(&mut self, at: Gva, to: &mut [u8], allowed: &mut u64) -> Vec<Range<usize>> {
        let mut missing = Vec::new();
        for (range, result) in self.space.read_partial(at, to) {
            let Err(error) = result else {
                *allowed = allowed.saturating_sub(range.len() as u64);
                continue;
            };
            *allowed = allowed.saturating_sub((range.len() as u64 / PAGE + 1) * ABSENT);
            // What is in swap is the process's own, whatever its file says.
            if error.is_paged_out() || error.page_fault().is_none() {
                missing.push(range);
                continue;
            }
            let mut done = range.start;
            while done < range.end {
                let here = at.0.wrapping_add(done as u64);
                let nth = self.areas.partition_point(|area| area.end <= here);
                let (file, left) = match self.areas.get(nth) {
                    Some(area) if area.start <= here => {
                        let file = area
                            .file
                            .map(|(mapping, offset)| (mapping, offset.wrapping_add(here - area.start)));
                        (Some(file), area.end - here)
                    }
                    Some(area) => (None, area.start - here),
                    None => (None, u64::MAX),
                };
                let len = (range.end - done).min(usize::try_from(left).unwrap_or(usize::MAX));
                let part = done..done.saturating_add(len);
                match (file, to.get_mut(part.clone())) {
                    // Memory of no file that nobody has written to yet is zeros.
                    (Some(None), _) => {}
                    (Some(Some((mapping, offset))), Some(to)) => {
                        let gaps = self.cached(mapping, offset, to, allowed);
                        missing.extend(gaps.into_iter().map(|gap| gap.start + done..gap.end + done));
                    }
                    _ => missing.push(part.clone()),
                }
                done = part.end;
            }
        }
        missing
    }

    /// Fills `to` from the cached pages of a file. Gives the parts that are not cached.
    fn cached(&mut self, mapping: Gva, offset: u64, to: &mut [u8], allowed: &mut u64) -> Vec<Range<usize>> {
        // No file is so long (MAX_LFS_FILESIZE is 2^63 − 1): none of it can be cached.
        if offset > i64::MAX as u64 - to.len() as u64 {
            return std::iter::once(0..to.len()).collect();
        }
        let limit = usize::try_from(self.kernel.memory().size() / PAGE).unwrap_or(usize::MAX);
        let cache = self.cache;
        let pages = self.known.entry(mapping.0).or_insert_with(|| {
            let pages = cache.pages(mapping, limit).unwrap_or_default();
            *allowed = allowed.saturating_sub(pages.stretches.len() as u64 * ABSENT);
            pages
        });
        let mut missing = Vec::new();
        let mut done = 0;
        while done < to.len() {
            let at = offset.saturating_add(done as u64);
            let nth = pages
                .stretches
                .partition_point(|s| s.index.saturating_add(s.count).saturating_mul(PAGE) <= at);
            let stretch = pages.stretches.get(nth);
            let start = stretch.map_or(u64::MAX, |s| s.index.saturating_mul(PAGE));
            if start > at {
                let len = usize::try_from(start - at)
                    .unwrap_or(usize::MAX)
                    .min(to.len() - done);
                missing.push(done..done + len);
                done += len;
                continue;
            }
            let Some(stretch) = stretch else { break };
            let left = stretch.count.saturating_mul(PAGE).saturating_sub(at - start);
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(to.len() - done);
            let from = Gpa(stretch.gpa.0.saturating_add(at - start));
            let part = to.get_mut(done..done + len).unwrap_or(&mut []);
            let read = self.kernel.memory().read(from, part).is_ok()
                && (!self.kernel.memory().is_live() || cache.holds(mapping, stretch));
            if read {
                self.from_cache += len as u64;
                *allowed = allowed.saturating_sub(len as u64);
            } else {
                part.fill(0);
                missing.push(done..done + len);
            }
            done += len;
        }
        missing
    }
}

/// What an image says of itself, in its own first page.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) file: FileHeader64<LE>,
    pub(super) segments: Vec<ProgramHeader64<LE>>,
    /// What is added to its addresses where it is loaded.
    pub(super) bias: u64,
}

/// Why something that begins like an ELF image is none that can be rebuilt.
pub(super) type Reason = &'static str;

impl Header {
    /// The header at an address. `None` where no ELF image begins.
    pub(super) fn read(memory: &mut Memory<'_>, at: Gva, allowed: &mut u64) -> Option<Result<Self, Reason>> {
        let mut bytes = [0; size_of::<FileHeader64<LE>>()];
        if !memory.fill(at, &mut bytes, allowed).is_empty() {
            return None;
        }
        let (file, _) = pod::from_bytes::<FileHeader64<LE>>(&bytes).ok()?;
        if file.e_ident.magic != object::elf::ELFMAG {
            return None;
        }
        Some(Self::parse(memory, at, file, allowed))
    }

    fn parse(
        memory: &mut Memory<'_>,
        at: Gva,
        file: &FileHeader64<LE>,
        allowed: &mut u64,
    ) -> Result<Self, Reason> {
        let ident = &file.e_ident;
        if ident.class != object::elf::ELFCLASS64 || ident.data != object::elf::ELFDATA2LSB {
            return Err("not of 64 bits: such images are not rebuilt");
        }
        let count = file.e_phnum.get(LE);
        if u64::from(file.e_phentsize.get(LE)) != PROGRAM_HEADER || !(1..=MAX_SEGMENTS).contains(&count) {
            return Err("its program headers cannot be such");
        }
        let offset = file.e_phoff.get(LE);
        if offset > PAGE {
            return Err("its program headers are not in its first page");
        }
        let mut table = vec![0; usize::from(count) * PROGRAM_HEADER as usize];
        if !memory
            .fill(at.wrapping_add(offset), &mut table, allowed)
            .is_empty()
        {
            return Err("its program headers are not in memory");
        }
        let (segments, _) =
            pod::slice_from_bytes::<ProgramHeader64<LE>>(&table, count.into()).unwrap_or_default();
        let first = segments
            .iter()
            .find(|s| s.p_type.get(LE) == PT_LOAD && s.p_offset.get(LE) < PAGE)
            .ok_or("no segment begins with its header")?;
        let begins = first.p_vaddr.get(LE).wrapping_sub(first.p_offset.get(LE));
        Ok(Self {
            file: *file,
            segments: segments.to_vec(),
            bias: at.0.wrapping_sub(begins),
        })
    }

    /// The segments that are loaded: those of a size that can be.
    pub(super) fn loads(&self) -> impl Iterator<Item = &ProgramHeader64<LE>> {
        self.segments.iter().filter(|s| {
            let end = s.p_offset.get(LE).checked_add(s.p_memsz.get(LE));
            s.p_type.get(LE) == PT_LOAD && end.is_some_and(|end| end <= MAX_IMAGE)
        })
    }

    /// The address behind its last byte.
    pub(super) fn end(&self) -> Gva {
        let ends = self.loads().map(|s| {
            let end = s.p_vaddr.get(LE).wrapping_add(s.p_memsz.get(LE));
            end.wrapping_add(self.bias)
        });
        Gva(ends.max().unwrap_or(0))
    }

    /// `EXEC`, `DYN`, or what else it says.
    pub(super) fn elf_type(&self) -> &'static str {
        match self.file.e_type.get(LE) {
            ET_EXEC => "EXEC",
            ET_DYN => "DYN",
            object::elf::ET_REL => "REL",
            object::elf::ET_CORE => "CORE",
            _ => "other",
        }
    }
}
