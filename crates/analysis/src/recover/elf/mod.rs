//! ELF images out of memory: the programs and libraries of processes, modules, the kernel; each at the addresses at which it was loaded.
//!
//! A process's image is rebuilt from the program headers in its own first page. What the process has not touched yet is taken from the
//! page cache, where its file's pages lie; what is neither here nor there is zeros, and listed.

mod file;
mod kernel;
mod process;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use object::LittleEndian as LE;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::listing::address;
use vmsight_linux::module::{Module, ModuleFields};
use vmsight_linux::{Kernel, LinuxError, Listing, Problem, ProcessMaps};
use vmsight_memory::AddressSpace;

use super::files::page_cache::PageCache;
use super::frames::PAGE;
use super::output::{self, ExtractError, Manifest, create, digest, failure, name};
use file::{Rights, Section};
use process::{Files, Header, MAX_IMAGE, Memory};

/// Images of one listing.
const MAX_IMAGES: usize = 1 << 16;
/// No more is looked at, and no more written, than so many times the guest's memory: many processes have the same libraries.
const MAX_COPIES: u64 = 8;
/// Bytes that are copied at once.
const AT_ONCE: u64 = 1 << 20;
/// Gaps of one image that are listed.
const MAX_GAPS: usize = 1 << 12;

/// What images are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which<'a> {
    /// Those of all processes, all modules, and the kernel.
    All,
    /// Those of one process.
    Process(i32),
    /// One module; dashes and underscores are the same.
    Module(&'a str),
    /// The kernel.
    Kernel,
}

/// One ELF image in memory.
#[derive(Clone, Debug, Serialize)]
pub struct ElfImage {
    /// The process; `None` for the kernel and modules.
    pub pid: Option<i32>,
    /// The process's name, or the module's.
    pub name: String,
    /// `program`: what the process executes; `library`: another file that it has mapped; `vdso`; `memory`: an image in memory of no file;
    /// `module`; `kernel`.
    pub kind: &'static str,
    /// The file that it was loaded from.
    pub path: Option<String>,
    /// That file's name was removed.
    pub deleted: bool,
    /// Its first byte.
    #[serde(serialize_with = "address::gva")]
    pub start: Gva,
    /// The address behind its last byte.
    #[serde(serialize_with = "address::gva")]
    pub end: Gva,
    /// What its header says that it is: `EXEC`, `DYN`; `None` for the kernel and modules, which have none in memory.
    pub elf_type: Option<&'static str>,
    /// Where it begins to run.
    #[serde(serialize_with = "address::gva_opt")]
    pub entry: Option<Gva>,
    /// What keeps it from being rebuilt whole.
    pub problems: Vec<Problem>,
}

/// What became of one image.
#[derive(Clone, Debug, Serialize)]
pub struct WrittenElf {
    /// The image in the guest.
    #[serde(flatten)]
    pub image: ElfImage,
    /// Where it was written, below the folder.
    pub output: Option<PathBuf>,
    /// Bytes of memory that are in it.
    pub written: u64,
    /// Of those, what came from the page cache: pages of its file that the process had not touched, or does not have mapped now.
    pub from_cache: u64,
    /// Bytes that are in no memory; they are zeros in the file.
    pub missing: u64,
    /// Where: address and length in bytes.
    pub missing_ranges: Vec<(u64, u64)>,
    /// SHA-256 of the file.
    pub sha256: Option<String>,
    /// Why it could not be written, or not as it is.
    pub failure: Option<String>,
}

/// The ELF images in a guest's memory: those of processes by process and address, then modules, then the kernel.
///
/// # Errors
/// If processes or modules cannot be listed, or what was asked for is not there.
pub fn images(kernel: &Kernel, which: Which<'_>) -> Result<Listing<ElfImage>, LinuxError> {
    let mut out = Listing::default();
    if let Which::All | Which::Process(_) = which {
        let cache = PageCache::new(kernel)?;
        let finder = Finder::new(kernel, &cache)?;
        let mut allowed = kernel.memory().size().saturating_mul(MAX_COPIES);
        let (processes, warnings) = processes(kernel, which)?;
        warnings.into_iter().for_each(|w| out.warn(w));
        for process in &processes {
            finder.images(process, &mut out, &mut allowed);
        }
    }
    if let Which::All | Which::Module(_) = which {
        let (modules, warnings) = modules(kernel, which)?;
        warnings.into_iter().for_each(|w| out.warn(w));
        for module in &modules {
            if push(&mut out, of_module(module)) {
                break;
            }
        }
    }
    if let Which::All | Which::Kernel = which {
        out.rows.push(of_kernel(kernel, &kernel::image(kernel)?));
    }
    Ok(out)
}

