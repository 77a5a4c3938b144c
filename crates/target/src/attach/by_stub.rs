//! VMs named by their gdb stub.

use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use vmsight_arch::Gpa;
use vmsight_memory::GuestMemory;

use super::{AttachOptions, attach_process, attach_with, connect_any, layout_of, leave_out_devices};
use crate::control::GdbControl;
use crate::discover::{self, ControlKind};
use crate::gdb::{Gdb, GdbError, StubMemory};
use crate::host::process::Process;
use crate::host::sockets::{self, ListenAddress, NetTables, Wanted};
use crate::layout::HostRange;
use crate::layout::from_monitor::{self, Blocks};
use crate::monitor;
use crate::spec::GdbAddress;
use crate::target::{Control, Target, TargetKind};
use crate::{TargetError, VmInfo};

/// Attaches to the VM behind a stub. Where its process is on this host and may be read, the stub is asked only for what
/// nothing else tells; else memory too is read through it, and the VM is paused as long as the target lives.
pub(super) fn attach(address: &GdbAddress, options: &AttachOptions<'_>) -> Result<Target, TargetError> {
    let server = server_of(address);
    let identity = server.as_ref().map(VmInfo::identity);
    let readable = |vm: &VmInfo| (Process { pid: vm.pid }).memory_readable().is_ok();
    let control = GdbControl::new(address.clone(), identity, options.timeout);
    let Some(info) = server.filter(readable) else {
        return through_stub(address, control, options);
    };
    // Its QMP socket tells the same without a pause.
    if let Ok(qmp) = connect_any(&info, options.timeout) {
        return attach_with(info, Ok(qmp), options);
    }
    let layout = control.with(|stub| Ok(ask(stub, &info)))?;
    attach_process(
        info,
        layout,
        Control::Gdb {
            control,
            _memory: None,
        },
        options,
    )
}

/// The layout from the monitor behind the stub.
fn ask(stub: &mut Gdb, info: &VmInfo) -> Result<Vec<HostRange>, String> {
    let mut backends = monitor::parse_memdev(&stub.hmp("info memdev").map_err(|e| e.to_string())?);
    leave_out_devices(&mut backends, info);
    layout_of(from_monitor::ask(&backends, Blocks::Unknown, |lines| {
        lines.iter().map(|line| stub.hmp(line)).collect()
    }))
}

fn through_stub(
    address: &GdbAddress,
    control: GdbControl,
    options: &AttachOptions<'_>,
) -> Result<Target, TargetError> {
    let held = control.pause()?;
    let unknown = |reason: &str| TargetError::NoMemoryMap {
        address: address.to_string(),
        reason: reason.to_owned(),
    };
    let texts =
        control.with(|stub| Ok::<_, GdbError>((stub.hmp("info memdev")?, stub.hmp("info mtree -f")?)));
    let (memdev, mtree) = match texts {
        Ok(texts) => texts,
        Err(GdbError::Unsupported { .. }) => return Err(unknown("it has no QEMU monitor behind it")),
        Err(error) => return Err(error.into()),
    };
    let flat = monitor::guest_memory(&mtree, &monitor::parse_memdev(&memdev)).unwrap_or_default();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for range in &flat {
        let Some(end) = range.gpa.checked_add(range.len) else {
            continue;
        };
        match ranges.last_mut() {
            Some(last) if last.1 == range.gpa => last.1 = end,
            _ => ranges.push((range.gpa, end)),
        }
    }
    if ranges.is_empty() {
        return Err(unknown("its monitor shows no main memory"));
    }
    let source = Arc::new(StubMemory::new(control.stub(), ranges.clone(), options.write));
    let mut builder = GuestMemory::builder();
    for (start, end) in ranges {
        builder = builder.custom(Gpa(start), end - start, source.clone(), start);
    }
    let note = "memory is read through the gdb stub: slowly, and the VM is paused until we are done";
    Ok(Target {
        memory: builder.note(note.to_owned()).build()?,
        name: format!("gdb:{address}"),
        kind: TargetKind::GdbStub,
        notes: vec![note.to_owned()],
        info: None,
        vmcoreinfo: None,
        ahead: false,
        control: Control::Gdb {
            control,
            _memory: Some(Arc::new(held)),
        },
    })
}

