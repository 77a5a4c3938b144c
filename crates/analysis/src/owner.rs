//! Whose an address is.

use std::fmt;
use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_linux::module::{Module, ModuleFields};
use vmsight_linux::structures::list;
use vmsight_linux::{Kernel, LinuxError};

use crate::Object;

/// Programs, trampolines and pages of instruction slots that are looked at: a machine full of BPF has some thousands.
const MAX_GENERATED: usize = 1 << 16;
/// The first address of the kernel's half.
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;
/// Where x86-64 loads modules and generated code: the 1 to 1.5 GiB above the image (Documentation/arch/x86/x86_64/mm.rst).
const MODULE_AREA: std::ops::Range<u64> = 0xffff_ffff_a000_0000..0xffff_ffff_ff00_0000;

/// Whose an address is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The kernel's code.
    Kernel,
    /// Code of the kernel that it gave back after it had booted: something else lies there now.
    KernelInit,
    /// The kernel's image, not its code.
    KernelData,
    /// A module in the kernel's list.
    Module {
        /// Its name.
        name: Arc<str>,
        /// Whether the address lies in its code.
        code: bool,
    },
    /// Code that the kernel made while it ran and keeps a list of: BPF programs, trampolines, instruction slots.
    Generated(Arc<str>),
    /// Where modules and generated code lie, and none that the kernel knows.
    ModuleArea,
    /// Other memory of the kernel's half.
    Memory,
    /// A process's half.
    User,
    /// The null pointer.
    Null,
}

impl Owner {
    /// Whether it is code that the kernel knows of.
    pub fn is_code(&self) -> bool {
        matches!(
            self,
            Owner::Kernel | Owner::Module { code: true, .. } | Owner::Generated(_)
        )
    }

    /// What it is of, of code that the kernel made while it ran.
    pub fn generated(&self) -> Option<&str> {
        match self {
            Owner::Generated(what) => Some(what),
            _ => None,
        }
    }

    /// The module.
    pub fn module(&self) -> Option<&str> {
        match self {
            Owner::Module { name, .. } => Some(name),
            _ => None,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Kernel => f.write_str("kernel text"),
            Owner::KernelInit => f.write_str("kernel text that is freed after boot"),
            Owner::KernelData => f.write_str("kernel data"),
            Owner::Module { name, code: true } => write!(f, "text of module {name}"),
            Owner::Module { name, code: false } => write!(f, "data of module {name}"),
            Owner::Generated(what) => f.write_str(what),
            Owner::ModuleArea => f.write_str("where modules lie, but in none that the kernel lists"),
            Owner::Memory => f.write_str("kernel memory that is no code the kernel lists"),
            Owner::User => f.write_str("user memory"),
            Owner::Null => f.write_str("null"),
        }
    }
}

/// The owners of a kernel's addresses.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    /// First byte, the one past the last, and whose it is; ascending, and what comes later in reading does not overlap.
    ranges: Vec<(u64, u64, Owner)>,
    image: (u64, u64),
    modules: Vec<Module>,
    doubts: Vec<String>,
}

impl Owners {
    /// First byte, the one past the last, and whose it is.
    pub(crate) fn ranges(&self) -> &[(u64, u64, Owner)] {
        &self.ranges
    }

    /// Reads them. What cannot be read is a doubt.
    pub(crate) fn read(kernel: &Kernel) -> Self {
        let image = kernel.image();
        let mut owners = Owners {
            image: (image.text.0, image.text.0.wrapping_add(image.len)),
            ..Owners::default()
        };
        owners.kernel(kernel);
        let fields = ModuleFields {
            sections: true,
            ..ModuleFields::default()
        };
        match kernel.modules(fields) {
            Ok(listing) => {
                owners.doubts.extend(listing.warnings);
                for module in &listing.rows {
                    owners.module(kernel, module);
                }
                owners.modules = listing.rows;
            }
            Err(error) => owners.doubts.push(format!("modules: {error}")),
        }
        for read in [Self::bpf, Self::ftrace, Self::kprobes] {
            if let Err(error) = read(&mut owners, kernel) {
                owners.doubts.push(format!("generated code: {error}"));
            }
        }
        owners.ranges.sort_by_key(|r| r.0);
        owners
    }

    pub(crate) fn modules(&self) -> &[Module] {
        &self.modules
    }

    pub(crate) fn doubts(&self) -> &[String] {
        &self.doubts
    }

    pub(crate) fn of(&self, at: Gva) -> Owner {
        let at = at.0;
        // Ranges of honest guests do not overlap; of those of others the nearest below that holds it is taken.
        let before = self.ranges.partition_point(|r| r.0 <= at);
        let near = self.ranges.get(before.saturating_sub(8)..before).unwrap_or(&[]);
        if let Some((_, _, owner)) = near.iter().rev().find(|r| at < r.1) {
            return owner.clone();
        }
        match at {
            0..4096 => Owner::Null,
            _ if (self.image.0..self.image.1).contains(&at) => Owner::KernelData,
            _ if MODULE_AREA.contains(&at) => Owner::ModuleArea,
            KERNEL_HALF.. => Owner::Memory,
            _ => Owner::User,
        }
    }