/// Adds a row; true where the listing is full.
fn push(out: &mut Listing<ElfImage>, row: ElfImage) -> bool {
    if out.rows.len() >= MAX_IMAGES {
        out.warn(format!("images: cut after {MAX_IMAGES}"));
        return true;
    }
    out.rows.push(row);
    false
}

fn processes(kernel: &Kernel, which: Which<'_>) -> Result<(Vec<ProcessMaps>, Vec<String>), LinuxError> {
    let mut all = kernel.all_maps()?;
    if let Which::Process(pid) = which {
        all.rows.retain(|process| process.pid == pid);
        if all.rows.is_empty() {
            return Err(LinuxError::NotFound(format!(
                "no process {pid} with memory of its own"
            )));
        }
    }
    Ok((all.rows, all.warnings))
}

fn modules(kernel: &Kernel, which: Which<'_>) -> Result<(Vec<Module>, Vec<String>), LinuxError> {
    let mut all = kernel.modules(ModuleFields {
        sections: true,
        parameters: false,
    })?;
    if let Which::Module(name) = which {
        let wanted = name.replace('-', "_");
        all.rows.retain(|module| module.name == wanted);
        if all.rows.is_empty() {
            return Err(LinuxError::NotFound(format!("no module {name} is loaded")));
        }
    }
    Ok((all.rows, all.warnings))
}

fn of_module(module: &Module) -> ElfImage {
    let own = module
        .ranges
        .iter()
        .filter(|range| range.kind != "percpu" && range.size > 0);
    let end = own
        .clone()
        .map(|range| range.base.0.saturating_add(range.size))
        .max();
    ElfImage {
        pid: None,
        name: module.name.clone(),
        kind: "module",
        path: None,
        deleted: false,
        start: Gva(own.map(|range| range.base.0).min().unwrap_or(module.base.0)),
        end: Gva(end.unwrap_or(module.base.0)),
        elf_type: None,
        entry: None,
        problems: module.problems.clone(),
    }
}

fn of_kernel(kernel: &Kernel, parts: &kernel::Parts) -> ElfImage {
    let (start, end) = kernel::extent(parts);
    let problems = parts.problems.iter();
    ElfImage {
        pid: None,
        name: kernel.release().to_owned(),
        kind: "kernel",
        path: None,
        deleted: false,
        start,
        end,
        elf_type: None,
        entry: None,
        problems: problems.map(|p| Problem::new("sections", p.clone())).collect(),
    }
}

/// What images in processes are looked for with.
struct Finder<'k> {
    kernel: &'k Kernel,
    files: Files,
    cache: &'k PageCache<'k>,
}

impl<'k> Finder<'k> {
    fn new(kernel: &'k Kernel, cache: &'k PageCache<'k>) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel,
            files: Files::new(kernel)?,
            cache,
        })
    }

    /// Adds the images of one process.
    fn images(&self, process: &ProcessMaps, out: &mut Listing<ElfImage>, allowed: &mut u64) {
        let mut memory = match Memory::of(self.kernel, &self.files, self.cache, process) {
            Ok(Some(memory)) => memory,
            Ok(None) => return,
            Err(error) => return out.warn(format!("images of process {}: {error}", process.pid)),
        };
        for warning in &process.maps.warnings {
            out.warn(format!("process {}: {warning}", process.pid));
        }
        // An image begins where its file does; in memory of no file, where a mapping does.
        for map in process.maps.rows.iter().filter(|map| map.offset == 0) {
            if *allowed == 0 {
                return out.warn("images: cut, the processes have more memory than the guest can have");
            }
            let Some(header) = Header::read(&mut memory, map.start, allowed) else {
                continue;
            };
            let mut row = ElfImage {
                pid: Some(process.pid),
                name: process.name.clone(),
                kind: self.files.kind(self.kernel, process, map),
                path: map.path.clone(),
                deleted: map.deleted,
                start: map.start,
                end: map.end,
                elf_type: None,
                entry: None,
                problems: Vec::new(),
            };
            match header {
                Ok(header) => {
                    row.end = header.end().max(map.end);
                    row.elf_type = Some(header.elf_type());
                    let entry = header.file.e_entry.get(LE);
                    row.entry = (entry != 0).then(|| Gva(entry.wrapping_add(header.bias)));
                    if header.loads().count() < header.segments.iter().filter(is_load).count() {
                        row.problems
                            .push(Problem::new("end", "a segment's size is none that can be"));
                    }
                }
                Err(reason) => row.problems.push(Problem::new("elf_type", reason)),
            }
            if push(out, row) {
                return;
            }
        }
    }
}

fn is_load(segment: &&object::elf::ProgramHeader64<LE>) -> bool {
    segment.p_type.get(LE) == object::elf::PT_LOAD
}

