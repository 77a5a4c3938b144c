//! What a verdict does to a vCPU that waits.

use vmsight_hooks::{Access, Detail, Register, Verdict};
use vmsight_target::gdb::GdbError;

use super::instruction;
use super::occasion::{Occasion, Run, Undo, Waiting};
use super::of_stub;
use super::worker::Worker;
use crate::EventError;

impl Worker {
    /// Applies a verdict. Where it does not fit the error says so, and nothing was changed.
    pub(super) fn apply(
        &mut self,
        occasion: &mut Occasion,
        waiting: &Waiting,
        verdict: &Verdict,
    ) -> Result<(), EventError> {
        let refuse = |why: &str| {
            Err(EventError::Verdict {
                verdict: verdict.kind(),
                why: why.to_owned(),
            })
        };
        let hook = waiting.event.hook;
        match (verdict, waiting.event.detail) {
            (Verdict::Continue, _) => Ok(()),
            (Verdict::Remove, _) => self.disarm(hook),
            (Verdict::Pause, _) => {
                self.pause = true;
                Ok(())
            }
            (Verdict::Step(0), _) => refuse("at least one step is needed"),
            (Verdict::Step(count), _) => {
                occasion.steps.push(Run::new(hook, *count));
                Ok(())
            }
            (Verdict::SetRegisters(changes), _) => self.set(occasion, changes),
            (Verdict::Skip, Detail::Execute { .. }) => match self.length(occasion)? {
                Some(len) => {
                    let rip = occasion.registers.rip.wrapping_add(len);
                    self.set(occasion, &[(Register::Rip, rip)])
                }
                None => refuse("the instruction is not understood"),
            },
            (Verdict::Return(value), Detail::Execute { .. }) => self.leave(occasion, *value),
            (Verdict::Deny, Detail::Execute { .. }) => {
                refuse("an instruction is passed over by skip, a function ended by return")
            }
            (
                Verdict::Deny | Verdict::SetData(_),
                Detail::Memory {
                    access: Access::WRITE,
                    gva,
                    len,
                    ..
                },
            ) => {
                // Of large hooks no copy is kept: whoever has one says what is to be there.
                let given = matches!(verdict, Verdict::SetData(_)).then_some(gva).flatten();
                let place = given.filter(|_| len > 0).map(|address| Undo {
                    address: address.0,
                    bytes: vec![0; usize::from(len).min(8)],
                });
                match waiting.undo.as_ref().or(place.as_ref()) {
                    Some(undo) => self.write_back(occasion, undo, verdict),
                    None => refuse("it is done, and what was there before is not known"),
                }
            }
            (Verdict::Deny | Verdict::SetData(_), Detail::Memory { .. }) => {
                refuse("it is done: the guest has the data")
            }
            (Verdict::Inject(_), _) => refuse("a gdb stub cannot raise exceptions; agent-kvm can"),
            _ => refuse("it does not fit what happened"),
        }
    }

    /// Changes registers. Nothing is changed where one of them cannot be.
    fn set(&mut self, occasion: &mut Occasion, changes: &[(Register, u64)]) -> Result<(), EventError> {
        let names: Vec<String> = changes.iter().map(|(register, _)| name(*register)).collect();
        if let Some((register, _)) = changes.iter().find(|(r, _)| matches!(r, Register::Gpr(16..))) {
            return Err(EventError::Verdict {
                verdict: vmsight_hooks::VerdictKind::SetRegisters,
                why: format!("there is no register {register}"),
            });
        }
        let vcpu = occasion.registers.vcpu;
        for (name, (_, value)) in names.iter().zip(changes) {
            self.debug.write_register(vcpu, name, *value).map_err(of_stub)?;
        }
        occasion.registers = self.debug.registers(vcpu).map_err(of_stub)?;
        Ok(())
    }

    /// The length of the instruction at which the vCPU stands.
    fn length(&mut self, occasion: &Occasion) -> Result<Option<u64>, EventError> {
        let bits = self.bits(&occasion.registers)?;
        let code = self.code(&occasion.registers)?;
        let instruction = instruction::decode(&code, bits, occasion.registers.rip);
        Ok(instruction.map(|i| i.len() as u64))
    }

    /// Ends the function that is about to begin.
    fn leave(&mut self, occasion: &mut Occasion, value: u64) -> Result<(), EventError> {
        let refuse = |why: &str| {
            Err(EventError::Verdict {
                verdict: vmsight_hooks::VerdictKind::Return,
                why: why.to_owned(),
            })
        };
        if self.bits(&occasion.registers)? != 64 {
            return refuse("the vCPU is not in 64-bit mode");
        }
        let rsp = occasion.registers.rsp();
        let mut address = [0; 8];
        match self.debug.read(occasion.registers.vcpu, rsp, &mut address) {
            Ok(()) => {}
            Err(GdbError::Refused { .. }) => return refuse("the stack cannot be read"),
            Err(error) => return Err(of_stub(error)),
        }
        self.set(
            occasion,
            &[
                (Register::Rip, u64::from_le_bytes(address)),
                (Register::RSP, rsp.wrapping_add(8)),
                (Register::RAX, value),
            ],
        )
    }

    /// Writes the old bytes, or other data, over what the guest wrote.
    fn write_back(&mut self, occasion: &Occasion, undo: &Undo, verdict: &Verdict) -> Result<(), EventError> {
        let mut bytes = undo.bytes.clone();
        if let Verdict::SetData(data) = verdict {
            for (byte, new) in bytes.iter_mut().zip(data.to_le_bytes()) {
                *byte = new;
            }
        }
        match self.debug.write(occasion.registers.vcpu, undo.address, &bytes) {
            Ok(()) => {}
            Err(GdbError::Refused { .. }) => {
                return Err(EventError::Verdict {
                    verdict: verdict.kind(),
                    why: "the memory cannot be written to".to_owned(),
                });
            }
            Err(error) => return Err(of_stub(error)),
        }
        self.refresh(&occasion.registers, undo.address, &bytes);
        Ok(())
    }

    /// What was written is what the hooks on that memory find there.
    fn refresh(&mut self, registers: &vmsight_arch::Registers, address: u64, bytes: &[u8]) {
        for armed in self.table.hooks.values_mut() {
            let Some((start, ..)) = armed.memory() else {
                continue;
            };
            let space = super::table::Armed::space(start, registers.cr3);
            let Some(before) = armed.before.as_mut().filter(|b| b.dtb == space) else {
                continue;
            };
            for (at, byte) in (address..).zip(bytes) {
                let offset = usize::try_from(at.wrapping_sub(start)).unwrap_or(usize::MAX);
                if let Some(kept) = before.bytes.get_mut(offset) {
                    *kept = *byte;
                }
            }
        }
    }
}

/// The name of a register in the stub's target description.
fn name(register: Register) -> String {
    match register {
        Register::Rflags => "eflags".to_owned(),
        other => other.to_string(),
    }
}
