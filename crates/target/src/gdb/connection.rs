//! One connection to a stub.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vmsight_arch::Registers;

use super::error::GdbError;
use super::packet::{self, Parsed, from_hex, to_hex};
use super::{features, refuse_if_busy};
use crate::guard::Guard;
use crate::host::peers;
use crate::host::process::{Identity, Process};
use crate::host::sockets;
use crate::monitor;
use crate::qmp::{connect_socket, unix_socket};
use crate::spec::GdbAddress;

/// Most text taken from one command of the monitor.
const MAX_TEXT: usize = 32 << 20;
/// Bytes of memory asked for at once: QEMU's packets hold 4096 characters.
const MEMORY_CHUNK: usize = 2000;
/// Questions for memory under way at once. QEMU takes a packet though the one before was not acknowledged.
const PIPELINE: usize = 32;
/// Most vCPUs taken from a stub.
const MAX_VCPUS: usize = 4096;
/// What the watch sends when we are gone: the end of whatever we were in the midst of, and the detach packet.
const LAST_WORDS: &str = "#00$D#44";

/// A connection. The VM is paused as long as it lives; dropping it lets the VM go on, unless it did not run before.
#[derive(Debug)]
pub(crate) struct Gdb {
    address: String,
    stream: OwnedFd,
    buffer: Vec<u8>,
    timeout: Duration,
    guard: Option<Guard>,
    physical: bool,
    /// A packet was taken and not acknowledged yet: that goes with the next one of ours.
    unacknowledged: bool,
    /// An answer was given up in the midst of others: what comes now answers something else.
    desynchronised: bool,
}

