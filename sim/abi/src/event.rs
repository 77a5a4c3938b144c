//! What a monitor has to tell, and where it puts it: a ring in its own data, which the hypervisor empties.

use core::fmt;
use core::sync::atomic::{Ordering, fence};

/// Bytes of text that an event has room for.
pub const TEXT: usize = 168;
/// Events that a ring holds.
pub const EVENTS: usize = 128;
/// So many that are not taken yet, and the monitor asks for the ring to be emptied, where [`crate::State::doorbell`] says
/// that this is served.
pub const FULL: u64 = 96;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A system call of 64 bits. Words: its number, then its six arguments.
    Call = 1,
    /// A system call of 32 bits or of x32, refused. Words: its number; 1 for x32.
    OtherCall = 2,
    /// A new process or thread, before it runs. Words: its pid and tgid; pid and tgid of its parent, which for a thread
    /// is its process's; 1 if it is a thread of the kernel's. Text: its name, which is still its creator's.
    Process = 3,
    /// A program is being executed, and there is no way back. Words: 1 if its file is root's and setuid. Text: its path, as
    /// it was given.
    Exec = 4,
    /// A module is being loaded. Words: its SHA-256 in four, little-endian; its length in bytes; 1 if it is in the list, 2 if
    /// it could not be read. Text: the name of its file, if it is from one.
    Module = 5,
    /// A process that was not root becomes root. Words: its uid and euid; its new uid and euid; 1 if it executes a file that
    /// is root's and setuid, as `su` is, which is how it should be. Text: its name.
    Credentials = 6,
}

impl Kind {
    /// The one with this number.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Call),
            2 => Some(Self::OtherCall),
            3 => Some(Self::Process),
            4 => Some(Self::Exec),
            5 => Some(Self::Module),
            6 => Some(Self::Credentials),
            _ => None,
        }
    }
}

/// Something that happened in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// Counts up from 0, without a gap, those included that were lost.
    pub sequence: u64,
    /// The [`Kind`].
    pub kind: u32,
    /// The error number with which the monitor refused it; 0 if it did not.
    pub errno: u32,
    /// Who did it: thread, as the first namespace numbers it.
    pub pid: u32,
    /// And process.
    pub tgid: u32,
    /// Bytes of text, [`TEXT`] at most.
    pub length: u32,
    /// Whether the text is longer than that.
    pub cut: u32,
    /// By kind.
    pub words: [u64; 7],
    /// By kind; whatever bytes the guest had there.
    pub text: [u8; TEXT],
}

/// Words of 8 bytes that an event has.
pub const EVENT_WORDS: usize = size_of::<Event>() / 8;

impl Event {
    /// Nothing.
    pub const EMPTY: Self = Self {
        sequence: 0,
        kind: 0,
        errno: 0,
        pid: 0,
        tgid: 0,
        length: 0,
        cut: 0,
        words: [0; 7],
        text: [0; TEXT],
    };

    /// An event as it lies in memory.
    pub fn from_words(words: &[u64; EVENT_WORDS]) -> Self {
        let mut event = Self::EMPTY;
        let [sequence, kind, who, length, rest @ ..] = words;
        let halves = |word: u64| (word as u32, (word >> 32) as u32);
        event.sequence = *sequence;
        (event.kind, event.errno) = halves(*kind);
        (event.pid, event.tgid) = halves(*who);
        (event.length, event.cut) = halves(*length);
        for (to, from) in event.words.iter_mut().zip(rest) {
            *to = *from;
        }
        let text = rest.iter().skip(event.words.len());
        for (to, from) in event.text.chunks_exact_mut(8).zip(text) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        event
    }

    /// Its text.
    pub fn text(&self) -> &[u8] {
        self.text.get(..self.length as usize).unwrap_or(&self.text)
    }
}

/// As a line of `key=value`, in which nothing that the guest wrote is left unescaped.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, ..] = self.words;
        let (name, text) = match Kind::from_number(self.kind) {
            Some(Kind::Call) => ("call", None),
            Some(Kind::OtherCall) => ("other-call", None),
            Some(Kind::Process) => ("process", Some("name")),
            Some(Kind::Exec) => ("exec", Some("path")),
            Some(Kind::Module) => ("module", Some("file")),
            Some(Kind::Credentials) => ("credentials", Some("name")),
            None => ("unknown", None),
        };
        write!(f, "{} {name} pid={} tgid={}", self.sequence, self.pid, self.tgid)?;
        match Kind::from_number(self.kind) {
            Some(Kind::Call) => {
                write!(f, " number={a} arguments=")?;
                for (n, argument) in self.words.iter().skip(1).enumerate() {
                    let comma = if n == 0 { "" } else { "," };
                    write!(f, "{comma}{argument:#x}")?;
                }
            }
            Some(Kind::OtherCall) => write!(f, " number={a} x32={b}")?,
            Some(Kind::Process) => write!(
                f,
                " child={a} child-tgid={b} parent={c} parent-tgid={d} kernel={e}"
            )?,
            Some(Kind::Exec) => write!(f, " setuid={a}")?,
            Some(Kind::Module) => {
                f.write_str(" sha256=")?;
                for byte in self.words.iter().take(4).flat_map(|word| word.to_le_bytes()) {
                    write!(f, "{byte:02x}")?;
                }
                let [.., listed, _] = self.words;
                write!(
                    f,
                    " bytes={e} listed={}",
                    match listed {
                        1 => "yes",
                        2 => "unreadable",
                        _ => "no",
                    }
                )?;
            }
            Some(Kind::Credentials) => write!(f, " uid={a} euid={b} new-uid={c} new-euid={d} setuid={e}")?,
            None => {}
        }
        if let Some(text) = text {
            let dots = if self.cut == 0 { "" } else { "..." };
            write!(f, " {text}=\"{}{dots}\"", self.text().escape_ascii())?;
        }
        if self.errno != 0 {
            write!(f, " refused={}", self.errno)?;
        }
        Ok(())
    }
}

