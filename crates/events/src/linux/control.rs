//! Writes of control registers, where a backend can hook execution and nothing else: on the instructions that write them.
//!
//! They are found by disassembly in the text of the kernel and of the modules that are loaded. Code that comes into being
//! later is not seen, unless [`ControlTrace::add_code`] is told of it.

use std::time::SystemTime;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register as Operand};
use rustc_hash::FxHashSet;
use vmsight_arch::{Gva, Registers};
use vmsight_hooks::{ControlRegister, Delivery, Hook, HookId};
use vmsight_linux::Kernel;
use vmsight_linux::module::ModuleFields;

use super::TraceError;
use crate::{Armed, Monitor, Occurrence};

/// Most text that is searched in one piece: no kernel's is larger.
const MAX_TEXT: u64 = 256 << 20;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// The longest instruction.
const MAX_INSTRUCTION: usize = 15;
/// Most instructions hooked.
const MAX_SITES: usize = 4096;
/// How far before a candidate decoding begins at most: functions are shorter.
const MAX_FUNCTION: u64 = 64 << 10;

/// An instruction that writes a control register.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ControlSite {
    /// Where it is.
    pub at: Gva,
    /// What it writes.
    pub register: ControlRegister,
    /// Where the value comes from: the number of a general-purpose register.
    pub source: u8,
}

/// A write that is about to happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlRecord {
    /// When.
    pub time: SystemTime,
    /// On which vCPU.
    pub vcpu: u32,
    /// The instruction.
    pub site: ControlSite,
    /// What the register holds.
    pub old: u64,
    /// What it will hold.
    pub new: u64,
}

/// Every instruction in the text of the kernel and its modules that writes CR0, CR3 or CR4.
///
/// # Errors
/// If the kernel's text cannot be found. Pages of it that cannot be read are passed over.
pub fn control_sites(kernel: &Kernel) -> Result<Vec<ControlSite>, TraceError> {
    let start = kernel.symbol("_stext")?;
    let end = kernel.symbol("_etext")?;
    let mut sites = Vec::new();
    search(kernel, start, end.0.saturating_sub(start.0), &mut sites);
    for module in kernel.modules(ModuleFields::default())?.rows {
        // Before 6.4 text is the first part of the core area, and its size not told apart here.
        let code = module
            .ranges
            .iter()
            .filter(|r| matches!(r.kind.as_str(), "core" | "init" | "text" | "init_text"));
        for range in code {
            search(kernel, range.base, range.size, &mut sites);
        }
    }
    Ok(sites)
}

/// Adds what is found in `len` bytes from `start` on.
fn search(kernel: &Kernel, start: Gva, len: u64, sites: &mut Vec<ControlSite>) {
    let mut buffer = vec![0; CHUNK + MAX_INSTRUCTION];
    let mut done = 0;
    let len = len.min(MAX_TEXT);
    while done < len && sites.len() < MAX_SITES {
        let at = start.wrapping_add(done);
        let want = usize::try_from(len - done).unwrap_or(CHUNK).min(CHUNK);
        // An instruction may lie across two pieces.
        let more = usize::try_from(len - done)
            .unwrap_or(usize::MAX)
            .min(want + MAX_INSTRUCTION);
        let piece = buffer.get_mut(..more).unwrap_or_default();
        // What is missing is zeros, which is no such instruction.
        kernel.space().read_partial(at, piece);
        candidates(piece, |offset| {
            let opcode = at.wrapping_add(offset as u64);
            if offset < want
                && let Some(site) = decode(kernel, opcode, start)
            {
                sites.push(site);
            }
        });
        done += want as u64;
    }
    sites.truncate(MAX_SITES);
    sites.sort_unstable_by_key(|s| s.at);
    sites.dedup();
}

/// Calls `found` with every offset at which the bytes of MOV CR, r64 stand, at whatever boundary.
fn candidates(bytes: &[u8], mut found: impl FnMut(usize)) {
    for (offset, window) in bytes.windows(3).enumerate() {
        // 0F 22 /r with a register operand; r/m is the source, reg the control register.
        if let [0x0f, 0x22, modrm @ 0xc0..=0xff] = window
            && matches!(modrm >> 3 & 7, 0 | 3 | 4)
        {
            found(offset);
        }
    }
}

