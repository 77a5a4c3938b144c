//! The listings: what is in the guest, a row per object.

mod files;
mod machine;
mod network;
mod processes;
mod stacks;

pub(crate) use files::{Lsmod, Lsof, Mounts};
pub(crate) use machine::{Bpf, Iomem, Perf, Slabs};
pub(crate) use network::{Ifaces, Net, Unix};
pub(crate) use processes::{Cgroups, Env, Maps, Ps, Pstree, Threads};
pub(crate) use stacks::Stacks;

use anyhow::Result;
use vmsight_linux::{Kernel, LinuxError, Listing, ProcessFields};

use crate::{
    Outcome,
    output::{Row, Sheet},
    session::Session,
};

/// Prints a listing; a table shows these columns of it unless others are asked for.
fn print<T: Row>(session: &Session, columns: &'static [&'static str], listing: Listing<T>) -> Result<()> {
    session.print(&Sheet::new(columns, &listing.rows, listing.warnings))?;
    session.let_go(listing.rows);
    Ok(())
}

/// Where something was asked for by name and is not there, exit code 1.
fn found(all: bool) -> Outcome {
    if all { Outcome::Fine } else { Outcome::Nothing }
}

/// Whether everything asked for is there; a warning for each that is not.
fn all_there<T: Copy>(
    asked: &[T],
    there: impl Fn(T) -> bool,
    missing: impl Fn(T) -> String,
    warnings: &mut Vec<String>,
) -> bool {
    let before = warnings.len();
    warnings.extend(asked.iter().filter(|a| !there(**a)).map(|a| missing(*a)));
    warnings.len() == before
}

fn no_process(pid: i32) -> String {
    format!("the guest has no process {pid}")
}

/// An error where there is no process of this pid: what has nothing to show of it shall say which of both it is.
fn must_exist(kernel: &Kernel, pid: i32) -> Result<(), LinuxError> {
    kernel.process(pid, ProcessFields::empty()).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let mut warnings = vec!["before".to_owned()];
        assert!(all_there(&[1, 2], |_| true, no_process, &mut warnings));
        assert!(!all_there(&[1, 2], |p| p == 1, no_process, &mut warnings));
        assert_eq!(warnings, ["before", "the guest has no process 2"]);
    }

    #[test]
    fn tables_show_columns_that_there_are() {
        use vmsight_linux::{
            Cgroup, Mapping, bpf::BpfObject, file::OpenFile, iface::Interface, module::Module, mount::Mount,
            perf::PerfEvent,
        };
        use vmsight_linux::{
            Process, Resource, SlabCache, StackFrame, Thread, socket::Socket, socket::UnixSocket,
        };
        fn check<T: Row>(columns: &[&str]) {
            for column in columns {
                let known = T::COLUMNS.contains(column) || *column == processes::KIND;
                assert!(known, "{} has no {column}", std::any::type_name::<T>());
            }
        }
        check::<Process>(processes::PS);
        check::<Thread>(processes::THREADS);
        check::<StackFrame>(stacks::STACKS);
        check::<Mapping>(processes::MAPS);
        check::<Cgroup>(processes::CGROUPS);
        check::<OpenFile>(files::LSOF);
        check::<Mount>(files::MOUNTS);
        check::<Module>(files::LSMOD);
        check::<Socket>(network::NET);
        check::<UnixSocket>(network::UNIX);
        check::<Interface>(network::IFACES);
        check::<Resource>(machine::IOMEM);
        check::<SlabCache>(machine::SLABS);
        check::<BpfObject>(machine::BPF);
        check::<PerfEvent>(machine::PERF);
    }
}