impl Gdb {
    /// Connects and pauses the VM. `server` is its process, where that is on this host.
    pub(crate) fn connect(
        address: &GdbAddress,
        server: Option<Identity>,
        timeout: Duration,
    ) -> Result<Self, GdbError> {
        let name = address.to_string();
        let deadline = Instant::now() + timeout;
        if let Some(vm) = server {
            if !vm.runs() {
                return Err(GdbError::Closed {
                    address: name,
                    doing: "connecting".into(),
                });
            }
            refuse_if_busy(address, vm.pid, deadline)?;
        }
        // Before connecting: QEMU pauses the VM for the connection alone.
        let arm = |socket: &OwnedFd| Guard::set(socket.try_clone()?, LAST_WORDS, "");
        let (stream, guard) = match connect(address, deadline, arm, Guard::dismiss) {
            Ok(connected) => connected,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                return Err(GdbError::Timeout {
                    address: name,
                    doing: "connecting".into(),
                    after: timeout,
                });
            }
            Err(source) => {
                return Err(GdbError::Connect {
                    address: name,
                    source,
                });
            }
        };
        if let Some(vm) = server
            && !is_of(&stream, address, vm.pid)
        {
            return Err(GdbError::AnotherVm {
                address: name,
                pid: vm.pid,
            });
        }
        let mut gdb = Self {
            address: name,
            stream,
            buffer: Vec::new(),
            timeout,
            guard: Some(guard),
            physical: false,
            unacknowledged: false,
            desynchronised: false,
        };
        gdb.ask("qSupported:multiprocess-;swbreak-;hwbreak-")?;
        // A machine that QEMU had to pause is now `paused`; one that did not run for another reason (prelaunch, a
        // finished shutdown, an error) still is what it was.
        let did_not_run = match gdb.hmp("info status") {
            Ok(status) => status.contains("VM status: paused ("),
            Err(GdbError::Unsupported { .. }) => false,
            Err(error) => return Err(error),
        };
        if did_not_run && let Some(guard) = gdb.guard.take() {
            guard.dismiss();
        }
        Ok(gdb)
    }

    /// Runs one line of QEMU's human monitor and gives its text.
    pub(crate) fn hmp(&mut self, line: &str) -> Result<String, GdbError> {
        self.send(format!("qRcmd,{}", to_hex(line.as_bytes())).as_bytes(), line)?;
        let mut text = Vec::new();
        let deadline = Instant::now() + self.timeout;
        loop {
            let answer = self.receive(deadline, line)?;
            match answer.split_first() {
                Some((b'O', hex)) if answer != b"OK" => {
                    let part = from_hex(hex)
                        .ok_or_else(|| self.protocol("console output that is not hexadecimal"))?;
                    text.extend_from_slice(&part);
                    if text.len() > MAX_TEXT {
                        return Err(self.protocol("console output without end"));
                    }
                }
                Some(_) if answer == b"OK" => return Ok(String::from_utf8_lossy(&text).replace("\r\n", "\n")),
                _ => {
                    return Err(GdbError::Unsupported {
                        address: self.address.clone(),
                        what: "pass commands to QEMU's monitor",
                    });
                }
            }
        }
    }

    /// The registers of every vCPU at one moment: the general and control registers from the stub, what it does not
    /// carry (descriptor tables, hidden parts of segments) from the monitor behind it where there is one.
    pub(crate) fn registers(&mut self) -> Result<Vec<Registers>, GdbError> {
        let mut all = Vec::new();
        let description = self.description()?;
        let threads = self.threads()?;
        for (vcpu, thread) in (0_u32..).zip(threads) {
            self.ask(&format!("Hg{thread}"))?;
            let answer = self.ask("g")?;
            all.extend(features::parse_g(vcpu, &description, &answer));
        }
        let told = match self.hmp("info registers -a") {
            Ok(text) => monitor::parse_registers(&text),
            Err(GdbError::Unsupported { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        for mut more in told {
            match all.iter_mut().find(|r| r.vcpu == more.vcpu) {
                Some(registers) => {
                    more.kernel_gs_base = registers.kernel_gs_base;
                    *registers = more;
                }
                None => all.push(more),
            }
        }
        Ok(all)
    }

    /// Reads guest-physical memory.
    pub(crate) fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), GdbError> {
        self.physical_mode()?;
        let mut at = gpa;
        for group in buf.chunks_mut(MEMORY_CHUNK * PIPELINE) {
            // Several questions at once: waiting for each answer costs more than the answer.
            let mut questions = Vec::new();
            let mut next = at;
            for chunk in group.chunks(MEMORY_CHUNK) {
                questions
                    .extend_from_slice(&packet::frame(format!("m{next:x},{:x}", chunk.len()).as_bytes()));
                next = next.wrapping_add(chunk.len() as u64);
            }
            self.write_all(&questions, "m")?;
            for chunk in group.chunks_mut(MEMORY_CHUNK) {
                let deadline = Instant::now() + self.timeout;
                let answer = self.receive(deadline, "m")?;
                match from_hex(&answer).filter(|bytes| bytes.len() == chunk.len()) {
                    Some(bytes) => chunk.copy_from_slice(&bytes),
                    None => return Err(self.broken(&format!("it does not give the memory at {at:#x}"))),
                }
                at = at.wrapping_add(chunk.len() as u64);
            }
        }
        Ok(())
    }

    /// Writes guest-physical memory.
    pub(crate) fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), GdbError> {
        self.physical_mode()?;
        let mut at = gpa;
        for chunk in data.chunks(MEMORY_CHUNK) {
            let answer = self.ask(&format!("M{at:x},{:x}:{}", chunk.len(), to_hex(chunk)))?;
            if answer != b"OK" {
                return Err(self.protocol(&format!("it does not take memory at {at:#x}")));
            }
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Addresses of `m` and `M` are guest-physical from here on (QEMU 4.2 and later).
    fn physical_mode(&mut self) -> Result<(), GdbError> {
        if !self.physical {
            if self.ask("Qqemu.PhyMemMode:1")? != b"OK" {
                return Err(GdbError::Unsupported {
                    address: self.address.clone(),
                    what: "read physical memory",
                });
            }
            self.physical = true;
        }
        Ok(())
    }

    /// The core registers: those of the first file that the description includes, which make up the `g` packet.
    fn description(&mut self) -> Result<Vec<features::Register>, GdbError> {
        let mut all = Vec::new();
        let xml = self.file("target.xml")?;
        all.extend(features::registers(&xml));
        for name in features::includes(&xml) {
            let xml = self.file(&name)?;
            all.extend(features::registers(&xml));
        }
        Ok(all)
    }

    fn file(&mut self, name: &str) -> Result<String, GdbError> {
        let mut text = Vec::new();
        loop {
            let answer = self.ask(&format!("qXfer:features:read:{name}:{:x},7f0", text.len()))?;
            match answer.split_first() {
                Some((kind @ (b'm' | b'l'), part)) => {
                    text.extend_from_slice(part);
                    if *kind == b'l' {
                        return Ok(String::from_utf8_lossy(&text).into_owned());
                    }
                    if part.is_empty() || text.len() > 1 << 20 {
                        return Err(self.protocol("a target description without end"));
                    }
                }
                _ => {
                    return Err(GdbError::Unsupported {
                        address: self.address.clone(),
                        what: "describe its registers",
                    });
                }
            }
        }
    }

    /// The threads' ids, one for each vCPU.
    fn threads(&mut self) -> Result<Vec<String>, GdbError> {
        let mut all = Vec::new();
        let mut answer = self.ask("qfThreadInfo")?;
        while let Some((b'm', list)) = answer.split_first() {
            let list = String::from_utf8_lossy(list).into_owned();
            let ids = list
                .split(',')
                .filter(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.'));
            all.extend(ids.map(str::to_owned));
            if all.len() > MAX_VCPUS {
                return Err(self.protocol("more vCPUs than machines have"));
            }
            answer = self.ask("qsThreadInfo")?;
        }
        Ok(all)
    }

    fn ask(&mut self, command: &str) -> Result<Vec<u8>, GdbError> {
        self.send(command.as_bytes(), command)?;
        let deadline = Instant::now() + self.timeout;
        self.receive(deadline, command)
    }

    fn send(&mut self, data: &[u8], doing: &str) -> Result<(), GdbError> {
        if self.desynchronised {
            return Err(self.protocol("an earlier answer was lost"));
        }
        let mut framed = packet::frame(data);
        if std::mem::take(&mut self.unacknowledged) {
            framed.insert(0, b'+');
        }
        self.write_all(&framed, doing)
    }

    /// The next packet. After an error nobody knows what the next one answers.
    fn receive(&mut self, deadline: Instant, doing: &str) -> Result<Vec<u8>, GdbError> {
        let received = self.next_packet(deadline, doing);
        self.desynchronised |= received.is_err();
        received
    }

    fn next_packet(&mut self, deadline: Instant, doing: &str) -> Result<Vec<u8>, GdbError> {
        loop {
            match packet::parse(&self.buffer) {
                Parsed::Packet(data, taken) => {
                    self.buffer.drain(..taken);
                    self.unacknowledged = true;
                    match data.first() {
                        // That the machine stopped, for which nobody asked: QEMU says so after each connect.
                        Some(b'T' | b'S') => {}
                        // That it is gone.
                        Some(b'W' | b'X') => return Err(self.closed(doing)),
                        _ => return Ok(data),
                    }
                }
                Parsed::Nak(taken) => {
                    self.buffer.drain(..taken);
                    return Err(self.protocol(&format!("it did not understand {}", short(doing))));
                }
                Parsed::Broken(taken) => {
                    self.buffer.drain(..taken);
                    self.write_all(b"-", doing)?;
                }
                Parsed::TooLong => return Err(self.protocol("a packet without end")),
                Parsed::More => {
                    if std::mem::take(&mut self.unacknowledged) {
                        self.write_all(b"+", doing)?;
                    }
                    self.fill(deadline, doing)?;
                }
            }
        }
    }

    fn fill(&mut self, deadline: Instant, doing: &str) -> Result<(), GdbError> {
        self.wait(PollFlags::IN, deadline, doing)?;
        let mut chunk = [0; 16 * 1024];
        match rustix::io::read(&self.stream, &mut chunk) {
            Ok(0) => Err(self.closed(doing)),
            Ok(n) => {
                self.buffer.extend_from_slice(chunk.get(..n).unwrap_or_default());
                Ok(())
            }
            Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(Errno::CONNRESET) => Err(self.closed(doing)),
            Err(e) => Err(GdbError::Connect {
                address: self.address.clone(),
                source: e.into(),
            }),
        }
    }

    fn write_all(&mut self, mut bytes: &[u8], doing: &str) -> Result<(), GdbError> {
        let deadline = Instant::now() + self.timeout;
        while !bytes.is_empty() {
            self.wait(PollFlags::OUT, deadline, doing)?;
            match rustix::net::send(&self.stream, bytes, rustix::net::SendFlags::NOSIGNAL) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.closed(doing)),
                Err(e) => {
                    return Err(GdbError::Connect {
                        address: self.address.clone(),
                        source: e.into(),
                    });
                }
            }
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags, deadline: Instant, doing: &str) -> Result<(), GdbError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let address = self.address.clone();
                return Err(GdbError::Timeout {
                    address,
                    doing: short(doing),
                    after: self.timeout,
                });
            }
            let timeout = rustix::event::Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.stream, flags)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => {
                    return Err(GdbError::Connect {
                        address: self.address.clone(),
                        source: e.into(),
                    });
                }
            }
        }
    }

    fn closed(&self, doing: &str) -> GdbError {
        GdbError::Closed {
            address: self.address.clone(),
            doing: short(doing),
        }
    }

    /// An error after which the answers to other questions are still on their way.
    fn broken(&mut self, reason: &str) -> GdbError {
        self.desynchronised = true;
        self.protocol(reason)
    }

    fn protocol(&self, reason: &str) -> GdbError {
        GdbError::Protocol {
            address: self.address.clone(),
            reason: reason.to_owned(),
        }
    }

    /// Whether the VM goes on when this is dropped.
    pub(crate) fn will_resume(&self) -> bool {
        self.guard.is_some()
    }

    fn detach(&mut self) {
        let Some(guard) = self.guard.take() else { return };
        if self.desynchronised {
            return; // the watch, dropped, says it in a way that needs no answer
        }
        match self.ask("D") {
            Ok(answer) if answer == b"OK" => guard.dismiss(),
            // A VM that is gone needs no watch; for the rest the watch tries once more as it is dropped.
            Err(error) if error.is_exit() => guard.dismiss(),
            other => tracing::warn!(
                ?other,
                address = self.address,
                "the gdb stub did not confirm the detach"
            ),
        }
    }
}

