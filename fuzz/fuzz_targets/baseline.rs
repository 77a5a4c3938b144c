//! Baselines of any bytes: refused, or the same when written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_analysis::Baseline;

fuzz_target!(|data: &[u8]| {
    let Ok(baseline) = Baseline::read(data) else {
        return;
    };
    let mut again = Vec::new();
    baseline.write(&mut again).expect("memory");
    assert_eq!(Baseline::read(again.as_slice()).expect("our own"), baseline);
});
