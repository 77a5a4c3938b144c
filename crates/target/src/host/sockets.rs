//! The sockets a process listens on, from `/proc/PID/net`.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::process::{Descriptor, Process};

/// The most that is read of one of the tables.
const MAX_TABLE: u64 = 64 << 20;
/// `TCP_LISTEN` of `include/net/tcp_states.h`.
const TCP_LISTEN: u8 = 0x0a;
/// `TCP_ESTABLISHED` of the same file.
const TCP_ESTABLISHED: u8 = 0x01;
/// `__SO_ACCEPTCON` of `include/linux/net.h`: the unix socket listens.
const SO_ACCEPTCON: u32 = 1 << 16;

/// A socket that waits for connections.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Listener {
    /// The descriptor in the process.
    pub(crate) fd: u32,
    /// Its address.
    pub(crate) address: ListenAddress,
}

/// Where a socket listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum ListenAddress {
    /// A path in the process's own mount namespace; abstract names start with `@`.
    Unix(String),
    /// TCP over IPv4 or IPv6.
    Tcp(SocketAddr),
}

/// The name under which `process` bound the unix socket that we call `path`.
pub(crate) fn bound_name(process: Process, path: &Path) -> Option<String> {
    let wanted = fs::metadata(path).ok()?;
    let descriptors = process.descriptors().ok()?;
    NetTables::new(Wanted::Unix)
        .listeners(process, &descriptors)
        .ok()?
        .into_iter()
        .find_map(|listener| match listener.address {
            ListenAddress::Unix(name) => {
                let found = fs::metadata(process.own_path(Path::new(&name))).ok()?;
                (found.ino() == wanted.ino() && found.dev() == wanted.dev()).then_some(name)
            }
            ListenAddress::Tcp(_) => None,
        })
}

/// Whether somebody is connected to TCP port `port` in the network namespace of `process`, or waits to be.
pub(crate) fn has_tcp_client(process: Process, port: u16) -> io::Result<bool> {
    let mut found = false;
    for table in ["net/tcp", "net/tcp6"] {
        let Ok(text) = process.text(table, MAX_TABLE) else {
            continue;
        };
        found |= text.lines().skip(1).any(|line| {
            let mut fields = line.split_ascii_whitespace();
            let local = fields.nth(1).and_then(parse_tcp_address);
            let state = fields.nth(1).and_then(|s| u8::from_str_radix(s, 16).ok());
            local.is_some_and(|a| a.port() == port) && state == Some(TCP_ESTABLISHED)
        });
    }
    Ok(found)
}

/// Whether `process` listens on TCP port `port`.
pub(crate) fn listens_on_tcp(process: Process, port: u16) -> io::Result<bool> {
    let listeners = NetTables::new(Wanted::All).listeners(process, &process.descriptors()?)?;
    Ok(listeners
        .iter()
        .any(|l| matches!(l.address, ListenAddress::Tcp(bound) if bound.port() == port)))
}

/// Whether `process` has our network: its addresses are ours.
pub(crate) fn shares_our_network(process: Process) -> bool {
    let ours = fs::read_link("/proc/self/ns/net").ok();
    ours.is_some() && fs::read_link(process.path("ns/net")).ok() == ours
}

/// A line of `/proc/net/unix`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct UnixSocket {
    pub(crate) inode: u64,
    pub(crate) listening: bool,
    pub(crate) path: Option<String>,
}

/// Which tables are looked into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// Unix sockets.
    Unix,
    /// TCP too, whose tables the kernel takes milliseconds to print.
    All,
}

/// The tables of listening sockets, read once for each network namespace.
#[derive(Debug)]
pub(crate) struct NetTables {
    wanted: Wanted,
    of_namespace: Vec<(PathBuf, Vec<(u64, ListenAddress)>)>,
}

impl NetTables {
    pub(crate) fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            of_namespace: Vec::new(),
        }
    }

    /// Whether TCP sockets are among the answers.
    pub(crate) fn has_tcp(&self) -> bool {
        self.wanted == Wanted::All
    }

    /// The listening sockets among `descriptors`, which are those of `process`.
    pub(crate) fn listeners(
        &mut self,
        process: Process,
        descriptors: &[Descriptor],
    ) -> io::Result<Vec<Listener>> {
        let inodes: Vec<(u64, u32)> = descriptors
            .iter()
            .filter_map(|d| Some((d.socket_inode()?, d.fd)))
            .collect();
        if inodes.is_empty() {
            return Ok(Vec::new());
        }
        let namespace = fs::read_link(process.path("ns/net"))?;
        let at = match self.of_namespace.iter().position(|(n, _)| *n == namespace) {
            Some(at) => at,
            None => {
                let all = self.read(process)?;
                self.of_namespace.push((namespace, all));
                self.of_namespace.len() - 1
            }
        };
        let all = self
            .of_namespace
            .get(at)
            .map(|(_, all)| all.as_slice())
            .unwrap_or_default();
        let mut found: Vec<Listener> = all
            .iter()
            .filter_map(|(inode, address)| {
                let (_, fd) = inodes.iter().find(|(i, _)| i == inode)?;
                Some(Listener {
                    fd: *fd,
                    address: address.clone(),
                })
            })
            .collect();
        found.sort_by_key(|l| l.fd);
        Ok(found)
    }

    fn read(&self, process: Process) -> io::Result<Vec<(u64, ListenAddress)>> {
        let mut all = Vec::new();
        for socket in parse_unix(&process.text("net/unix", MAX_TABLE)?) {
            if let (true, Some(path)) = (socket.listening, socket.path) {
                all.push((socket.inode, ListenAddress::Unix(path)));
            }
        }
        if self.wanted == Wanted::All {
            for table in ["net/tcp", "net/tcp6"] {
                // A kernel without IPv6 has no tcp6.
                let Ok(text) = process.text(table, MAX_TABLE) else {
                    continue;
                };
                all.extend(parse_tcp_listeners(&text).map(|(inode, a)| (inode, ListenAddress::Tcp(a))));
            }
        }
        Ok(all)
    }
}

