//! A connection for hooks: the machine runs most of the time, and is stopped by breakpoints, watchpoints and steps.
//!
//! What QEMU's stub does that the manual does not say (gdbstub.c of 7.2; 8.1 and later where it is said):
//! - Any byte that comes while the machine runs pauses it and is lost. So nothing is sent then but 0x03.
//! - A stop reply that is not acknowledged swallows the next 0x03. So it is acknowledged at once.
//! - When somebody else lets the machine go on, nothing is said; from 8.1 on the next stop is not told either, unless a
//!   command that resumes was given in between. One for a thread that does not exist serves, and resumes nothing.
//! - The stop reply ends the single step of the *current* thread only. So the thread to be stepped is made current first.
//! - A step that meets a watchpoint leaves an interrupt behind, for which that thread stops once more.
//! - `D` takes all breakpoints out and lets the machine go on. `?` takes out those of the thread that `Hc` has named: with
//!   7.2 under TCG each vCPU has its own. A second `D` crashes QEMU.

use std::fmt;
use std::time::{Duration, Instant};

use vmsight_arch::Registers;

use super::connect::{self, LAST_WORDS};
use super::error::GdbError;
use super::features::{self, Register};
use super::link::{Link, Ready};
use super::open::Lease;
use super::packet::{self, from_hex, to_hex};
use super::stop::{self, Cause};
use super::waker::Waker;
use crate::TargetError;
use crate::guard::Guard;
use crate::host::process::Identity;
use crate::monitor;
use crate::spec::GdbAddress;

/// Last words that take breakpoints out and leave the machine paused, or pause it where it runs, while its vCPUs are not
/// known.
const HOLD: &str = "+#00$?#3f";
/// The same once they are.
fn hold_words(threads: &[String]) -> String {
    let mut words = b"+#00".to_vec();
    for thread in threads {
        words.extend(packet::frame(format!("Hc{thread}").as_bytes()));
        words.extend(packet::frame(b"?"));
    }
    String::from_utf8_lossy(&words).into_owned()
}

/// Bytes of memory asked for at once.
const MEMORY_CHUNK: usize = 2000;
/// A resumption of a thread that no machine has (its highest is 4096).
const NOBODY: &[u8] = b"vCont;c:7ffe";

/// What runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accelerator {
    /// Emulation: breakpoints and watchpoints are QEMU's own, without number, and invisible.
    Tcg,
    /// The processor: four debug registers for hardware breakpoints and watchpoints; software breakpoints are INT3
    /// bytes in the guest's memory.
    Kvm,
}

/// What stops the machine, by its packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Point {
    /// `Z0`.
    Software,
    /// `Z1`.
    Hardware,
    /// `Z2`.
    Write,
    /// `Z3`.
    Read,
    /// `Z4`.
    Access,
}

impl Point {
    const fn number(self) -> u8 {
        match self {
            Self::Software => 0,
            Self::Hardware => 1,
            Self::Write => 2,
            Self::Read => 3,
            Self::Access => 4,
        }
    }
}

/// The machine stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stop {
    /// The vCPU that stopped it; for a pause the one that was current.
    pub vcpu: u32,
    /// Why.
    pub cause: Cause,
}

/// What came of a wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Waited {
    /// The machine stopped.
    Stop(Stop),
    /// The waker was used.
    Woken,
    /// The deadline passed.
    TimedOut,
}

/// A connection to a stub for hooks. One thread uses it; [`Waker`] ends its waits.
///
/// Dropped, it takes all breakpoints out and lets the machine go on, unless [`Self::hold`] said otherwise or it did
/// not run before; a watch does the same where the program is killed. QEMU does nothing of that when its connection
/// ends: where somebody cut it, another one is made to say so.
pub struct Debugger {
    link: Link,
    address: GdbAddress,
    server: Option<Identity>,
    guard: Option<Guard>,
    registers: Vec<Register>,
    threads: Vec<String>,
    accelerator: Accelerator,
    waker: Waker,
    /// The thread that questions are about, and the one that is stepped, where known.
    asked: Option<u32>,
    current: Option<u32>,
    ran: bool,
    held: bool,
    lease: Option<Lease>,
}

