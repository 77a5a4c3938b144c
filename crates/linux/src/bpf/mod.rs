//! BPF programs, maps and links that are loaded: the tables behind `BPF_*_GET_NEXT_ID` (kernel/bpf/syscall.c), since 5.8 those of
//! links too.
//!
//! What a program is of, what a map is and to what a link attaches is written in the kernel's own enumerations: their names are taken
//! from its types, so that one that came after this was written has its name all the same.

mod links;
mod names;
mod programs;

use std::sync::Arc;

use rustc_hash::FxHashSet;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::{Budget, NO_ROOM};
use crate::file::holder::Owner;
use crate::file::private::PrivateOwners;
use crate::layout::{Field, Place, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::structures::{Walk, xarray};
use crate::text::guest_array_text;
use crate::{Kernel, LinuxError};

use names::Names;

/// Bytes of a name that are believed: BPF_OBJ_NAME_LEN is 16.
const MAX_NAME: u64 = 64;

layout! {
    struct MapLayout = "bpf_map" {
        kind: Field<u32> = "map_type",
        key_size: Field<u32> = "key_size",
        value_size: Field<u32> = "value_size",
        max_entries: Field<u32> = "max_entries",
        flags: Field<u32> = "map_flags",
        id: Field<u32> = "id",
        references: Field<i64> = "refcnt",
        name: Place = "name",
    }
}

/// What the kernel numbers apart from one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BpfKind {
    /// `struct bpf_prog`.
    Program,
    /// `struct bpf_map`.
    Map,
    /// `struct bpf_link`, since 5.8.
    Link,
}

impl BpfKind {
    /// All of them, in the order of the listing.
    pub const ALL: [Self; 3] = [Self::Program, Self::Map, Self::Link];

    /// `program`, `map`, `link`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Program => "program",
            Self::Map => "map",
            Self::Link => "link",
        }
    }

    /// The `struct idr` that has them.
    fn table(self) -> &'static str {
        match self {
            Self::Program => "prog_idr",
            Self::Map => "map_idr",
            Self::Link => "link_idr",
        }
    }
}

/// A program, a map or a link. `None` is what its kind or this kernel does not have, or what could not be read: then `problems` says so.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BpfObject {
    /// `program`, `map` or `link`.
    pub kind: &'static str,
    /// Its number; each kind has numbers of its own.
    pub id: u32,
    /// As the enumerations `bpf_prog_type`, `bpf_map_type` and `bpf_link_type` call it: `kprobe`, `hash`, `cgroup`; `type-N` where the
    /// kernel's types have no name for it.
    #[serde(rename = "type")]
    pub type_name: String,
    /// What its loader called it, at most 15 bytes.
    pub name: Option<String>,
    /// Digest of a program's instructions, in hex.
    pub tag: Option<String>,
    /// When a program was loaded, RFC 3339.
    pub load_time: Option<String>,
    /// The same in nanoseconds since boot.
    pub loaded_ns: Option<u64>,
    /// The user that loaded a program.
    pub uid: Option<u32>,
    /// To what a link attaches its program, or what a program was loaded for, where that is said (`bpf_attach_type`).
    pub attach_type: Option<String>,
    /// What a link is attached to, or a program was made for: a function, a tracepoint, the path of a control group, an interface, a
    /// network namespace.
    pub target: Option<String>,
    /// The program of a link.
    pub program: Option<u32>,
    /// The maps that a program uses.
    pub maps: Vec<u32>,
    /// Instructions of a program after verification.
    pub instructions: Option<u32>,
    /// Instructions that the verifier went through, since 5.16.
    pub verified_instructions: Option<u32>,
    /// Where the machine code of a program begins; `None` where it is interpreted.
    #[serde(serialize_with = "address::gva_opt")]
    pub jited_address: Option<Gva>,
    /// Bytes of machine code, that of its functions included.
    pub jited_size: Option<u64>,
    /// Bytes of a key of a map.
    pub key_size: Option<u32>,
    /// Bytes of a value.
    pub value_size: Option<u32>,
    /// Entries that a map may have.
    pub max_entries: Option<u32>,
    /// `BPF_F_*` of a map (include/uapi/linux/bpf.h).
    #[serde(serialize_with = "address::hex_opt")]
    pub flags: Option<u64>,
    /// References held by the kernel.
    pub references: Option<i64>,
    /// Who has it open. What is attached or pinned lives on without.
    pub owners: Vec<Owner>,
    /// The structure.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Kernel {
    /// Where the programs, maps or links lie, with their numbers. `None` if the kernel has no such table, or does not name it.
    ///
    /// # Errors
    /// If the table cannot be read or the kernel's types lack a member.
    pub fn bpf_table(&self, kind: BpfKind) -> Result<Option<Walk<(u64, Gva)>>, LinuxError> {
        let Some(idr) = self.find_symbol(&[kind.table()]) else {
            return Ok(None);
        };
        let walk = xarray::walk_idr(self, idr)?;
        Ok(Some(Walk {
            // A number that was reserved leads nowhere yet.
            items: walk
                .items
                .iter()
                .filter_map(|entry| Some((entry.index, entry.pointer()?)))
                .collect(),
            end: walk.end,
        }))
    }

    /// The BPF programs, maps and links of the guest, each kind by rising number.
    ///
    /// # Errors
    /// If the kernel names no table of them, or its types lack what is needed.
    pub fn bpf(&self) -> Result<Listing<BpfObject>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &BpfObject| row.problems.len(),
            || self.list_bpf(),
        )
    }

    fn list_bpf(&self) -> Result<Listing<BpfObject>, LinuxError> {
        let mut listing = Listing::default();
        let mut found: Vec<(BpfKind, u64, Gva)> = Vec::new();
        let mut tables = 0;
        for kind in BpfKind::ALL {
            let Some(walk) = self.bpf_table(kind)? else {
                continue;
            };
            tables += 1;
            let what = format!("table of BPF {}s", kind.as_str());
            walk.end
                .warning(&what)
                .into_iter()
                .for_each(|warning| listing.warn(warning));
            found.extend(walk.items.into_iter().map(|(id, at)| (kind, id, at)));
        }
        if tables == 0 {
            return Err(LinuxError::NotFound(
                "the kernel has no BPF, or hides its tables of it".to_owned(),
            ));
        }
        let objects: FxHashSet<Gva> = found.iter().map(|&(_, _, at)| at).collect();
        let mut owners = PrivateOwners::read(self, &objects)?;
        for warning in std::mem::take(&mut owners.warnings).into_vec() {
            listing.warn(warning);
        }
        let reader = Reader::new(self)?;
        let budget = Budget::default();
        for (kind, id, at) in found {
            if !budget.row(0) {
                break;
            }
            listing.rows.push(reader.row(kind, id, at, &owners, &budget));
        }
        budget
            .warning("BPF")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }
}