/// Events, the oldest of which give way to new ones.
#[derive(Debug)]
#[repr(C)]
pub struct Ring {
    /// Sequence number of the next event: the monitor's.
    pub next: u64,
    /// Sequence number of the first event that was not taken: the hypervisor's.
    pub taken: u64,
    /// Events that gave way before they were taken: the hypervisor's.
    pub lost: u64,
    /// By sequence number modulo [`EVENTS`].
    pub events: [Event; EVENTS],
}

impl Ring {
    /// Without events.
    pub const EMPTY: Self = Self {
        next: 0,
        taken: 0,
        lost: 0,
        events: [Event::EMPTY; EVENTS],
    };

    /// Where the event with this sequence number lies, in bytes from the begin of the ring.
    pub const fn place(sequence: u64) -> usize {
        core::mem::offset_of!(Self, events) + sequence as usize % EVENTS * size_of::<Event>()
    }

    /// How many wait to be taken, those included that gave way.
    pub const fn waiting(&self) -> u64 {
        self.next.wrapping_sub(self.taken)
    }

    /// Puts an event in and gives it its number.
    pub fn push(&mut self, event: &Event) {
        if let Some(slot) = self.events.get_mut(self.next as usize % EVENTS) {
            *slot = Event {
                sequence: self.next,
                ..*event
            };
        }
        // Whoever empties the ring may be on another processor, and looks at the number first.
        fence(Ordering::Release);
        self.next = self.next.wrapping_add(1);
    }

    /// Takes the oldest one out.
    pub fn take(&mut self) -> Option<Event> {
        let gone = self.waiting().saturating_sub(EVENTS as u64);
        self.lost = self.lost.wrapping_add(gone);
        self.taken = self.taken.wrapping_add(gone);
        if self.waiting() == 0 {
            return None;
        }
        let event = self.events.get(self.taken as usize % EVENTS).copied();
        self.taken = self.taken.wrapping_add(1);
        event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern crate std;
    use std::string::ToString;

    fn event(kind: Kind, words: [u64; 7], text: &[u8]) -> Event {
        let mut event = Event {
            kind: kind as u32,
            pid: 57,
            tgid: 56,
            words,
            length: text.len() as u32,
            ..Event::EMPTY
        };
        event.text[..text.len()].copy_from_slice(text);
        event
    }

    #[test]
    fn a_full_ring_says_how_much_it_lost() {
        let mut ring = std::boxed::Box::new(Ring::EMPTY);
        assert_eq!(ring.take(), None);
        for n in 0..EVENTS as u64 + 5 {
            ring.push(&event(Kind::Exec, [n; 7], b""));
        }
        assert_eq!(ring.waiting(), EVENTS as u64 + 5);
        let taken: std::vec::Vec<u64> = core::iter::from_fn(|| ring.take()).map(|e| e.sequence).collect();
        assert_eq!(taken, (5..EVENTS as u64 + 5).collect::<std::vec::Vec<_>>());
        assert_eq!((ring.lost, ring.waiting()), (5, 0));
        assert_eq!(Ring::place(EVENTS as u64 + 1), 24 + 256);
    }

    #[test]
    fn an_event_is_found_again_in_its_words() {
        let mut first = event(Kind::Process, [1, 2, 3, 4, 5, 6, 7], b"sh");
        (first.errno, first.cut, first.sequence) = (8, 9, 10);
        let mut words = [0u64; EVENT_WORDS];
        words[..4].copy_from_slice(&[10, 3 | 8 << 32, 57 | 56 << 32, 2 | 9 << 32]);
        words[4..11].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7]);
        words[11] = u64::from_le_bytes(*b"sh\0\0\0\0\0\0");
        assert_eq!(Event::from_words(&words), first);
    }

    #[test]
    fn lines_say_what_happened_and_escape_what_the_guest_wrote() {
        let line = event(Kind::Process, [58, 58, 57, 56, 0, 0, 0], b"a\"\n\xff").to_string();
        assert_eq!(
            line,
            r#"0 process pid=57 tgid=56 child=58 child-tgid=58 parent=57 parent-tgid=56 kernel=0 name="a\"\n\xff""#
        );
        let mut refused = event(Kind::Call, [41, 2, 1, 0, 0, 0, 0], b"");
        refused.errno = 13;
        assert_eq!(
            refused.to_string(),
            "0 call pid=57 tgid=56 number=41 arguments=0x2,0x1,0x0,0x0,0x0,0x0 refused=13"
        );
        let mut forged = event(Kind::Exec, [0; 7], b"");
        (forged.length, forged.cut) = (u32::MAX, 1);
        assert_eq!(forged.text().len(), TEXT);
        assert!(forged.to_string().ends_with("...\""));
        forged.kind = 77;
        assert_eq!(forged.to_string(), "0 unknown pid=57 tgid=56");
    }
}
