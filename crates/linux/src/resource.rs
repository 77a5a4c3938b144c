//! What lies at which physical address and I/O port: the trees of `struct resource` behind /proc/iomem and /proc/ioports
//! (kernel/resource.c).

use std::sync::Arc;

use rustc_hash::FxHashSet;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::layout::{Field, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::text::guest_text;
use crate::{Kernel, LinuxError};

/// Resources of both trees; a large machine has some thousand.
const MAX_RESOURCES: usize = 1 << 16;
/// Bytes of a name.
const MAX_NAME: usize = 256;

layout! {
    struct ResourceLayout = "resource" {
        start: Field<u64> = "start",
        end: Field<u64> = "end",
        name: Field<Gva> = "name",
        sibling: Field<Gva> = "sibling",
        child: Field<Gva> = "child",
    }
}

/// A range of physical addresses or of I/O ports, and whose it is.
#[derive(Clone, Debug, Serialize)]
pub struct Resource {
    /// `memory` or `port`.
    pub space: &'static str,
    /// First address or port.
    #[serde(serialize_with = "address::hex")]
    pub start: u64,
    /// Last address or port.
    #[serde(serialize_with = "address::hex")]
    pub end: u64,
    /// Size in bytes, or how many ports.
    pub size: u64,
    /// How many others it lies in.
    pub depth: u32,
    /// What is there.
    pub name: Option<String>,
    /// Its `struct resource`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Kernel {
    /// The ranges of memory and of I/O ports, each followed by those that lie in it, as /proc/iomem and /proc/ioports show them.
    ///
    /// # Errors
    /// If the kernel's symbols or types lack what is needed.
    pub fn resources(&self) -> Result<Listing<Resource>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Resource| row.problems.len(),
            || self.list_resources(),
        )
    }

    fn list_resources(&self) -> Result<Listing<Resource>, LinuxError> {
        let layout: Arc<ResourceLayout> = self.layout()?;
        let mut listing = Listing::default();
        let mut seen = FxHashSet::default();
        for (space, root) in [("memory", "iomem_resource"), ("port", "ioport_resource")] {
            let root = self.symbol(root)?;
            let first = layout.child.read(self.space(), root);
            let first = first.map_err(LinuxError::read("the tree of resources", root))?;
            // What is still to be shown: the next of each level, the innermost last.
            let mut levels = vec![first];
            while let Some(at) = levels.pop() {
                if at.is_null() {
                    continue;
                }
                if listing.rows.len() >= MAX_RESOURCES {
                    listing.warn(format!("resources: cut after {MAX_RESOURCES}"));
                    break;
                }
                if !seen.insert(at) {
                    listing.warn(format!("resources: cut, the tree comes back to {at} (a cycle)"));
                    continue;
                }
                match self.resource(&layout, space, at, levels.len() as u32) {
                    Ok((row, sibling, child)) => {
                        listing.rows.push(row);
                        levels.extend([sibling, child]);
                    }
                    Err(error) => listing.warn(format!("resources: the one at {at} cannot be read: {error}")),
                }
            }
        }
        Ok(listing)
    }

    /// A resource, the next one, and the first that lies in it.
    fn resource(
        &self,
        layout: &ResourceLayout,
        space: &'static str,
        at: Gva,
        depth: u32,
    ) -> Result<(Resource, Gva, Gva), ReadError> {
        let memory = self.space();
        let (start, end) = (layout.start.read(memory, at)?, layout.end.read(memory, at)?);
        let mut row = Resource {
            space,
            start,
            end,
            size: end.wrapping_sub(start).wrapping_add(1),
            depth,
            name: None,
            address: at,
            problems: Vec::new(),
        };
        match layout.name.read(memory, at)? {
            Gva(0) => {}
            name => match memory.read_cstr(name, MAX_NAME) {
                Ok(name) => row.name = Some(guest_text(&name)),
                Err(error) => row.problems.push(Problem::read("name", &error)),
            },
        }
        Ok((
            row,
            layout.sibling.read(memory, at)?,
            layout.child.read(memory, at)?,
        ))
    }
}