/// Parses `/proc/net/unix`.
pub(crate) fn parse_unix(text: &str) -> Vec<UnixSocket> {
    text.lines().skip(1).filter_map(parse_unix_line).collect()
}

fn parse_unix_line(line: &str) -> Option<UnixSocket> {
    // Num RefCount Protocol Flags Type St Inode Path: the path may hold spaces.
    let mut rest = line;
    let mut fields = [""; 7];
    for field in &mut fields {
        rest = rest.trim_start_matches(' ');
        let end = rest.find(' ').unwrap_or(rest.len());
        (*field, rest) = rest.split_at(end);
    }
    let flags = u32::from_str_radix(fields[3], 16).ok()?;
    let path = rest.strip_prefix(' ').filter(|p| !p.is_empty());
    Some(UnixSocket {
        inode: fields[6].parse().ok()?,
        listening: flags & SO_ACCEPTCON != 0,
        path: path.map(str::to_owned),
    })
}

fn parse_tcp_listeners(text: &str) -> impl Iterator<Item = (u64, SocketAddr)> + '_ {
    text.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let local = fields.nth(1)?;
        let state = u8::from_str_radix(fields.nth(1)?, 16).ok()?;
        if state != TCP_LISTEN {
            return None;
        }
        let inode = fields.nth(5)?.parse().ok()?;
        Some((inode, parse_tcp_address(local)?))
    })
}

/// `0100007F:1538`: each 32-bit word of the address in the host's byte order, the port as a number.
fn parse_tcp_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        Some(
            u32::from_str_radix(address.get(at..at + 8)?, 16)
                .ok()?
                .to_ne_bytes(),
        )
    };
    match address.len() {
        8 => Some(SocketAddr::from((Ipv4Addr::from(word(0)?), port))),
        32 => {
            let mut bytes = [0; 16];
            for (i, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(i * 8)?);
            }
            Some(SocketAddr::from((Ipv6Addr::from(bytes), port)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn lines_of_the_unix_table() {
        let text = "\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 18502 /tmp/with space/q1
0000000000000000: 00000003 00000000 00000000 0001 03 18503
0000000000000000: 00000002 00000000 00010000 0001 01 7 @abstract
";
        let all = parse_unix(text);
        assert_eq!(
            all[0],
            UnixSocket {
                inode: 18502,
                listening: true,
                path: Some("/tmp/with space/q1".into())
            }
        );
        assert_eq!(
            all[1],
            UnixSocket {
                inode: 18503,
                listening: false,
                path: None
            }
        );
        assert_eq!(all[2].path.as_deref(), Some("@abstract"));
        assert!(parse_unix("head\nbroken line\n").is_empty());
    }

    #[test]
    fn addresses_of_the_tcp_table() {
        assert_eq!(
            parse_tcp_address("0100007F:04D2"),
            Some("127.0.0.1:1234".parse().unwrap())
        );
        assert_eq!(
            parse_tcp_address("00000000000000000000000001000000:04D2"),
            Some("[::1]:1234".parse().unwrap())
        );
        assert_eq!(parse_tcp_address("00:1"), None);
        assert_eq!(parse_tcp_address("ééééé:1"), None);
    }

    #[test]
    fn what_this_process_listens_on_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a socket");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        let me = Process {
            pid: std::process::id(),
        };
        let found = NetTables::new(Wanted::All)
            .listeners(me, &me.descriptors().unwrap())
            .unwrap();
        let addresses: Vec<_> = found.iter().map(|l| &l.address).collect();
        assert!(
            addresses.contains(&&ListenAddress::Unix(path.to_str().unwrap().into())),
            "{addresses:?}"
        );
        assert!(
            addresses.contains(&&ListenAddress::Tcp(tcp.local_addr().unwrap())),
            "{addresses:?}"
        );
        drop(unix);
    }
}
