//! The memory of a VM's devices: what a graphics card shows lies there, and nowhere in the guest's own memory.

use std::sync::Arc;

use vmsight_arch::Gpa;
use vmsight_memory::GuestMemory;

use super::{layout_of, leave_out_devices};
use crate::control::GdbControl;
use crate::gdb::{GdbError, StubMemory};
use crate::host::maps;
use crate::host::process::Process;
use crate::layout::backing::{self, Opened};
use crate::layout::{HostRange, from_monitor};
use crate::target::{Control, Target};
use crate::{TargetError, VmInfo, monitor};

impl Target {
    /// The plain memory that the VM's devices have in the guest's physical address space: that of graphics cards, above all. It is no
    /// part of [`Self::memory`], so nothing looks for a kernel there, searches it or dumps it. Whoever wants it asks, and the VM's
    /// monitor is asked then: the guest may move its devices at any time.
    ///
    /// What an assigned device has is left out: to read there may have effects.
    ///
    /// # Errors
    /// Where there is no monitor that tells where it lies, which nothing else does; for a dump, which has what it has in
    /// [`Self::memory`].
    pub fn device_memory(&self) -> Result<GuestMemory, TargetError> {
        let none = |why: String| TargetError::NoDeviceMemory {
            target: self.name.clone(),
            why,
        };
        let info = self.info.as_ref();
        let found = match &self.control {
            Control::Dump(_) => Err(none("it is a dump".to_owned())),
            Control::None(why) => Err(none(format!("only a monitor tells where it lies, and {why}"))),
            Control::Qmp(control) => control.with(|qmp| {
                // QEMU before 2.1 knows no such command.
                let backends = own(qmp.memory_backends().unwrap_or_default(), info);
                let ask = |lines: &[String]| qmp.hmp_all(lines);
                Ok(layout_of(from_monitor::ask_devices(&backends, ask)))
            }),
            Control::Virsh(control) => control.hmp("info memdev").map(|text| {
                let backends = own(monitor::parse_memdev(&text), info);
                let ask = |lines: &[String]| lines.iter().map(|line| control.hmp(line)).collect();
                layout_of::<TargetError>(from_monitor::ask_devices(&backends, ask))
            }),
            Control::Gdb { control, .. } => control
                .with(|stub| {
                    let backends = own(monitor::parse_memdev(&stub.hmp("info memdev")?), info);
                    let ask = |lines: &[String]| lines.iter().map(|line| stub.hmp(line)).collect();
                    Ok(layout_of::<GdbError>(from_monitor::ask_devices(&backends, ask)))
                })
                .map_err(TargetError::from),
        };
        let ranges = found.map_err(|error| self.or_exited(error))?.map_err(none)?;
        match (info, &self.control) {
            (Some(info), _) => {
                let memory = in_process(info, &ranges)?.map_err(none)?;
                match self.has_exited() {
                    true => Err(TargetError::Exited { pid: info.pid }),
                    false => Ok(memory),
                }
            }
            (None, Control::Gdb { control, .. }) => through_stub(control, &ranges),
            (None, _) => Err(none("its process is not known".to_owned())),
        }
    }
}

/// The backends of main memory among these.
fn own(mut backends: Vec<String>, info: Option<&VmInfo>) -> Vec<String> {
    if let Some(info) = info {
        leave_out_devices(&mut backends, info);
    }
    backends
}

/// An error within is why what the monitor says is not believed.
fn in_process(info: &VmInfo, ranges: &[HostRange]) -> Result<Result<GuestMemory, String>, TargetError> {
    let process = Process { pid: info.pid };
    let maps =
        maps::of(process).map_err(|error| TargetError::of_process(info.pid, "read the mappings", &error))?;
    if let Err(reason) = from_monitor::check(ranges, &maps) {
        return Ok(Err(format!(
            "what its monitor says does not fit the process: {reason}"
        )));
    }
    let built = backing::build(process, &maps, ranges, false, &mut Opened::default())?;
    Ok(Ok(built.memory))
}

/// Where the process is out of reach, the stub reads what the monitor says is plain memory.
fn through_stub(control: &GdbControl, ranges: &[HostRange]) -> Result<GuestMemory, TargetError> {
    let parts = ranges.iter().map(|r| (r.gpa, r.gpa.saturating_add(r.len)));
    let source = Arc::new(StubMemory::new(control.stub(), parts.collect(), false));
    let mut builder = GuestMemory::builder();
    for range in ranges {
        builder = builder.custom(Gpa(range.gpa), range.len, source.clone(), range.gpa);
    }
    Ok(builder.build()?)
}
