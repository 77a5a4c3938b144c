//! Next hops: `struct fib_nh_common` (include/net/ip_fib.h), which both protocols' routes have.

use std::net::IpAddr;
use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::iface::name::DeviceNames;
use crate::layout::{Field, Place, layout};
use crate::neighbour::ip;
use crate::{Kernel, LinuxError};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

layout! {
    struct HopLayout = "fib_nh_common" {
        dev: Field<Gva> = "nhc_dev",
        family: Field<u8> = "nhc_gw_family",
        gateway: Place = "nhc_gw",
    }
}

layout! {
    /// A next hop that several routes share (5.3).
    struct NextHopLayout = "nexthop" {
        is_group: Field<bool> = "is_group",
        info: Field<Gva> = "nh_info",
    }
}

layout! {
    struct NextHopInfoLayout = "nh_info" {
        common: Place = "fib_nhc",
    }
}

/// Where a packet is sent next.
#[derive(Clone, Debug, Default)]
pub(super) struct Hop {
    pub(super) gateway: Option<IpAddr>,
    pub(super) interface: Option<String>,
    pub(super) index: Option<i32>,
}

pub(super) struct HopReader<'k> {
    kernel: &'k Kernel,
    hop: Arc<HopLayout>,
    shared: Option<(Arc<NextHopLayout>, Arc<NextHopInfoLayout>)>,
    devices: DeviceNames,
}

impl<'k> HopReader<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel,
            hop: kernel.layout()?,
            shared: kernel.layout().ok().zip(kernel.layout().ok()),
            devices: DeviceNames::new(kernel)?,
        })
    }

    /// The next hop whose `fib_nh_common` lies at an address.
    pub(super) fn read(&mut self, at: Gva) -> Result<Hop, ReadError> {
        let (space, layout) = (self.kernel.space(), &self.hop);
        let mut out = Hop::default();
        let length = match layout.family.read(space, at)? {
            AF_INET => 4,
            AF_INET6 => 16,
            _ => 0,
        };
        if length > 0 {
            let mut bytes = [0u8; 16];
            let to = bytes.get_mut(..length).unwrap_or(&mut []);
            space.read(layout.gateway.at(at), to)?;
            out.gateway = Some(ip(&bytes, length));
        }
        let device = layout.dev.read(space, at)?;
        // A route that leads nowhere has no interface.
        if !device.is_null() {
            let device = self.devices.of(device)?;
            out.interface = Some(device.name);
            out.index = Some(device.index);
        }
        Ok(out)
    }

    /// The next hop of a `struct nexthop`; `None` for a group of them.
    pub(super) fn shared(&mut self, at: Gva) -> Result<Option<Hop>, ReadError> {
        let Some((nexthop, info)) = &self.shared else {
            return Ok(None);
        };
        let space = self.kernel.space();
        if nexthop.is_group.read(space, at)? {
            return Ok(None);
        }
        let common = info.common.at(nexthop.info.read(space, at)?);
        self.read(common).map(Some)
    }
}
