//! The capture file format of libpcap (pcap-savefile(5)): with nanoseconds, and packets from their IP header on.

use std::io::{self, Write};

use super::Packet;

/// Says that fractions of a second are nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
const VERSION: (u16, u16) = (2, 4);
/// No packet is longer.
const LONGEST: u32 = 1 << 18;
/// `LINKTYPE_RAW`: the packet begins with its IP header, whose version tells which.
const RAW: u32 = 101;
const SECOND: u64 = 1_000_000_000;

/// Writes packets as a capture file, which Wireshark and tcpdump read. A packet without a time is of 1970.
///
/// # Errors
/// If `out` cannot be written to.
pub fn write_pcap(packets: &[Packet], out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&MAGIC.to_le_bytes())?;
    out.write_all(&VERSION.0.to_le_bytes())?;
    out.write_all(&VERSION.1.to_le_bytes())?;
    // Two words that nobody uses.
    out.write_all(&[0; 8])?;
    out.write_all(&LONGEST.to_le_bytes())?;
    out.write_all(&RAW.to_le_bytes())?;
    for packet in packets {
        let length = u32::try_from(packet.bytes.len()).map_err(io::Error::other)?;
        // Seconds have 32 bits, which are read without a sign.
        let seconds = u32::try_from(packet.nanoseconds / SECOND).unwrap_or(u32::MAX);
        let rest = (packet.nanoseconds % SECOND) as u32;
        for word in [seconds, rest, length, length] {
            out.write_all(&word.to_le_bytes())?;
        }
        out.write_all(&packet.bytes)?;
    }
    Ok(())
}