impl Debugger {
    /// Connects, which pauses the machine. `running` says whether it ran before, where that is known otherwise.
    pub(crate) fn connect(
        address: &GdbAddress,
        server: Option<Identity>,
        timeout: Duration,
        running: Option<bool>,
        lease: Option<Lease>,
    ) -> Result<Self, TargetError> {
        let waker = Waker::new().map_err(|source| TargetError::Guard {
            what: "no descriptor can be had",
            source,
        })?;
        let watch = |socket| Guard::switched(socket, LAST_WORDS, HOLD);
        let (link, guard) = connect::open(address, server, timeout, watch)?;
        let mut debug = Self {
            link,
            address: address.clone(),
            server,
            guard: Some(guard),
            registers: Vec::new(),
            threads: Vec::new(),
            accelerator: Accelerator::Tcg,
            waker,
            asked: None,
            current: None,
            ran: running.unwrap_or(true),
            held: false,
            lease,
        };
        debug.begin(running)?;
        Ok(debug)
    }

    fn begin(&mut self, running: Option<bool>) -> Result<(), GdbError> {
        if running == Some(false) {
            self.hold(true)?;
        }
        self.link.ask("qSupported:multiprocess-;swbreak-;hwbreak-")?;
        self.link.insist();
        let told = self.link.stop_reply("connecting")?.is_some();
        self.ran = match running {
            // It tells that the connection paused it, and only what ran can be paused.
            _ if self.tells_pauses()? => told,
            Some(running) => running,
            // What QEMU had to pause is plainly paused; a state that is spelt out is an older one.
            None => !self.monitor("info status")?.contains("VM status: paused ("),
        };
        self.hold(!self.ran)?;
        let kvm = self.monitor("info kvm")?;
        if kvm.contains("support: enabled") {
            self.accelerator = Accelerator::Kvm;
        }
        self.registers = self.link.description()?;
        self.threads = self.link.threads()?;
        // The watch had words for one vCPU until now.
        if self.held {
            self.entrust()?;
        }
        if self.threads.is_empty() || features::index(&self.registers, "rip").is_none() {
            return Err(self.link.unsupported("show the vCPUs of an x86-64 machine"));
        }
        Ok(())
    }

    /// Whether a stop that nobody asked for is told: by QEMU before 8.1.
    fn tells_pauses(&mut self) -> Result<bool, GdbError> {
        let text = self.monitor("info version")?;
        let mut numbers = text
            .trim()
            .split(['.', ' ', '('])
            .map_while(|n| n.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        Ok(version < (8, 1))
    }

    /// What runs the guest.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> u32 {
        u32::try_from(self.threads.len()).unwrap_or(u32::MAX)
    }

    /// Whether the machine ran before the connection.
    pub fn ran(&self) -> bool {
        self.ran
    }

    /// What ends waits of this connection.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Whether the machine is to stay as it is when this ends, however it ends. A new connection has what the
    /// machine was found in: one that did not run is left so.
    ///
    /// # Errors
    /// Where the watch is gone.
    pub fn hold(&mut self, hold: bool) -> Result<(), GdbError> {
        if self.held == hold {
            return Ok(());
        }
        self.held = hold;
        self.entrust()
    }

    /// Tells the watch what it is to do when we are gone.
    fn entrust(&mut self) -> Result<(), GdbError> {
        let Some(guard) = &mut self.guard else {
            return Ok(());
        };
        let told = match (self.held, self.threads.is_empty()) {
            (false, _) => guard.let_go(),
            (true, true) => guard.hold(""),
            (true, false) => guard.hold(&hold_words(&self.threads)),
        };
        told.map_err(|source| GdbError::Connect {
            address: self.link.address().to_owned(),
            source,
        })
    }

    /// One line of QEMU's human monitor. Only while the machine stands still.
    ///
    /// # Errors
    /// Where the stub does not answer.
    pub fn monitor(&mut self, line: &str) -> Result<String, GdbError> {
        self.link.hmp(line)
    }

    /// The registers of one vCPU: general, control, the bases of FS and GS. Descriptor tables and the hidden parts of
    /// segments are not in it.
    ///
    /// # Errors
    /// Where the stub does not answer, or answers nonsense.
    pub fn registers(&mut self, vcpu: u32) -> Result<Registers, GdbError> {
        let mut questions = Vec::with_capacity(2);
        if self.asked != Some(vcpu) {
            questions.push(format!("Hg{}", self.thread(vcpu)?));
        }
        questions.push("g".to_owned());
        let answers = self.link.ask_all(&questions)?;
        self.asked = Some(vcpu);
        let answer = answers.last().map(Vec::as_slice).unwrap_or_default();
        features::parse_g(vcpu, &self.registers, answer).ok_or_else(|| {
            self.link
                .protocol("it does not give the registers of an x86-64 vCPU")
        })
    }

