//! What an interface counted, as far as the kernel proper keeps it (`dev_get_stats`, net/core/dev.c).

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::layout::{Field, Place, layout};
use crate::{Kernel, LinuxError, PerCpu};

layout! {
    struct DeviceStatsLayout = "net_device" {
        ops: Field<Gva> = "netdev_ops",
        stats: Place = "stats",
        // A union of pointers to per-CPU counters of several kinds.
        lstats: Option<Field<Gva>> = "lstats",
        tstats: Option<Field<Gva>> = "tstats",
    }
}

layout! {
    struct DeviceOpsLayout = "net_device_ops" {
        get_stats64: Field<Gva> = "ndo_get_stats64",
        get_stats: Field<Gva> = "ndo_get_stats",
    }
}

layout! {
    struct StatsLayout = "net_device_stats" {
        rx_packets: Field<u64> = "rx_packets",
        tx_packets: Field<u64> = "tx_packets",
        rx_bytes: Field<u64> = "rx_bytes",
        tx_bytes: Field<u64> = "tx_bytes",
    }
}

layout! {
    struct LightStatsLayout = "pcpu_lstats" {
        packets: Field<u64> = "packets",
        bytes: Field<u64> = "bytes",
    }
}

layout! {
    struct TunnelStatsLayout = "pcpu_sw_netstats" {
        rx_packets: Field<u64> = "rx_packets",
        tx_packets: Field<u64> = "tx_packets",
        rx_bytes: Field<u64> = "rx_bytes",
        tx_bytes: Field<u64> = "tx_bytes",
    }
}

/// Packets and bytes that went through an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// Functions that say which counters a device uses.
#[derive(Debug)]
struct Functions {
    loopback: Option<Gva>,
    tunnel: Vec<Gva>,
}

pub(super) struct CounterReader {
    kernel: Kernel,
    device: Arc<DeviceStatsLayout>,
    ops: Arc<DeviceOpsLayout>,
    stats: Arc<StatsLayout>,
    light: Option<Arc<LightStatsLayout>>,
    tunnel: Option<Arc<TunnelStatsLayout>>,
    functions: Functions,
    cpus: Option<PerCpu>,
}

impl CounterReader {
    pub(super) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let tunnel = ["dev_get_tstats64", "ip_tunnel_get_stats64"];
        Ok(Self {
            kernel: kernel.clone(),
            device: kernel.layout()?,
            ops: kernel.layout()?,
            stats: kernel.layout()?,
            light: kernel.layout().ok(),
            tunnel: kernel.layout().ok(),
            functions: Functions {
                loopback: kernel.find_symbol(&["loopback_get_stats64"]),
                tunnel: tunnel
                    .iter()
                    .filter_map(|name| kernel.find_symbol(&[name]))
                    .collect(),
            },
            cpus: kernel.per_cpu().ok().cloned(),
        })
    }

    /// The counters of the `net_device` at `device`, `None` if its driver has a way of its own.
    pub(super) fn read(&self, device: Gva) -> Result<Option<Counters>, ReadError> {
        let space = self.kernel.space();
        let ops = self.device.ops.read(space, device)?;
        if ops.is_null() {
            return Ok(None);
        }
        let get = self.ops.get_stats64.read(space, ops)?;
        let own = self.device.stats.at(device);
        let plain = || -> Result<Counters, ReadError> {
            Ok(Counters {
                rx_packets: self.stats.rx_packets.read(space, own)?,
                rx_bytes: self.stats.rx_bytes.read(space, own)?,
                tx_packets: self.stats.tx_packets.read(space, own)?,
                tx_bytes: self.stats.tx_bytes.read(space, own)?,
            })
        };
        if get.is_null() {
            return if self.ops.get_stats.read(space, ops)?.is_null() {
                plain().map(Some)
            } else {
                Ok(None)
            };
        }
        let Some(cpus) = &self.cpus else { return Ok(None) };
        if Some(get) == self.functions.loopback
            && let (Some(field), Some(layout)) = (&self.device.lstats, &self.light)
        {
            let base = field.read(space, device)?;
            let mut sum = Counters::default();
            for (_, at) in cpus.copies(base) {
                sum.rx_packets = sum.rx_packets.wrapping_add(layout.packets.read(space, at)?);
                sum.rx_bytes = sum.rx_bytes.wrapping_add(layout.bytes.read(space, at)?);
            }
            (sum.tx_packets, sum.tx_bytes) = (sum.rx_packets, sum.rx_bytes);
            return Ok(Some(sum));
        }
        if self.functions.tunnel.contains(&get)
            && let (Some(field), Some(layout)) = (&self.device.tstats, &self.tunnel)
        {
            let base = field.read(space, device)?;
            let mut sum = plain()?;
            for (_, at) in cpus.copies(base) {
                sum.rx_packets = sum.rx_packets.wrapping_add(layout.rx_packets.read(space, at)?);
                sum.rx_bytes = sum.rx_bytes.wrapping_add(layout.rx_bytes.read(space, at)?);
                sum.tx_packets = sum.tx_packets.wrapping_add(layout.tx_packets.read(space, at)?);
                sum.tx_bytes = sum.tx_bytes.wrapping_add(layout.tx_bytes.read(space, at)?);
            }
            return Ok(Some(sum));
        }
        Ok(None)
    }
}
