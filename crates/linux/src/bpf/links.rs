//! Links: `struct bpf_link`, and the structure of its kind that it is the first member of.

use std::cell::{OnceCell, RefCell};
use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::BpfObject;
use super::names::Names;
use super::programs::Programs;
use crate::Kernel;
use crate::budget::Budget;
use crate::iface::name::DeviceNames;
use crate::layout::{Field, Layout, layout};
use crate::listing::Problem;
use crate::task::cgroup::CgroupReader;

/// Bytes of the name of a tracepoint.
const MAX_NAME: usize = 128;

layout! {
    struct LinkLayout = "bpf_link" {
        references: Field<i64> = "refcnt",
        id: Field<u32> = "id",
        kind: Field<u32> = "type",
        program: Field<Gva> = "prog",
        attach: Option<Field<u32>> = "attach_type",                // since 6.17; before, in the links of each kind
    }
}

layout! {
    /// kernel/bpf/cgroup.c.
    struct CgroupLinkLayout = "bpf_cgroup_link" {
        cgroup: Field<Gva> = "cgroup",
        attach: Option<Field<u32>> = "type",
    }
}

layout! {
    /// kernel/bpf/syscall.c.
    struct RawTracepointLinkLayout = "bpf_raw_tp_link" {
        event: Field<Gva> = "btp",
    }
}

layout! {
    struct RawEventLayout = "bpf_raw_event_map" {
        tracepoint: Field<Gva> = "tp",
    }
}

layout! {
    struct TracepointLayout = "tracepoint" {
        name: Field<Gva> = "name",
    }
}

layout! {
    struct TracingLinkLayout = "bpf_tracing_link" {
        attach: Option<Field<u32>> = "attach_type",
    }
}

layout! {
    struct NetnsLinkLayout = "bpf_netns_link" {
        attach: Option<Field<u32>> = "type",
        net: Field<Gva> = "net",
    }
}

layout! {
    struct NetnsLayout = "net" {
        inum: Field<u32> = "ns.inum",
    }
}

layout! {
    struct XdpLinkLayout = "bpf_xdp_link" {
        device: Field<Gva> = "dev",
        attach: Option<Field<u32>> = "location",
    }
}

layout! {
    struct TcxLinkLayout = "tcx_link" {
        device: Field<Gva> = "dev",
        attach: Option<Field<u32>> = "location",
    }
}

layout! {
    struct NetkitLinkLayout = "netkit_link" {
        device: Field<Gva> = "dev",
        attach: Option<Field<u32>> = "location",
    }
}

/// Reads links.
pub(super) struct Links {
    kernel: Kernel,
    // Those of the first that is asked for: a kernel before 5.8 has none.
    cgroups: OnceCell<Option<CgroupReader>>,
    devices: RefCell<Option<DeviceNames>>,
}

impl Links {
    pub(super) fn new(kernel: &Kernel) -> Self {
        Self {
            kernel: kernel.clone(),
            cgroups: OnceCell::new(),
            devices: RefCell::new(DeviceNames::new(kernel).ok()),
        }
    }

    /// Reads a link, and the number that it says it has.
    pub(super) fn fill(
        &self,
        row: &mut BpfObject,
        names: &Names,
        programs: &Programs,
        budget: &Budget,
    ) -> Result<u32, ReadError> {
        let (space, at) = (self.kernel.space(), row.address);
        let layout: Arc<LinkLayout> = match self.kernel.layout() {
            Ok(layout) => layout,
            Err(error) => {
                row.problems.push(Problem::new("type", error.to_string()));
                return Ok(row.id);
            }
        };
        row.type_name = names.link(layout.kind.read(space, at)?);
        row.references = Some(layout.references.read(space, at)?);
        let program = layout.program.read(space, at)?;
        // A link without one: its kind attaches no program (struct_ops), or its group is gone.
        if !program.is_null() {
            match programs.id(program) {
                Ok(id) => row.program = Some(id),
                Err(error) => row.problems.push(Problem::read("program", &error)),
            }
        }
        let target = match row.type_name.as_str() {
            "cgroup" => self.cgroup(at, budget),
            "raw_tracepoint" => self.tracepoint(at),
            "netns" => self.namespace(at),
            "tracing" => self.tracing(at, program, programs),
            "xdp" => self.device::<XdpLinkLayout>(at, |l| (&l.device, &l.attach)),
            "tcx" => self.device::<TcxLinkLayout>(at, |l| (&l.device, &l.attach)),
            "netkit" => self.device::<NetkitLinkLayout>(at, |l| (&l.device, &l.attach)),
            _ => Ok(Target::default()),
        };
        let mut attach = None;
        match target {
            Ok(target) => (row.target, attach) = (target.what, target.attach),
            Err(error) => row.problems.push(Problem::read("target", &error)),
        }
        if let Some(common) = &layout.attach {
            attach = Some(common.read(space, at)?);
        }
        // A raw tracepoint has none, which is zero where all links have a place for it.
        row.attach_type = attach
            .filter(|_| row.type_name != "raw_tracepoint")
            .map(|number| names.attach(number));
        layout.id.read(space, at)
    }