/// Reads objects of all kinds.
struct Reader {
    kernel: Kernel,
    names: Names,
    map: Arc<MapLayout>,
    programs: programs::Programs,
    links: links::Links,
}

impl Reader {
    fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            names: Names::new(kernel),
            map: kernel.layout()?,
            programs: programs::Programs::new(kernel)?,
            links: links::Links::new(kernel),
        })
    }

    fn row(&self, kind: BpfKind, id: u64, at: Gva, owners: &PrivateOwners, budget: &Budget) -> BpfObject {
        let mut row = BpfObject {
            kind: kind.as_str(),
            // IDRs number by int (include/linux/idr.h).
            id: u32::try_from(id).unwrap_or(u32::MAX),
            address: at,
            ..BpfObject::default()
        };
        let held = owners.of(at);
        match budget.bytes(size_of_val(held)) {
            true => row.owners = held.to_vec(),
            false => row.problems.push(Problem::new("owners", NO_ROOM)),
        }
        let said = match kind {
            BpfKind::Program => self.programs.fill(&mut row, &self.names, budget),
            BpfKind::Map => self.map(&mut row),
            BpfKind::Link => self.links.fill(&mut row, &self.names, &self.programs, budget),
        };
        match said {
            Ok(said) if said == row.id => {}
            Ok(said) => row.problems.push(Problem::new(
                "id",
                format!("the table has it as {}, it says {said}", row.id),
            )),
            Err(error) => row.problems.push(Problem::read("type", &error)),
        }
        let texts = [&row.name, &row.tag, &row.attach_type, &row.target];
        if !budget.bytes(texts.into_iter().flatten().map(String::len).sum()) {
            (row.name, row.target) = (None, None);
            row.problems.push(Problem::new("name", NO_ROOM));
        }
        row
    }

    /// Reads a map, and the number that it says it has.
    fn map(&self, row: &mut BpfObject) -> Result<u32, ReadError> {
        let (layout, space, at) = (&self.map, self.kernel.space(), row.address);
        row.type_name = self.names.map(layout.kind.read(space, at)?);
        row.name = array_text(&self.kernel, &layout.name, at)?;
        row.key_size = Some(layout.key_size.read(space, at)?);
        row.value_size = Some(layout.value_size.read(space, at)?);
        row.max_entries = Some(layout.max_entries.read(space, at)?);
        row.flags = Some(u64::from(layout.flags.read(space, at)?));
        row.references = Some(layout.references.read(space, at)?);
        layout.id.read(space, at)
    }

    /// The number of the map at an address.
    fn map_id(map: &MapLayout, kernel: &Kernel, at: Gva) -> Result<u32, ReadError> {
        map.id.read(kernel.space(), at)
    }
}

/// The text in an array of the structure at `at`; `None` where it is empty.
fn array_text(kernel: &Kernel, array: &Place, at: Gva) -> Result<Option<String>, ReadError> {
    let mut bytes = vec![0; array.size().min(MAX_NAME) as usize];
    kernel.space().read(array.at(at), &mut bytes)?;
    Ok(Some(guest_array_text(&bytes)).filter(|name| !name.is_empty()))
}
