//! VMs named by their gdb stub.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use vmsight_arch::Gpa;
use vmsight_memory::GuestMemory;

use super::{AttachOptions, attach_process, attach_with, connect_any, layout_of};
use crate::control::GdbControl;
use crate::discover::{self, ControlKind};
use crate::gdb::{Gdb, GdbError, StubMemory};
use crate::host::process::Process;
use crate::layout::HostRange;
use crate::layout::from_monitor;
use crate::monitor;
use crate::spec::GdbAddress;
use crate::target::{Control, Target, TargetKind};
use crate::{TargetError, VmInfo};

/// Attaches to the VM behind a stub. Where its process is on this host and may be read, the stub is asked only for what
/// nothing else tells; else memory too is read through it, and the VM is paused as long as the target lives.
pub(super) fn attach(address: &GdbAddress, options: &AttachOptions<'_>) -> Result<Target, TargetError> {
    let server = server_of(address);
    let pid = server.as_ref().map(|vm| vm.pid);
    let readable = |vm: &VmInfo| (Process { pid: vm.pid }).memory_readable().is_ok();
    let control = GdbControl::new(address.clone(), pid, options.timeout);
    let Some(info) = server.filter(readable) else {
        return through_stub(address, control, options);
    };
    // Its QMP socket tells the same without a pause.
    if let Ok(qmp) = connect_any(&info, options.timeout) {
        return attach_with(info, Ok(qmp), options);
    }
    let layout = control.with(|stub| Ok(ask(stub)))?;
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
fn ask(stub: &mut Gdb) -> Result<Vec<HostRange>, String> {
    let backends = monitor::parse_memdev(&stub.hmp("info memdev").map_err(|e| e.to_string())?);
    layout_of(from_monitor::ask(&backends, |line| stub.hmp(line)))
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
        control: Control::Gdb {
            control,
            _memory: Some(Arc::new(held)),
        },
    })
}

/// The VM of this host that listens at `address`, as far as that can be seen without connecting.
fn server_of(address: &GdbAddress) -> Option<VmInfo> {
    let file = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let is_it = |bound: &str| match address {
        GdbAddress::Unix(path) => {
            Path::new(bound) == path || (file(path).is_some() && file(path) == file(bound.as_ref()))
        }
        GdbAddress::Tcp { host, port } => {
            let here = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
            here && bound.rsplit_once(':').and_then(|(_, p)| p.parse().ok()) == Some(*port)
        }
    };
    let listens = |vm: &VmInfo| {
        vm.control
            .iter()
            .any(|c| matches!(c.kind, ControlKind::Gdb | ControlKind::Unknown) && is_it(&c.address))
    };
    discover::list().ok()?.into_iter().find(listens)
}
