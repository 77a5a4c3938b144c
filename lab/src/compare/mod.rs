//! What vmsight sees held against what the guest says of itself, field by field. The same comparison serves a guest that runs and a
//! dump of it.

pub mod bpf;
pub mod cgroups;
mod endpoints;
pub mod files;
pub mod frames;
mod holders;
pub mod info;
pub mod interfaces;
pub mod log;
pub mod maps;
pub mod modules;
pub mod mounts;
pub mod neighbours;
pub mod perf;
pub mod processes;
pub mod resources;
pub mod routes;
pub mod slabs;
pub mod sockets;
pub mod stacks;
pub mod symbols;
pub mod threads;
mod times;
pub mod unix;

use std::fmt::{self, Debug, Display};

use vmsight_linux::Kernel;
use vmsight_linux::text::guest_text;

use crate::truth::{Text, Truth};

/// Where the two do not agree, and how much was compared.
#[derive(Debug, Default)]
pub struct Differences {
    /// Values compared.
    pub compared: usize,
    /// One sentence for each difference.
    pub found: Vec<String>,
}

impl Differences {
    /// Notes a difference of `what` unless both are equal.
    pub fn same<T: PartialEq<U> + Debug, U: Debug>(&mut self, what: impl Display, seen: T, said: U) {
        let same = seen == said;
        self.near(what, same, seen, said);
    }

    /// Notes a difference of `what` unless `near`: for what may differ a little.
    pub fn near<T: Debug, U: Debug>(&mut self, what: impl Display, near: bool, seen: T, said: U) {
        self.compared += 1;
        if !near {
            self.found
                .push(format!("{what}: vmsight sees {seen:?}, the guest says {said:?}"));
        }
    }

    /// Notes a difference.
    pub fn differs(&mut self, what: impl Into<String>) {
        self.compared += 1;
        self.found.push(what.into());
    }

    /// Notes warnings of a listing and problems of its rows: on an honest guest there are none.
    pub fn complaints<T: Debug>(&mut self, what: &str, complaints: impl IntoIterator<Item = T>) {
        for complaint in complaints {
            self.differs(format!("{what}: vmsight complains: {complaint:?}"));
        }
    }
}

impl Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} of {} values differ:", self.found.len(), self.compared)?;
        self.found.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// A comparison of one listing.
pub type Comparison = fn(&Kernel, &Truth) -> anyhow::Result<Differences>;

/// All of them: what it is about, and the least number of values that one guest of the lab gives it to compare.
pub const ALL: &[(&str, usize, Comparison)] = &[
    ("open files", 2000, files::open_files),
    ("mounts", 400, mounts::mounts),
    ("modules", 180, modules::modules),
    ("symbols", 250, symbols::symbols),
    ("kernel log", 1500, log::kmsg),
    ("sockets", 380, sockets::sockets),
    ("UNIX sockets", 100, unix::unix_sockets),
    ("interfaces", 80, interfaces::interfaces),
    ("neighbours", 4, neighbours::neighbours),
    ("routes", 40, routes::routes),
    ("processes", 2000, processes::processes),
    ("threads", 300, threads::threads),
    ("kernel stacks", 800, stacks::stacks),
    ("mappings", 4000, maps::maps),
    ("page tables", 300, frames::frames),
    ("control groups", 40, cgroups::cgroups),
    ("info", 18, info::info),
    ("resources", 20, resources::resources),
    ("slabs", 100, slabs::slabs),
    ("BPF", 100, bpf::bpf),
    ("perf events", 40, perf::perf),
];

/// Makes all comparisons and gives the differences, each with what it is about; none for a vmsight that sees all as it is.
pub fn all(kernel: &Kernel, truth: &Truth) -> Vec<String> {
    let mut out = Vec::new();
    for (what, least, compare) in ALL {
        match compare(kernel, truth) {
            Ok(differences) => {
                out.extend(differences.found.iter().map(|d| format!("{what}: {d}")));
                if differences.compared < *least {
                    out.push(format!(
                        "{what}: only {} values were compared, not {least}",
                        differences.compared
                    ));
                }
            }
            Err(error) => out.push(format!("{what}: {error:#}")),
        }
    }
    out
}

/// The guest's bytes spelt as vmsight spells them.
pub(crate) fn spelt(text: &Text) -> String {
    guest_text(text.bytes())
}
