//! UNIX sockets (net/unix/af_unix.c): one table for all namespaces up to 5.17, one in each since.

use std::sync::Arc;

use rustc_hash::FxHashSet;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::SockReader;
use super::address::{self, AF_UNIX, TCP_ESTABLISHED, TCP_LISTEN};
use super::namespace::{self, Namespaces};
use super::owner::SocketOwners;
use super::table::{self, Found, Table};
use crate::budget::{Budget, NO_ROOM};
use crate::file::fd::FdReader;
use crate::file::holder::{self, Owner};
use crate::layout::{Field, Place, layout};
use crate::listing::{Listing, Problem, address as serial, settled};
use crate::text::guest_text;
use crate::{Kernel, LinuxError};

/// Chains of the table: `2 * UNIX_HASH_SIZE`, 512 since 2.6 (include/net/af_unix.h), a number that no type tells.
const CHAINS: u64 = 512;

/// `sizeof(struct sockaddr_un)`: the longest address.
const MAX_ADDRESS: u32 = 110;

layout! {
    struct NetUnixLayout = "net" {
        buckets: Option<Field<Gva>> = "unx.table.buckets",        // 5.18
    }
}

layout! {
    pub(crate) struct UnixLayout = "unix_sock" {
        addr: Field<Gva> = "addr",
        peer: Field<Gva> = "peer",
    }
}

layout! {
    struct UnixAddressLayout = "unix_address" {
        len: Field<u32> = "len",
        name: Place = "name",
    }
}

layout! {
    struct UnixQueueLayout = "sock" {
        refcount: Field<u32> = "__sk_common.skc_refcnt",
        receive_packets: Field<u32> = "sk_receive_queue.qlen",
    }
}

/// A UNIX socket.
#[derive(Clone, Debug, Serialize)]
pub struct UnixSocket {
    /// `stream`, `dgram`, `seqpacket`.
    pub kind: Option<&'static str>,
    /// `LISTEN`, `CONNECTED`, `UNCONNECTED`; `CONNECTING` and `DISCONNECTING` for one without a file.
    pub state: &'static str,
    /// The name it is bound to: a path, or `@` and a name of the abstract kind, whose NUL bytes are written `@` too. `None` if unnamed.
    pub path: Option<String>,
    /// Inode number, as in `socket:[N]`; `None` for a connection that was not accepted yet.
    pub inode: Option<u64>,
    /// Who has it open.
    pub owners: Vec<Owner>,
    /// Inode number of the socket it is connected to.
    pub peer_inode: Option<u64>,
    /// The name of that socket.
    pub peer_path: Option<String>,
    /// Who has that open.
    pub peer_owners: Vec<Owner>,
    /// Owner's uid.
    pub uid: Option<u32>,
    /// References held by the kernel.
    pub references: Option<u32>,
    /// Messages that wait to be read.
    pub receive_queue: Option<u32>,
    /// Bytes sent that the other end has not read.
    pub send_queue: Option<u32>,
    /// Inode number of its network namespace.
    pub namespace: Option<u32>,
    /// Whether it was found in the kernel's tables, false for those that only a descriptor leads to.
    pub listed: bool,
    /// The `struct unix_sock`.
    #[serde(serialize_with = "serial::gva")]
    pub address: Gva,
    /// The socket it is connected to.
    #[serde(serialize_with = "serial::gva_opt")]
    pub peer: Option<Gva>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Kernel {
    /// The UNIX sockets of all network namespaces.
    ///
    /// # Errors
    /// If the network namespaces or the processes cannot be listed, or the kernel's types lack a member.
    pub fn unix_sockets(&self) -> Result<Listing<UnixSocket>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &UnixSocket| row.problems.len(),
            || self.list_unix(),
        )
    }

    fn list_unix(&self) -> Result<Listing<UnixSocket>, LinuxError> {
        let mut listing = Listing::default();
        let reader = UnixReader::new(self)?;
        let (holders, warnings) = holder::all(self)?;
        let owners = SocketOwners::read(self, &holders, &mut FdReader::new(self, holders.len())?)?;
        let namespaces = namespace::all(self, &holders)?;
        for warning in warnings
            .iter()
            .chain(owners.warnings.as_slice())
            .chain(namespaces.warnings.as_slice())
        {
            listing.warn(warning.clone());
        }
        let found = reader.tables(&namespaces)?;
        let budget = Budget::default();
        let mut seen: FxHashSet<Gva> = FxHashSet::default();
        for sock in found.socks {
            if seen.insert(sock) {
                if !budget.row(0) {
                    break;
                }
                let mut row = reader.row(sock, &owners, &namespaces, &budget);
                row.listed = true;
                listing.rows.push(row);
            }
        }
        for warning in found.warnings.into_vec() {
            listing.warn(warning);
        }
        let mut unlisted: Vec<Gva> = owners.socks().filter(|sock| !seen.contains(sock)).collect();
        unlisted.sort_unstable();
        for sock in unlisted {
            if reader.sock.family(sock).is_ok_and(|family| family == AF_UNIX) {
                if !budget.row(0) {
                    break;
                }
                listing.rows.push(reader.row(sock, &owners, &namespaces, &budget));
            }
        }
        budget
            .warning("UNIX sockets")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }
}

/// Reads UNIX sockets.
pub(crate) struct UnixReader {
    kernel: Kernel,
    sock: SockReader,
    unix: Arc<UnixLayout>,
    address: Arc<UnixAddressLayout>,
    queue: Arc<UnixQueueLayout>,
}

