//! Network packets that are still in the kernel's `struct sk_buff`s: in the queues of sockets, where somebody has still to read them,
//! and elsewhere in the slabs of such structures, in flight or left over.
//!
//! A packet proves itself: lengths and checksums must agree before what is in no queue is believed to be one.

mod ip;
mod pcap;

use std::net::{IpAddr, SocketAddr};

use rustc_hash::FxHashMap;
use serde::Serialize;
use vmsight_arch::{Gpa, Gva};
use vmsight_linux::clock::rfc3339;
use vmsight_linux::listing::address;
use vmsight_linux::socket::SocketFilter;
use vmsight_linux::structures::list;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::ReadError;

use super::frames::Frames;
use super::member::{Member, Structure};
use super::slab::Slabs;
use ip::{Checksum, Headers};

pub use pcap::write_pcap;

/// Packets of one listing.
const MAX_PACKETS: usize = 1 << 20;
/// Their bytes.
const MAX_BYTES: usize = 256 << 20;
/// Packets in the queue of one socket.
const MAX_QUEUE: usize = 1 << 16;
/// The longest packet: IPv6's payload and its header.
const MAX_PACKET: usize = 65535 + 40;
/// Pieces of one packet: `MAX_SKB_FRAGS`, which is 17, up to 45 where so configured.
const MAX_FRAGMENTS: u64 = 45;
/// Where a header that nobody has noted lies.
const UNSET: u64 = 0xffff;
/// Times that are believed, in nanoseconds since 1970: from 1990 on. Others are of another clock.
const FIRST_TIME: u64 = 631_152_000_000_000_000;

/// One IP packet.
#[derive(Clone, Debug, Serialize)]
pub struct Packet {
    /// When it was received, where the kernel noted that: RFC 3339.
    pub time: Option<String>,
    /// `tcp`, `udp`, `icmp`, … , or the protocol's number.
    pub protocol: String,
    /// Where it comes from, with the port where there is one.
    pub source: String,
    /// Where it goes to, likewise.
    pub destination: String,
    /// Its length in bytes.
    pub length: usize,
    /// `queue`: a socket's program has still to read it; `slab`: found in the slabs of packets, in flight or left over.
    pub found_in: &'static str,
    /// The sockets in whose queues it is.
    pub sockets: Vec<String>,
    /// `good`; `partial`: the sender left it to hardware, as for what stays on the machine; `none`: the packet has none; `bad`.
    pub checksum: &'static str,
    /// The `struct sk_buff`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
    /// When, in nanoseconds since 1970; 0 where that is not known.
    #[serde(skip)]
    nanoseconds: u64,
    /// The packet, from its IP header on.
    #[serde(skip)]
    bytes: Vec<u8>,
}

impl Packet {
    /// The packet, from its IP header on.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// The IP packets in a guest's memory: those that have a time by time, then the others, by where they lie.
///
/// # Errors
/// If the kernel's types lack a member or sockets cannot be listed.
pub fn packets(kernel: &Kernel) -> Result<Listing<Packet>, LinuxError> {
    let reader = Reader::new(kernel)?;
    let mut out = Listing::default();
    let mut known: FxHashMap<Gva, usize> = FxHashMap::default();
    let mut left = MAX_BYTES;
    reader.queues(&mut out, &mut known, &mut left)?;
    reader.slabs(&mut out, &mut known, &mut left);
    out.rows.sort_by_key(|packet| {
        let time = packet.nanoseconds.checked_sub(1).unwrap_or(u64::MAX);
        (time, packet.address.0)
    });
    Ok(out)
}

struct Reader<'k> {
    kernel: &'k Kernel,
    frames: Frames,
    /// Bytes of a `struct sk_buff`.
    size: usize,
    head: Member,
    end: Member,
    tail: Member,
    length: Member,
    network: Member,
    time: Member,
    users: Member,
    fragments: Fragments,
}

/// Where the pieces of a packet that are in pages of their own are told: `struct skb_shared_info`, right behind its buffer.
struct Fragments {
    count: Member,
    first: Member,
    size: u64,
    page: Member,
    length: Member,
    offset: Member,
}

