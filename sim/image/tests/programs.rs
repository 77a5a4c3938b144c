//! The programs as they are built.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Register};
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
        ("vmsight-sim-witness", "vmsight-witness"),
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

/// The monitor runs with the guest's floating-point and vector registers. What can be reached before they are kept, or after
/// they are loaded again, does not touch them.
#[test]
fn the_monitor_keeps_the_guests_vector_registers() {
    let image = Program::Monitor.bytes().unwrap_or_else(|e| panic!("{e:?}"));
    let word = |n: usize| u64::from_le_bytes(image[n * 8..n * 8 + 8].try_into().unwrap());
    assert_eq!(word(0), u64::from_le_bytes(*b"\xeb\x36vmsim\0"));
    let (base, entry) = (word(2), word(5));
    // The image's first instruction is a jump to it.
    assert_eq!(entry - base, 0x38);
    let reached = reached_before_keeping(&image, base, entry);
    let mut factory = InstructionInfoFactory::new();
    for instruction in reached.values() {
        assert!(
            only_general(&mut factory, instruction),
            "{:#x}: {instruction}",
            instruction.ip()
        );
    }
    assert!(reached.len() > 40, "only {} instructions", reached.len());
}

/// The instructions that can be reached from an address, by where they are, but for those between keeping the vector
/// registers and loading them again.
fn reached_before_keeping(image: &[u8], base: u64, from: u64) -> BTreeMap<u64, Instruction> {
    let mut found = BTreeMap::new();
    let mut kept = 0;
    let mut ahead = vec![from];
    while let Some(at) = ahead.pop() {
        let Some(code) = image.get((at - base) as usize..) else {
            panic!("{at:#x} is outside of the image");
        };
        let mut decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
        let mut instruction = decoder.decode();
        if found.contains_key(&at) {
            continue;
        }
        if instruction.code() == Code::Fxsave64_m512byte {
            while instruction.code() != Code::Fxrstor64_m512byte {
                instruction = decoder.decode();
                assert!(
                    !instruction.is_invalid(),
                    "the vector registers are not loaded again"
                );
            }
            kept += 1;
            ahead.push(instruction.next_ip());
            continue;
        }
        found.insert(at, instruction);
        match instruction.flow_control() {
            FlowControl::Next => ahead.push(instruction.next_ip()),
            FlowControl::Call if instruction.is_call_near() => {
                ahead.extend([instruction.near_branch_target(), instruction.next_ip()]);
            }
            FlowControl::ConditionalBranch => {
                ahead.extend([instruction.near_branch_target(), instruction.next_ip()]);
            }
            FlowControl::UnconditionalBranch => ahead.push(instruction.near_branch_target()),
            // UD2, of a panic; RET; and the last jump, to the gate.
            FlowControl::Exception | FlowControl::Return => {}
            FlowControl::IndirectBranch if instruction.is_ip_rel_memory_operand() => {}
            other => panic!("{at:#x}: {instruction}: {other:?}"),
        }
    }
    assert_eq!(kept, 1, "the vector registers are kept at one place");
    found
}

fn only_general(factory: &mut InstructionInfoFactory, instruction: &Instruction) -> bool {
    let info = factory.info(instruction);
    info.used_registers().iter().all(|used| {
        let register: Register = used.register();
        register.is_gpr() || register.is_segment_register() || register.is_ip()
    })
}
