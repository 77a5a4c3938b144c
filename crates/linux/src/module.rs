//! Loaded modules: `lsmod`, and what `/sys/module` knows of each.

mod arguments;
mod parameter;
mod section;
mod symbols;

use std::sync::Arc;

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::{Budget, NO_ROOM, Own, Share};
use crate::layout::{Buffer, Field, Place, Spans, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::structures::list;
use crate::text::guest_array_text;
use crate::{Kernel, LinuxError};

pub use parameter::Parameter;
pub use section::Section;
pub use symbols::ModuleSymbol;

/// More modules than any kernel holds; the largest distribution kernels have some 6,000 to load at all.
const MAX_MODULES: usize = 1 << 16;

/// What a module has to itself for its users, sections and parameters.
const OWN: Own = Own {
    rows: 0,
    bytes: 64 << 10,
};

layout! {
    /// `struct module` (include/linux/module.h).
    pub(crate) struct ModuleLayout = "module" {
        state: Field<u32> = "state",
        list: Place = "list",
        name: Place = "name",
        version: Field<Gva> = "version",
        srcversion: Field<Gva> = "srcversion",
        taints: Field<u64> = "taints",
        refcnt: Option<Field<i32>> = "refcnt.counter",           // CONFIG_MODULE_UNLOAD
        source_list: Option<Place> = "source_list",
        init: Field<Gva> = "init",
        exit: Option<Field<Gva>> = "exit",
        kp: Field<Gva> = "kp",
        num_kp: Field<u32> = "num_kp",
        args: Field<Gva> = "args",
        build_id: Option<Place> = "build_id",                     // 5.14, CONFIG_STACKTRACE_BUILD_ID
        sect_attrs: Option<Field<Gva>> = "sect_attrs",
        percpu: Option<Field<Gva>> = "percpu",
        percpu_size: Option<Field<u32>> = "percpu_size",
        // Before 6.4: two areas, from 5.18 on and not on x86 a third.
        core_base: Option<Field<Gva>> = "core_layout.base",
        core_size: Option<Field<u32>> = "core_layout.size",
        core_text: Option<Field<u32>> = "core_layout.text_size",
        init_base: Option<Field<Gva>> = "init_layout.base",
        init_size: Option<Field<u32>> = "init_layout.size",
        data_base: Option<Field<Gva>> = "data_layout.base",
        data_size: Option<Field<u32>> = "data_layout.size",
        // 6.4: one per kind, `enum mod_mem_type`.
        mem: Option<Place> = "mem",
    }
}

layout! {
    struct ModuleMemoryLayout = "module_memory" {
        base: Field<Gva> = "base",
        size_: Field<u32> = "size",
    }
}

layout! {
    struct ModuleUseLayout = "module_use" {
        source_list: Place = "source_list",
        source: Field<Gva> = "source",
    }
}

layout! {
    struct TaintFlagLayout = "taint_flag" {
        c_true: Field<u8> = "c_true",
        module: Option<Field<bool>> = "module",                   // gone in 6.19: all that are set are shown
    }
}

/// A stretch of memory that belongs to a module. Serialised as `"kind 0xbase+0xsize"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleRange {
    /// `core`, `init`, `data` before 6.4; `text`, `data`, `rodata`, `ro_after_init`, `init_text`, … since; `percpu`.
    pub kind: String,
    /// First byte. For `percpu` the offset base that [`crate::PerCpu::copy`] takes.
    pub base: Gva,
    /// Length in bytes.
    pub size: u64,
}

impl Serialize for ModuleRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{} {}+{:#x}", self.kind, self.base, self.size))
    }
}

/// Which costly fields of [`Module`] are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModuleFields {
    /// Names and addresses of the sections.
    pub sections: bool,
    /// Parameters with their present values.
    pub parameters: bool,
}

impl ModuleFields {
    /// All of them.
    pub const ALL: Self = Self {
        sections: true,
        parameters: true,
    };
}

