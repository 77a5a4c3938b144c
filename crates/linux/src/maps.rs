//! A process's mappings: `vm_area_struct`s, as /proc/PID/maps shows them.

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::{Budget, NO_ROOM, Own, Share};
use crate::layout::{Buffer, Extent, Field, Place, Spans, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::structures::{maple, rbtree};
use crate::task::layouts::{MmLayout, TaskLayout};
use crate::task::places::{PlaceCache, PlaceReader};
use crate::task::walk;
use crate::text::guest_array_text;
use crate::{Kernel, LinuxError};

layout! {
    /// `struct vm_area_struct`.
    struct VmaLayout = "vm_area_struct" {
        start: Field<u64> = "vm_start",
        end: Field<u64> = "vm_end",
        flags: Field<u64> = "vm_flags",
        pgoff: Field<u64> = "vm_pgoff",
        file: Field<Gva> = "vm_file",
        ops: Field<Gva> = "vm_ops",
        private: Field<Gva> = "vm_private_data",
        mm: Field<Gva> = "vm_mm",
        // Up to 6.0.
        rb: Option<Place> = "vm_rb",
        // Since 5.17, with CONFIG_ANON_VMA_NAME.
        anon_name: Option<Field<Gva>> = "anon_name",
        shared: Option<Place> = "shared",
    }
}

layout! {
    /// `struct anon_vma_name`: a name given with prctl(PR_SET_VMA).
    struct AnonNameLayout = "anon_vma_name" {
        name: Place = "name",
    }
}

layout! {
    /// `struct vm_special_mapping`: vdso and the like.
    struct SpecialMappingLayout = "vm_special_mapping" {
        name: Field<Gva> = "name",
    }
}

layout! {
    /// `struct inode`, as far as a mapping needs it.
    struct MappedInodeLayout = "inode" {
        number: Field<u64> = "i_ino",
        super_block: Field<Gva> = "i_sb",
    }
}

layout! {
    /// `struct super_block`, as far as a mapping needs it.
    struct MappedSuperLayout = "super_block" {
        device: Field<u32> = "s_dev",
    }
}

/// What a process has to itself of the rows of a listing of all.
const OWN: Own = Own {
    rows: 1024,
    bytes: 64 << 10,
};

/// More than any process has: `vm.max_map_count` is 65,530 by default, some 1 Mi where it was raised.
const MAX_MAPPINGS: usize = 4 << 20;

const VM_READ: u64 = 1;
const VM_WRITE: u64 = 2;
const VM_EXEC: u64 = 4;
const VM_MAYSHARE: u64 = 0x80;

/// One mapping.
#[derive(Clone, Debug, Serialize)]
pub struct Mapping {
    /// The process.
    pub pid: i32,
    /// First address.
    #[serde(serialize_with = "address::gva")]
    pub start: Gva,
    /// Address behind the last.
    #[serde(serialize_with = "address::gva")]
    pub end: Gva,
    /// Size in KiB.
    pub size_kb: u64,
    /// `rwxp`, or `s` last where it is shared.
    pub perms: String,
    /// Offset in the file in bytes; 0 without a file.
    pub offset: u64,
    /// `major:minor` of the file's device in hex; `00:00` without a file.
    pub device: String,
    /// Inode number of the file; 0 without a file.
    pub inode: u64,
    /// The file's path, or what /proc shows in brackets: `[heap]`, `[stack]`, `[vdso]`, `[anon:name]`.
    pub path: Option<String>,
    /// Whether the file was deleted.
    pub deleted: bool,
    /// All of `vm_flags`.
    #[serde(serialize_with = "address::hex_opt")]
    pub flags: Option<u64>,
    /// Address of the `vm_area_struct`.
    #[serde(serialize_with = "address::gva")]
    pub vma: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// The mappings of one process.
#[derive(Clone, Debug)]
pub struct ProcessMaps {
    /// Pid in the root namespace.
    pub pid: i32,
    /// The process's name.
    pub name: String,
    /// Its `task_struct`: what tells two processes from one another that say they have the same pid.
    pub task: Gva,
    /// Its mappings by rising address, and what may be missing of them.
    pub maps: Listing<Mapping>,
}

impl Kernel {
    /// The mappings of the process `pid`, by rising address; none of a kernel thread. Where the guest lies and several processes have
    /// that pid, those of all of them, and a warning.
    ///
    /// # Errors
    /// If there is no such process, its `mm_struct` cannot be read, or the kernel's types lack a member.
    pub fn maps(&self, pid: i32) -> Result<Listing<Mapping>, LinuxError> {
        let layout: Arc<TaskLayout> = self.layout()?;
        let first = self.task(pid)?;
        let mut tasks = walk::task_list(self)?.tasks;
        tasks.retain(|&task| task != first && layout.pid.read(self.space(), task).is_ok_and(|p| p == pid));
        tasks.insert(0, first);
        let reader = MapReader::new(self)?;
        let budget = Budget::shared_by(tasks.len(), OWN);
        let mut out = Listing::default();
        if tasks.len() > 1 {
            out.warn(format!(
                "{} processes have the pid {pid}; the mappings of all are shown",
                tasks.len()
            ));
        }
        for task in tasks {
            let maps = reader.of_task(pid, task, &budget)?;
            out.rows.extend(maps.rows);
            maps.warnings.into_iter().for_each(|warning| out.warn(warning));
        }
        Ok(out)
    }

    /// The mappings of all processes that have any, in the kernel's order of processes, in one walk of their list.
    ///
    /// What cannot be read of one process is a warning of its own mappings; the outer warnings are about the list of processes.
    ///
    /// # Errors
    /// If the processes cannot be listed or the kernel's types lack a member.
    pub fn all_maps(&self) -> Result<Listing<ProcessMaps>, LinuxError> {
        let layout: Arc<TaskLayout> = self.layout()?;
        let list = walk::task_list(self)?;
        let reader = MapReader::new(self)?;
        let budget = Budget::shared_by(list.tasks.len(), OWN);
        let space = self.space();
        let mut out = Listing::new(Vec::new(), list.warnings());
        let mut comm = vec![0; layout.comm.size().min(64) as usize];
        for task in list.tasks {
            let facts = layout.pid.read(space, task).and_then(|pid| {
                space.read(layout.comm.at(task), &mut comm)?;
                Ok((pid, layout.mm.read(space, task)?))
            });
            let (pid, mm) = match facts {
                Ok(facts) => facts,
                Err(error) => {
                    out.warn(format!("the process at {task} cannot be read: {error}"));
                    continue;
                }
            };
            if mm.is_null() {
                continue;
            }
            let maps = reader.of_task(pid, task, &budget).unwrap_or_else(|error| {
                let mut source = String::new();
                if let Some(cause) = std::error::Error::source(&error) {
                    source = format!(": {cause}");
                }
                Listing::new(
                    Vec::new(),
                    vec![format!("maps of process {pid}: {error}{source}")],
                )
            });
            out.rows.push(ProcessMaps {
                pid,
                name: guest_array_text(&comm),
                task,
                maps,
            });
        }
        budget.warning("mappings").into_iter().for_each(|w| out.warn(w));
        Ok(out)
    }
}

/// What the mappings of any process are read with.
pub(crate) struct MapReader {
    kernel: Kernel,
    vma: Arc<VmaLayout>,
    spans: Spans,
    mm: Arc<MmLayout>,
    anon_name: Option<Arc<AnonNameLayout>>,
    special: Option<Arc<SpecialMappingLayout>>,
    special_ops: Vec<Gva>,
    places: PlaceReader,
    // Up to 6.1 the name shares its place with the links of file mappings, so that a file mapping has none.
    named_files: bool,
    inode: Arc<MappedInodeLayout>,
    super_block: Arc<MappedSuperLayout>,
}

/// The bounds that tell heap and stack.
struct Bounds {
    start_brk: u64,
    brk: u64,
    start_stack: u64,
}

impl MapReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let vma: Arc<VmaLayout> = kernel.layout()?;
        let mut extents: Vec<Extent> = [&vma.start, &vma.end, &vma.flags, &vma.pgoff]
            .map(|f| f.extent())
            .to_vec();
        extents.extend([&vma.file, &vma.ops, &vma.private, &vma.mm].map(|f| f.extent()));
        extents.extend(vma.anon_name.map(|f| f.extent()));
        let spans = Spans::covering("vm_area_struct", kernel.release(), extents)?;
        let named_files = vma
            .anon_name
            .is_some_and(|name| vma.shared.is_none_or(|s| s.offset() != name.extent().offset));
        Ok(Self {
            spans,
            vma,
            mm: kernel.layout()?,
            anon_name: kernel.layout().ok(),
            special: kernel.layout().ok(),
            special_ops: ["special_mapping_vmops", "legacy_special_mapping_vmops"]
                .iter()
                .filter_map(|name| kernel.symbol(name).ok())
                .collect(),
            places: PlaceReader::new(kernel)?,
            named_files,
            inode: kernel.layout()?,
            super_block: kernel.layout()?,
            kernel: kernel.clone(),
        })
    }

    /// The addresses of the `vm_area_struct`s of the `mm_struct` at `mm`, `limit` at most, and what kept the walk from its end.
    fn areas(&self, mm: Gva, limit: usize) -> Result<(Vec<Gva>, Option<String>), LinuxError> {
        let what = "tree of mappings";
        if let Some(tree) = &self.mm.mm_mt {
            let walk = maple::walk(&self.kernel, tree.at(mm), limit)?;
            return Ok((
                walk.items.iter().map(|entry| entry.value).collect(),
                walk.end.warning(what),
            ));
        }
        let (Some(tree), Some(node)) = (&self.mm.mm_rb, &self.vma.rb) else {
            return Err(LinuxError::NoMember {
                structure: "mm_struct".to_owned(),
                member: "mm_mt or mm_rb".to_owned(),
                release: self.kernel.release().to_owned(),
            });
        };
        let walk = rbtree::walk(self.kernel.space(), tree.at(mm), limit);
        Ok((
            walk.items.iter().map(|&at| node.container(at)).collect(),
            walk.end.warning(what),
        ))
    }

    /// The `struct file`s that the `mm_struct` at `mm` has mapped, each once, and what kept the walk from its end.
    pub(crate) fn files(&self, mm: Gva, budget: &Budget) -> Result<(Vec<Gva>, Option<String>), LinuxError> {
        let (areas, warning) = self.areas(mm, budget.limit(MAX_MAPPINGS))?;
        budget.walked(areas.len());
        let mut seen = rustc_hash::FxHashSet::default();
        let files = areas
            .iter()
            .filter_map(|&area| self.vma.file.read(self.kernel.space(), area).ok());
        Ok((
            files
                .filter(|&file| !file.is_null() && seen.insert(file))
                .collect(),
            warning,
        ))
    }

    /// The mappings of the process `pid` whose `task_struct` is at `task`, made again where a live guest changed them meanwhile.
    fn of_task(&self, pid: i32, task: Gva, budget: &Budget) -> Result<Listing<Mapping>, LinuxError> {
        let layout: Arc<TaskLayout> = self.kernel.layout()?;
        let mm = layout
            .mm
            .read(self.kernel.space(), task)
            .map_err(LinuxError::read("task_struct.mm", task))?;
        if mm.is_null() {
            return Ok(Listing::default());
        }
        let limit = budget.share().rows_left(MAX_MAPPINGS);
        let listing = settled(
            self.kernel.memory().is_live(),
            |row: &Mapping| row.problems.len(),
            || self.mappings(pid, mm, limit),
        )?;
        let mut share = budget.share();
        share.rows(listing.rows.len());
        Ok(self.affordable(listing, &mut share))
    }

    /// The listing without the paths that there is no room for.
    fn affordable(&self, mut listing: Listing<Mapping>, share: &mut Share<'_>) -> Listing<Mapping> {
        for row in &mut listing.rows {
            if !share.bytes(row.path.as_ref().map_or(0, String::len)) {
                row.path = None;
                row.problems.push(Problem::new("path", NO_ROOM));
            }
        }
        listing
    }

    /// The first `limit` mappings of the `mm_struct` at `mm`.
    fn mappings(&self, pid: i32, mm: Gva, limit: usize) -> Result<Listing<Mapping>, LinuxError> {
        let space = self.kernel.space();
        let bounds = |error: ReadError| LinuxError::Read {
            what: "mm_struct".to_owned(),
            at: mm,
            source: error,
        };
        let bounds = Bounds {
            start_brk: self.mm.start_brk.read(space, mm).map_err(bounds)?,
            brk: self.mm.brk.read(space, mm).map_err(bounds)?,
            start_stack: self.mm.start_stack.read(space, mm).map_err(bounds)?,
        };
        let (areas, warning) = self.areas(mm, limit)?;
        let mut out = Listing::new(Vec::with_capacity(areas.len()), warning.into_iter().collect());
        let mut buffer = self.spans.buffer();
        let mut cache = PlaceCache::default();
        for area in areas {
            out.rows
                .push(self.row(pid, area, &bounds, &mut buffer, &mut cache));
        }
        if out
            .rows
            .windows(2)
            .any(|pair| matches!(pair, [a, b] if a.end > b.start))
        {
            out.warn("mappings overlap: the tree was changed while read, or tampered with");
        }
        out.rows.extend(self.vsyscall(pid, mm, &mut buffer));
        Ok(out)
    }

    fn row(
        &self,
        pid: i32,
        area: Gva,
        bounds: &Bounds,
        buffer: &mut Buffer,
        cache: &mut PlaceCache,
    ) -> Mapping {
        let mut row = Mapping {
            pid,
            start: Gva(0),
            end: Gva(0),
            size_kb: 0,
            perms: "????".to_owned(),
            offset: 0,
            device: "00:00".to_owned(),
            inode: 0,
            path: None,
            deleted: false,
            flags: None,
            vma: area,
            problems: Vec::new(),
        };
        if let Err(error) = self.spans.read(self.kernel.space(), area, buffer) {
            row.problems.push(Problem::read("vma", &error));
            return row;
        }
        let (layout, vma) = (&self.vma, &*buffer);
        let (start, end, flags) = (layout.start.of(vma), layout.end.of(vma), layout.flags.of(vma));
        row.start = Gva(start);
        row.end = Gva(end);
        row.size_kb = end.saturating_sub(start) / 1024;
        row.flags = Some(flags);
        row.perms = permissions(flags);
        if start >= end {
            row.problems.push(Problem::new("end", "not above the start"));
        }
        let file = layout.file.of(vma);
        if !file.is_null() {
            row.offset = layout.pgoff.of(vma).wrapping_mul(4096);
            self.file(&mut row, file, cache);
            // Shared anonymous memory is a file of tmpfs underneath.
            if self.named_files
                && let Ok(Some(name)) = self.given_name(vma)
            {
                row.path = Some(format!("[anon_shmem:{name}]"));
            }
        } else {
            match self.name(vma, start, end, bounds) {
                Ok(name) => row.path = name,
                Err(error) => row.problems.push(Problem::read("path", &error)),
            }
        }
        row
    }

    fn file(&self, row: &mut Mapping, file: Gva, cache: &mut PlaceCache) {
        let space = self.kernel.space();
        let inode = self.places.shown_inode(file).and_then(|inode| {
            row.inode = self.inode.number.read(space, inode)?;
            let device = self
                .super_block
                .device
                .read(space, self.inode.super_block.read(space, inode)?)?;
            // dev_t inside the kernel: 12 bits of major, 20 of minor (include/linux/kdev_t.h).
            row.device = format!("{:02x}:{:02x}", device >> 20, device & 0xf_ffff);
            Ok(())
        });
        if let Err(error) = inode {
            row.problems.push(Problem::read("inode", &error));
        }
        match self.places.file(file, cache) {
            Ok(path) => {
                row.path = Some(path.to_string());
                row.deleted = path.deleted;
                row.problems
                    .extend(path.problem.map(|reason| Problem::new("path", reason)));
            }
            Err(error) => row.problems.push(Problem::read("path", &error)),
        }
    }

    /// The name that prctl(PR_SET_VMA) gave to the mapping in `vma`.
    fn given_name(&self, vma: &Buffer) -> Result<Option<String>, ReadError> {
        let (Some(member), Some(named)) = (self.vma.anon_name, &self.anon_name) else {
            return Ok(None);
        };
        let at = member.of(vma);
        if at.is_null() {
            return Ok(None);
        }
        // ANON_VMA_NAME_MAX_LEN is 80.
        self.kernel.text(named.name.at(at), 80).map(Some)
    }

    /// What /proc shows in brackets for a mapping without a file (`get_vma_name` in fs/proc/task_mmu.c).
    fn name(&self, vma: &Buffer, start: u64, end: u64, bounds: &Bounds) -> Result<Option<String>, ReadError> {
        let (layout, space) = (&self.vma, self.kernel.space());
        let ops = layout.ops.of(vma);
        if let (true, Some(special)) = (self.special_ops.contains(&ops), &self.special) {
            let name = special.name.read(space, layout.private.of(vma))?;
            return self.kernel.text(name, 64).map(Some);
        }
        if layout.mm.of(vma).is_null() {
            return Ok(Some("[vdso]".to_owned()));
        }
        if start < bounds.brk && end > bounds.start_brk {
            return Ok(Some("[heap]".to_owned()));
        }
        if start <= bounds.start_stack && end >= bounds.start_stack {
            return Ok(Some("[stack]".to_owned()));
        }
        if let Some(name) = self.given_name(vma)? {
            return Ok(Some(format!("[anon:{name}]")));
        }
        Ok(None)
    }

    /// The page at the top of the address space that every x86-64 process sees and no tree holds: `gate_vma`.
    fn vsyscall(&self, pid: i32, mm: Gva, buffer: &mut Buffer) -> Option<Mapping> {
        // arch/x86/entry/vsyscall/vsyscall_64.c: get_gate_vma, enum { EMULATE, XONLY, NONE }.
        const NONE: u32 = 2;
        // MM_CONTEXT_HAS_VSYSCALL (arch/x86/include/asm/mmu.h), since 5.8: a process of 32 bits has none.
        const HAS_VSYSCALL: u64 = 1 << 1;
        let space = self.kernel.space();
        let gate = self.kernel.symbol("gate_vma").ok()?;
        let mode = self.kernel.symbol("vsyscall_mode").ok()?;
        if space.read_u32(mode).ok()? == NONE {
            return None;
        }
        if self.mm.context_flags?.read(space, mm).ok()? & HAS_VSYSCALL == 0 {
            return None;
        }
        let bounds = Bounds {
            start_brk: u64::MAX,
            brk: 0,
            start_stack: 0,
        };
        let mut row = self.row(pid, gate, &bounds, buffer, &mut PlaceCache::default());
        row.path = Some("[vsyscall]".to_owned());
        Some(row)
    }
}

fn permissions(flags: u64) -> String {
    let letter = |bit: u64, yes: char, no: char| if flags & bit != 0 { yes } else { no };
    [
        letter(VM_READ, 'r', '-'),
        letter(VM_WRITE, 'w', '-'),
        letter(VM_EXEC, 'x', '-'),
        letter(VM_MAYSHARE, 's', 'p'),
    ]
    .iter()
    .collect()
}
