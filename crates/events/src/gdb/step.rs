//! Single steps of one vCPU, while all others stand still.

use std::time::{Duration, Instant};

use vmsight_arch::Registers;
use vmsight_arch::registers::control::{CR0_PE, EFER_LMA};
use vmsight_target::gdb::{Accelerator, Cause, GdbError, Stop, WatchKind};

use super::instruction::{self, MAX_LEN, Still};
use super::occasion::Occasion;
use super::of_stub;
use super::table::Place;
use super::watch::Hit;
use super::worker::Worker;
use crate::EventError;

/// How long a step may take before it is looked what became of it.
const STEP: Duration = Duration::from_millis(100);
/// How often a step is tried.
const MAX_TRIES: u32 = 6;
/// Most rounds of a repeated string instruction that are stepped through at once.
const MAX_ROUNDS: u32 = 4096;

/// What came of a step.
#[derive(Default)]
pub(super) struct Step {
    /// The watchpoint that was met.
    pub(super) hit: Option<Hit>,
    /// The instruction was not executed, as often as it was tried.
    pub(super) missed: bool,
    /// The vCPU sleeps in HLT. It cannot be woken while the others stand: interrupts and timers wait.
    pub(super) asleep: bool,
}

/// What one step of the stub's came to.
enum Stepped {
    Done,
    Met(WatchKind, u64),
    Asleep,
}

impl Worker {
    /// One instruction of one vCPU, while all others stand.
    pub(super) fn step(&mut self, occasion: &mut Occasion) -> Result<Step, EventError> {
        let vcpu = occasion.registers.vcpu;
        let rip = occasion.registers.rip;
        // The processor would stop in front of it for ever. TCG does not look at breakpoints in a step.
        let here = Place::instruction(rip);
        let kvm = self.debug.accelerator() == Accelerator::Kvm;
        let point = self.table.places.get(&here).map(|s| s.point);
        if let (true, Some(point)) = (kvm, point) {
            self.remove_point(vcpu, point, here)?;
        }
        let mut step = Step::default();
        let mut met = None;
        let mut missed = 0;
        if !kvm && self.passes_pause(&mut occasion.registers)? {
            return Ok(step);
        }
        for _ in 0..MAX_ROUNDS {
            let before = occasion.registers.gprs;
            match self.one_step(vcpu, rip)? {
                Stepped::Met(kind, address) => met = Some((kind, address)),
                Stepped::Asleep => step.asleep = true,
                Stepped::Done => {}
            }
            occasion.registers = self.debug.registers(vcpu).map_err(of_stub)?;
            if occasion.registers.rip != rip || self.pause || step.asleep {
                break;
            }
            let bits = self.bits(&occasion.registers)?;
            let code = self.code(&occasion.registers)?;
            match instruction::still(&code, bits, rip, occasion.registers.gprs != before) {
                Still::Repeats => {}
                Still::Jumped => break,
                Still::NotExecuted => {
                    missed += 1;
                    if missed > MAX_TRIES {
                        step.missed = true;
                        break;
                    }
                }
            }
        }
        if let (true, Some(point)) = (kvm, point) {
            self.debug.insert(vcpu, point, rip, 1).map_err(of_stub)?;
        }
        let registers = occasion.registers;
        step.hit = met.map(|(kind, address)| Hit {
            registers,
            kind,
            address,
        });
        Ok(step)
    }

    /// Moves a vCPU past PAUSE, which does nothing and cannot be stepped over alone.
    pub(super) fn passes_pause(&mut self, registers: &mut Registers) -> Result<bool, EventError> {
        let mut code = [0; instruction::PAUSE.len()];
        match self.debug.read(registers.vcpu, registers.rip, &mut code) {
            Ok(()) if code == instruction::PAUSE => {}
            Ok(()) | Err(GdbError::Refused { .. }) => return Ok(false),
            Err(error) => return Err(of_stub(error)),
        }
        let next = registers.rip.wrapping_add(code.len() as u64);
        self.debug
            .write_register(registers.vcpu, "rip", next)
            .map_err(of_stub)?;
        registers.rip = next;
        Ok(true)
    }

    /// Steps once.
    fn one_step(&mut self, vcpu: u32, from: u64) -> Result<Stepped, EventError> {
        let mut patience = STEP;
        for _ in 0..MAX_TRIES {
            self.debug.step(vcpu).map_err(of_stub)?;
            let deadline = Instant::now() + patience;
            let mut stops: Vec<Stop> = Vec::new();
            match self.debug.wait_stop(deadline).map_err(of_stub)? {
                Some(stop) => stops.push(stop),
                // HLT, or a busy host.
                None => {
                    let interrupted = self.debug.interrupt().map_err(of_stub)?;
                    stops.extend(interrupted.into_iter().filter(|s| s.cause != Cause::Paused));
                }
            }
            for stop in &stops {
                match stop.cause {
                    Cause::Watch { kind, address } if stop.vcpu == vcpu => {
                        return Ok(Stepped::Met(kind, address));
                    }
                    Cause::Trap if stop.vcpu == vcpu => return Ok(Stepped::Done),
                    Cause::Trap | Cause::Watch { .. } => {}
                    _ => {
                        self.pause = true;
                        return Ok(Stepped::Done);
                    }
                }
            }
            if self.debug.is_halted(vcpu).map_err(of_stub)? {
                return Ok(Stepped::Asleep);
            }
            if self.debug.registers(vcpu).map_err(of_stub)?.rip != from {
                return Ok(Stepped::Done);
            }
            patience = patience.saturating_mul(2);
        }
        Err(EventError::Protocol {
            what: format!("the gdb stub does not step vCPU {vcpu}"),
        })
    }

    /// The size of the code that a vCPU executes, in bits.
    pub(super) fn bits(&mut self, registers: &Registers) -> Result<u32, EventError> {
        let long = registers.efer & EFER_LMA != 0;
        // Compatibility mode has 32-bit addresses.
        if long && registers.rip >> 32 != 0 {
            return Ok(64);
        }
        if registers.cr0 & CR0_PE == 0 {
            return Ok(16);
        }
        let all = self.debug.all_registers(registers.vcpu).map_err(of_stub)?;
        let has = |bit: u16| all.cs.attributes & (1 << bit) != 0;
        Ok(match (long && has(13), has(14)) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        })
    }

    /// What is at the instruction pointer, as far as it can be read.
    pub(super) fn code(&mut self, registers: &Registers) -> Result<Vec<u8>, EventError> {
        let rip = registers.rip;
        // The page behind may not be there.
        let to_the_end = usize::try_from(0x1000 - (rip & 0xfff)).unwrap_or(MAX_LEN);
        for len in [MAX_LEN, to_the_end.min(MAX_LEN)] {
            let mut code = vec![0; len];
            match self.debug.read(registers.vcpu, rip, &mut code) {
                Ok(()) => return Ok(code),
                Err(GdbError::Refused { .. }) => {}
                Err(error) => return Err(of_stub(error)),
            }
        }
        Ok(Vec::new())
    }
}
