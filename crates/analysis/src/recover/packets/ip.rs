//! IP packets: whether bytes are one, and what it says of itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;
const UDPLITE: u8 = 136;
/// Bytes of IPv6's own header.
const V6_HEADER: usize = 40;
/// Extension headers of one packet.
const MAX_EXTENSIONS: usize = 8;

/// What the checksum of a packet's contents says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// It agrees.
    Good,
    /// It is that of the addresses alone: the sender left the rest to hardware, as it does for packets that stay on the machine.
    Partial,
    /// The packet has none that can be checked: by its protocol, or as a fragment.
    None,
    /// It does not agree.
    Bad,
}

impl Checksum {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Partial => "partial",
            Self::None => "none",
            Self::Bad => "bad",
        }
    }
}

/// What a packet says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    /// Of protocols that have them.
    pub(super) ports: Option<(u16, u16)>,
    /// Bytes of the whole packet.
    pub(super) length: usize,
    pub(super) checksum: Checksum,
}

impl Headers {
    /// The headers of a packet that begins with these bytes and is whole. `None` where that cannot be: its version, its lengths or the
    /// checksum of its header are none that a packet has.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::v4(bytes),
            6 => Self::v6(bytes),
            _ => None,
        }
    }

    /// How long the packet says that it is, from its first bytes.
    pub(super) fn length(bytes: &[u8]) -> Option<usize> {
        match bytes.first()? >> 4 {
            4 => Some(half(bytes, 2)?.into()),
            6 => Some(V6_HEADER + usize::from(half(bytes, 4)?)),
            _ => None,
        }
    }

    fn v4(bytes: &[u8]) -> Option<Self> {
        let header = usize::from(bytes.first()? & 0xf) * 4;
        let length = Self::length(bytes)?;
        if header < 20 || length < header || sum(bytes.get(..header)?) != 0xffff {
            return None;
        }
        let packet = bytes.get(..length)?;
        let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
        let (source, destination) = (address(12)?, address(16)?);
        let protocol = *packet.get(9)?;
        let contents = packet.get(header..)?;
        // A fragment: more of them, or not the first.
        let is_fragment = half(packet, 6)? & 0x3fff != 0;
        let is_later = half(packet, 6)? & 0x1fff != 0;
        let pseudo = pseudo(&source.octets(), &destination.octets(), protocol, contents.len());
        Some(Self {
            source: source.into(),
            destination: destination.into(),
            protocol,
            ports: ports(protocol, contents).filter(|_| !is_later),
            length,
            checksum: match is_fragment {
                true => Checksum::None,
                false => checksum(protocol, contents, pseudo),
            },
        })
    }

    fn v6(bytes: &[u8]) -> Option<Self> {
        let length = Self::length(bytes)?;
        let packet = bytes.get(..length)?;
        let address = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
        let (source, destination) = (address(8)?, address(24)?);
        let mut protocol = *packet.get(6)?;
        let mut contents = packet.get(V6_HEADER..)?;
        let (mut is_fragment, mut is_later) = (false, false);
        for _ in 0..MAX_EXTENSIONS {
            let size = match protocol {
                // Hop by hop, routing, destination options: their length is in units of 8, the first left out.
                0 | 43 | 60 => (usize::from(*contents.get(1)?) + 1) * 8,
                44 => {
                    let place = half(contents, 2)?;
                    (is_fragment, is_later) = (place & 0xfff9 != 0, place & 0xfff8 != 0);
                    8
                }
                _ => break,
            };
            protocol = *contents.first()?;
            contents = contents.get(size..)?;
        }
        let pseudo = pseudo(&source.octets(), &destination.octets(), protocol, contents.len());
        Some(Self {
            source: source.into(),
            destination: destination.into(),
            protocol,
            ports: ports(protocol, contents).filter(|_| !is_later),
            length,
            checksum: match is_fragment {
                true => Checksum::None,
                false => checksum(protocol, contents, pseudo),
            },
        })
    }

    /// The protocol's name, or its number.
    pub(super) fn protocol_name(&self) -> String {
        match self.protocol {
            ICMP => "icmp",
            2 => "igmp",
            TCP => "tcp",
            UDP => "udp",
            47 => "gre",
            50 => "esp",
            ICMP6 => "icmpv6",
            89 => "ospf",
            132 => "sctp",
            UDPLITE => "udplite",
            other => return other.to_string(),
        }
        .to_owned()
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk::<2>()?))
}

fn ports(protocol: u8, contents: &[u8]) -> Option<(u16, u16)> {
    match protocol {
        TCP | UDP | UDPLITE | 132 => half(contents, 0).zip(half(contents, 2)),
        _ => None,
    }
}

