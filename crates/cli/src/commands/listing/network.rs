//! Sockets and interfaces.

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use vmsight_linux::socket::SocketFilter;

use super::{found, must_exist, print};
use crate::{Outcome, args::Global, session::Session};

/// A family of sockets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Family {
    /// TCP, UDP, raw … over IPv4 and IPv6
    Inet,
    /// Packet sockets
    Packet,
    /// Netlink
    Netlink,
    /// Guest to host
    Vsock,
    /// Every other family a process has open
    Other,
}

/// Sockets.
#[derive(Args, Debug)]
#[command(after_help = "\
Every network namespace, by the kernel's own hash tables, and by the processes' file descriptors: `listed` is false
for a socket that a process holds but no table has. UNIX sockets have their own command: vmsight unix.")]
pub(crate) struct Net {
    /// What to look into
    target: String,
    /// Only these families
    #[arg(short, long, value_name = "FAMILY,…", value_delimiter = ',')]
    family: Vec<Family>,
    /// Only listening sockets
    #[arg(short, long)]
    listening: bool,
    /// Only sockets of this process
    #[arg(short, long)]
    pid: Option<i32>,
}

pub(super) const NET: &[&str] = &[
    "protocol",
    "state",
    "local_address",
    "local_port",
    "remote_address",
    "remote_port",
    "uid",
    "inode",
    "namespace",
    "owners",
];

impl Net {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let all = self.family.is_empty();
        let wants = |f: Family| all || self.family.contains(&f);
        let filter = SocketFilter {
            inet: wants(Family::Inet),
            packet: wants(Family::Packet),
            netlink: wants(Family::Netlink),
            vsock: wants(Family::Vsock),
            other: wants(Family::Other),
            ports: wants(Family::Inet),
        };
        let mut listing = session.kernel()?.sockets(filter).context("listing sockets")?;
        listing.rows.retain(|s| {
            (!self.listening || s.state == "LISTEN")
                && self.pid.is_none_or(|p| s.owners.iter().any(|o| o.pid == p))
        });
        if let Some(pid) = self.pid.filter(|_| listing.rows.is_empty()) {
            must_exist(session.kernel()?, pid)?;
        }
        let any = !listing.rows.is_empty() || !(self.listening || self.pid.is_some() || !all);
        if !any {
            listing.warn("the guest has no such sockets");
        }
        print(&session, NET, listing)?;
        Ok(found(any))
    }
}

/// UNIX sockets.
#[derive(Args, Debug)]
#[command(after_help = "\
`peer_inode` is the inode of the socket at the other end, `peer_owners` who has it open (PID/NAME/FD). Names in the
abstract namespace begin with @.")]
pub(crate) struct Unix {
    /// What to look into
    target: String,
}

pub(super) const UNIX: &[&str] = &[
    "kind",
    "state",
    "inode",
    "peer_inode",
    "uid",
    "namespace",
    "path",
    "owners",
    "peer_owners",
];

impl Unix {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session.kernel()?.unix_sockets().context("listing UNIX sockets")?;
        print(&session, UNIX, listing)?;
        Ok(Outcome::Fine)
    }
}

/// Network interfaces.
#[derive(Args, Debug)]
pub(crate) struct Ifaces {
    /// What to look into
    target: String,
}

pub(super) const IFACES: &[&str] = &[
    "namespace",
    "index",
    "name",
    "type",
    "flags",
    "mtu",
    "mac",
    "ipv4",
    "ipv6",
];

impl Ifaces {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session.kernel()?.interfaces().context("listing interfaces")?;
        print(&session, IFACES, listing)?;
        Ok(Outcome::Fine)
    }
}