impl<'k> Reader<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let skb = Structure::of(kernel, "sk_buff")?;
        let shared = Structure::of(kernel, "skb_shared_info")?;
        // One of its own since 6.9.
        let fragment = Structure::of(kernel, "skb_frag").or_else(|_| Structure::of(kernel, "bio_vec"))?;
        Ok(Self {
            kernel,
            frames: Frames::new(kernel)?,
            size: usize::try_from(skb.size()).unwrap_or(0),
            head: skb.member("head")?,
            end: skb.member("end")?,
            tail: skb.member("tail")?,
            length: skb.member("len")?,
            network: skb.member("network_header")?,
            time: skb.member("tstamp")?,
            users: skb.member("users.refs.counter|users")?,
            fragments: Fragments {
                count: shared.member("nr_frags")?,
                first: shared.member("frags")?,
                size: fragment.size(),
                page: fragment.member("netmem|bv_page")?,
                length: fragment.member("len|bv_len")?,
                offset: fragment.member("offset|bv_offset")?,
            },
        })
    }

    /// What waits in the queues of sockets.
    fn queues(
        &self,
        out: &mut Listing<Packet>,
        known: &mut FxHashMap<Gva, usize>,
        left: &mut usize,
    ) -> Result<(), LinuxError> {
        let queue = Structure::of(self.kernel, "sock")?.member("sk_receive_queue")?;
        // Where a UDP socket's reader has put them aside to read them one by one.
        let aside = Structure::of(self.kernel, "udp_sock")?.find("reader_queue");
        let sockets = self.kernel.sockets(SocketFilter {
            packet: true,
            ..SocketFilter::INET
        })?;
        sockets.warnings.into_iter().for_each(|w| out.warn(w));
        let space = self.kernel.space();
        for socket in &sockets.rows {
            // What is left of a connection is a smaller structure without a queue.
            if socket.kind.is_none() {
                continue;
            }
            let mut heads = vec![queue.at(socket.address)];
            if socket.protocol.starts_with("udp") {
                heads.extend(aside.map(|aside| aside.at(socket.address)));
            }
            for head in heads {
                let found = list::walk(space, head, MAX_QUEUE);
                let what = format!("the queue of {}", socket.endpoint());
                let end = found.walk.end.warning(&what);
                end.into_iter().for_each(|w| out.warn(w));
                for at in found.walk.items {
                    let mut bytes = vec![0; self.size];
                    if let Err(error) = space.read(at, &mut bytes) {
                        out.warn(format!("{what}: {error}"));
                        continue;
                    }
                    match self.packet(at, &bytes, true) {
                        Ok(Some((place, packet))) => {
                            if !add(out, known, left, place, packet, Some(socket.endpoint())) {
                                return Ok(());
                            }
                        }
                        // What is no IP packet: ARP in the queue of a packet socket, for one.
                        Ok(None) => {}
                        Err(error) => out.warn(format!("{what}: {error}")),
                    }
                }
            }
        }
        Ok(())
    }

    /// All else in the slabs of such structures.
    fn slabs(&self, out: &mut Listing<Packet>, known: &mut FxHashMap<Gva, usize>, left: &mut usize) {
        for (names, member) in [
            (&["skbuff_cache", "skbuff_head_cache"][..], "skbuff_cache"),
            (&["skbuff_fclone_cache"], "skbuff_fclone_cache"),
        ] {
            let slabs = match self.cache(names, member) {
                Ok(slabs) => slabs,
                Err(error) => {
                    out.warn(format!("packets in no queue: {error}"));
                    continue;
                }
            };
            if slabs.cut {
                out.warn("packets in no queue: cut, there are too many slabs");
            }
            // An object of the second holds two.
            let each = (slabs.stride / (self.size as u64).max(1)).clamp(1, 2);
            let mut bytes = vec![0; self.size];
            for object in slabs.objects() {
                for nth in 0..each {
                    let gpa = Gpa(object.0.saturating_add(nth * self.size as u64));
                    if self.kernel.memory().read(gpa, &mut bytes).is_err() || !self.can_be(&bytes) {
                        continue;
                    }
                    // What cannot be read was given back and used for something else.
                    if let Ok(Some((place, packet))) = self.packet(self.frames.seen(gpa), &bytes, false)
                        && !add(out, known, left, place, packet, None)
                    {
                        return;
                    }
                }
            }
        }
    }

    /// The slabs of a cache: a variable of its own up to 6.8, then a member of a structure.
    fn cache(&self, names: &[&str], member: &str) -> Result<Slabs, LinuxError> {
        let what = names.first().copied().unwrap_or(member);
        if let Some(variable) = self.kernel.find_symbol(names) {
            return Slabs::find_at(self.kernel, what, variable);
        }
        let all = self.kernel.symbol("net_hotdata")?;
        let place = Structure::of(self.kernel, "net_hotdata")?.member(member)?;
        Slabs::find_at(self.kernel, what, place.at(all))
    }

    /// Whether these bytes can be a `struct sk_buff` with a packet.
    fn can_be(&self, skb: &[u8]) -> bool {
        let number = |member: &Member| member.of(skb).unwrap_or(0);
        let (tail, end, network) = (number(&self.tail), number(&self.end), number(&self.network));
        number(&self.head) >> 47 == (1 << 17) - 1
            && (1..1 << 16).contains(&number(&self.users))
            && network != UNSET
            && network < tail
            && tail <= end
            && end <= 1 << 20
            && number(&self.length) > 0
    }

    /// The packet of a `struct sk_buff`, and where its header lies. `None` where it has none of IP, or is in no queue and does not prove
    /// itself.
    fn packet(&self, at: Gva, skb: &[u8], queued: bool) -> Result<Option<(Gva, Packet)>, ReadError> {
        let number = |member: &Member| member.of(skb).unwrap_or(0);
        let (head, tail, network) = (Gva(number(&self.head)), number(&self.tail), number(&self.network));
        let Some(linear) = tail.checked_sub(network).filter(|_| network != UNSET) else {
            return Ok(None);
        };
        let place = head.wrapping_add(network);
        let mut bytes = vec![0; usize::try_from(linear).unwrap_or(MAX_PACKET).min(MAX_PACKET)];
        self.kernel.space().read(place, &mut bytes)?;
        let Some(wanted) = Headers::length(&bytes) else {
            return Ok(None);
        };
        if bytes.len() < wanted.min(MAX_PACKET) {
            self.fragments(
                head.wrapping_add(number(&self.end)),
                &mut bytes,
                wanted.min(MAX_PACKET),
            )?;
        }
        let Some(headers) = Headers::parse(&bytes) else {
            return Ok(None);
        };
        if !queued && headers.checksum == Checksum::Bad {
            return Ok(None);
        }
        // What comes behind is padding of the link, or was joined to it.
        bytes.truncate(headers.length);
        let end = |ip: IpAddr, port: Option<u16>| match port {
            Some(port) => SocketAddr::new(ip, port).to_string(),
            None => ip.to_string(),
        };
        let (from, to) = headers.ports.unzip();
        let time = number(&self.time);
        let nanoseconds = if time >= FIRST_TIME { time } else { 0 };
        let mut problems = Vec::new();
        if headers.checksum == Checksum::Bad {
            let text = "does not agree: it was changed, or what follows it was joined to it";
            problems.push(Problem::new("checksum", text));
        }
        Ok(Some((
            place,
            Packet {
                time: i64::try_from(nanoseconds)
                    .ok()
                    .filter(|&time| time > 0)
                    .and_then(rfc3339),
                protocol: headers.protocol_name(),
                source: end(headers.source, from),
                destination: end(headers.destination, to),
                length: headers.length,
                found_in: if queued { "queue" } else { "slab" },
                sockets: Vec::new(),
                checksum: headers.checksum.name(),
                address: at,
                problems,
                nanoseconds,
                bytes,
            },
        )))
    }

    /// Adds the pieces that are in pages of their own, until the packet has as many bytes as it says.
    fn fragments(&self, shared: Gva, bytes: &mut Vec<u8>, wanted: usize) -> Result<(), ReadError> {
        let (space, layout) = (self.kernel.space(), &self.fragments);
        let count = layout.count.number(space, shared)?.min(MAX_FRAGMENTS);
        for nth in 0..count {
            let Some(missing) = wanted.checked_sub(bytes.len()).filter(|&missing| missing > 0) else {
                break;
            };
            let at = layout.first.at(shared).wrapping_add(nth * layout.size);
            let page = layout.page.pointer(space, at)?;
            let length = layout.length.number(space, at)?;
            let offset = layout.offset.number(space, at)?;
            let Some(gpa) = self.frames.frame(page) else {
                break;
            };
            let from = bytes.len();
            let length = usize::try_from(length).unwrap_or(missing).min(missing);
            bytes.resize(from + length, 0);
            let to = bytes.get_mut(from..).unwrap_or(&mut []);
            let at = Gpa(gpa.0.saturating_add(offset));
            if self.kernel.memory().read(at, to).is_err() {
                bytes.truncate(from);
                break;
            }
        }
        Ok(())
    }
}

/// Adds a packet, or the socket to one that is known: copies of a `struct sk_buff` share the packet. False where there is no room.
fn add(
    out: &mut Listing<Packet>,
    known: &mut FxHashMap<Gva, usize>,
    left: &mut usize,
    place: Gva,
    packet: Packet,
    socket: Option<String>,
) -> bool {
    if let Some(row) = known.get(&place).and_then(|&nth| out.rows.get_mut(nth)) {
        row.sockets.extend(socket);
        return true;
    }
    let rest = left.checked_sub(packet.bytes.len());
    let Some(rest) = rest.filter(|_| out.rows.len() < MAX_PACKETS) else {
        out.warn("packets: cut, the listing holds too much already");
        return false;
    };
    *left = rest;
    known.insert(place, out.rows.len());
    out.rows.push(packet);
    if let Some(row) = out.rows.last_mut() {
        row.sockets.extend(socket);
    }
    true
}
