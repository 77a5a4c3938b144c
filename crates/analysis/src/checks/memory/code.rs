//! The code of processes, held against the files that it is of.

use rustc_hash::FxHashMap;
use vmsight_arch::paging::Absent;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_linux::maps::ProcessMaps;
use vmsight_linux::{LinuxError, Mapping, Process, ProcessFields};
use vmsight_memory::AddressSpace;

use crate::checks::sites;
use crate::code;
use crate::recover::files::page_cache::PageCache;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const PROCESS_CODE: Check = Check {
    name: "process-code",
    summary: "Programs and libraries in processes are what their files are",
    compares: "every page of code that a process has for its own with the page of its file in the page cache, but for the kernel's uprobes; \
               the program of each process with the files that are mapped into it",
    why: "Code that is written over in a process (a hook in its libraries, an emptied process that runs something else) leaves the file \
          on disk as it was.",
    techniques: &[
        Technique::PROCESS_INJECTION,
        Technique::new("T1055.012", "Process Injection: Process Hollowing"),
        Technique::new("T1574", "Hijack Execution Flow"),
    ],
    blind_spots: &[
        "Pages whose file's page is not in the page cache any more: how many there are is noted.",
        "A change in the page cache itself, which all processes then share: hold files that were recovered against the package's.",
        "Pages that are swapped out.",
        "Programs that unpack themselves, or move their code to large pages, look as if their file had been replaced.",
    ],
    run,
};

const PAGE: u64 = 4096;
/// Page tables of one mapping that are visited: those of 16 GiB.
const MAX_TABLES: u64 = 1 << 13;
/// Pages of one file that are looked up.
const MAX_PAGES: usize = 1 << 20;
/// Pages of all mappings that are looked at: 256 GiB of code, which processes share.
const MAX_LOOKED_AT: u64 = 1 << 26;
/// Pages of processes' own that are compared with their file's: 1 GiB.
const MAX_COMPARED: u64 = 1 << 18;
/// Ranges of one mapping that differ and are told.
const SHOWN: usize = 4;
/// Differences nearer than this are told as one.
const NEAR: usize = 8;
/// What a uprobe writes at most: a breakpoint, or where it stands on a NOP of five bytes a call (6.18).
const UPROBE: u64 = 5;
const BREAKPOINT: u8 = 0xcc;

/// Where code differs from its file.
struct Difference {
    at: Gva,
    file: Vec<u8>,
    now: Vec<u8>,
}

/// Where the code of one mapping does.
#[derive(Default)]
struct Differences {
    /// The first of them.
    shown: Vec<Difference>,
    places: u64,
    bytes: u64,
    /// Whether one is no breakpoint.
    others: bool,
}

impl Differences {
    fn add(&mut self, at: Gva, file: &[u8], now: &[u8]) {
        self.places += 1;
        self.bytes += now.len() as u64;
        self.others |= *now != [BREAKPOINT];
        if self.shown.len() < SHOWN {
            self.shown.push(Difference {
                at,
                file: file.to_vec(),
                now: now.to_vec(),
            });
        }
    }
}

/// The code of all processes, and what is known of the files behind it.
struct Reader<'c> {
    context: &'c Context,
    cache: PageCache<'c>,
    /// By `address_space`: the page frame of each of its pages, by rising index, as (index, count, frame).
    files: FxHashMap<Gva, Vec<(u64, u64, Gpa)>>,
    /// Offsets of uprobes by inode, rising.
    probes: FxHashMap<Gva, Vec<u64>>,
    /// Pages that may still be looked at, and compared: any number of mappings may be of one and the same memory.
    look_at: u64,
    compare: u64,
    /// Pages of processes' own whose file's page is not in memory.
    unknown: u64,
}

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let mut reader = Reader {
        context,
        cache: PageCache::new(kernel)?,
        files: FxHashMap::default(),
        probes: FxHashMap::default(),
        look_at: MAX_LOOKED_AT,
        compare: MAX_COMPARED,
        unknown: 0,
    };
    for (inode, offset) in sites::user_probes(context, findings)? {
        reader.probes.entry(inode).or_default().push(offset);
    }
    reader
        .probes
        .values_mut()
        .for_each(|offsets| offsets.sort_unstable());
    let rows = kernel.processes(ProcessFields::EXE)?.rows;
    let rows: FxHashMap<Gva, &Process> = rows.iter().map(|row| (row.task, row)).collect();
    let maps = context.maps()?;
    for warning in &maps.warnings {
        findings.note(warning.clone());
    }
    for process in &maps.rows {
        if let Some(row) = rows.get(&process.task) {
            replaced(findings, row, process);
        }
        // It may have ended meanwhile.
        let Ok(Some(space)) = address_space(context, process.task) else {
            continue;
        };
        for mapping in process.maps.rows.iter().filter(|m| is_code(m)) {
            if !findings.go_on() {
                return Ok(());
            }
            let looked = reader.mapping(findings, process, mapping, &space);
            findings.or_note("code of a process", looked);
            if reader.look_at == 0 || reader.compare == 0 {
                findings.note(format!(
                    "code of processes: no more was looked at after {MAX_LOOKED_AT} pages, or {MAX_COMPARED} of their own"
                ));
                return Ok(());
            }
        }
    }
    if reader.unknown > 0 {
        findings.note(format!(
            "{} pages of code that processes have for their own are not in the page cache, and could not be compared",
            reader.unknown
        ));
    }
    Ok(())
}

