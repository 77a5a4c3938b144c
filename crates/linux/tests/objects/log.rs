//! The kernel's log.

use vmsight_linux::kmsg::KernelMessage;
use vmsight_linux::{Kernel, LinuxError, Listing};

use crate::guest::{Guest, offset};
use crate::{BAD, timed};

const COUNT_BITS: u64 = 3;
const SIZE_BITS: u64 = 8;
const FINALIZED: u64 = 2 << 62;

struct Ring {
    guest: Guest,
    ring: u64,
    descs: u64,
    infos: u64,
    data: u64,
    next: u64,
}

/// A ring of eight descriptors and 256 bytes of text. Ids start just below a wrap of the descriptors.
fn ring() -> Ring {
    let mut guest = Guest::new();
    let descs = guest.space(24 << COUNT_BITS);
    let infos = guest.space(88 << COUNT_BITS);
    let data = guest.space(1 << SIZE_BITS);
    let ring = guest.make(
        "printk_ringbuffer",
        &[
            ("desc_ring.count_bits", COUNT_BITS),
            ("desc_ring.descs", descs),
            ("desc_ring.infos", infos),
            ("desc_ring.head_id", 6),
            ("desc_ring.tail_id", 7),
            ("text_data_ring.size_bits", SIZE_BITS),
            ("text_data_ring.data", data),
        ],
    );
    let pointer = guest.space(8);
    guest.put(pointer, ring);
    guest.symbol("prb", pointer);
    Ring {
        guest,
        ring,
        descs,
        infos,
        data,
        next: 0,
    }
}

impl Ring {
    /// Stores a record as the kernel would.
    fn push(&mut self, id: u64, text: &[u8]) {
        let size = 1u64 << SIZE_BITS;
        let block = (text.len() as u64 + 8).next_multiple_of(8);
        let begin = self.next;
        let mut at = begin;
        if begin / size != (begin + block - 1) / size {
            at = (begin / size + 1) * size;
        }
        self.next = at + block;
        self.guest.put(self.data + at % size, id);
        self.guest.put_bytes(self.data + at % size + 8, text);
        let slot = id % (1 << COUNT_BITS);
        let (desc, info) = (self.descs + slot * 24, self.infos + slot * 88);
        self.guest.set(desc, "prb_desc", "state_var", FINALIZED | id);
        self.guest.set(desc, "prb_desc", "text_blk_lpos.begin", begin);
        self.guest.set(desc, "prb_desc", "text_blk_lpos.next", self.next);
        self.guest.set(info, "printk_info", "seq", id);
        self.guest.set(info, "printk_info", "ts_nsec", id * 1_000_000);
        self.guest.set(info, "printk_info", "text_len", text.len() as u64);
        self.guest
            .set(self.ring, "printk_ringbuffer", "desc_ring.head_id", id);
    }

    fn three(mut self) -> Self {
        self.push(7, b"the first");
        self.push(8, b"the second\nwith two lines");
        self.push(9, b"\x1b[31mthe third\xff");
        self
    }

    fn kmsg(&self) -> Result<Listing<KernelMessage>, LinuxError> {
        let kernel: Kernel = self.guest.kernel();
        timed(|| kernel.kmsg())
    }

    fn texts(&self) -> Vec<Option<String>> {
        self.kmsg().unwrap().rows.into_iter().map(|r| r.text).collect()
    }
}

fn some(texts: &[&str]) -> Vec<Option<String>> {
    texts.iter().map(|t| Some((*t).to_owned())).collect()
}

#[test]
fn an_honest_log_is_whole() {
    let ring = ring().three();
    assert_eq!(
        ring.texts(),
        some(&[
            "the first",
            "the second\nwith two lines",
            "\u{1b}[31mthe third\\xff"
        ])
    );
    let listing = ring.kmsg().unwrap();
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    assert_eq!(
        (
            listing.rows[0].seq,
            listing.rows[0].time_us,
            listing.rows[0].caller.as_str()
        ),
        (7, 7000, "T0")
    );
}

