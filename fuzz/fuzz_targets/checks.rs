//! All checks on a kernel whose memory is any bytes, again and again where there are few.
#![no_main]

#[path = "../../crates/analysis/tests/synthetic/mod.rs"]
mod synthetic;

use libfuzzer_sys::fuzz_target;
use synthetic::{DATA, Guest, IMAGE, RODATA, TEXT};
use vmsight_analysis::{Context, checks, run};

fuzz_target!(|data: &[u8]| {
    let (words, rest) = data.as_chunks::<8>();
    if words.is_empty() {
        return;
    }
    let mut guest = Guest::new();
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word)).cycle();
    for at in RODATA.chain(DATA).step_by(8) {
        let word = words.next().unwrap_or(0);
        // Most are made to lead into the image: few bytes of any would.
        guest.put(
            at,
            match word & 3 {
                0 => word,
                1 => IMAGE + TEXT.start + (word >> 2) % (TEXT.end - TEXT.start),
                _ => {
                    IMAGE
                        + DATA.start
                        + (word >> 2) % (DATA.end - DATA.start) / 8 * 8
                        + u64::from(rest.len() as u8 & 2)
                }
            },
        );
    }
    for at in TEXT.step_by(8) {
        guest.put(at, words.next().unwrap_or(0));
    }
    guest.put(DATA.start, 0);
    guest.put(DATA.start + 0x40, 1);
    for outcome in run(&Context::new(guest.kernel()), checks::ALL, &|_| {}) {
        assert!(outcome.looked_at > 0 || !outcome.notes.is_empty());
    }
});