/// A module in the kernel's list of modules.
#[derive(Clone, Debug, Serialize)]
pub struct Module {
    /// Its name, with underscores for dashes as the kernel spells it.
    pub name: String,
    /// Bytes of memory, as `/proc/modules` counts them.
    pub size: u64,
    /// References held, `None` if the kernel cannot unload modules.
    pub refcount: Option<i64>,
    /// Modules that use this one.
    pub used_by: Vec<String>,
    /// It can never be unloaded: it has an init function and no exit function.
    pub permanent: bool,
    /// `Live`, `Loading`, `Unloading`, `Unformed`.
    pub state: &'static str,
    /// Why it taints the kernel, as `/proc/modules` spells it: `O` out of tree, `E` unsigned, `P` proprietary, … . Empty if not.
    pub taints: String,
    /// Start of its code.
    #[serde(serialize_with = "address::gva")]
    pub base: Gva,
    /// All its memory.
    pub ranges: Vec<ModuleRange>,
    /// `MODULE_VERSION`.
    pub version: Option<String>,
    /// Checksum of its sources.
    pub srcversion: Option<String>,
    /// GNU build-id in hexadecimal.
    pub build_id: Option<String>,
    /// What it was loaded with on the command line.
    pub arguments: Option<String>,
    /// Its sections; `None` if not asked for or not recorded by the kernel.
    pub sections: Option<Vec<Section>>,
    /// Its parameters; `None` if not asked for.
    pub parameters: Option<Vec<Parameter>>,
    /// The `struct module`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Kernel {
    /// The modules in the kernel's list, newest first, as `/proc/modules`.
    ///
    /// # Errors
    /// If the list cannot be found or the kernel's types lack a member.
    pub fn modules(&self, fields: ModuleFields) -> Result<Listing<Module>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Module| row.problems.len(),
            || self.list_modules(fields),
        )
    }

    fn list_modules(&self, fields: ModuleFields) -> Result<Listing<Module>, LinuxError> {
        let reader = ModuleReader::new(self)?;
        let mut listing = Listing::default();
        let found = addresses(self, &reader.layout)?;
        found.warnings.into_iter().for_each(|w| listing.warn(w));
        let budget = Budget::shared_by(found.rows.len(), OWN);
        for address in found.rows {
            listing.rows.push(reader.module(address, fields, &budget));
        }
        budget
            .warning("modules")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }

    /// The address of the loaded module `name`; dashes and underscores are the same.
    ///
    /// # Errors
    /// If the list cannot be read, or no such module is in it.
    pub fn module_address(&self, name: &str) -> Result<Gva, LinuxError> {
        let layout: Arc<ModuleLayout> = self.layout()?;
        let wanted = name.replace('-', "_");
        let mut bytes = vec![0u8; layout.name.size().min(256) as usize];
        for address in addresses(self, &layout)?.rows {
            if self.space().read(layout.name.at(address), &mut bytes).is_ok()
                && guest_array_text(&bytes) == wanted
            {
                return Ok(address);
            }
        }
        Err(LinuxError::NotFound(format!("no module {name} is loaded")))
    }
}

/// The `struct module`s in the kernel's list.
pub(crate) fn addresses(kernel: &Kernel, layout: &ModuleLayout) -> Result<Listing<Gva>, LinuxError> {
    let head = kernel.symbol("modules")?;
    let found = list::walk(kernel.space(), head, MAX_MODULES);
    let mut listing = Listing::default();
    if let Some(warning) = found.walk.end.warning("module list") {
        listing.warn(warning);
    }
    if found.uneven > 0 {
        listing.warn(format!(
            "module list: {} links do not agree with their back links",
            found.uneven
        ));
    }
    listing.rows = found
        .walk
        .items
        .into_iter()
        .map(|node| layout.list.container(node))
        .collect();
    Ok(listing)
}

struct ModuleReader<'k> {
    kernel: &'k Kernel,
    layout: Arc<ModuleLayout>,
    memory: Option<Arc<ModuleMemoryLayout>>,
    uses: Option<Arc<ModuleUseLayout>>,
    taints: Vec<(u32, char)>,
    spans: Spans,
    kinds: Vec<String>,
    parameters: parameter::ParameterReader<'k>,
}

