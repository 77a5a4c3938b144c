//! `vmsight recover packets`: IP packets in the kernel's memory.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::packets::{Packet, packets, write_pcap};

use super::show;
use crate::{
    Outcome,
    args::Global,
    commands::beside::write_beside,
    output::{Progress, Row},
    session::Session,
};

/// Network packets that are still in the kernel's memory.
#[derive(Args, Debug)]
#[command(after_help = "\
`queue`: somebody has still to read it, and `sockets` says who; a sniffer that lags behind has copies of all. `slab`: found
in the kernel's slabs of packets, in flight or left over; such a one must prove itself by its lengths and checksums.

--pcap writes them as a capture file, from their IP headers on, for Wireshark and tcpdump. The kernel notes a packet's time
only while somebody on the machine wants that: one without is of 1970 there.

What cannot be seen: packets that were read and whose memory was used again, which is a matter of moments; what is no IP
(ARP); frames in the rings of network cards; what TCP has joined to one packet is cut to the first one's length.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only those that wait in the queue of a socket
    #[arg(long)]
    queued: bool,
    /// Write them to this file
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
}

const COLUMNS: &[&str] = &[
    "time",
    "protocol",
    "source",
    "destination",
    "length",
    "found_in",
    "sockets",
];

impl Row for Packet {
    const COLUMNS: &'static [&'static str] = &[
        "time",
        "protocol",
        "source",
        "destination",
        "length",
        "found_in",
        "sockets",
        "checksum",
        "address",
        "problems",
    ];
}

impl Cmd {
    /// Whether it makes files.
    pub(super) fn writes(&self) -> bool {
        self.pcap.is_some()
    }

    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "searching for packets");
        let mut listing = packets(session.kernel()?).context("searching for packets")?;
        drop(progress);
        listing
            .rows
            .retain(|packet| !self.queued || packet.found_in == "queue");
        if let Some(file) = &self.pcap {
            write_beside(file, "the packets", |out| {
                write_pcap(&listing.rows, out).context("writing the packets")
            })?;
        }
        show(&session, COLUMNS, listing)
    }
}
