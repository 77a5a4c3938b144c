//! One connection to a stub as a stream of packets: questions and their answers, and stop replies, which come when
//! they come.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::error::GdbError;
use super::packet::{self, Parsed};

/// Most stop replies kept that nobody asked for.
const MAX_STOPS: usize = 16;

/// A connection. After an error in the midst of answers it is of no more use for questions.
#[derive(Debug)]
pub(super) struct Link {
    address: String,
    stream: OwnedFd,
    buffer: Vec<u8>,
    timeout: Duration,
    /// A packet was taken and not acknowledged yet: that goes with the next one of ours.
    unacknowledged: bool,
    /// An answer was given up in the midst of others: what comes now answers something else.
    desynchronised: bool,
    /// Stop replies that came between answers.
    stops: VecDeque<Vec<u8>>,
    /// What goes in front of each packet.
    prefix: &'static [u8],
}

/// What [`Link::wait`] waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ready {
    /// The stub said something.
    Stub,
    /// The other descriptor has something.
    Other,
    /// Nothing came in time.
    Nothing,
}

impl Link {
    pub(super) fn new(address: String, stream: OwnedFd, timeout: Duration) -> Self {
        Self {
            address,
            stream,
            buffer: Vec::new(),
            timeout,
            unacknowledged: false,
            desynchronised: false,
            stops: VecDeque::new(),
            prefix: b"",
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether answers can no longer be told apart.
    pub(super) fn is_lost(&self) -> bool {
        self.desynchronised
    }

    /// Whether the connection itself has ended.
    pub(super) fn is_cut(&self) -> bool {
        let mut ends = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = rustix::event::Timespec::default();
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let looked = poll(&mut ends, Some(&now));
        looked.is_ok() && ends.iter().any(|end| end.revents().intersects(ended))
    }

    /// From now on each packet is preceded by an interrupt, which QEMU passes over while the machine stands still.
    /// Where somebody let it go on behind our back QEMU would take the packet's first byte for the wish to pause
    /// it, and lose the packet.
    pub(super) fn insist(&mut self) {
        self.prefix = &[3];
    }

    /// One question and its answer.
    pub(super) fn ask(&mut self, command: &str) -> Result<Vec<u8>, GdbError> {
        self.send(command.as_bytes(), command)?;
        self.answer(command)
    }

    /// Several questions sent at once, and their answers: waiting for each costs more than the answers.
    pub(super) fn ask_all(&mut self, commands: &[String]) -> Result<Vec<Vec<u8>>, GdbError> {
        let doing = commands.first().map(String::as_str).unwrap_or_default();
        let mut bytes = Vec::new();
        for command in commands {
            bytes.extend_from_slice(&packet::frame(command.as_bytes()));
        }
        self.send_packets(bytes, doing)?;
        commands.iter().map(|command| self.answer(command)).collect()
    }

    /// The answer to a question that was sent.
    pub(super) fn answer(&mut self, doing: &str) -> Result<Vec<u8>, GdbError> {
        let deadline = Instant::now() + self.timeout;
        self.receive(deadline, doing)
    }

    pub(super) fn send(&mut self, data: &[u8], doing: &str) -> Result<(), GdbError> {
        self.send_packets(packet::frame(data), doing)
    }

    fn send_packets(&mut self, packets: Vec<u8>, doing: &str) -> Result<(), GdbError> {
        self.send_raw([self.prefix, &packets].concat(), doing)
    }

    /// Sends bytes as they are, behind the acknowledgement that is due.
    pub(super) fn send_raw(&mut self, mut bytes: Vec<u8>, doing: &str) -> Result<(), GdbError> {
        if self.desynchronised {
            return Err(self.protocol("an earlier answer was lost"));
        }
        if std::mem::take(&mut self.unacknowledged) {
            bytes.insert(0, b'+');
        }
        self.write_all(&bytes, doing)
    }

    /// The next packet that is no stop reply. After an error nobody knows what the next one answers.
    pub(super) fn receive(&mut self, deadline: Instant, doing: &str) -> Result<Vec<u8>, GdbError> {
        let received = loop {
            match self.next_packet(deadline, doing) {
                // That the machine stopped, for which nobody asked.
                Ok(Some(data)) if is_stop(&data) => self.keep(data),
                Ok(Some(data)) => break Ok(data),
                Ok(None) => {
                    if let Err(error) = self.acknowledge(doing).and_then(|()| self.fill(deadline, doing)) {
                        break Err(error);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.desynchronised |= received.is_err();
        received
    }

    /// The next stop reply that is here already, without waiting.
    pub(super) fn stop_reply(&mut self, doing: &str) -> Result<Option<Vec<u8>>, GdbError> {
        if let Some(stop) = self.stops.pop_front() {
            return Ok(Some(stop));
        }
        let now = Instant::now();
        while let Some(data) = self.next_packet(now, doing)? {
            if is_stop(&data) {
                // At once, while QEMU waits for it: a byte that it does not wait for pauses a machine that runs.
                self.acknowledge(doing)?;
                return Ok(Some(data));
            }
            tracing::debug!(address = self.address, "an answer to no question");
        }
        Ok(None)
    }

    /// Waits until the stub said something, `other` can be read, or the deadline has passed. Nothing is sent: the
    /// machine may run, and would be paused by a byte.
    pub(super) fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
        doing: &str,
    ) -> Result<Ready, GdbError> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| rustix::event::Timespec::try_from(left).ok());
        let stream = self.stream.as_fd();
        let second = other.unwrap_or(stream);
        let mut ready = [
            PollFd::new(&stream, PollFlags::IN),
            PollFd::new(&second, PollFlags::IN),
        ];
        match poll(&mut ready, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return Ok(Ready::Nothing),
            Ok(_) => {}
            Err(e) => return Err(self.refused(e)),
        }
        let [stub, _] = ready;
        if stub.revents().is_empty() {
            return Ok(Ready::Other);
        }
        self.fill(Instant::now() + self.timeout, doing)?;
        Ok(Ready::Stub)
    }

    fn keep(&mut self, stop: Vec<u8>) {
        if self.stops.len() >= MAX_STOPS {
            self.stops.pop_front();
        }
        self.stops.push_back(stop);
    }

    fn acknowledge(&mut self, doing: &str) -> Result<(), GdbError> {
        if std::mem::take(&mut self.unacknowledged) {
            self.write_all(b"+", doing)?;
        }
        Ok(())
    }

    /// The next packet in the buffer; `None` where it is not whole yet.
    fn next_packet(&mut self, deadline: Instant, doing: &str) -> Result<Option<Vec<u8>>, GdbError> {
        loop {
            match packet::parse(&self.buffer) {
                Parsed::Packet(data, taken) => {
                    self.buffer.drain(..taken);
                    self.unacknowledged = true;
                    // That the machine is gone.
                    if matches!(data.first(), Some(b'W' | b'X')) {
                        return Err(self.closed(doing));
                    }
                    return Ok(Some(data));
                }
                Parsed::Nak(taken) => {
                    self.buffer.drain(..taken);
                    return Err(self.protocol(&format!("it did not understand {}", short(doing))));
                }
                Parsed::Broken(taken) => {
                    self.buffer.drain(..taken);
                    self.write_all(b"-", doing)?;
                    if Instant::now() > deadline {
                        return Ok(None);
                    }
                }
                Parsed::TooLong => return Err(self.protocol("a packet without end")),
                Parsed::More => return Ok(None),
            }
        }
    }

    fn fill(&mut self, deadline: Instant, doing: &str) -> Result<(), GdbError> {
        self.wait_for(PollFlags::IN, deadline, doing)?;
        let mut chunk = [0; 16 * 1024];
        match rustix::io::read(&self.stream, &mut chunk) {
            Ok(0) => Err(self.closed(doing)),
            Ok(n) => {
                self.buffer.extend_from_slice(chunk.get(..n).unwrap_or_default());
                Ok(())
            }
            Err(Errno::INTR | Errno::AGAIN) => Ok(()),
            Err(Errno::CONNRESET) => Err(self.closed(doing)),
            Err(e) => Err(self.refused(e)),
        }
    }

    fn write_all(&mut self, mut bytes: &[u8], doing: &str) -> Result<(), GdbError> {
        let deadline = Instant::now() + self.timeout;
        while !bytes.is_empty() {
            self.wait_for(PollFlags::OUT, deadline, doing)?;
            match rustix::net::send(&self.stream, bytes, rustix::net::SendFlags::NOSIGNAL) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.closed(doing)),
                Err(e) => return Err(self.refused(e)),
            }
        }
        Ok(())
    }

    fn wait_for(&self, flags: PollFlags, deadline: Instant, doing: &str) -> Result<(), GdbError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let address = self.address.clone();
                return Err(GdbError::Timeout {
                    address,
                    doing: short(doing),
                    after: self.timeout,
                });
            }
            let timeout = rustix::event::Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.stream, flags)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(self.refused(e)),
            }
        }
    }

    fn refused(&self, error: Errno) -> GdbError {
        GdbError::Connect {
            address: self.address.clone(),
            source: error.into(),
        }
    }

    fn closed(&self, doing: &str) -> GdbError {
        GdbError::Closed {
            address: self.address.clone(),
            doing: short(doing),
        }
    }

    /// An error after which the answers to other questions are still on their way.
    pub(super) fn broken(&mut self, reason: &str) -> GdbError {
        self.desynchronised = true;
        self.protocol(reason)
    }

    pub(super) fn protocol(&self, reason: &str) -> GdbError {
        GdbError::Protocol {
            address: self.address.clone(),
            reason: reason.to_owned(),
        }
    }

    /// An error that says what this stub lacks.
    pub(super) fn unsupported(&self, what: &'static str) -> GdbError {
        GdbError::Unsupported {
            address: self.address.clone(),
            what,
        }
    }
}

/// Whether a packet says that the machine stopped. No answer to a question of ours begins like this.
fn is_stop(data: &[u8]) -> bool {
    matches!(data.first(), Some(b'T' | b'S'))
}

/// A packet for a message: memory writes are long.
pub(super) fn short(doing: &str) -> String {
    doing.chars().take(60).collect()
}