impl<'k> ModuleReader<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let layout: Arc<ModuleLayout> = kernel.layout()?;
        let l = &layout;
        let mut extents = vec![
            l.state.extent(),
            l.name.extent(),
            l.version.extent(),
            l.srcversion.extent(),
            l.taints.extent(),
            l.init.extent(),
            l.kp.extent(),
            l.num_kp.extent(),
            l.args.extent(),
        ];
        extents.extend(l.refcnt.iter().map(Field::extent));
        extents.extend(
            [
                &l.exit,
                &l.sect_attrs,
                &l.percpu,
                &l.core_base,
                &l.init_base,
                &l.data_base,
            ]
            .into_iter()
            .flatten()
            .map(Field::extent),
        );
        extents.extend(
            [
                &l.percpu_size,
                &l.core_size,
                &l.core_text,
                &l.init_size,
                &l.data_size,
            ]
            .into_iter()
            .flatten()
            .map(Field::extent),
        );
        extents.extend([&l.build_id, &l.mem].into_iter().flatten().map(Place::extent));
        let spans = Spans::covering("module", kernel.release(), extents)?;
        Ok(Self {
            kernel,
            memory: if layout.mem.is_some() {
                Some(kernel.layout()?)
            } else {
                None
            },
            uses: kernel.layout().ok(),
            taints: taint_letters(kernel),
            kinds: memory_kinds(kernel),
            parameters: parameter::ParameterReader::new(kernel)?,
            layout,
            spans,
        })
    }

    fn module(&self, address: Gva, fields: ModuleFields, budget: &Budget) -> Module {
        let mut share = budget.share();
        let l = &self.layout;
        let mut module = Module {
            name: String::new(),
            size: 0,
            refcount: None,
            used_by: Vec::new(),
            permanent: false,
            state: "unknown",
            taints: String::new(),
            base: Gva(0),
            ranges: Vec::new(),
            version: None,
            srcversion: None,
            build_id: None,
            arguments: None,
            sections: None,
            parameters: None,
            address,
            problems: Vec::new(),
        };
        let mut object = self.spans.buffer();
        if let Err(error) = self.spans.read(self.kernel.space(), address, &mut object) {
            module.problems.push(Problem::read("name", &error));
            return module;
        }
        module.name = guest_array_text(l.name.of(&object));
        module.state = match l.state.of(&object) {
            0 => "Live",
            1 => "Loading",
            2 => "Unloading",
            3 => "Unformed",
            _ => "unknown",
        };
        // The kernel starts the count at one and shows it without that (MODULE_REF_BASE).
        module.refcount = l.refcnt.map(|f| i64::from(f.of(&object)) - 1);
        module.permanent = l
            .exit
            .is_some_and(|exit| !l.init.of(&object).is_null() && exit.of(&object).is_null());
        let taints = l.taints.of(&object);
        module.taints = self
            .taints
            .iter()
            .filter(|(bit, _)| taints >> bit & 1 == 1)
            .map(|&(_, letter)| letter)
            .collect();
        self.ranges(&mut module, &object);
        let mut problems = Vec::new();
        let mut text = |field: &'static str, at: Gva, max: usize| -> Option<String> {
            if at.is_null() {
                return None;
            }
            self.kernel
                .text(at, max)
                .map_err(|error| problems.push(Problem::read(field, &error)))
                .ok()
        };
        module.version = text("version", l.version.of(&object), 256);
        module.srcversion = text("srcversion", l.srcversion.of(&object), 64);
        module.problems.append(&mut problems);
        match self.arguments(&object, &mut share) {
            Ok(arguments) => module.arguments = Some(arguments).filter(|a| !a.is_empty()),
            Err(error) => module.problems.push(Problem::read("arguments", &error)),
        }
        module.build_id = l.build_id.and_then(|place| hex(place.of(&object)));
        match self.used_by(address, budget, &mut share) {
            Ok((names, warning)) => {
                module.used_by = names;
                module
                    .problems
                    .extend(warning.map(|w| Problem::new("used_by", w)));
            }
            Err(error) => module.problems.push(Problem::read("used_by", &error)),
        }
        let needs_sections = fields.sections || module.build_id.is_none();
        if needs_sections && let Some(attrs) = l.sect_attrs.map(|f| f.of(&object)).filter(|a| !a.is_null()) {
            match section::read(self.kernel, attrs, &mut share) {
                Ok((sections, problem)) => {
                    if module.build_id.is_none() {
                        module.build_id = self.build_id_note(&sections);
                    }
                    if fields.sections {
                        module.sections = Some(sections);
                        module.problems.extend(problem);
                    }
                }
                Err(error) if fields.sections => {
                    module.problems.push(Problem::new("sections", error.to_string()))
                }
                Err(_) => {}
            }
        }
        if fields.parameters {
            let (parameters, problem) =
                self.parameters
                    .all(l.kp.of(&object), l.num_kp.of(&object), &mut share);
            module.parameters = Some(parameters);
            module.problems.extend(problem);
        }
        module
    }

    fn arguments(&self, object: &Buffer, share: &mut Share<'_>) -> Result<String, ReadError> {
        let at = self.layout.args.of(object);
        if at.is_null() || self.kernel.space().read_u8(at)? == 0 {
            return Ok(String::new());
        }
        // They end where nothing says so: as far as their page goes, and on to the next one if there is one.
        let mut left = vec![0u8; (4096 - at.page_offset()) + 4096];
        if self.kernel.space().read(at, &mut left).is_err() {
            left.truncate(4096 - at.page_offset());
            self.kernel.space().read(at, &mut left)?;
        }
        let (parameters, _) =
            self.parameters
                .all(self.layout.kp.of(object), self.layout.num_kp.of(object), share);
        Ok(arguments::rejoin(&left, &parameters))
    }

    fn ranges(&self, module: &mut Module, object: &Buffer) {
        let l = &self.layout;
        let mut add = |kind: &str, base: Gva, size: u64| {
            if !base.is_null() && size > 0 {
                module.ranges.push(ModuleRange {
                    kind: kind.to_owned(),
                    base,
                    size,
                });
            }
            size
        };
        let mut total = 0u64;
        let mut base = Gva(0);
        if let (Some(mem), Some(memory)) = (&l.mem, &self.memory) {
            let count = mem.size().checked_div(memory.size).unwrap_or(0).min(32);
            for index in 0..count {
                let Some(bytes) = mem.of(object).get((index * memory.size) as usize..) else {
                    break;
                };
                let (at, size) = memory.of_bytes(bytes);
                let kind = self.kinds.get(index as usize).map_or("other", String::as_str);
                total += add(kind, at, size);
                if index == 0 {
                    base = at;
                }
            }
        } else {
            for (kind, at, size) in [
                ("core", l.core_base, l.core_size),
                ("init", l.init_base, l.init_size),
                ("data", l.data_base, l.data_size),
            ] {
                if let (Some(at), Some(size)) = (at, size) {
                    total += add(kind, at.of(object), u64::from(size.of(object)));
                }
            }
            base = l.core_base.map_or(Gva(0), |f| f.of(object));
        }
        if let (Some(at), Some(size)) = (l.percpu, l.percpu_size) {
            add("percpu", at.of(object), u64::from(size.of(object)));
        }
        module.size = total;
        module.base = base;
    }

    fn used_by(
        &self,
        address: Gva,
        budget: &Budget,
        share: &mut Share<'_>,
    ) -> Result<(Vec<String>, Option<String>), ReadError> {
        let (Some(head), Some(uses)) = (&self.layout.source_list, &self.uses) else {
            return Ok((Vec::new(), None));
        };
        let limit = budget.limit(MAX_MODULES);
        let found = list::walk(self.kernel.space(), head.at(address), limit);
        budget.walked(found.walk.items.len());
        let mut names = Vec::new();
        for node in found.walk.items {
            let user = uses
                .source
                .read(self.kernel.space(), uses.source_list.container(node))?;
            let mut bytes = vec![0; self.layout.name.size().min(256) as usize];
            self.kernel.space().read(self.layout.name.at(user), &mut bytes)?;
            let name = guest_array_text(&bytes);
            if !share.bytes(size_of::<String>() + name.len()) {
                return Ok((names, Some(NO_ROOM.to_owned())));
            }
            names.push(name);
        }
        Ok((names, found.walk.end.warning("list of users")))
    }

    /// The build-id from the note section, which the kernel keeps for `/sys/module/…/notes`.
    fn build_id_note(&self, sections: &[Section]) -> Option<String> {
        let note = sections.iter().find(|s| s.name == ".note.gnu.build-id")?;
        let mut bytes = [0u8; 36];
        self.kernel.space().read(note.address, &mut bytes).ok()?;
        let word = |at: usize| {
            bytes
                .get(at..at + 4)
                .map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        // Elf64_Nhdr: length of the name, length of the value, NT_GNU_BUILD_ID, "GNU\0".
        let len = word(4)? as usize;
        (word(0)? == 4 && word(8)? == 3 && bytes.get(12..16)? == b"GNU\0").then_some(())?;
        hex(bytes.get(16..16 + len.min(20))?)
    }
}