/// Writes these images to the folder `into`, which must be new or empty, and a line of JSON on each to `manifest.jsonl` there. Those of a
/// process go to a folder `PID-NAME`, modules to `modules`. `each` is told of every image as it is done.
///
/// Nothing outside the folder is touched, whatever the guest's names are.
///
/// # Errors
/// If the folder is there and not empty, or cannot be written to. What concerns one image is in its own row.
pub fn write(
    kernel: &Kernel,
    images: &[ElfImage],
    into: &Path,
    mut each: impl FnMut(&WrittenElf),
) -> Result<(), ExtractError> {
    let mut manifest = Manifest::new(into)?;
    let cache = PageCache::new(kernel)?;
    let mut writer = Writer {
        kernel,
        finder: Finder::new(kernel, &cache)?,
        into,
        allowed: kernel.memory().size().saturating_mul(MAX_COPIES),
    };
    let of_processes = images.iter().any(|image| image.pid.is_some());
    let processes = match of_processes {
        true => processes(kernel, Which::All)?.0,
        false => Vec::new(),
    };
    let of_modules = images.iter().any(|image| image.kind == "module");
    let modules = match of_modules {
        true => modules(kernel, Which::All)?.0,
        false => Vec::new(),
    };
    for image in images {
        let mut done = WrittenElf {
            image: image.clone(),
            output: None,
            written: 0,
            from_cache: 0,
            missing: 0,
            missing_ranges: Vec::new(),
            sha256: None,
            failure: None,
        };
        let process = image
            .pid
            .and_then(|pid| processes.iter().find(|process| process.pid == pid));
        let module = modules.iter().find(|module| module.name == image.name);
        let result = match (image.kind, process, module) {
            ("kernel", ..) => kernel::image(kernel)
                .map_err(io::Error::other)
                .and_then(|parts| writer.parts(&parts, &mut done)),
            ("module", _, Some(module)) => writer.parts(&kernel::module(kernel, module), &mut done),
            (_, Some(process), _) => writer.process(process, &mut done),
            _ => Err(io::Error::other("it is gone meanwhile")),
        };
        done.failure = failure(result, into, done.output.as_deref())?;
        manifest.add(&done)?;
        each(&done);
    }
    manifest.finish()
}

struct Writer<'k> {
    kernel: &'k Kernel,
    finder: Finder<'k>,
    into: &'k Path,
    /// Bytes that may still be looked at and written.
    allowed: u64,
}

