//! A module's own symbols: what the kernel keeps of its symbol table for kallsyms (kernel/module/kallsyms.c).

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;

use super::{ModuleLayout, addresses};
use crate::budget::Budget;
use crate::layout::{Field, layout};
use crate::listing::{Listing, address};
use crate::text::{guest_array_text, guest_text};
use crate::{Kernel, LinuxError};

/// More symbols than a module has; the largest (graphics drivers) have some 50,000.
const MAX_SYMBOLS: u32 = 1 << 20;
/// Largest string table that is read. Names average 20 bytes.
const MAX_STRINGS: usize = 64 << 20;
/// Size of `Elf64_Sym`.
const SYM: usize = 24;

layout! {
    struct KallsymsPointerLayout = "module" {
        kallsyms: Field<Gva> = "kallsyms",
    }
}

layout! {
    struct ModKallsymsLayout = "mod_kallsyms" {
        symtab: Field<Gva> = "symtab",
        num_symtab: Field<u32> = "num_symtab",
        strtab: Field<Gva> = "strtab",
        typetab: Option<Field<Gva>> = "typetab",                  // 5.2
    }
}

/// A symbol of a module, as a line of `/proc/kallsyms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModuleSymbol {
    /// Its name.
    pub name: String,
    /// Its run-time address.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// Kind as in `nm`: `t` code, `d` data, `r` read-only, `b` zeroed, upper case if exported from its file.
    pub kind: char,
    /// Length in bytes as the ELF symbol says; 0 if unknown.
    pub size: u64,
    /// The module.
    pub module: Arc<str>,
}

impl Kernel {
    /// The symbols of all loaded modules, module by module in the kernel's order.
    ///
    /// # Errors
    /// If the module list cannot be found or the kernel's types lack a member.
    pub fn module_symbols(&self) -> Result<Listing<ModuleSymbol>, LinuxError> {
        let layout: Arc<ModuleLayout> = self.layout()?;
        let found = addresses(self, &layout)?;
        let mut listing = Listing::new(Vec::new(), found.warnings);
        let budget = Budget::default();
        for module in found.rows {
            let mut name = vec![0; layout.name.size().min(256) as usize];
            if let Err(error) = self.space().read(layout.name.at(module), &mut name) {
                listing.warn(format!("the module at {module} cannot be read: {error}"));
                continue;
            }
            let name: Arc<str> = guest_array_text(&name).into();
            match self.some_symbols_of(module, &name, &budget) {
                Ok(symbols) => {
                    listing.rows.extend(symbols.rows);
                    symbols.warnings.into_iter().for_each(|w| listing.warn(w));
                }
                Err(error) => listing.warn(format!("module {name}: {error}")),
            }
        }
        budget
            .warning("symbols of modules")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }

    /// The symbols of the module whose `struct module` lies at `module`.
    ///
    /// # Errors
    /// If its symbol table cannot be read.
    pub fn symbols_of_module(
        &self,
        module: Gva,
        name: &Arc<str>,
    ) -> Result<Listing<ModuleSymbol>, LinuxError> {
        self.some_symbols_of(module, name, &Budget::default())
    }

    fn some_symbols_of(
        &self,
        module: Gva,
        name: &Arc<str>,
        budget: &Budget,
    ) -> Result<Listing<ModuleSymbol>, LinuxError> {
        let pointer: Arc<KallsymsPointerLayout> = self.layout()?;
        let table: Arc<ModKallsymsLayout> = self.layout()?;
        let space = self.space();
        let at = pointer
            .kallsyms
            .read(space, module)
            .map_err(LinuxError::read("struct module", module))?;
        let mut listing = Listing::default();
        if at.is_null() {
            return Ok(listing);
        }
        let read = LinuxError::read;
        let symtab = table.symtab.read(space, at).map_err(read("mod_kallsyms", at))?;
        let strtab = table.strtab.read(space, at).map_err(read("mod_kallsyms", at))?;
        let typetab = match &table.typetab {
            Some(field) => field.read(space, at).map_err(read("mod_kallsyms", at))?,
            None => Gva(0),
        };
        let claimed = table
            .num_symtab
            .read(space, at)
            .map_err(read("mod_kallsyms", at))?;
        let count = budget.limit(claimed.min(MAX_SYMBOLS) as usize);
        budget.walked(count);
        if count < claimed as usize {
            listing.warn(format!("module {name}: cut, it claims {claimed} symbols"));
        }
        // Page by page: a size that no memory backs costs nothing.
        let mut symbols = Vec::new();
        for chunk in 0..count.div_ceil(4096 / SYM) {
            let first = chunk * (4096 / SYM);
            let many = (count - first).min(4096 / SYM);
            let mut bytes = vec![0; many * SYM];
            let from = symtab.wrapping_add((first * SYM) as u64);
            if let Err(error) = space.read(from, &mut bytes) {
                listing.warn(format!("module {name}: symbols cut: {error}"));
                break;
            }
            symbols.extend_from_slice(&bytes);
        }
        let mut kinds = vec![b'?'; symbols.len() / SYM];
        if !typetab.is_null() && space.read(typetab, &mut kinds).is_err() {
            kinds.fill(b'?');
        }
        for (symbol, &kind) in symbols.chunks_exact(SYM).zip(&kinds).skip(1) {
            let field = |from: usize, len: usize| {
                let mut out = [0u8; 8];
                if let (Some(to), Some(bytes)) = (out.get_mut(..len), symbol.get(from..from + len)) {
                    to.copy_from_slice(bytes);
                }
                u64::from_le_bytes(out)
            };
            let (name_at, section) = (field(0, 4), field(6, 2));
            if section == 0 || name_at as usize > MAX_STRINGS {
                continue;
            }
            match space.read_cstr(strtab.wrapping_add(name_at), 512) {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) if !budget.row(bytes.len()) => {
                    listing.warn(format!(
                        "module {name}: symbols cut, the listing holds too many already"
                    ));
                    break;
                }
                Ok(bytes) => listing.rows.push(ModuleSymbol {
                    name: guest_text(&bytes),
                    address: Gva(field(8, 8)),
                    kind: if kind.is_ascii_graphic() {
                        char::from(kind)
                    } else {
                        '?'
                    },
                    size: field(16, 8),
                    module: name.clone(),
                }),
                Err(error) => listing.warn(format!("module {name}: a symbol's name cannot be read: {error}")),
            }
            if listing.warnings.len() > 64 {
                listing.warn(format!(
                    "module {name}: given up after too many unreadable symbols"
                ));
                break;
            }
        }
        Ok(listing)
    }
}