    /// Whether a vCPU sleeps in HLT. Only while the machine stands still.
    ///
    /// # Errors
    /// Where the stub does not answer.
    pub fn is_halted(&mut self, vcpu: u32) -> Result<bool, GdbError> {
        let question = format!("qThreadExtraInfo,{}", self.thread(vcpu)?);
        let answer = self.link.ask(&question)?;
        // `CPU#0 [halted ]`
        let text = from_hex(&answer).unwrap_or_default();
        Ok(text.windows(6).any(|word| word == b"halted"))
    }

    /// The registers of one vCPU with all that the monitor behind the stub tells beside: descriptor tables, the hidden
    /// parts of segments.
    ///
    /// # Errors
    /// As [`Self::registers`].
    pub fn all_registers(&mut self, vcpu: u32) -> Result<Registers, GdbError> {
        let known = self.registers(vcpu)?;
        let text = self.monitor("info registers -a")?;
        let told = monitor::parse_registers(&text)
            .into_iter()
            .find(|r| r.vcpu == vcpu);
        Ok(match told {
            Some(told) => Registers {
                kernel_gs_base: known.kernel_gs_base,
                ..told
            },
            None => known,
        })
    }

    /// Writes one register, by its name in the target description (`rax`, `rip`, `eflags`, …).
    ///
    /// # Errors
    /// [`GdbError::Refused`] where there is none of that name.
    pub fn write_register(&mut self, vcpu: u32, name: &str, value: u64) -> Result<(), GdbError> {
        let Some((number, bytes)) = features::index(&self.registers, name) else {
            return Err(self.refused(format!("register {name}"), b""));
        };
        self.ask_of(vcpu)?;
        let value = value.to_le_bytes();
        let value = to_hex(value.get(..bytes.min(8)).unwrap_or_default());
        let answer = self.link.ask(&format!("P{number:x}={value}"))?;
        self.ok(&answer, || format!("register {name}"))
    }

    /// Reads memory through the page tables of a vCPU.
    ///
    /// # Errors
    /// [`GdbError::Refused`] where it is not mapped there.
    pub fn read(&mut self, vcpu: u32, address: u64, buf: &mut [u8]) -> Result<(), GdbError> {
        self.ask_of(vcpu)?;
        let mut at = address;
        for chunk in buf.chunks_mut(MEMORY_CHUNK) {
            let answer = self.link.ask(&format!("m{at:x},{:x}", chunk.len()))?;
            match from_hex(&answer).filter(|bytes| bytes.len() == chunk.len()) {
                Some(bytes) => chunk.copy_from_slice(&bytes),
                None => return Err(self.refused(format!("memory at {at:#x}"), &answer)),
            }
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Writes memory through the page tables of a vCPU, whatever they say about writing.
    ///
    /// # Errors
    /// [`GdbError::Refused`] where it is not mapped there.
    pub fn write(&mut self, vcpu: u32, address: u64, data: &[u8]) -> Result<(), GdbError> {
        self.ask_of(vcpu)?;
        let mut at = address;
        for chunk in data.chunks(MEMORY_CHUNK) {
            let answer = self
                .link
                .ask(&format!("M{at:x},{:x}:{}", chunk.len(), to_hex(chunk)))?;
            self.ok(&answer, || format!("memory at {at:#x}"))?;
            at = at.wrapping_add(chunk.len() as u64);
        }
        Ok(())
    }

    /// Arms a breakpoint or watchpoint on all vCPUs. A software breakpoint under KVM is written through the page
    /// tables of `vcpu`. Only while the machine stands still.
    ///
    /// # Errors
    /// [`GdbError::Refused`] where QEMU does not take it.
    pub fn insert(&mut self, vcpu: u32, point: Point, address: u64, len: u64) -> Result<(), GdbError> {
        self.make_current(vcpu)?;
        let answer = self
            .link
            .ask(&format!("Z{},{address:x},{len:x}", point.number()))?;
        self.ok(&answer, || format!("a breakpoint at {address:#x}"))
    }

    /// Takes out what [`Self::insert`] armed.
    ///
    /// # Errors
    /// [`GdbError::Refused`] where there is none.
    pub fn remove(&mut self, vcpu: u32, point: Point, address: u64, len: u64) -> Result<(), GdbError> {
        self.make_current(vcpu)?;
        let answer = self
            .link
            .ask(&format!("z{},{address:x},{len:x}", point.number()))?;
        self.ok(&answer, || format!("to take out the breakpoint at {address:#x}"))
    }

    /// Lets the machine go on.
    ///
    /// # Errors
    /// Where the connection is lost.
    pub fn resume(&mut self) -> Result<(), GdbError> {
        self.go("c")
    }

    /// Begins a step of one instruction of one vCPU. The others stand still, interrupts wait; its end is a stop.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub fn step(&mut self, vcpu: u32) -> Result<(), GdbError> {
        self.make_current(vcpu)?;
        let command = format!("vCont;s:{}", self.thread(vcpu)?);
        self.go(&command)
    }

    /// Lets one vCPU go on; the others stand still.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub fn resume_one(&mut self, vcpu: u32) -> Result<(), GdbError> {
        self.make_current(vcpu)?;
        let command = format!("vCont;c:{}", self.thread(vcpu)?);
        self.go(&command)
    }