/// Where the contents of an image come from.
enum Source<'s, 'k> {
    Kernel(&'s AddressSpace),
    Process(&'s mut Memory<'k>),
}

impl Source<'_, '_> {
    fn fill(&mut self, at: Gva, to: &mut [u8], allowed: &mut u64) -> Vec<Range<usize>> {
        match self {
            Self::Kernel(space) => {
                *allowed = allowed.saturating_sub(to.len() as u64);
                let pieces = space.read_partial(at, to).into_iter();
                pieces
                    .filter(|(_, read)| read.is_err())
                    .map(|(range, _)| range)
                    .collect()
            }
            Self::Process(memory) => memory.fill(at, to, allowed),
        }
    }
}

impl Writer<'_> {
    /// Makes the image's file.
    fn open(&self, image: &ElfImage) -> io::Result<(PathBuf, File)> {
        let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        let (folder, file) = match (image.pid, image.kind) {
            (Some(pid), kind) => (
                format!("{pid}-{}", image.name),
                format!(
                    "{:x}-{}",
                    image.start.0,
                    image.path.as_deref().map_or(kind.to_owned(), last)
                ),
            ),
            (None, "module") => ("modules".to_owned(), format!("{}.elf", image.name)),
            _ => (
                name::component(&format!("kernel-{}", image.name)),
                "vmlinux".to_owned(),
            ),
        };
        let folder = PathBuf::from(name::component(&folder));
        output::folders(self.into, &folder)?;
        let mut failure = io::Error::from(ErrorKind::AlreadyExists);
        // Processes of a guest that lies may have the same pid, name and addresses.
        for attempt in 0..16 {
            let name = match attempt {
                0 => name::component(&file),
                _ => name::component(&format!("{attempt}-{file}")),
            };
            let at = folder.join(name);
            match create(&self.into.join(&at)) {
                Ok(file) => return Ok((at, file)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Writes the image of a process.
    fn process(&mut self, process: &ProcessMaps, done: &mut WrittenElf) -> io::Result<()> {
        let memory = Memory::of(self.kernel, &self.finder.files, self.finder.cache, process);
        let gone = || io::Error::other("it is gone meanwhile");
        let mut memory = memory.map_err(io::Error::other)?.ok_or_else(gone)?;
        let header = Header::read(&mut memory, done.image.start, &mut self.allowed)
            .ok_or_else(gone)?
            .map_err(io::Error::other)?;
        let (at, mut out) = self.open(&done.image)?;
        done.output = Some(at);
        let mut segments = header.segments.clone();
        // Nothing is behind the last in the file: there is room for what it has in memory beyond its file.
        let last = header.loads().map(|s| s.p_offset.get(LE)).max();
        let mut sections: Vec<Section> = Vec::new();
        let mut end = 0;
        for segment in &mut segments {
            let (offset, in_memory) = (segment.p_offset.get(LE), segment.p_memsz.get(LE));
            let start = segment.p_vaddr.get(LE).wrapping_add(header.bias);
            // GNU_STACK and the like have no place.
            if in_memory > 0 {
                segment.p_vaddr.set(LE, start);
                segment.p_paddr.set(LE, start);
            }
            if !is_load(&&*segment) {
                continue;
            }
            let fits = offset.checked_add(in_memory).is_some_and(|end| end <= MAX_IMAGE);
            let size = match (fits, Some(offset) == last) {
                (false, _) => 0,
                (true, true) => in_memory,
                (true, false) => segment.p_filesz.get(LE).min(in_memory),
            };
            segment.p_filesz.set(LE, size);
            let rights = Rights::of_segment(segment.p_flags.get(LE));
            let same = sections.iter().filter(|section| section.rights == rights).count();
            let piece = Section {
                name: match same {
                    0 => rights.name().to_owned(),
                    _ => format!("{}.{same}", rights.name()),
                },
                address: start,
                size,
                offset,
                rights,
            };
            self.copy(&mut Source::Process(&mut memory), &piece, &out, done)?;
            end = end.max(offset + size);
            sections.push(piece);
        }
        let mut own = header.file;
        if own.e_entry.get(LE) != 0 {
            own.e_entry.set(LE, own.e_entry.get(LE).wrapping_add(header.bias));
        }
        let headers = own.e_phoff.get(LE) + segments.len() as u64 * file::PROGRAM_HEADER;
        file::finish(&out, own, &segments, &sections, &[], end.max(headers))?;
        done.from_cache = memory.from_cache;
        self.finish(&mut out, done)
    }

    /// Writes the kernel or a module.
    fn parts(&mut self, parts: &kernel::Parts, done: &mut WrittenElf) -> io::Result<()> {
        let (at, mut out) = self.open(&done.image)?;
        done.output = Some(at);
        let kernel = self.kernel;
        for piece in &parts.pieces {
            self.copy(&mut Source::Kernel(kernel.space()), piece, &out, done)?;
        }
        let segments: Vec<_> = parts.pieces.iter().map(file::load).collect();
        let (sections, symbols) = (&parts.sections, &parts.symbols);
        file::finish(&out, file::header(), &segments, sections, symbols, parts.end())?;
        let known = done.image.problems.len();
        for problem in &parts.problems {
            let problem = Problem::new("sections", problem.clone());
            if !done.image.problems.iter().take(known).any(|p| *p == problem) {
                done.image.problems.push(problem);
            }
        }
        self.finish(&mut out, done)
    }

    /// Copies a piece of memory to its place in the file. Pages of zeros are left out: the file is sparse.
    fn copy(
        &mut self,
        source: &mut Source<'_, '_>,
        piece: &Section,
        out: &File,
        done: &mut WrittenElf,
    ) -> io::Result<()> {
        let mut buffer = vec![0; AT_ONCE.min(piece.size) as usize];
        let mut copied = 0;
        while copied < piece.size {
            if self.allowed == 0 {
                let text = "cut: the images have more memory than the guest can have";
                return Err(io::Error::other(text));
            }
            let len = AT_ONCE.min(piece.size - copied);
            let at = Gva(piece.address.wrapping_add(copied));
            let to = buffer.get_mut(..len as usize).unwrap_or(&mut []);
            let missing = source.fill(at, to, &mut self.allowed);
            for (nth, page) in to.chunks(PAGE as usize).enumerate() {
                if page.iter().any(|&b| b != 0) {
                    out.write_all_at(page, piece.offset + copied + nth as u64 * PAGE)?;
                }
            }
            done.written += len;
            for range in missing {
                let (start, len) = (at.0.wrapping_add(range.start as u64), range.len() as u64);
                done.written = done.written.saturating_sub(len);
                done.missing += len;
                let gaps = done.missing_ranges.len();
                match done.missing_ranges.last_mut() {
                    Some((first, before)) if first.checked_add(*before) == Some(start) => *before += len,
                    _ if gaps < MAX_GAPS => done.missing_ranges.push((start, len)),
                    _ => {}
                }
            }
            copied += len;
        }
        Ok(())
    }

    /// What there is to say when the file is made.
    fn finish(&mut self, out: &mut File, done: &mut WrittenElf) -> io::Result<()> {
        let size = out.metadata()?.len();
        if size <= self.allowed {
            self.allowed -= size;
            done.sha256 = Some(digest(out)?);
        }
        Ok(())
    }
}
