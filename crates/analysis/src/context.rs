//! What a check looks through: the kernel, and whose each address is.

use std::sync::{Arc, OnceLock};

use vmsight_arch::{Gva, Registers};
use vmsight_linux::maps::ProcessMaps;
use vmsight_linux::module::{Module, ModuleSymbol};
use vmsight_linux::{Kernel, LinuxError, Listing};
use vmsight_memory::AddressSpace;

use crate::baseline::Trusted;
use crate::code;
use crate::owner::Owners;
use crate::{Baseline, Evidence, Known, Object, Owner};

/// One guest as checks see it. What is read of it in common (modules, the owners of addresses) is read once.
#[derive(Debug)]
pub struct Context {
    kernel: Kernel,
    still: bool,
    registers: Result<Vec<Registers>, String>,
    trusted: Option<Arc<Trusted>>,
    known: Option<Known>,
    owners: OnceLock<Owners>,
    symbols: OnceLock<Vec<ModuleSymbol>>,
    maps: OnceLock<Result<Listing<ProcessMaps>, LinuxError>>,
}

impl Context {
    /// For a kernel. Its vCPUs' registers are not known yet, and a live guest is taken to run.
    pub fn new(kernel: Kernel) -> Self {
        Self {
            still: !kernel.memory().is_live(),
            kernel,
            registers: Err("nobody asked for the vCPUs' registers".to_owned()),
            trusted: None,
            known: None,
            owners: OnceLock::new(),
            symbols: OnceLock::new(),
            maps: OnceLock::new(),
        }
    }

    /// With the vCPUs' registers, or why they cannot be had.
    #[must_use]
    pub fn with_registers(mut self, registers: Result<Vec<Registers>, String>) -> Self {
        self.registers = registers;
        self
    }

    /// With a trusted copy of the kernel's code, for the check `golden`.
    #[must_use]
    pub fn with_baseline(self, baseline: Baseline) -> Self {
        self.with_trusted(Arc::new(baseline.into()))
    }

    /// With what is trusted of the code of the kernel and of modules, for the check `golden`.
    #[must_use]
    pub fn with_trusted(mut self, trusted: Arc<Trusted>) -> Self {
        self.trusted = Some(trusted);
        self
    }

    /// With what earlier looks at this guest found right; what this one does is kept there, too.
    #[must_use]
    pub fn with_known(mut self, known: Known) -> Self {
        self.known = Some(known);
        self
    }

    pub(crate) fn known(&self) -> Option<&Known> {
        self.known.as_ref()
    }

    /// What is trusted of the code of the kernel and of modules.
    pub fn trusted(&self) -> Option<&Trusted> {
        self.trusted.as_deref()
    }

    /// Of a guest that is paused as long as checks run: nothing changes.
    #[must_use]
    pub fn paused(mut self) -> Self {
        self.still = true;
        self
    }

    /// The same guest with nothing remembered.
    pub(crate) fn anew(&self) -> Self {
        Self {
            kernel: self.kernel.clone(),
            still: self.still,
            registers: self.registers.clone(),
            trusted: self.trusted.clone(),
            known: None,
            owners: OnceLock::new(),
            symbols: OnceLock::new(),
            maps: OnceLock::new(),
        }
    }

    /// The kernel: its symbols, types and listings.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The kernel's address space.
    pub fn space(&self) -> &AddressSpace {
        self.kernel.space()
    }

    /// Whether this is a running VM or a paused one; a dump is not.
    pub fn is_live(&self) -> bool {
        self.kernel.memory().is_live()
    }

    /// Whether memory changes while it is read.
    pub fn is_changing(&self) -> bool {
        !self.still
    }

    /// The vCPUs' registers.
    ///
    /// # Errors
    /// Why they cannot be had, in a sentence.
    pub fn registers(&self) -> Result<&[Registers], &str> {
        self.registers.as_deref().map_err(String::as_str)
    }

    pub(crate) fn owners(&self) -> &Owners {
        self.owners.get_or_init(|| Owners::read(&self.kernel))
    }

    /// The modules in the kernel's list.
    pub fn modules(&self) -> &[Module] {
        self.owners().modules()
    }

    /// What of the owners could not be read: whoever calls an address nobody's says this too.
    pub fn doubts(&self) -> &[String] {
        self.owners().doubts()
    }

    /// Whose an address is.
    pub fn owner(&self, at: Gva) -> Owner {
        self.owners().of(at)
    }

    /// The symbols of all modules, ascending.
    pub fn module_symbols(&self) -> &[ModuleSymbol] {
        self.symbols.get_or_init(|| {
            let mut symbols = self.kernel.module_symbols().map(|l| l.rows).unwrap_or_default();
            symbols.sort_by_key(|s| s.address);
            symbols
        })
    }

    /// The mappings of all processes.
    ///
    /// # Errors
    /// If the processes cannot be listed.
    pub fn maps(&self) -> Result<&Listing<ProcessMaps>, LinuxError> {
        let read = self.maps.get_or_init(|| self.kernel.all_maps());
        read.as_ref().map_err(|error| LinuxError::Implausible {
            what: "the mappings of processes".to_owned(),
            reason: error.to_string(),
        })
    }