#[test]
fn texts_that_wrap_at_the_rings_end_are_whole() {
    let mut ring = ring();
    for id in 7..14 {
        ring.push(id, format!("message {id} {}", "x".repeat(20)).as_bytes());
    }
    let texts = ring.texts();
    // Seven blocks of 40 bytes do not fit 256: the oldest is overwritten, and says so, the others are whole.
    assert_eq!(texts.len(), 7);
    let whole: Vec<String> = texts.into_iter().flatten().collect();
    assert_eq!(whole.len(), 6, "{whole:?}");
    assert!(whole.iter().all(|t| t.ends_with(&"x".repeat(20))), "{whole:?}");
    assert!(whole.last().unwrap().starts_with("message 13"));
}

#[test]
fn absurd_sizes_are_refused() {
    for (member, value) in [
        ("desc_ring.count_bits", 64),
        ("desc_ring.count_bits", u64::from(u32::MAX)),
        ("text_data_ring.size_bits", 63),
        ("text_data_ring.size_bits", 0),
    ] {
        let mut ring = ring().three();
        ring.guest.set(ring.ring, "printk_ringbuffer", member, value);
        assert!(
            matches!(ring.kmsg(), Err(LinuxError::Implausible { .. })),
            "{member} {value}"
        );
    }
}

#[test]
fn the_largest_believable_ring_over_nothing_ends_soon() {
    for bad in BAD {
        let mut ring = ring().three();
        ring.guest
            .set(ring.ring, "printk_ringbuffer", "desc_ring.count_bits", 26);
        ring.guest
            .set(ring.ring, "printk_ringbuffer", "desc_ring.descs", bad);
        ring.guest
            .set(ring.ring, "printk_ringbuffer", "desc_ring.head_id", 1 << 40);
        let listing = ring.kmsg().unwrap();
        assert!(
            listing.rows.is_empty() && !listing.warnings.is_empty(),
            "{bad:#x}"
        );
    }
}

#[test]
fn head_and_tail_that_contradict_each_other_hide_nothing() {
    let mut ring = ring().three();
    ring.guest
        .set(ring.ring, "printk_ringbuffer", "desc_ring.tail_id", 1 << 50);
    let listing = ring.kmsg().unwrap();
    assert_eq!(listing.rows.len(), 3);
    assert!(
        listing.warnings.iter().any(|w| w.contains("contradict")),
        "{:?}",
        listing.warnings
    );
}

#[test]
fn lies_about_a_text_cost_that_text() {
    for (begin, next) in [
        (0, 0),
        (u64::MAX - 1, 0),
        (0, u64::MAX - 1),
        (1 << 62, 1 << 63),
        (8, 4),
        (40, 40),
        (1 << 40, (1 << 40) + 40),
    ] {
        let mut ring = ring().three();
        ring.guest
            .set(ring.descs, "prb_desc", "text_blk_lpos.begin", begin);
        ring.guest.set(ring.descs, "prb_desc", "text_blk_lpos.next", next);
        let listing = ring.kmsg().unwrap();
        assert_eq!(listing.rows.len(), 3);
        let row = listing.rows.iter().find(|r| r.seq == 8).unwrap();
        assert!(
            row.text.is_none() && row.problems.iter().any(|p| p.field == "text"),
            "{begin:#x} {next:#x}: {row:?}"
        );
    }
    // Longer than its block.
    let mut ring = ring().three();
    ring.guest.set(ring.infos, "printk_info", "text_len", 0xffff);
    assert!(ring.texts().into_iter().flatten().all(|t| t.len() < 64));
    // A record that was reserved and never filled is none.
    ring.guest.set(ring.descs, "prb_desc", "state_var", 8);
    assert_eq!(ring.texts().len(), 2);
    let _ = offset("prb_desc", "state_var");
}

#[test]
fn a_record_that_came_out_marked_is_read_again() {
    let ring = ring().three();
    let owner = ring.data;
    let kernel = ring.guest.flickering(owner, 1234);
    let listing = timed(|| kernel.kmsg().unwrap());
    assert_eq!(listing.rows[0].text.as_deref(), Some("the first"));
    assert!(listing.rows.iter().all(|row| row.problems.is_empty()));
}
