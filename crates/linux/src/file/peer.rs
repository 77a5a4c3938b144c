//! The other ends: who holds what a pipe or a UNIX socket leads to, and what a socket is connected to.

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use super::facts::Facts;
use super::holder::{Holder, Owner};
use super::{Lister, OpenFile};
use crate::budget::Budget;
use crate::listing::{Listing, Problem};
use crate::socket::{SockReader, SocketOwners, UnixReader, namespace};
use crate::{Kernel, LinuxError};

/// Holders that are named at most. A pipe that thousands have inherited is not shown thousands of times with thousands each.
const MAX_PEERS: usize = 64;

/// The holders of a pipe's ends, as many as can be shown and one more.
#[derive(Default)]
struct Ends {
    readers: Vec<Owner>,
    writers: Vec<Owner>,
}

/// Fills in `peers` and `endpoint` of the rows.
pub(super) fn fill(
    kernel: &Kernel,
    holders: &[Holder],
    facts: &mut Lister,
    listing: &mut Listing<OpenFile>,
) -> Result<(), LinuxError> {
    let owners = SocketOwners::read(kernel, holders, &mut facts.fds)?;
    let pipes = pipes(holders, facts, listing);
    let sockets = SockReader::new(kernel)?;
    let unix = UnixReader::new(kernel).ok();
    let namespaces = namespace::all(kernel, holders)?;
    // Only endpoints are kept of the rows of sockets.
    let budget = &Budget::default();
    for row in &mut listing.rows {
        let Some(address) = row.address else { continue };
        let known = facts.facts(address);
        if let Some(pipe) = known.pipe {
            if let Some(ends) = pipes.get(&pipe) {
                others(ends, &known, row);
            }
        } else if let Some(sock) = known.sock
            && let Err(error) = socket(row, sock, &sockets, unix.as_ref(), (&owners, &namespaces, budget))
        {
            row.problems.push(Problem::read("endpoint", &error));
        }
    }
    Ok(())
}

/// Who can read what this one writes, and the other way round.
fn others(ends: &Ends, known: &Facts, row: &mut OpenFile) {
    let sides = [(known.can_read, &ends.writers), (known.can_write, &ends.readers)];
    let mut peers: Vec<Owner> = sides
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .flat_map(|(_, side)| side)
        .filter(|end| end.pid != row.pid || end.fd.to_string() != row.fd)
        .cloned()
        .collect();
    peers.sort();
    peers.dedup();
    show(row, peers);
}

fn show(row: &mut OpenFile, mut peers: Vec<Owner>) {
    if peers.len() > MAX_PEERS {
        peers.truncate(MAX_PEERS);
        row.problems
            .push(Problem::new("peers", format!("cut after {MAX_PEERS}")));
    }
    row.peers = peers;
}

/// The ends of the pipes and FIFOs among the rows, by their `pipe_inode_info`.
fn pipes(holders: &[Holder], facts: &mut Lister, listing: &Listing<OpenFile>) -> FxHashMap<Gva, Ends> {
    let mut pipes: FxHashMap<Gva, Ends> = FxHashMap::default();
    let files = listing.rows.iter().filter_map(|row| row.address);
    pipes.extend(
        files
            .filter_map(|file| facts.facts(file).pipe)
            .map(|pipe| (pipe, Ends::default())),
    );
    if pipes.is_empty() {
        return pipes;
    }
    for holder in holders.iter().filter(|h| !h.files.is_null()) {
        let Ok(open) = facts.fds.open_fds(holder.files) else {
            continue;
        };
        for entry in &open.fds {
            let known = facts.facts(entry.file);
            if let Some(ends) = known.pipe.and_then(|pipe| pipes.get_mut(&pipe)) {
                let owner = Owner {
                    pid: holder.pid,
                    name: holder.comm.clone(),
                    fd: entry.fd,
                };
                for (can, side) in [
                    (known.can_read, &mut ends.readers),
                    (known.can_write, &mut ends.writers),
                ] {
                    if can && side.len() <= MAX_PEERS {
                        side.push(owner.clone());
                    }
                }
            }
        }
    }
    pipes
}

fn socket(
    row: &mut OpenFile,
    sock: Gva,
    sockets: &SockReader,
    unix: Option<&UnixReader>,
    (owners, namespaces, budget): (&SocketOwners, &namespace::Namespaces, &Budget),
) -> Result<(), vmsight_memory::ReadError> {
    if sockets.is_unix(sock)? {
        let Some(unix) = unix else { return Ok(()) };
        let path = unix.path(sock)?;
        let mut endpoint = "unix".to_owned();
        if let Some(path) = &path {
            endpoint = format!("{endpoint} {path}");
        }
        if let Some(peer) = unix.peer(sock)? {
            show(row, owners.of(peer).iter().take(MAX_PEERS + 1).cloned().collect());
            if let Some(path) = unix.path(peer)? {
                endpoint = format!("{endpoint}->{path}");
            }
        }
        row.endpoint = Some(endpoint);
    } else {
        row.endpoint = Some(sockets.row(sock, owners, namespaces, budget).endpoint());
    }
    Ok(())
}