impl Drop for Gdb {
    fn drop(&mut self) {
        self.detach();
    }
}

/// A packet for a message: memory writes are long.
fn short(doing: &str) -> String {
    doing.chars().take(60).collect()
}

/// Whether the stub that was connected to is that of process `pid`.
fn is_of(stream: &OwnedFd, address: &GdbAddress, pid: u32) -> bool {
    let process = Process { pid };
    match address {
        GdbAddress::Unix(_) => {
            peers::listener_pid(stream) == Some(pid) || peers::holds_other_end(process, stream)
        }
        // It listens there still: of two that could, one would not have been able to.
        GdbAddress::Tcp { port, .. } => sockets::listens_on_tcp(process, *port).unwrap_or(true),
    }
}

/// Connects. `arm` is called with the socket before it is connected; what it gives is `disarm`ed where that fails.
fn connect<T>(
    address: &GdbAddress,
    deadline: Instant,
    arm: impl Fn(&OwnedFd) -> io::Result<T>,
    disarm: impl Fn(T),
) -> io::Result<(OwnedFd, T)> {
    match address {
        GdbAddress::Unix(path) => {
            let socket = unix_socket()?;
            let armed = arm(&socket)?;
            match connect_socket(&socket, path, deadline) {
                Ok(()) => Ok((socket, armed)),
                Err(e) => {
                    disarm(armed);
                    Err(e)
                }
            }
        }
        GdbAddress::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            for address in (host.as_str(), *port).to_socket_addrs()?.take(8) {
                let family = if address.is_ipv4() {
                    AddressFamily::INET
                } else {
                    AddressFamily::INET6
                };
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
                let armed = arm(&socket)?;
                match connect_tcp(&socket, &address, deadline) {
                    Ok(()) => return Ok((socket, armed)),
                    Err(e) => {
                        disarm(armed);
                        last = e;
                    }
                }
            }
            Err(last)
        }
    }
}