/// The VM of this host that listens at `address`, as far as that can be seen without connecting.
fn server_of(address: &GdbAddress) -> Option<VmInfo> {
    let all = discover::list().ok()?;
    match address {
        GdbAddress::Unix(path) => {
            let file = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
            let is_it = |bound: &str| {
                Path::new(bound) == path || (file(path).is_some() && file(path) == file(bound.as_ref()))
            };
            let listens = |vm: &VmInfo| {
                vm.control
                    .iter()
                    .any(|c| matches!(c.kind, ControlKind::Gdb | ControlKind::Unknown) && is_it(&c.address))
            };
            all.into_iter().find(listens)
        }
        GdbAddress::Tcp { host, port } => {
            // In the order in which they are connected to. What is not this host's own is another's.
            let wanted: Vec<SocketAddr> = (host.as_str(), *port)
                .to_socket_addrs()
                .ok()?
                .take(8)
                .filter(|wanted| wanted.ip().is_loopback())
                .collect();
            let pairs = |bound_by: fn(&VmInfo) -> Vec<SocketAddr>| {
                let bound: Vec<(usize, SocketAddr)> = all
                    .iter()
                    .enumerate()
                    .flat_map(|(i, vm)| bound_by(vm).into_iter().map(move |bound| (i, bound)))
                    .collect();
                wanted.iter().find_map(|wanted| serving(*wanted, &bound))
            };
            let at = pairs(bound_by).or_else(|| pairs(said_to_be_bound_by))?;
            all.into_iter().nth(at)
        }
    }
}

/// Where a VM with our network listens.
fn bound_by(vm: &VmInfo) -> Vec<SocketAddr> {
    let process = Process { pid: vm.pid };
    if !sockets::shares_our_network(process) {
        return Vec::new();
    }
    let listeners = process
        .descriptors()
        .and_then(|all| NetTables::new(Wanted::All).listeners(process, &all))
        .unwrap_or_default();
    listeners
        .into_iter()
        .filter_map(|listener| match listener.address {
            ListenAddress::Tcp(address) => Some(address),
            ListenAddress::Unix(_) => None,
        })
        .collect()
}

/// Where a VM whose sockets we may not see has its stub by its command line. Its memory we may not read either, so this
/// serves only to see whether the stub is in use.
fn said_to_be_bound_by(vm: &VmInfo) -> Vec<SocketAddr> {
    if vm.process_memory {
        return Vec::new();
    }
    vm.control
        .iter()
        .filter(|c| c.kind == ControlKind::Gdb && c.listening.is_none())
        .filter_map(|c| c.address.replace("localhost:", "127.0.0.1:").parse().ok())
        .collect()
}

/// Which of those that listen gets a connection to `wanted`: who is bound to the very address, else who is to all of
/// that family's (`::` may take IPv4 too).
fn serving<T: Copy>(wanted: SocketAddr, bound: &[(T, SocketAddr)]) -> Option<T> {
    let bound = || bound.iter().filter(|(_, b)| b.port() == wanted.port());
    let any = |family: bool| move |b: &&(T, SocketAddr)| b.1.ip().is_unspecified() && b.1.is_ipv4() == family;
    bound()
        .find(|(_, b)| b.ip() == wanted.ip())
        .or_else(|| bound().find(any(wanted.is_ipv4())))
        .or_else(|| bound().find(any(false)).filter(|_| wanted.is_ipv4()))
        .map(|(which, _)| *which)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_names_no_machine() {
        let at = |text: &str| text.parse().unwrap();
        let bound = [
            ('a', at("127.0.0.1:1234")),
            ('b', at("127.0.0.2:1234")),
            ('c', at("[::1]:1234")),
            ('d', at("0.0.0.0:99")),
            ('e', at("[::]:77")),
        ];
        for (wanted, server) in [
            ("127.0.0.1:1234", Some('a')),
            ("127.0.0.2:1234", Some('b')),
            ("127.0.0.3:1234", None),
            ("[::1]:1234", Some('c')),
            ("127.0.0.1:99", Some('d')),
            ("[::1]:99", None),
            ("127.0.0.1:77", Some('e')),
            ("127.0.0.1:1", None),
        ] {
            assert_eq!(serving(at(wanted), &bound), server, "{wanted}");
        }
    }
}