    fn add(&mut self, start: u64, length: u64, owner: Owner) {
        if length > 0 && start >= KERNEL_HALF {
            self.ranges.push((start, start.saturating_add(length), owner));
        }
    }

    fn kernel(&mut self, kernel: &Kernel) {
        if !self.between(kernel, &["_text", "_stext"], "_etext", Owner::Kernel) {
            self.doubts
                .push("the kernel does not say where its text ends".to_owned());
        }
        self.between(kernel, &["_sinittext"], "_einittext", Owner::KernelInit);
    }

    fn between(&mut self, kernel: &Kernel, from: &[&str], to: &str, owner: Owner) -> bool {
        let (Some(from), Some(to)) = (kernel.find_symbol(from), kernel.find_symbol(&[to])) else {
            return false;
        };
        self.add(from.0, to.0.saturating_sub(from.0), owner);
        true
    }

    fn module(&mut self, kernel: &Kernel, module: &Module) {
        let name: Arc<str> = module.name.as_str().into();
        let text_of_core = Object::new(kernel, "module", module.address)
            .and_then(|m| m.number("core_layout.text_size"))
            .unwrap_or(0);
        for range in &module.ranges {
            let owner = |code| Owner::Module {
                name: name.clone(),
                code,
            };
            // One that claims more than the area holds is not believed.
            let size = range.size.min(1 << 30);
            match range.kind.as_str() {
                "percpu" => {}
                "core" => {
                    let text = text_of_core.min(size);
                    self.add(range.base.0, text, owner(true));
                    self.add(range.base.0.saturating_add(text), size - text, owner(false));
                }
                "text" | "init" | "init_text" => self.add(range.base.0, size, owner(true)),
                _ => self.add(range.base.0, size, owner(false)),
            }
        }
    }

    /// What BPF has made: programs, trampolines, dispatchers (`bpf_kallsyms`, 5.7; kernel/bpf/core.c).
    fn bpf(&mut self, kernel: &Kernel) -> Result<(), LinuxError> {
        let Some(head) = kernel.find_symbol(&["bpf_kallsyms"]) else {
            return Ok(());
        };
        let offset = kernel.offset("bpf_ksym", "lnode")?;
        let found = list::walk(kernel.space(), head, MAX_GENERATED);
        self.doubts.extend(found.walk.end.warning("list of BPF code"));
        for node in found.walk.items {
            let symbol = Object::new(kernel, "bpf_ksym", node.wrapping_sub(offset))?;
            let (start, end) = (symbol.number("start")?, symbol.number("end")?);
            let name = symbol.array_text("name")?;
            self.add(
                start,
                end.saturating_sub(start).min(1 << 21),
                Owner::Generated(format!("BPF code {name}").into()),
            );
        }
        Ok(())
    }

    /// Trampolines of function tracing (`ftrace_ops.trampoline`; arch/x86/kernel/ftrace.c).
    fn ftrace(&mut self, kernel: &Kernel) -> Result<(), LinuxError> {
        let Some(head) = kernel.find_symbol(&["ftrace_ops_list"]) else {
            return Ok(());
        };
        let end = kernel.find_symbol(&["ftrace_list_end"]);
        let mut at = read(kernel, head)?;
        let mut seen = 0;
        while Some(at) != end && !at.is_null() && seen < 4096 {
            seen += 1;
            let ops = Object::new(kernel, "ftrace_ops", at)?;
            let (start, size) = (ops.number("trampoline")?, ops.number("trampoline_size")?);
            // Built into the kernel: known already.
            if !(self.image.0..self.image.1).contains(&start) {
                self.add(
                    start,
                    size.min(1 << 16),
                    Owner::Generated(format!("ftrace trampoline of {at}").into()),
                );
            }
            at = ops.pointer("next")?;
        }
        Ok(())
    }

    /// Pages of copied instructions (`kprobe_insn_slots`, `kprobe_optinsn_slots`; kernel/kprobes.c).
    fn kprobes(&mut self, kernel: &Kernel) -> Result<(), LinuxError> {
        for cache in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
            let Some(at) = kernel.find_symbol(&[cache]) else {
                continue;
            };
            let head = Object::new(kernel, "kprobe_insn_cache", at)?.member("pages")?;
            let offset = kernel.offset("kprobe_insn_page", "list")?;
            let found = list::walk(kernel.space(), head, 4096);
            self.doubts.extend(found.walk.end.warning(cache));
            for node in found.walk.items {
                let page = Object::new(kernel, "kprobe_insn_page", node.wrapping_sub(offset))?;
                let start = page.number("insns")?;
                self.add(start, 4096, Owner::Generated("kprobe instruction slots".into()));
            }
        }
        Ok(())
    }
}

fn read(kernel: &Kernel, at: Gva) -> Result<Gva, LinuxError> {
    let read = kernel.space().read_u64(at);
    read.map(Gva).map_err(|source| LinuxError::Read {
        what: "a list's head".to_owned(),
        at,
        source,
    })
}
