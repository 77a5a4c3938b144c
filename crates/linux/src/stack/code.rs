//! Whose code an address lies in, what it is called, and what unwinds it.

use std::cell::RefCell;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::orc::{Bits, Entry, Form, Table};
use crate::layout::{Field, layout};
use crate::listing::Listing;
use crate::module::{ModuleFields, ModuleLayout, ModuleSymbol};
use crate::{Kernel, LinuxError};

/// Addresses whose names and entries are kept. Stacks are made of the same few thousand.
const MAX_KEPT: usize = 1 << 16;
/// Code of one module: more is not believed.
const MAX_CODE: u64 = 1 << 30;
/// Bytes of the longest near call without its prefixes.
const LONGEST_CALL: u64 = 7;

layout! {
    /// Where a module's table lies (arch/x86/include/asm/module.h).
    struct ModuleOrcLayout = "module" {
        count: Field<u32> = "arch.num_orcs",
        addresses: Field<Gva> = "arch.orc_unwind_ip",
        entries: Field<Gva> = "arch.orc_unwind",
    }
}

/// Whose code it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Owner {
    Kernel,
    /// The module of this number.
    Module(usize),
}

/// What an address is called.
#[derive(Clone, Debug, Default)]
pub(super) struct Name {
    /// `symbol+0x10/0x40`.
    pub(super) symbol: Option<Arc<str>>,
    pub(super) module: Option<Arc<str>>,
}

struct ModuleCode {
    name: Arc<str>,
    address: Gva,
    table: Option<Table>,
    /// Of those whose names were asked for: by address, the kernel's order where that is the same.
    symbols: RefCell<Option<Arc<[ModuleSymbol]>>>,
}

/// All code of a kernel and of the modules in its list.
pub(super) struct Code<'k> {
    kernel: &'k Kernel,
    /// First byte, the one past the last, and whose; ascending.
    ranges: Vec<(u64, u64, Owner)>,
    modules: Vec<ModuleCode>,
    table: Option<(Table, Form)>,
    names: RefCell<FxHashMap<(u64, bool), Name>>,
    entries: RefCell<FxHashMap<u64, Option<Entry>>>,
}

impl<'k> Code<'k> {
    /// Reads where code lies. What could not be read is a warning of `listing`.
    pub(super) fn read<T>(kernel: &'k Kernel, listing: &mut Listing<T>) -> Result<Self, LinuxError> {
        let mut code = Self {
            kernel,
            ranges: Vec::new(),
            modules: Vec::new(),
            table: None,
            names: RefCell::default(),
            entries: RefCell::default(),
        };
        for (from, to) in [("_stext", "_etext"), ("_sinittext", "_einittext")] {
            if let (Some(from), Some(to)) = (kernel.find_symbol(&[from]), kernel.find_symbol(&[to])) {
                code.add(from.0, to.0, Owner::Kernel);
            }
        }
        if code.ranges.is_empty() {
            return Err(LinuxError::NoSymbol {
                name: "_stext".to_owned(),
                release: kernel.release().to_owned(),
            });
        }
        code.tables(listing);
        match kernel.modules(ModuleFields::default()) {
            Ok(modules) => {
                modules.warnings.into_iter().for_each(|w| listing.warn(w));
                let layout: Arc<ModuleLayout> = kernel.layout()?;
                let orc = kernel.layout::<ModuleOrcLayout>().ok();
                for module in modules.rows {
                    let owner = Owner::Module(code.modules.len());
                    for range in &module.ranges {
                        let size = match (range.kind.as_str(), layout.core_text) {
                            ("core", Some(text)) => text
                                .read(kernel.space(), module.address)
                                .map_or(range.size, |text| u64::from(text).min(range.size)),
                            ("core" | "init" | "text" | "init_text", _) => range.size,
                            _ => continue,
                        };
                        code.add(
                            range.base.0,
                            range.base.0.saturating_add(size.min(MAX_CODE)),
                            owner,
                        );
                    }
                    code.modules.push(ModuleCode {
                        name: module.name.into(),
                        address: module.address,
                        table: orc
                            .as_deref()
                            .and_then(|orc| module_table(kernel, orc, module.address)),
                        symbols: RefCell::default(),
                    });
                }
            }
            Err(error) => listing.warn(format!("the code of modules is not known: {error}")),
        }
        code.ranges.sort_by_key(|range| range.0);
        Ok(code)
    }