impl UnixReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            sock: SockReader::new(kernel)?,
            unix: kernel.layout()?,
            address: kernel.layout()?,
            queue: kernel.layout()?,
        })
    }

    fn tables(&self, namespaces: &Namespaces) -> Result<Found, LinuxError> {
        let net: Arc<NetUnixLayout> = self.kernel.layout()?;
        let mut found = Found::default();
        let mut heads: Vec<Gva> = Vec::new();
        match &net.buckets {
            Some(field) => {
                for namespace in &namespaces.rows {
                    match field.read(self.kernel.space(), namespace.address) {
                        Ok(table) => heads.push(table),
                        Err(error) => found.warnings.add(format!(
                            "the UNIX sockets of namespace {} cannot be read: {error}",
                            namespace.inum
                        )),
                    }
                }
            }
            None => heads.push(self.kernel.symbol("unix_socket_table")?),
        }
        for heads in heads {
            let table = Table {
                what: "UNIX sockets",
                heads,
                count: CHAINS,
                stride: 8,
                node: self.sock.sock.node.offset(),
            };
            table::walk(&self.kernel, &table, &mut found);
        }
        Ok(found)
    }

    /// The socket that the one at `sock` is connected to.
    pub(crate) fn peer(&self, sock: Gva) -> Result<Option<Gva>, ReadError> {
        let peer = self.unix.peer.read(self.kernel.space(), sock)?;
        Ok((!peer.is_null()).then_some(peer))
    }

    /// The name that the socket at `sock` is bound to.
    pub(crate) fn path(&self, sock: Gva) -> Result<Option<String>, ReadError> {
        let space = self.kernel.space();
        let address = self.unix.addr.read(space, sock)?;
        if address.is_null() {
            return Ok(None);
        }
        // The length counts the two bytes of sun_family.
        let len = self.address.len.read(space, address)?.min(MAX_ADDRESS);
        let Some(len) = len.checked_sub(2).filter(|&len| len > 0) else {
            return Ok(None);
        };
        let mut name = vec![0u8; len as usize];
        space.read(self.address.name.at(address).wrapping_add(2), &mut name)?;
        Ok(Some(if name.first() == Some(&0) {
            // All bytes count in an abstract name, the first only marks it. /proc/net/unix shows NUL as @.
            for byte in &mut name {
                if *byte == 0 {
                    *byte = b'@';
                }
            }
            guest_text(&name)
        } else {
            let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
            guest_text(name.get(..end).unwrap_or(&name))
        }))
    }

    fn row(
        &self,
        address: Gva,
        owners: &SocketOwners,
        namespaces: &Namespaces,
        budget: &Budget,
    ) -> UnixSocket {
        let mut row = UnixSocket {
            kind: None,
            state: "unknown",
            path: None,
            inode: None,
            owners: owners.of(address).to_vec(),
            peer_inode: None,
            peer_path: None,
            peer_owners: Vec::new(),
            uid: None,
            references: None,
            receive_queue: None,
            send_queue: None,
            namespace: None,
            listed: false,
            address,
            peer: None,
            problems: Vec::new(),
        };
        if !budget.bytes(size_of_val(row.owners.as_slice())) {
            row.owners = Vec::new();
            row.problems.push(Problem::new("owners", NO_ROOM));
        }
        if let Err(error) = self.basics(&mut row, namespaces) {
            row.problems.push(Problem::read("state", &error));
            return row;
        }
        match self.path(address) {
            Ok(path) => row.path = path,
            Err(error) => row.problems.push(Problem::read("path", &error)),
        }
        match self.peer(address) {
            Ok(peer) => row.peer = peer,
            Err(error) => row.problems.push(Problem::read("peer", &error)),
        }
        if let Some(peer) = row.peer {
            // Thousands of sockets can have one peer, and that thousands of owners.
            let found = owners.of(peer);
            if budget.bytes(size_of_val(found)) {
                row.peer_owners = found.to_vec();
            } else {
                row.problems.push(Problem::new("peer_owners", NO_ROOM));
            }
            let read = || -> Result<_, ReadError> {
                let socket = self.sock.sock.socket.read(self.kernel.space(), peer)?;
                Ok((self.sock.inode_of(socket)?, self.path(peer)?))
            };
            match read() {
                Ok((inode, path)) => (row.peer_inode, row.peer_path) = (inode, path),
                Err(error) => row.problems.push(Problem::read("peer_inode", &error)),
            }
        }
        row
    }

    fn basics(&self, row: &mut UnixSocket, namespaces: &Namespaces) -> Result<(), ReadError> {
        let l = &self.sock.sock;
        let space = self.kernel.space();
        let at = row.address;
        let state = l.state.read(space, at)?;
        let socket = l.socket.read(space, at)?;
        row.kind = address::kind(l.kind.read(space, at)?);
        row.state = match (state, socket.is_null()) {
            (TCP_LISTEN, _) => "LISTEN",
            (TCP_ESTABLISHED, false) => "CONNECTED",
            (TCP_ESTABLISHED, true) => "CONNECTING",
            (_, false) => "UNCONNECTED",
            (_, true) => "DISCONNECTING",
        };
        row.inode = self.sock.inode_of(socket)?;
        row.uid = Some(l.uid.read(space, at)?);
        row.namespace = namespaces.inum(l.net.read(space, at)?);
        row.references = Some(self.queue.refcount.read(space, at)?);
        row.receive_queue = Some(self.queue.receive_packets.read(space, at)?);
        row.send_queue = u32::try_from(l.wmem.read(space, at)?.wrapping_sub(1)).ok();
        Ok(())
    }
}