/// The address space of a task; none of one that has given its memory back.
fn address_space(context: &Context, task: Gva) -> Result<Option<AddressSpace>, LinuxError> {
    let mm = context.object("task_struct", task)?.pointer("mm")?;
    if mm.is_null() {
        return Ok(None);
    }
    let top = context.object("mm_struct", mm)?.pointer("pgd")?;
    let Ok(top) = context.space().translate(top) else {
        return Ok(None);
    };
    let root = Dtb(top.gpa.0 & !(PAGE - 1));
    Ok(Some(context.space().with_absent(root, Absent::Linux)))
}

fn is_code(mapping: &Mapping) -> bool {
    mapping.perms.as_bytes().get(2) == Some(&b'x') && mapping.inode != 0
}

/// A path without what is said of a file whose name was removed.
fn undeleted(path: &str) -> &str {
    path.strip_suffix(" (deleted)").unwrap_or(path)
}

/// A process whose program is mapped nowhere in it.
fn replaced(findings: &mut Findings, row: &Process, process: &ProcessMaps) {
    let mappings = &process.maps;
    let Some(exe) = row.details().exe.as_deref() else {
        return;
    };
    // What could not be read whole says nothing.
    if mappings.rows.is_empty() || !mappings.warnings.is_empty() {
        return;
    }
    // A file whose path cannot be told may be it.
    let is_program = |mapping: &Mapping| {
        let path = mapping.path.as_deref();
        mapping.inode != 0 && path.is_none_or(|path| undeleted(path) == undeleted(exe))
    };
    if mappings.rows.iter().any(is_program) {
        return;
    }
    let finding = Finding::new(
        Severity::Medium,
        format!("program of process {} ({})", process.pid, process.name),
        "the file of its program is mapped nowhere in it: what it runs has been put in its place",
    );
    let files = mappings.rows.iter().filter_map(|m| m.path.as_deref());
    let mut files: Vec<&str> = files.collect();
    files.dedup();
    files.truncate(8);
    findings.report(
        finding
            .at(process.task)
            .with(Evidence::value("program", exe))
            .with(Evidence::value("mapped instead", files.join(", "))),
    );
}

impl Reader<'_> {
    fn mapping(
        &mut self,
        findings: &mut Findings,
        process: &ProcessMaps,
        mapping: &Mapping,
        space: &AddressSpace,
    ) -> Result<(), LinuxError> {
        let context = self.context;
        let file = context
            .object("vm_area_struct", mapping.vma)?
            .pointer("vm_file")?;
        let file = context.object("file", file)?;
        let (pages, inode) = (file.pointer("f_mapping")?, file.pointer("f_inode")?);
        if !self.files.contains_key(&pages) {
            let found = self.cache.pages(pages, MAX_PAGES)?;
            let stretches = found.stretches.iter().map(|s| (s.index, s.count, s.gpa));
            self.files.insert(pages, stretches.collect());
        }
        let known = self.files.get(&pages).map_or(&[][..], Vec::as_slice);
        let mut differences = Differences::default();
        let last = Gva(mapping.end.0.saturating_sub(1));
        for page in space.mappings(mapping.start..=last, MAX_TABLES) {
            let Ok(page) = page else { break };
            let size = 1u64 << page.translation.page_shift;
            let first = Gpa(page.translation.gpa.0 & !(PAGE - 1));
            let parts = (size / PAGE).min(MAX_TABLES).min(self.look_at);
            self.look_at -= parts;
            if parts == 0 {
                break;
            }
            for part in 0..parts {
                let at = page.gva.wrapping_add(part * PAGE);
                let frame = Gpa(first.0.wrapping_add(part * PAGE));
                findings.looked_at(1);
                let offset = at.0.wrapping_sub(mapping.start.0).wrapping_add(mapping.offset);
                match frame_of(known, offset / PAGE) {
                    Some(of_file) if of_file == frame => {}
                    Some(_) if self.compare == 0 => {}
                    Some(of_file) => {
                        self.compare -= 1;
                        let probes = self.probes.get(&inode).map_or(&[][..], Vec::as_slice);
                        differ(context, (at, offset), (of_file, frame), probes, &mut differences);
                    }
                    None => self.unknown += 1,
                }
            }
        }
        if differences.places > 0 {
            report(context, findings, process, mapping, &differences)?;
        }
        Ok(())
    }
}

