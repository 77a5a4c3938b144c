//! A connection that holds a VM paused, to look at it.

use std::time::Duration;

use vmsight_arch::Registers;

use super::connect::{self, LAST_WORDS};
use super::error::GdbError;
use super::features;
use super::link::Link;
use super::packet::{self, from_hex, to_hex};
use crate::guard::Guard;
use crate::host::process::Identity;
use crate::monitor;
use crate::spec::GdbAddress;

/// Bytes of memory asked for at once: QEMU's packets hold 4096 characters.
const MEMORY_CHUNK: usize = 2000;
/// Questions for memory under way at once. QEMU takes a packet though the one before was not acknowledged.
const PIPELINE: usize = 32;

/// A connection. The VM is paused as long as it lives; dropping it lets the VM go on, unless it did not run before.
#[derive(Debug)]
pub(crate) struct Gdb {
    link: Link,
    guard: Option<Guard>,
    physical: bool,
}

impl Gdb {
    /// Connects and pauses the VM. `server` is its process, where that is on this host.
    pub(crate) fn connect(
        address: &GdbAddress,
        server: Option<Identity>,
        timeout: Duration,
    ) -> Result<Self, GdbError> {
        let watch = |socket| Guard::set(socket, LAST_WORDS, "");
        let (link, guard) = connect::open(address, server, timeout, watch)?;
        let mut gdb = Self {
            link,
            guard: Some(guard),
            physical: false,
        };
        gdb.link.ask("qSupported:multiprocess-;swbreak-;hwbreak-")?;
        // A machine that QEMU had to pause is now `paused`; one that did not run for another reason (prelaunch, a
        // finished shutdown, an error) still is what it was.
        let did_not_run = match gdb.hmp("info status") {
            Ok(status) => status.contains("VM status: paused ("),
            Err(GdbError::Unsupported { .. }) => false,
            Err(error) => return Err(error),
        };
        if did_not_run && let Some(guard) = gdb.guard.take() {
            guard.dismiss();
        }
        Ok(gdb)
    }

    /// Runs one line of QEMU's human monitor and gives its text.
    pub(crate) fn hmp(&mut self, line: &str) -> Result<String, GdbError> {
        self.link.hmp(line)
    }

    /// The registers of every vCPU at one moment: the general and control registers from the stub, what it does not
    /// carry (descriptor tables, hidden parts of segments) from the monitor behind it where there is one.
    pub(crate) fn registers(&mut self) -> Result<Vec<Registers>, GdbError> {
        let mut all = Vec::new();
        let description = self.link.description()?;
        let threads = self.link.threads()?;
        for (vcpu, thread) in (0_u32..).zip(threads) {
            self.link.ask(&format!("Hg{thread}"))?;
            let answer = self.link.ask("g")?;
            all.extend(features::parse_g(vcpu, &description, &answer));
        }
        let told = match self.link.hmp("info registers -a") {
            Ok(text) => monitor::parse_registers(&text),
            Err(GdbError::Unsupported { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        for mut more in told {
            match all.iter_mut().find(|r| r.vcpu == more.vcpu) {
                Some(registers) => {
                    more.kernel_gs_base = registers.kernel_gs_base;
                    *registers = more;
                }
                None => all.push(more),
            }
        }
        Ok(all)
    }

    /// Reads guest-physical memory.
    pub(crate) fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), GdbError> {
        self.physical_mode()?;
        let mut at = gpa;
        for group in buf.chunks_mut(MEMORY_CHUNK * PIPELINE) {
            // Several questions at once: waiting for each answer costs more than the answer.
            let mut questions = Vec::new();
            let mut next = at;
            for chunk in group.chunks(MEMORY_CHUNK) {
                questions
                    .extend_from_slice(&packet::frame(format!("m{next:x},{:x}", chunk.len()).as_bytes()));
                next = next.wrapping_add(chunk.len() as u64);
            }
            self.link.send_raw(questions, "m")?;
            for chunk in group.chunks_mut(MEMORY_CHUNK) {
                let answer = self.link.answer("m")?;
                match from_hex(&answer).filter(|bytes| bytes.len() == chunk.len()) {
                    Some(bytes) => chunk.copy_from_slice(&bytes),
                    None => {
                        return Err(self
                            .link
                            .broken(&format!("it does not give the memory at {at:#x}")));
                    }
                }
                at = at.wrapping_add(chunk.len() as u64);
            }
        }
        Ok(())
    }

    /// Writes guest-physical memory.
    pub(crate) fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), GdbError> {
        self.physical_mode()?;
        let mut at = gpa;
        for chunk in data.chunks(MEMORY_CHUNK) {
            let answer = self
                .link
                .ask(&format!("M{at:x},{:x}:{}", chunk.len(), to_hex(chunk)))?;
            if answer != b"OK" {
                return Err(self.link.protocol(&format!("it does not take memory at {at:#x}")));
            }
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Addresses of `m` and `M` are guest-physical from here on (QEMU 4.2 and later).
    fn physical_mode(&mut self) -> Result<(), GdbError> {
        if !self.physical {
            if self.link.ask("Qqemu.PhyMemMode:1")? != b"OK" {
                return Err(self.link.unsupported("read physical memory"));
            }
            self.physical = true;
        }
        Ok(())
    }

    /// Whether the VM goes on when this is dropped.
    pub(crate) fn will_resume(&self) -> bool {
        self.guard.is_some()
    }

    fn detach(&mut self) {
        let Some(guard) = self.guard.take() else { return };
        if self.link.is_lost() {
            return; // the watch, dropped, says it in a way that needs no answer
        }
        match self.link.ask("D") {
            Ok(answer) if answer == b"OK" => guard.dismiss(),
            // A VM that is gone needs no watch; for the rest the watch tries once more as it is dropped.
            Err(error) if error.is_exit() => guard.dismiss(),
            other => tracing::warn!(
                ?other,
                address = self.link.address(),
                "the gdb stub did not confirm the detach"
            ),
        }
    }
}

impl Drop for Gdb {
    fn drop(&mut self) {
        self.detach();
    }
}
