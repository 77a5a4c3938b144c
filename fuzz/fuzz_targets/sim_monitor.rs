//! What the in-VM monitor is given: a policy of any bytes, which is accepted or not and is the same after a round trip; and
//! every handler over a guest of any bytes, which ends, in bounds, and tells one thing at most.
#![no_main]

use std::cell::Cell;

use libfuzzer_sys::fuzz_target;
use vmsight_sim_abi::{Frame, Handler, Hook, Policy, Watch};
use vmsight_sim_monitor::{Context, Memory, Rest, handle};

/// The input, over and over, up to 1 MiB.
struct Guest<'d> {
    data: &'d [u8],
    reads: &'d Cell<usize>,
}

impl Memory for Guest<'_> {
    fn read(&self, gpa: u64) -> Option<u64> {
        self.reads.set(self.reads.get() + 1);
        if gpa >= 1 << 20 || self.data.is_empty() {
            return None;
        }
        let byte = |n: usize| self.data[(gpa as usize + n) % self.data.len()];
        Some(u64::from_le_bytes(core::array::from_fn(byte)))
    }

    fn write(&mut self, gpa: u64, _: u64) -> bool {
        gpa < 1 << 20
    }
}

fuzz_target!(|data: &[u8]| {
    if let Ok(policy) = Policy::from_bytes(data) {
        assert_eq!(Policy::from_bytes(&policy.to_bytes()), Ok(policy));
    }
    // Registers, offsets of members, and the guest.
    let Some((&head, memory)) = data.split_first_chunk::<104>() else {
        return;
    };
    let word = |n: usize| u64::from_le_bytes(core::array::from_fn(|m| head[n * 8 + m]));
    let mut watch = Box::new(Watch::EMPTY);
    watch.policy = Policy::new([0x1000, 0x2000], 0x1000);
    watch.policy.flags = word(0) & 3;
    for (n, offset) in watch.policy.members.iter_mut().enumerate() {
        // Near ones, where structures lie in each other, and any.
        *offset = match head[8 + n % 32] {
            byte if byte < 0xf0 => u64::from(byte) & !3,
            _ => word(n % 13) & 0xff_ffff,
        };
    }
    let frame = Frame {
        rdi: word(5),
        // A module's length, too; what is too long for one is not looked at.
        rsi: word(6) & 0xffff | word(6) >> 63 << 40,
        rdx: word(7) & 0xffff,
        r8: word(8),
        r9: word(9),
        site: 0,
        cr3: word(10) & 0xf_f000,
    };
    let rest = Rest {
        gs_base: word(11),
        rcx: (head[96] & 1 == 0).then(|| watch.policy.members[26]),
    };
    let (reads, mut handled) = (Cell::new(0), 0);
    for number in 0..=9 {
        let handler = Handler::from_number(number).expect("these are all there are");
        watch.policy.hooks[0] = Hook {
            address: 0x1000,
            handler: number,
            may_refuse: 1,
            refusal: -1,
        };
        let before = watch.ring.next;
        reads.set(0);
        let guest = Guest {
            data: memory,
            reads: &reads,
        };
        handle(
            &mut Context::new(&frame, rest, guest),
            handler,
            &mut watch,
            &mut handled,
        );
        // A module of 64 KiB is 8,192 words and a walk for each 512 bytes; nothing else reads as much.
        assert!(reads.get() < 20_000, "{handler:?} made {} reads", reads.get());
        assert!(watch.ring.next - before <= 1);
        if let Some(event) = watch.ring.take() {
            assert!(
                event
                    .to_string()
                    .bytes()
                    .all(|byte| (b' '..=b'~').contains(&byte))
            );
        }
    }
    assert_eq!(handled, 10);
});