/// The frame of the page of this index.
fn frame_of(known: &[(u64, u64, Gpa)], index: u64) -> Option<Gpa> {
    let before = known
        .partition_point(|(first, _, _)| *first <= index)
        .checked_sub(1)?;
    let (first, count, frame) = known.get(before)?;
    let within = index.checked_sub(*first).filter(|within| within < count)?;
    frame.0.checked_add(within * PAGE).map(Gpa)
}

/// Adds where the page that a process has for its own differs from the file's.
fn differ(
    context: &Context,
    (at, offset): (Gva, u64),
    (of_file, own): (Gpa, Gpa),
    probes: &[u64],
    differences: &mut Differences,
) {
    let memory = context.kernel().memory();
    let (mut file, mut now) = ([0; PAGE as usize], [0; PAGE as usize]);
    if memory.read(of_file, &mut file).is_err() || memory.read(own, &mut now).is_err() || file == now {
        return;
    }
    let is_probe = |place: usize| {
        let place = offset.wrapping_add(place as u64);
        let before = probes.partition_point(|probe| *probe <= place).checked_sub(1);
        before
            .and_then(|nth| probes.get(nth))
            .is_some_and(|probe| place - probe < UPROBE)
    };
    let odd = file.iter().zip(&now).enumerate();
    let odd = odd.filter(|(place, (old, new))| old != new && !is_probe(*place));
    let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
    for (place, _) in odd {
        match ranges.last_mut() {
            Some(last) if place - last.end < NEAR => last.end = place + 1,
            _ => ranges.push(place..place + 1),
        }
    }
    for range in ranges {
        let [file, now] = [&file, &now].map(|page| page.get(range.clone()).unwrap_or_default());
        differences.add(at.wrapping_add(range.start as u64), file, now);
    }
}

fn report(
    context: &Context,
    findings: &mut Findings,
    process: &ProcessMaps,
    mapping: &Mapping,
    differences: &Differences,
) -> Result<(), LinuxError> {
    let traced = context.object("task_struct", process.task)?.number("ptrace")? != 0;
    // A debugger's breakpoints are single bytes, and it is there.
    let breakpoints = traced && !differences.others;
    let (severity, explanation) = match breakpoints {
        true => (
            Severity::Info,
            format!(
                "{} breakpoints of who traces it stand in its code",
                differences.places
            ),
        ),
        false => (
            Severity::High,
            format!(
                "{} bytes of its code are not what its file has: it was written over in memory",
                differences.bytes
            ),
        ),
    };
    let path = mapping.path.as_deref().unwrap_or("?");
    let first = differences.shown.first().map_or(mapping.start, |d| d.at);
    let mut finding = Finding::new(
        severity,
        format!("code of {path} in process {} ({})", process.pid, process.name),
        explanation,
    )
    .at(first)
    .with(Evidence::value("places", differences.places));
    for difference in &differences.shown {
        let bytes = |what: &str, bytes: &[u8]| Evidence::Bytes {
            what: what.to_owned(),
            at: difference.at,
            bytes: bytes.iter().take(32).copied().collect(),
        };
        finding = finding
            .with(bytes("bytes of the file", &difference.file))
            .with(bytes("bytes now", &difference.now))
            .with(code::of_bytes("code now", difference.at, &difference.now));
    }
    findings.report(finding);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_a_file_is_in_the_stretch_that_has_it() {
        let known = [(2, 3, Gpa(0x10_0000)), (9, 1, Gpa(0x5000))];
        assert_eq!(frame_of(&known, 1), None);
        assert_eq!(frame_of(&known, 2), Some(Gpa(0x10_0000)));
        assert_eq!(frame_of(&known, 4), Some(Gpa(0x10_2000)));
        assert_eq!(frame_of(&known, 5), None);
        assert_eq!(frame_of(&known, 9), Some(Gpa(0x5000)));
        assert_eq!(frame_of(&known, 10), None);
    }
}