fn connect_tcp(socket: &OwnedFd, address: &SocketAddr, deadline: Instant) -> io::Result<()> {
    match rustix::net::connect(socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let timeout = rustix::event::Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(socket, PollFlags::OUT)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => break rustix::net::sockopt::socket_error(socket)??,
                Err(e) => return Err(e.into()),
            }
        },
        Err(e) => return Err(e.into()),
    }
    rustix::net::sockopt::set_tcp_nodelay(socket, true)?;
    rustix::io::ioctl_fionbio(socket, false)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// The watch must be there before the VM can be paused, and it is the connection that pauses it.
    #[test]
    fn the_watch_is_set_before_the_connection_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let tcp_at = |port| GdbAddress::Tcp {
            host: "127.0.0.1".into(),
            port,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        let (armed, disarmed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let arm = |socket: &OwnedFd| {
            assert_eq!(rustix::net::getpeername(socket).err(), Some(Errno::NOTCONN));
            armed.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let disarm = |()| {
            disarmed.fetch_add(1, Ordering::SeqCst);
        };
        for address in [GdbAddress::Unix(path.clone()), tcp_at(port)] {
            let (socket, ()) = connect(&address, deadline, arm, disarm).unwrap();
            assert!(rustix::net::getpeername(&socket).is_ok());
        }
        assert_eq!(
            (armed.load(Ordering::SeqCst), disarmed.load(Ordering::SeqCst)),
            (2, 0)
        );
        // Where there is nobody the watch ends.
        drop((unix, tcp));
        for address in [GdbAddress::Unix(path), tcp_at(port)] {
            assert!(connect(&address, deadline, arm, disarm).is_err());
        }
        assert_eq!(
            (armed.load(Ordering::SeqCst), disarmed.load(Ordering::SeqCst)),
            (4, 2)
        );
    }
}
