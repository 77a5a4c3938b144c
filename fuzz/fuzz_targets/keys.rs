//! Private keys, schedules and key logs in any bytes: what is found lies in them and is the same wherever they begin.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use vmsight_analysis::keys::{Form, Material, find_in};

fuzz_target!(|data: &[u8]| {
    let found = find_in(data);
    for (at, _, material) in &found {
        assert!(*at < data.len());
        assert!(!material.kind().is_empty() && !material.secret().is_empty());
        assert_eq!(material.fingerprint().len(), 16);
    }
    // Moved by whole pages, the same keys are there.
    if !found.is_empty() {
        let moved = find_in(&[&[0xaa; 4096][..], data].concat());
        let which = |all: &[(usize, Form, Material)]| -> BTreeSet<String> {
            all.iter()
                .map(|(_, _, material)| material.fingerprint())
                .collect()
        };
        assert!(which(&moved).is_superset(&which(&found)));
    }
});
