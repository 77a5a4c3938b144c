//! The types of loaded modules: the kernel keeps each module's BTF, laid over its own, in `btf_idr` (kernel/bpf/btf.c, since 5.11).

use std::sync::{Arc, PoisonError};

use vmsight_arch::Gva;
use vmsight_symbols::Types;

use crate::layout::{Field, Place, layout};
use crate::structures::xarray;
use crate::{Kernel, LinuxError};

layout! {
    /// `struct btf`.
    struct BtfLayout = "btf" {
        data: Field<Gva> = "data",
        data_size: Field<u32> = "data_size",
        name: Place = "name",
        of_kernel: Field<bool> = "kernel_btf",
    }
}

/// The types of the largest module (amdgpu) take about 2 MB.
const MAX_BTF: u32 = 64 << 20;

impl Kernel {
    /// The types of a loaded module, over the kernel's own; read at the first call.
    ///
    /// They are laid over the BTF that the guest itself carries, also where [`Kernel::types`] are from a file: a module's BTF goes on
    /// counting where its kernel's ends, and with any other types below, each reference would lead elsewhere.
    ///
    /// # Errors
    /// If the kernel keeps none for it: built without CONFIG_DEBUG_INFO_BTF_MODULES, older than 5.11, or no such module. If its
    /// own BTF could not be read.
    pub fn module_types(&self, module: &str) -> Result<Types, LinuxError> {
        let cache = self.module_type_cache();
        if let Some(known) = cache.read().unwrap_or_else(PoisonError::into_inner).get(module) {
            return Ok(known.clone());
        }
        let types = self.read_module_types(module)?;
        cache
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(module.to_owned(), types.clone());
        Ok(types)
    }

    fn read_module_types(&self, module: &str) -> Result<Types, LinuxError> {
        let layout: Arc<BtfLayout> = self.layout()?;
        let walk = xarray::walk_idr(self, self.symbol("btf_idr")?)?;
        for entry in &walk.items {
            let Some(btf) = entry.pointer() else { continue };
            let mut name = vec![0u8; layout.name.size().min(256) as usize];
            let named = self.space().read(layout.name.at(btf), &mut name).is_ok()
                && layout.of_kernel.read(self.space(), btf).unwrap_or(false)
                && crate::text::guest_array_text(&name) == module;
            if named {
                return self.types_at(&layout, btf, module);
            }
        }
        let cut = walk.end.warning("; btf_idr").unwrap_or_default();
        Err(LinuxError::NotFound(format!(
            "the kernel keeps no types of a module {module}{cut}"
        )))
    }

    fn types_at(&self, layout: &BtfLayout, btf: Gva, module: &str) -> Result<Types, LinuxError> {
        let what = || format!("the types of module {module}");
        let base = self.profile().guest_types();
        if base.is_empty() {
            return Err(LinuxError::NotFound(format!(
                "{} continue the BTF of the kernel, which could not be read in the guest; no file can stand in for it",
                what()
            )));
        }
        let size = layout
            .data_size
            .read(self.space(), btf)
            .map_err(LinuxError::read(what(), btf))?;
        if size > MAX_BTF {
            return Err(LinuxError::Implausible {
                what: what(),
                reason: format!("they have {size} bytes"),
            });
        }
        let data = layout
            .data
            .read(self.space(), btf)
            .map_err(LinuxError::read(what(), btf))?;
        let mut bytes = vec![0u8; size as usize];
        self.space()
            .read(data, &mut bytes)
            .map_err(LinuxError::read(what(), data))?;
        Types::from_split_btf(base, bytes).map_err(|error| LinuxError::Implausible {
            what: what(),
            reason: error.to_string(),
        })
    }
}
