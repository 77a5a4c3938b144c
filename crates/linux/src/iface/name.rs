//! What a `struct net_device` is called and where it belongs, for what refers to one.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::layout::{Field, Place, layout};
use crate::text::guest_array_text;
use crate::{Kernel, LinuxError};

layout! {
    struct NamedDeviceLayout = "net_device" {
        name: Place = "name",
        ifindex: Field<i32> = "ifindex",
        net: Option<Field<Gva>> = "nd_net.net",                   // CONFIG_NET_NS
        addr_len: Field<u8> = "addr_len",
    }
}

/// One interface.
#[derive(Clone, Debug)]
pub(crate) struct NamedDevice {
    pub(crate) name: String,
    pub(crate) index: i32,
    /// Its `struct net`; null in a kernel without network namespaces.
    pub(crate) net: Gva,
    /// Bytes of its hardware address.
    pub(crate) addr_len: u8,
}

/// The interfaces that were asked for so far.
pub(crate) struct DeviceNames {
    kernel: Kernel,
    layout: Arc<NamedDeviceLayout>,
    known: FxHashMap<Gva, NamedDevice>,
}

impl DeviceNames {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            layout: kernel.layout()?,
            known: FxHashMap::default(),
        })
    }

    /// The interface whose `struct net_device` lies at an address.
    pub(crate) fn of(&mut self, at: Gva) -> Result<NamedDevice, ReadError> {
        if let Some(known) = self.known.get(&at) {
            return Ok(known.clone());
        }
        let (space, layout) = (self.kernel.space(), &self.layout);
        let mut name = vec![0u8; layout.name.size().min(64) as usize];
        space.read(layout.name.at(at), &mut name)?;
        let found = NamedDevice {
            name: guest_array_text(&name),
            index: layout.ifindex.read(space, at)?,
            net: match &layout.net {
                Some(field) => field.read(space, at)?,
                None => Gva(0),
            },
            addr_len: layout.addr_len.read(space, at)?,
        };
        self.known.insert(at, found.clone());
        Ok(found)
    }
}
