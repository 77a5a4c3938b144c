//! A module's sections, as `/sys/module/NAME/sections` has them.

use std::sync::Arc;

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;

use crate::budget::{NO_ROOM, Share};
use crate::layout::{Field, Place, layout};
use crate::listing::Problem;
use crate::{Kernel, LinuxError};

/// More sections than a module has; the ELF format's own limit without extensions is 65,280.
const MAX_SECTIONS: u32 = 4096;

/// One section of a module. Serialised as `"NAME 0xADDRESS"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name, `.text` for one.
    pub name: String,
    /// Where it was loaded.
    pub address: Gva,
}

impl Serialize for Section {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{} {}", self.name, self.address))
    }
}

layout! {
    struct SectAttrsLayout = "module_sect_attrs" {
        nsections: Option<Field<u32>> = "nsections",              // gone in 6.14
        attrs: Place = "attrs",
        bin_attrs: Field<Gva> = "grp.bin_attrs",
    }
}

layout! {
    /// Up to 6.13.
    struct SectAttrLayout = "module_sect_attr" {
        name: Field<Gva> = "battr.attr.name",
        address: Field<Gva> = "address",
    }
}

layout! {
    /// From 6.14 on the attribute's private pointer is the section's address.
    struct BinAttributeLayout = "bin_attribute" {
        name: Field<Gva> = "attr.name",
        private: Field<Gva> = "private",
    }
}

/// The sections of the `struct module_sect_attrs` at `attrs`, and what was cut.
pub(super) fn read(
    kernel: &Kernel,
    attrs: Gva,
    share: &mut Share<'_>,
) -> Result<(Vec<Section>, Option<Problem>), LinuxError> {
    let layout: Arc<SectAttrsLayout> = kernel.layout()?;
    let space = kernel.space();
    let mut sections = Vec::new();
    let mut problem = None;
    let mut add = |name: Gva, address: Gva| match kernel.text(name, 256) {
        Ok(name) if share.bytes(size_of::<Section>() + name.len()) => {
            sections.push(Section { name, address });
        }
        Ok(_) => problem = Some(Problem::new("sections", NO_ROOM)),
        Err(error) => problem = Some(Problem::read("sections", &error)),
    };
    if let Some(nsections) = &layout.nsections {
        let attr: Arc<SectAttrLayout> = kernel.layout()?;
        let count = nsections
            .read(space, attrs)
            .map_err(LinuxError::read("module_sect_attrs", attrs))?;
        for index in 0..count.min(MAX_SECTIONS) {
            let at = layout.attrs.at(attrs).wrapping_add(u64::from(index) * attr.size);
            let name = attr
                .name
                .read(space, at)
                .map_err(LinuxError::read("module_sect_attr", at))?;
            let address = attr
                .address
                .read(space, at)
                .map_err(LinuxError::read("module_sect_attr", at))?;
            add(name, address);
        }
        if count > MAX_SECTIONS {
            problem = Some(Problem::new(
                "sections",
                format!("cut: the module claims {count} sections"),
            ));
        }
    } else {
        let attr: Arc<BinAttributeLayout> = kernel.layout()?;
        let table = layout
            .bin_attrs
            .read(space, attrs)
            .map_err(LinuxError::read("module_sect_attrs", attrs))?;
        let mut ended = table.is_null();
        for index in 0..if ended { 0 } else { MAX_SECTIONS } {
            let slot = table.wrapping_add(u64::from(index) * 8);
            let at = Gva(space
                .read_u64(slot)
                .map_err(LinuxError::read("a table of sections", slot))?);
            if at.is_null() {
                ended = true;
                break;
            }
            let name = attr
                .name
                .read(space, at)
                .map_err(LinuxError::read("bin_attribute", at))?;
            let address = attr
                .private
                .read(space, at)
                .map_err(LinuxError::read("bin_attribute", at))?;
            add(name, address);
        }
        if !ended {
            problem = Some(Problem::new(
                "sections",
                "cut: the table of sections does not end",
            ));
        }
    }
    Ok((sections, problem))
}