    fn tables<T>(&mut self, listing: &mut Listing<T>) {
        let Some(table) = Table::of_kernel(self.kernel) else {
            return listing.warn("the kernel has no ORC tables: return addresses are guessed");
        };
        let Some(form) = Form::of_table(self.kernel, &table) else {
            return listing
                .warn("the kernel's ORC tables are of no known form: return addresses are guessed");
        };
        // How the bits lie is known twice, how registers are numbered only by the table.
        if Bits::of_types(self.kernel).is_some_and(|bits| bits != form.bits) {
            listing.warn("the kernel's ORC table is not of the form that its types say");
        }
        self.table = Some((table, form));
    }

    fn add(&mut self, from: u64, to: u64, owner: Owner) {
        if from < to {
            self.ranges.push((from, to, owner));
        }
    }

    /// Whose code lies at `at`.
    pub(super) fn owner(&self, at: u64) -> Option<Owner> {
        self.range(at).map(|range| range.2)
    }

    fn range(&self, at: u64) -> Option<&(u64, u64, Owner)> {
        let before = self.ranges.partition_point(|range| range.0 <= at);
        // Those of honest guests do not overlap; of those of others the nearest below that holds it is taken.
        let near = self.ranges.get(before.saturating_sub(8)..before)?;
        near.iter().rev().find(|range| at < range.1)
    }

    /// What unwinds the instruction at `at`; `None` where nothing does.
    pub(super) fn entry(&self, at: u64) -> Option<Entry> {
        if let Some(known) = self.entries.borrow().get(&at) {
            return *known;
        }
        let found = self.find_entry(at);
        let mut kept = self.entries.borrow_mut();
        if kept.len() < MAX_KEPT {
            kept.insert(at, found);
        }
        found
    }

    fn find_entry(&self, at: u64) -> Option<Entry> {
        let (kernel, form) = self.table?;
        let table = match self.owner(at)? {
            Owner::Kernel => kernel,
            Owner::Module(number) => self.modules.get(number)?.table?,
        };
        table.find(self.kernel.space(), form, Gva(at)).ok().flatten()
    }

    /// What the kernel would call `at`. A return address may lie past its function, whose last instruction is the call: unless
    /// `exact`, the byte before says whose it is.
    pub(super) fn name(&self, at: u64, exact: bool) -> Name {
        if let Some(known) = self.names.borrow().get(&(at, exact)) {
            return known.clone();
        }
        let name = self.find_name(at, if exact { at } else { at.wrapping_sub(1) });
        let mut kept = self.names.borrow_mut();
        if kept.len() < MAX_KEPT {
            kept.insert((at, exact), name.clone());
        }
        name
    }

    fn find_name(&self, at: u64, inside: u64) -> Name {
        let spelt = |name: &str, start: u64, end: u64| {
            let (offset, size) = (at.wrapping_sub(start), end.wrapping_sub(start));
            format!("{name}+{offset:#x}/{size:#x}").into()
        };
        match self.owner(inside) {
            Some(Owner::Kernel) => {
                let (image, symbols) = (self.kernel.image(), &self.kernel.profile().symbols);
                let symbol = symbols.nearest(image.link_time(Gva(inside))).map(|(symbol, _)| {
                    let start = image.runtime(symbol.address).0;
                    let next = symbols.after(image.link_time(Gva(inside)));
                    spelt(
                        symbol.name,
                        start,
                        next.map_or(start, |next| image.runtime(next.address).0),
                    )
                });
                Name { symbol, module: None }
            }
            Some(Owner::Module(number)) => {
                self.modules
                    .get(number)
                    .map_or_else(Name::default, |module| Name {
                        symbol: self.module_symbol(module, inside, &spelt),
                        module: Some(module.name.clone()),
                    })
            }
            None => Name::default(),
        }
    }