    fn go(&mut self, command: &str) -> Result<(), GdbError> {
        self.link.send(command.as_bytes(), command)
    }

    /// Waits for the machine to stop.
    ///
    /// # Errors
    /// [`GdbError::Closed`] when the VM ended.
    pub fn wait(&mut self, deadline: Option<Instant>) -> Result<Waited, GdbError> {
        loop {
            if let Some(stop) = self.stopped()? {
                return Ok(Waited::Stop(stop));
            }
            match self.link.wait(Some(self.waker.fd()), deadline, "waiting")? {
                Ready::Stub => {}
                Ready::Other => {
                    self.waker.clear();
                    return Ok(Waited::Woken);
                }
                Ready::Nothing => {
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        return Ok(Waited::TimedOut);
                    }
                }
            }
        }
    }

    /// Waits for the machine to stop, whatever the waker says; `None` where it does not by the deadline.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_stop(&mut self, deadline: Instant) -> Result<Option<Stop>, GdbError> {
        loop {
            if let Some(stop) = self.stopped()? {
                return Ok(Some(stop));
            }
            if self.link.wait(None, Some(deadline), "waiting for a stop")? == Ready::Nothing
                && Instant::now() >= deadline
            {
                return Ok(None);
            }
        }
    }

    /// A stop that was told already.
    fn stopped(&mut self) -> Result<Option<Stop>, GdbError> {
        match self.link.stop_reply("waiting")? {
            Some(reply) => self.stop(&reply).map(Some),
            None => Ok(None),
        }
    }

    /// Makes the machine stand still, and gives the stops that were told: ours ([`Cause::Paused`]), or another that
    /// came before it. None where it stood still already, because of its owner. The next stop is told in either
    /// case, also where it is not we who let the machine go on.
    ///
    /// # Errors
    /// Where there is no answer in time.
    pub fn interrupt(&mut self) -> Result<Vec<Stop>, GdbError> {
        let mut bytes = vec![3];
        bytes.extend_from_slice(&packet::frame(NOBODY));
        self.link.send_raw(bytes, "an interrupt")?;
        self.link.answer("an interrupt")?;
        let mut stops = Vec::new();
        while let Some(stop) = self.stopped()? {
            stops.push(stop);
        }
        Ok(stops)
    }

    /// What a stop reply says. QEMU makes the thread that it names the current one.
    fn stop(&mut self, reply: &[u8]) -> Result<Stop, GdbError> {
        let reply = stop::parse(reply)
            .ok_or_else(|| self.link.protocol("it stopped in a way that makes no sense"))?;
        let index = match &reply.thread {
            Some(thread) => match self.index(thread) {
                Some(index) => index,
                // One that was plugged in.
                None => {
                    self.threads = self.link.threads()?;
                    self.index(thread)
                        .ok_or_else(|| self.link.protocol("a thread that it did not list"))?
                }
            },
            None => 0,
        };
        (self.asked, self.current) = (Some(index), Some(index));
        Ok(Stop {
            vcpu: index,
            cause: reply.cause,
        })
    }

    fn index(&self, thread: &str) -> Option<u32> {
        let at = self.threads.iter().position(|t| t == thread)?;
        u32::try_from(at).ok()
    }

    fn thread(&self, vcpu: u32) -> Result<&str, GdbError> {
        self.threads
            .get(vcpu as usize)
            .map(String::as_str)
            .ok_or_else(|| self.link.protocol(&format!("it has no vCPU {vcpu}")))
    }

    fn ask_of(&mut self, vcpu: u32) -> Result<(), GdbError> {
        if self.asked != Some(vcpu) {
            let command = format!("Hg{}", self.thread(vcpu)?);
            let answer = self.link.ask(&command)?;
            self.ok(&answer, || command)?;
            self.asked = Some(vcpu);
        }
        Ok(())
    }

    fn make_current(&mut self, vcpu: u32) -> Result<(), GdbError> {
        if self.current != Some(vcpu) {
            let command = format!("Hc{}", self.thread(vcpu)?);
            let answer = self.link.ask(&command)?;
            self.ok(&answer, || command)?;
            self.current = Some(vcpu);
        }
        Ok(())
    }

    fn ok(&self, answer: &[u8], what: impl FnOnce() -> String) -> Result<(), GdbError> {
        match answer {
            b"OK" => Ok(()),
            other => Err(self.refused(what(), other)),
        }
    }

    fn refused(&self, what: String, answer: &[u8]) -> GdbError {
        GdbError::Refused {
            address: self.link.address().to_owned(),
            what,
            answer: answer.escape_ascii().to_string().chars().take(40).collect(),
        }
    }

    /// Takes everything out and lets the machine go on, or leaves it as it is.
    fn detach(&mut self) -> Result<(), GdbError> {
        // Where it stands still already that does nothing.
        self.interrupt()?;
        if !self.held {
            let answer = self.link.ask("D")?;
            return self.ok(&answer, || "to detach".to_owned());
        }
        for thread in self.threads.clone() {
            let answer = self.link.ask(&format!("Hc{thread}"))?;
            self.ok(&answer, || format!("to choose the thread {thread}"))?;
            // Its answer is a stop reply.
            self.link.send(b"?", "?")?;
            let deadline = Instant::now() + self.link.timeout();
            if self.wait_stop(deadline)?.is_none() {
                return Err(self
                    .link
                    .protocol("it does not confirm that the breakpoints are out"));
            }
        }
        Ok(())
    }

    /// Says what is to be said at the end over another connection, where this one is cut and the machine lives;
    /// whether it could.
    fn ends_over_another(&self) -> bool {
        if !self.link.is_cut() || self.server.is_some_and(|vm| !vm.runs()) {
            return false;
        }
        let watch = |socket| Guard::switched(socket, LAST_WORDS, HOLD);
        let opened = connect::open(&self.address, self.server, self.link.timeout(), watch);
        let said = opened.and_then(|(link, mut guard)| {
            drop(link);
            // Dropped, the watch says it in a way that needs no answer.
            match self.held {
                true => guard
                    .hold(&hold_words(&self.threads))
                    .map_err(|source| GdbError::Connect {
                        address: self.link.address().to_owned(),
                        source,
                    }),
                false => Ok(()),
            }
        });
        // Nobody is there any more: the machine was about to end.
        said.inspect_err(|error| tracing::debug!(%error, "no other connection to the gdb stub"))
            .is_ok()
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        let Some(guard) = self.guard.take() else { return };
        if self.ends_over_another() {
            guard.dismiss();
            if let Some(lease) = self.lease.take() {
                lease.leave();
            }
            return;
        }
        let detached = match self.link.is_lost() {
            true => false,
            false => match self.detach() {
                Ok(()) => true,
                // A VM that is gone needs no watch.
                Err(error) if error.is_exit() => true,
                Err(error) => {
                    tracing::warn!(%error, "the gdb stub did not confirm the detach");
                    false
                }
            },
        };
        match (detached, self.lease.take()) {
            (true, lease) => {
                guard.dismiss();
                drop(lease);
            }
            // The watch, dropped, says it in a way that needs no answer.
            (false, Some(lease)) => lease.leave(),
            (false, None) => {}
        }
    }
}

impl fmt::Debug for Debugger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Debugger")
            .field("address", &self.link.address())
            .field("accelerator", &self.accelerator)
            .field("vcpus", &self.threads.len())
            .field("ran", &self.ran)
            .finish_non_exhaustive()
    }
}