    /// `symbol+0x10` or `module:symbol+0x10`, where the address lies in the image or a module that has symbols.
    pub fn name(&self, at: Gva) -> Option<String> {
        let (name, offset) = match self.owner(at) {
            Owner::Module { name, .. } => {
                let symbols = self.module_symbols();
                let before = symbols.partition_point(|s| s.address <= at).checked_sub(1)?;
                let symbol = symbols.get(before).filter(|s| *s.module == *name)?;
                let offset = at.0.wrapping_sub(symbol.address.0);
                (format!("{}:{}", symbol.module, symbol.name), offset)
            }
            _ if self.kernel.image().contains(at) => {
                let linked = self.kernel.image().link_time(at);
                let (symbol, offset) = self.kernel.profile().symbols.nearest(linked)?;
                (symbol.name.to_owned(), offset)
            }
            _ => return None,
        };
        Some(match offset {
            0 => name,
            offset => format!("{name}+{offset:#x}"),
        })
    }

    /// The name of the kernel's symbol that begins at exactly this address; of several the first.
    pub fn symbol_at(&self, at: Gva) -> Option<&str> {
        if !self.kernel.image().contains(at) {
            return None;
        }
        let linked = self.kernel.image().link_time(at);
        let (symbol, offset) = self.kernel.profile().symbols.nearest(linked)?;
        (offset == 0).then_some(symbol.name)
    }

    /// All names of the kernel's symbols at exactly this address.
    pub fn symbols_at(&self, at: Gva) -> impl Iterator<Item = &str> {
        let linked = self.kernel.image().link_time(at);
        let here = linked..linked.saturating_add(1);
        self.kernel.profile().symbols.range(here).map(|s| s.name)
    }

    /// The symbol and the owner of an address, for people: `commit_creds+0x10 (kernel text)`.
    pub fn describe(&self, at: Gva) -> String {
        match self.name(at) {
            Some(name) => format!("{name} ({})", self.owner(at)),
            None => self.owner(at).to_string(),
        }
    }

    /// An address as evidence.
    pub fn evidence(&self, what: impl Into<String>, at: Gva) -> Evidence {
        Evidence::Address {
            what: what.into(),
            at,
            place: self.describe(at),
        }
    }

    /// Bytes of memory as evidence: at most 64; that they cannot be read is evidence too.
    pub fn bytes(&self, what: &str, at: Gva, length: usize) -> Evidence {
        let mut bytes = vec![0; length.min(64)];
        match self.space().read(at, &mut bytes) {
            Ok(()) => Evidence::Bytes {
                what: what.to_owned(),
                at,
                bytes,
            },
            Err(error) => Evidence::value(format!("{what} at {at}"), error),
        }
    }

    /// The first instructions at an address as evidence, at most 16.
    pub fn code(&self, what: &str, at: Gva, instructions: usize) -> Evidence {
        code::evidence(self, what, at, instructions.min(16))
    }

    /// The kernel's structure of this name at an address.
    ///
    /// # Errors
    /// If the kernel's types have no such structure.
    pub fn object<'c>(&'c self, structure: &str, at: Gva) -> Result<Object<'c>, LinuxError> {
        Object::new(&self.kernel, structure, at)
    }

    /// The structure that begins `member` bytes before: the kernel's `container_of`. `member` is a path.
    ///
    /// # Errors
    /// If the kernel's types have no such structure or member.
    pub fn container<'c>(&'c self, structure: &str, member: &str, at: Gva) -> Result<Object<'c>, LinuxError> {
        let offset = self.kernel.offset(structure, member)?;
        self.object(structure, at.wrapping_sub(offset))
    }

    /// The address of the first of these symbols that the kernel has.
    ///
    /// # Errors
    /// If it has none of them.
    pub fn symbol(&self, names: &[&str]) -> Result<Gva, LinuxError> {
        self.kernel
            .find_symbol(names)
            .ok_or_else(|| LinuxError::NoSymbol {
                name: names.join(" or "),
                release: self.kernel.release().to_owned(),
            })
    }

    /// How many entries of 8 bytes fit between a table in the image and the next symbol, at most `max`.
    pub fn entries(&self, table: Gva, max: u64) -> u64 {
        let linked = self.kernel.image().link_time(table);
        let symbols = &self.kernel.profile().symbols;
        let next = symbols.after(linked);
        next.map_or(max, |s| s.address.wrapping_sub(linked) / 8).min(max)
    }

    /// Bytes from the symbol of this name to the next.
    pub(crate) fn room(&self, name: &str) -> u64 {
        let symbols = &self.kernel.profile().symbols;
        let Some(at) = symbols.address(name) else { return 0 };
        let next = symbols.after(at);
        next.map_or(0, |s| s.address - at)
    }

    /// The pointer at an address.
    ///
    /// # Errors
    /// If it cannot be read; `what` says what should be there.
    pub fn pointer(&self, what: &str, at: Gva) -> Result<Gva, LinuxError> {
        let read = self.space().read_u64(at);
        read.map(Gva).map_err(|source| LinuxError::Read {
            what: what.to_owned(),
            at,
            source,
        })
    }

    /// A NUL-terminated text of at most `max` bytes.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn text(&self, what: &str, at: Gva, max: usize) -> Result<String, LinuxError> {
        let read = self.space().read_cstr(at, max);
        read.map(|bytes| vmsight_linux::text::guest_text(&bytes))
            .map_err(|source| LinuxError::Read {
                what: what.to_owned(),
                at,
                source,
            })
    }

    /// A module's name by the address of its `struct module`.
    pub fn module_named_at(&self, module: Gva) -> Option<Arc<str>> {
        let module = self.modules().iter().find(|m| m.address == module)?;
        Some(module.name.as_str().into())
    }
}
