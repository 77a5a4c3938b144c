//! The programs as they are built.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Register};
use vmsight_sim_image::Program;

#[path = "../build/freestanding.rs"]
mod freestanding;

use freestanding::Source;

/// Clippy's default run leaves out what needs the feature `freestanding`.
#[test]
fn programs_have_no_lints() {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sim");
    for (package, program) in [
        ("vmsight-sim-hypervisor", "vmsight-hypervisor"),
        ("vmsight-sim-monitor", "vmsight-monitor"),
        ("vmsight-sim-trial", "vmsight-trial"),
    ] {
        let source = Source {
            package,
            program,
            features: "",
        };
        source
            .cargo("clippy", &target, &["--", "-D", "warnings"])
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

/// The monitor runs with the guest's floating-point and vector registers, which it must not touch.
#[test]
fn the_monitor_uses_general_registers_alone() {
    let image = Program::Monitor.bytes().unwrap_or_else(|e| panic!("{e:?}"));
    let word = |n: usize| u64::from_le_bytes(image[n * 8..n * 8 + 8].try_into().unwrap());
    assert_eq!(word(0), u64::from_le_bytes(*b"\xeb\x36vmsim\0"));
    let (base, entry) = (word(2), word(5));
    // The image's first instruction is a jump to it.
    assert_eq!(entry - base, 0x38);
    let code = &image[(entry - base) as usize..];
    let mut factory = InstructionInfoFactory::new();
    let mut seen = 0;
    for instruction in Decoder::with_ip(64, code, entry, DecoderOptions::NONE) {
        // Padding between functions decodes as something or as nothing, and is never reached.
        if instruction.is_invalid() {
            continue;
        }
        seen += 1;
        assert!(
            plain(&mut factory, &instruction),
            "{:#x}: {instruction}",
            instruction.ip()
        );
    }
    assert!(seen > 30, "only {seen} instructions");
}

fn plain(factory: &mut InstructionInfoFactory, instruction: &Instruction) -> bool {
    let info = factory.info(instruction);
    info.used_registers().iter().all(|used| {
        let register: Register = used.register();
        register.is_gpr() || register.is_segment_register() || register.is_ip()
    })
}