/// The Internet checksum's sum (RFC 1071), folded and not inverted.
fn sum(bytes: &[u8]) -> u16 {
    let mut total = 0u64;
    for pair in bytes.chunks(2) {
        let (high, low) = (pair.first().copied(), pair.get(1).copied());
        total += u64::from(u16::from_be_bytes([high.unwrap_or(0), low.unwrap_or(0)]));
    }
    fold(total)
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// The sum of the pseudo header: addresses, protocol, length.
fn pseudo(source: &[u8], destination: &[u8], protocol: u8, length: usize) -> u16 {
    fold(
        u64::from(sum(source))
            + u64::from(sum(destination))
            + u64::from(protocol)
            + u64::from(fold(length as u64)),
    )
}

/// What the checksum in `contents` says; `pseudo` is the sum of the pseudo header.
fn checksum(protocol: u8, contents: &[u8], pseudo: u16) -> Checksum {
    let (at, with_pseudo) = match protocol {
        ICMP | 2 => (2, false),
        ICMP6 => (2, true),
        TCP => (16, true),
        UDP => (6, true),
        _ => return Checksum::None,
    };
    let Some(stored) = half(contents, at) else {
        return Checksum::Bad;
    };
    // A datagram's own length leaves out what is behind it.
    if protocol == UDP && half(contents, 4).map(usize::from) != Some(contents.len()) {
        return Checksum::Bad;
    }
    let start = if with_pseudo { pseudo } else { 0 };
    if protocol == UDP && stored == 0 {
        Checksum::None
    } else if fold(u64::from(start) + u64::from(sum(contents))) == 0xffff {
        Checksum::Good
    } else if with_pseudo && stored == pseudo {
        Checksum::Partial
    } else {
        Checksum::Bad
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A datagram from 10.0.0.1:1000 to 10.0.0.2:53 with three bytes and both its checksums.
    fn datagram() -> Vec<u8> {
        let mut out = vec![
            0x45, 0, 0, 31, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 3, 232, 0, 53, 0, 11, 0, 0,
            b'a', b'b', b'c',
        ];
        let header = !sum(&out[..20]);
        out[10..12].copy_from_slice(&header.to_be_bytes());
        let start = pseudo(&[10, 0, 0, 1], &[10, 0, 0, 2], 17, 11);
        let whole = !fold(u64::from(start) + u64::from(sum(&out[20..])));
        out[26..28].copy_from_slice(&whole.to_be_bytes());
        out
    }

    #[test]
    fn a_packet_is_one_by_its_lengths_and_checksums() {
        let bytes = datagram();
        let headers = Headers::parse(&bytes).unwrap();
        assert_eq!(headers.source, "10.0.0.1".parse::<IpAddr>().unwrap());
        assert_eq!((headers.ports, headers.length), (Some((1000, 53)), 31));
        assert_eq!(
            (headers.checksum, headers.protocol_name()),
            (Checksum::Good, "udp".to_owned())
        );
        for (at, checksum) in [(28, Checksum::Bad), (27, Checksum::Bad)] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_eq!(Headers::parse(&other).unwrap().checksum, checksum, "{at}");
        }
        let mut partial = bytes.clone();
        let start = pseudo(&[10, 0, 0, 1], &[10, 0, 0, 2], 17, 11);
        partial[26..28].copy_from_slice(&start.to_be_bytes());
        assert_eq!(Headers::parse(&partial).unwrap().checksum, Checksum::Partial);
        // Any byte of the header that is another, and any end that comes too early.
        for at in 0..20 {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_eq!(Headers::parse(&other), None, "{at}");
        }
        for end in 0..bytes.len() {
            assert_eq!(Headers::parse(&bytes[..end]), None, "{end}");
        }
    }

    #[test]
    fn the_sum_is_that_of_the_standard() {
        // RFC 1071, section 3.
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
        assert_eq!(sum(&[0x12]), 0x1200);
    }

    #[test]
    fn extension_headers_are_passed_and_may_lead_nowhere() {
        let mut bytes = vec![0x60, 0, 0, 0, 0, 16, 0, 64];
        bytes.extend([0u8; 15]);
        bytes.push(1);
        bytes.extend([0u8; 15]);
        bytes.push(1);
        // Hop by hop, then eight bytes of ICMPv6.
        bytes.extend([58, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([128, 0, 0, 0, 0, 1, 0, 2]);
        let headers = Headers::parse(&bytes).unwrap();
        assert_eq!((headers.protocol, headers.checksum), (58, Checksum::Bad));
        bytes[41] = 200;
        assert_eq!(Headers::parse(&bytes), None);
    }
}
