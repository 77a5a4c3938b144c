//! The layers of an overlay: which directories a container's root is made of (fs/overlayfs/ovl_entry.h). Usually a module, with
//! types of its own.

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::Kernel;
use crate::layout::{Field, Layout, layout};

/// Layers of one overlay; `OVL_MAX_STACK` is 500.
const MAX_LAYERS: u32 = 500;
/// Longest option; the mount system call takes one page of them.
const MAX_TEXT: usize = 4096;

layout! {
    pub(super) struct OverlayLayout = "ovl_fs" {
        upperdir: Field<Gva> = "config.upperdir",
        workdir: Field<Gva> = "config.workdir",
        lowerdir: Option<Field<Gva>> = "config.lowerdir",         // up to 6.4
        lowerdirs: Option<Field<Gva>> = "config.lowerdirs",       // 6.5
        layers: Option<Field<u32>> = "numlayer",
    }
}

impl OverlayLayout {
    /// From the kernel's own types or those of the module; `None` before 5.11, when modules had no types in memory.
    pub(super) fn find(kernel: &Kernel) -> Option<Self> {
        Self::resolve(kernel.types(), kernel.release())
            .ok()
            .or_else(|| Self::resolve(&kernel.module_types("overlay").ok()?, kernel.release()).ok())
    }

    /// Adds `lowerdir`, `upperdir` and `workdir` of the `struct ovl_fs` at `info`.
    pub(super) fn options(&self, kernel: &Kernel, info: Gva, out: &mut String) -> Result<(), ReadError> {
        let space = kernel.space();
        let mut option = |name: &str, at: Gva| -> Result<(), ReadError> {
            if !at.is_null() {
                let value = kernel.text(at, MAX_TEXT)?;
                out.push(',');
                out.push_str(name);
                out.push('=');
                out.push_str(&value);
            }
            Ok(())
        };
        if let Some(field) = &self.lowerdir {
            option("lowerdir", field.read(space, info)?)?;
        }
        if let Some(field) = &self.lowerdirs {
            // The first is the list as it was given; if the layers were added one by one it is null and the others count.
            let table = field.read(space, info)?;
            let whole = if table.is_null() {
                Gva(0)
            } else {
                kernel.pointer(table)?
            };
            if whole.is_null() && !table.is_null() {
                let count = match &self.layers {
                    Some(layers) => layers.read(space, info)?.min(MAX_LAYERS),
                    None => 0,
                };
                for index in 1..count {
                    option(
                        "lowerdir+",
                        kernel.pointer(table.wrapping_add(u64::from(index) * 8))?,
                    )?;
                }
            } else {
                option("lowerdir", whole)?;
            }
        }
        option("upperdir", self.upperdir.read(space, info)?)?;
        option("workdir", self.workdir.read(space, info)?)
    }
}