/// The instruction whose opcode is at `opcode`, if the code around it, decoded from the function's start, has one there.
fn decode(kernel: &Kernel, opcode: Gva, lowest: Gva) -> Option<ControlSite> {
    let start = function_start(kernel, opcode)
        .unwrap_or(lowest)
        .max(Gva(opcode.0.saturating_sub(MAX_FUNCTION)))
        .max(lowest);
    let len = usize::try_from(opcode.0.checked_sub(start.0)?).ok()? + MAX_INSTRUCTION;
    let mut code = vec![0; len];
    if kernel.space().read(start, &mut code).is_err() {
        code.truncate(len - MAX_INSTRUCTION + 3);
        kernel.space().read(start, &mut code).ok()?;
    }
    let mut decoder = Decoder::with_ip(64, &code, start.0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() && decoder.ip() <= opcode.0 {
        decoder.decode_out(&mut instruction);
        if instruction.next_ip() <= opcode.0 {
            continue;
        }
        let register = match (instruction.code(), instruction.op0_register()) {
            (Code::Mov_cr_r64, Operand::CR0) => ControlRegister::Cr0,
            (Code::Mov_cr_r64, Operand::CR3) => ControlRegister::Cr3,
            (Code::Mov_cr_r64, Operand::CR4) => ControlRegister::Cr4,
            _ => return None,
        };
        return Some(ControlSite {
            at: Gva(instruction.ip()),
            register,
            source: u8::try_from(instruction.op1_register().number()).ok()?,
        });
    }
    None
}

/// Where the function begins that `at` lies in.
fn function_start(kernel: &Kernel, at: Gva) -> Option<Gva> {
    if !kernel.image().contains(at) {
        return None;
    }
    let linked = kernel.image().link_time(at);
    let (symbol, _) = kernel.profile().symbols.nearest(linked)?;
    Some(kernel.image().runtime(symbol.address))
}

/// Follows writes of control registers.
#[derive(Debug)]
pub struct ControlTrace {
    kernel: Kernel,
    registers: FxHashSet<ControlRegister>,
    delivery: Delivery,
    hooks: Armed<ControlSite>,
}

impl ControlTrace {
    /// Hooks every instruction that writes one of `registers`.
    ///
    /// # Errors
    /// If the text cannot be searched, or the backend cannot hook that many instructions.
    pub fn arm(
        kernel: &Kernel,
        monitor: &Monitor,
        registers: impl IntoIterator<Item = ControlRegister>,
        delivery: Delivery,
    ) -> Result<Self, TraceError> {
        let mut trace = Self {
            kernel: kernel.clone(),
            registers: registers.into_iter().collect(),
            delivery,
            hooks: Armed::default(),
        };
        let sites = control_sites(kernel)?;
        trace.add(monitor, sites)?;
        if trace.sites() == 0 {
            return Err(TraceError::NoSite {
                what: "control registers".to_owned(),
                why: "no instruction that writes them was found".to_owned(),
            });
        }
        Ok(trace)
    }

    /// Hooks what code that came into being writes to them: that of a module which is about to be initialised.
    ///
    /// # Errors
    /// Where the backend cannot hook that many instructions.
    pub fn add_code(&mut self, monitor: &Monitor, start: Gva, len: u64) -> Result<(), TraceError> {
        let mut sites = Vec::new();
        search(&self.kernel, start, len, &mut sites);
        self.add(monitor, sites)
    }

    fn add(&mut self, monitor: &Monitor, sites: Vec<ControlSite>) -> Result<(), TraceError> {
        for site in sites {
            let known = self.hooks.purposes().any(|known| known.at == site.at);
            if known || !self.registers.contains(&site.register) {
                continue;
            }
            let hook = Hook::execute(site.at).delivered(self.delivery);
            self.hooks.arm(monitor, &hook, site)?;
        }
        Ok(())
    }

    /// Whether an event is of one of these hooks.
    pub fn owns(&self, id: HookId) -> bool {
        self.hooks.get(id).is_some()
    }

    /// How many instructions are hooked.
    pub fn sites(&self) -> usize {
        self.hooks.purposes().len()
    }

    /// Takes an event in.
    ///
    /// # Errors
    /// If the registers cannot be had.
    pub fn take(&self, occurrence: &Occurrence) -> Result<Option<ControlRecord>, TraceError> {
        let event = occurrence.event();
        let Some(site) = self.hooks.get(event.hook).copied() else {
            return Ok(None);
        };
        let registers = occurrence.registers()?;
        Ok(Some(ControlRecord {
            time: event.time,
            vcpu: event.vcpu,
            site,
            old: held(&registers, site.register),
            new: registers
                .gprs
                .get(usize::from(site.source))
                .copied()
                .unwrap_or_default(),
        }))
    }
}

fn held(registers: &Registers, register: ControlRegister) -> u64 {
    match register {
        ControlRegister::Cr0 => registers.cr0,
        ControlRegister::Cr3 => registers.cr3,
        ControlRegister::Cr4 => registers.cr4,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn the_bytes_of_the_instruction_wherever_they_stand() {
        let mut found = Vec::new();
        // mov cr3, rax; mov r9 to cr4 with a prefix; a memory form that does not exist; mov cr2.
        let bytes = [
            0x0f, 0x22, 0xd8, 0x90, 0x41, 0x0f, 0x22, 0xe1, 0x0f, 0x22, 0x18, 0x0f, 0x22, 0xd0,
        ];
        candidates(&bytes, |at| found.push(at));
        assert_eq!(found, [0, 5]);
        candidates(&[0x0f, 0x22], |_| panic!("too short"));
    }
}