    /// As the kernel chooses it (`find_kallsyms_symbol`, kernel/module/kallsyms.c): the first of those that begin last before it, and
    /// up to the next, or the end of the code.
    fn module_symbol(
        &self,
        module: &ModuleCode,
        inside: u64,
        spelt: &dyn Fn(&str, u64, u64) -> Arc<str>,
    ) -> Option<Arc<str>> {
        let symbols = module
            .symbols
            .borrow_mut()
            .get_or_insert_with(|| {
                let listing = self.kernel.symbols_of_module(module.address, &module.name);
                let mut symbols = listing.map(|listing| listing.rows).unwrap_or_default();
                symbols.retain(|s| !["$", ".L", "L0"].iter().any(|mark| s.name.starts_with(mark)));
                symbols.sort_by_key(|symbol| symbol.address);
                symbols.into()
            })
            .clone();
        let after = symbols.partition_point(|symbol| symbol.address.0 <= inside);
        let last = symbols.get(after.checked_sub(1)?)?.address;
        let first = symbols.partition_point(|symbol| symbol.address < last);
        let symbol = symbols.get(first)?;
        let end = self.range(inside)?.1;
        let next = symbols.get(after).map_or(end, |next| next.address.0.min(end));
        Some(spelt(&symbol.name, symbol.address.0, next))
    }

    /// Whether `at` may be where a call returns to: in known code, and behind an instruction that calls.
    pub(super) fn is_behind_call(&self, at: u64) -> bool {
        let Some(from) = at.checked_sub(LONGEST_CALL) else {
            return false;
        };
        let mut bytes = [0; LONGEST_CALL as usize];
        self.owner(at.wrapping_sub(1)).is_some()
            && self.kernel.space().read(Gva(from), &mut bytes).is_ok()
            && ends_with_call(&bytes)
    }
}

fn module_table(kernel: &Kernel, layout: &ModuleOrcLayout, module: Gva) -> Option<Table> {
    let space = kernel.space();
    let read = || -> Result<_, ReadError> {
        Ok((
            layout.addresses.read(space, module)?,
            layout.entries.read(space, module)?,
            layout.count.read(space, module)?,
        ))
    };
    let (addresses, entries, count) = read().ok()?;
    Table::new(addresses, entries, u64::from(count))
}

/// Whether the last bytes are a near CALL: E8 with 32 bits, or FF /2 with its operand.
fn ends_with_call(bytes: &[u8; LONGEST_CALL as usize]) -> bool {
    if bytes.get(2) == Some(&0xe8) {
        return true;
    }
    (0..bytes.len()).any(|at| {
        let rest = bytes.get(at..).unwrap_or(&[]);
        let &[0xff, modrm, ..] = rest else { return false };
        let (mode, memory) = (modrm >> 6, modrm & 7);
        if modrm >> 3 & 7 != 2 {
            return false;
        }
        // A byte more where there is an index, and the displacement.
        let index = usize::from(mode != 3 && memory == 4);
        let displacement = match mode {
            0 if memory == 5 => 4,
            0 if memory == 4 && rest.get(2).is_some_and(|sib| sib & 7 == 5) => 4,
            1 => 1,
            2 => 4,
            _ => 0,
        };
        2 + index + displacement == rest.len()
    })
}

#[cfg(test)]
mod tests {
    use super::ends_with_call;

    #[test]
    fn calls_are_told_from_what_only_looks_like_one() {
        for call in [
            &[0xe8, 1, 2, 3, 4][..],         // call rel32
            &[0xff, 0xd0],                   // call rax
            &[0x41, 0xff, 0xd4],             // call r12
            &[0xff, 0x13],                   // call [rbx]
            &[0xff, 0x50, 0x08],             // call [rax+8]
            &[0xff, 0x90, 1, 2, 3, 4],       // call [rax+disp32]
            &[0xff, 0x15, 1, 2, 3, 4],       // call [rip+disp32]
            &[0xff, 0x14, 0x25, 1, 2, 3, 4], // call [disp32]
            &[0xff, 0x14, 0xc1],             // call [rcx+rax*8]
        ] {
            let mut bytes = [0x90; 7];
            bytes[7 - call.len()..].copy_from_slice(call);
            assert!(ends_with_call(&bytes), "{call:x?}");
        }
        for other in [
            &[0xe9, 1, 2, 3, 4][..],   // jmp rel32
            &[0xff, 0xe0],             // jmp rax
            &[0xff, 0x50, 0x08, 0x90], // a call, and something behind it
            &[0xff, 0x15, 1, 2, 3],    // too short
            &[0xc3],
        ] {
            let mut bytes = [0x90; 7];
            bytes[7 - other.len()..].copy_from_slice(other);
            assert!(!ends_with_call(&bytes), "{other:x?}");
        }
    }
}
