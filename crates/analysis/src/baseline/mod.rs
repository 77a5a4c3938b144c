//! A trusted copy of a kernel's code: made while the guest is known to be good, held against it later.

mod compare;
mod file;
mod kernel_file;
mod module_file;
mod package;
mod packed;
mod trusted;

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::module::Module;

use crate::Context;
use crate::text::{self, Region};

pub(crate) use compare::{DATA, differences};
pub use file::BaselineError;
pub use kernel_file::KernelFileError;
pub use module_file::{
    AlternativeLayout, ModuleFile, ModuleFileError, Outside, Placed, Relocated, Site, SiteKind,
};
pub(crate) use trusted::{Difference, differs};
pub use trusted::{Source, Trusted, TrustedError};

/// The code of one kernel and its modules, as it was.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Baseline {
    /// The kernel's release.
    pub release: String,
    /// The kernel's GNU build-id in hexadecimal; empty where it has none.
    pub build_id: String,
    /// The code, the kernel's first.
    pub parts: Vec<Part>,
}

/// The code of the kernel or of one module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// The module's name; empty for the kernel.
    pub module: String,
    /// Its GNU build-id in hexadecimal; empty where it has none.
    pub build_id: String,
    /// Where it lay.
    pub base: Gva,
    /// Where a module's other memory lay, by kind as in [`vmsight_linux::module::ModuleRange`]: its code refers to it.
    pub areas: Vec<(String, Gva)>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Baseline {
    /// The code as it is now, and what of it could not be read.
    ///
    /// # Errors
    /// If the kernel's text cannot be read.
    pub fn of(context: &Context) -> Result<(Self, Vec<String>), LinuxError> {
        let mut notes = Vec::new();
        let kernel = text::kernel(context)?;
        let mut parts = vec![part(String::new(), kernel_id(context), Vec::new(), kernel)];
        for (module, region) in text::modules(context) {
            match region {
                Ok(region) => {
                    let id = module.build_id.clone().unwrap_or_default();
                    parts.push(part(module.name.clone(), id, areas(module), region));
                }
                Err(why) => notes.push(format!("module {}: {why}", module.name)),
            }
        }
        let baseline = Self {
            release: context.kernel().release().to_owned(),
            build_id: kernel_id(context),
            parts,
        };
        Ok((baseline, notes))
    }
}

/// Where a module's memory lies, by kind.
pub(crate) fn areas(module: &Module) -> Vec<(String, Gva)> {
    module.ranges.iter().map(|r| (r.kind.clone(), r.base)).collect()
}

fn part(module: String, build_id: String, areas: Vec<(String, Gva)>, region: Region) -> Part {
    Part {
        module,
        build_id,
        base: Gva(region.start),
        areas,
        bytes: region.bytes,
    }
}

/// The kernel's build-id in hexadecimal.
pub(crate) fn kernel_id(context: &Context) -> String {
    let id = context.kernel().profile().build_id.as_deref().unwrap_or_default();
    hex(id)
}

/// A build-id as people write it.
fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