    fn cgroup(&self, at: Gva, budget: &Budget) -> Result<Target, ReadError> {
        let Ok(layout) = self.kernel.layout::<CgroupLinkLayout>() else {
            return Ok(Target::default());
        };
        let space = self.kernel.space();
        let mut target = Target::with(&self.kernel, at, &layout.attach)?;
        let cgroup = layout.cgroup.read(space, at)?;
        let reader = self.cgroups.get_or_init(|| CgroupReader::new(&self.kernel).ok());
        // Null once the group is gone, and the link attaches to nothing any more.
        if let Some(reader) = reader
            && !cgroup.is_null()
        {
            target.what = Some(reader.path(cgroup, budget)?);
        }
        Ok(target)
    }

    fn tracepoint(&self, at: Gva) -> Result<Target, ReadError> {
        let layouts = (
            self.kernel.layout::<RawTracepointLinkLayout>(),
            self.kernel.layout::<RawEventLayout>(),
            self.kernel.layout::<TracepointLayout>(),
        );
        let (Ok(link), Ok(event), Ok(point)) = layouts else {
            return Ok(Target::default());
        };
        let space = self.kernel.space();
        let point_at = event.tracepoint.read(space, link.event.read(space, at)?)?;
        let name = point.name.read(space, point_at)?;
        Ok(Target {
            what: Some(self.kernel.text(name, MAX_NAME)?),
            attach: None,
        })
    }

    fn tracing(&self, at: Gva, program: Gva, programs: &Programs) -> Result<Target, ReadError> {
        let Ok(layout) = self.kernel.layout::<TracingLinkLayout>() else {
            return Ok(Target::default());
        };
        let mut target = Target::with(&self.kernel, at, &layout.attach)?;
        target.what = programs.function(program)?;
        Ok(target)
    }

    fn namespace(&self, at: Gva) -> Result<Target, ReadError> {
        let layouts = (
            self.kernel.layout::<NetnsLinkLayout>(),
            self.kernel.layout::<NetnsLayout>(),
        );
        let (Ok(link), Ok(net)) = layouts else {
            return Ok(Target::default());
        };
        let mut target = Target::with(&self.kernel, at, &link.attach)?;
        let namespace = link.net.read(self.kernel.space(), at)?;
        if !namespace.is_null() {
            let inum = net.inum.read(self.kernel.space(), namespace)?;
            target.what = Some(format!("net:[{inum}]"));
        }
        Ok(target)
    }

    fn device<L: Layout>(
        &self,
        at: Gva,
        members: impl Fn(&L) -> (&Field<Gva>, &Option<Field<u32>>),
    ) -> Result<Target, ReadError> {
        let Ok(layout) = self.kernel.layout::<L>() else {
            return Ok(Target::default());
        };
        let (device, attach) = members(&layout);
        let mut target = Target::with(&self.kernel, at, attach)?;
        let device = device.read(self.kernel.space(), at)?;
        // Null once the interface is gone.
        if let Some(devices) = self.devices.borrow_mut().as_mut()
            && !device.is_null()
        {
            target.what = Some(devices.of(device)?.name);
        }
        Ok(target)
    }
}

/// What a link is attached to, and as what.
#[derive(Default)]
struct Target {
    what: Option<String>,
    attach: Option<u32>,
}

impl Target {
    fn with(kernel: &Kernel, at: Gva, attach: &Option<Field<u32>>) -> Result<Self, ReadError> {
        let read = |field: &Field<u32>| field.read(kernel.space(), at);
        Ok(Self {
            what: None,
            attach: attach.as_ref().map(read).transpose()?,
        })
    }
}