impl ModuleMemoryLayout {
    /// Base and size out of the bytes of one element of `mem`.
    fn of_bytes(&self, bytes: &[u8]) -> (Gva, u64) {
        let at = |offset: u64, size: usize| -> u64 {
            let mut out = [0u8; 8];
            let from = offset as usize;
            if let (Some(to), Some(b)) = (out.get_mut(..size), bytes.get(from..from + size)) {
                to.copy_from_slice(b);
            }
            u64::from_le_bytes(out)
        };
        (
            Gva(at(self.base.extent().offset, 8)),
            at(self.size_.extent().offset, 4),
        )
    }
}

/// Lowercase hexadecimal, `None` for nothing but zeroes.
fn hex(bytes: &[u8]) -> Option<String> {
    bytes
        .iter()
        .any(|&b| b != 0)
        .then(|| bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// The letters of `taint_flags` (kernel/panic.c) that modules can have, read out of the kernel: it is where they are defined.
fn taint_letters(kernel: &Kernel) -> Vec<(u32, char)> {
    // As of 6.12, for kernels whose table cannot be found: proprietary, forced, staging, out of tree, unsigned, live patch, test.
    let known = || {
        vec![
            (0, 'P'),
            (1, 'F'),
            (10, 'C'),
            (12, 'O'),
            (13, 'E'),
            (15, 'K'),
            (16, 'X'),
            (18, 'N'),
        ]
    };
    let (Ok(layout), Ok(table)) = (kernel.layout::<TaintFlagLayout>(), kernel.symbol("taint_flags")) else {
        return known();
    };
    let mut letters = Vec::new();
    // TAINT_FLAGS_COUNT is 19 in 6.12 and grows by one every few years; the bits of a long end the search.
    for bit in 0..64u32 {
        let at = table.wrapping_add(u64::from(bit) * layout.size);
        let Ok(letter) = layout.c_true.read(kernel.space(), at) else {
            break;
        };
        if !letter.is_ascii_uppercase() {
            break;
        }
        if layout
            .module
            .is_none_or(|f| f.read(kernel.space(), at).unwrap_or(false))
        {
            letters.push((bit, char::from(letter)));
        }
    }
    if letters
        .first()
        .is_none_or(|&(bit, letter)| bit != 0 || letter != 'P')
    {
        known()
    } else {
        letters
    }
}

/// The names of `enum mod_mem_type` (6.4), in the order of their values: `MOD_RO_AFTER_INIT` is `ro_after_init`.
fn memory_kinds(kernel: &Kernel) -> Vec<String> {
    let types = kernel.types();
    let Some(id) = types.find_enum("mod_mem_type") else {
        return Vec::new();
    };
    let mut kinds: Vec<(i64, String)> = types
        .enumerators(id)
        .filter_map(|e| {
            let name = e.name.strip_prefix("MOD_")?.to_ascii_lowercase();
            (0..32).contains(&e.value).then_some((e.value, name))
        })
        .collect();
    kinds.sort();
    kinds.dedup_by_key(|k| k.0);
    kinds.into_iter().map(|(_, name)| name).collect()
}
