//! The memory that both sides map: a header, and for each vCPU a page of control words and a ring of records.
//!
//! Everything is words of 8 bytes that are only ever accessed atomically, so that whatever the other side does to them is
//! a wrong value and nothing worse. The file is sealed against shrinking: an access never faults.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::record::RECORD_WORDS;
use crate::wait::{Spin, processor, ring, sleep};
use crate::{ChannelError, VERSION};

/// vCPUs that have a ring.
pub const MAX_VCPUS: u32 = 256;
/// Records in a ring.
pub const RING_ENTRIES: usize = 512;

const PAGE_WORDS: usize = 4096 / 8;
/// Words of a vCPU: its control page and its ring.
const AREA_WORDS: usize = PAGE_WORDS + RING_ENTRIES * RECORD_WORDS;
const WORDS: usize = PAGE_WORDS + MAX_VCPUS as usize * AREA_WORDS;
const BYTES: usize = WORDS * 8;
/// "vmsight" and a byte of its own.
const MAGIC: u64 = u64::from_le_bytes(*b"vmsight\x01");

/// Words of the header. What different sides write lies in cache lines of its own.
mod header {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    /// vCPUs that there are.
    pub(super) const VCPUS: usize = 2;
    /// Rung for each event (u32).
    pub(super) const BELL: usize = 8;
    /// The processor that the agent was on when it rang, plus one.
    pub(super) const RUNG_ON: usize = 9;
    /// Whether the monitor sleeps (u32).
    pub(super) const SLEEPS: usize = 16;
}

/// What is read and written where an index is out of range, which no caller's is.
static NOWHERE: AtomicU64 = AtomicU64::new(0);

/// The mapping. It ends with this.
#[derive(Debug)]
pub struct Shared {
    start: NonNull<AtomicU64>,
}

// SAFETY: the memory is accessed through shared references to atomics only, and unmapped by the owner alone.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// New memory, and the descriptor to hand over. Pages that nobody touches take no memory.
    ///
    /// # Errors
    /// Where the system has none.
    pub fn create() -> Result<(Self, OwnedFd), ChannelError> {
        let io = |e: Errno| ChannelError::io("make shared memory")(e.into());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("vmsight", flags).map_err(io)?;
        ftruncate(&file, BYTES as u64).map_err(io)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(io)?;
        let shared = Self::map(&file)?;
        shared.word(header::MAGIC).store(MAGIC, Ordering::Relaxed);
        shared
            .word(header::VERSION)
            .store(VERSION.into(), Ordering::Relaxed);
        Ok((shared, file))
    }

    /// The memory behind a descriptor that came from the other side.
    ///
    /// # Errors
    /// Where it is not what it should be.
    pub fn open(file: &OwnedFd) -> Result<Self, ChannelError> {
        let io = |e: Errno| ChannelError::io("look at the shared memory")(e.into());
        // Only files of memory have seals; one that could shrink could make us fault.
        let seals = fcntl_get_seals(file).map_err(io)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(ChannelError::Shared("it is not sealed"));
        }
        if fstat(file).map_err(io)?.st_size != BYTES as i64 {
            return Err(ChannelError::Shared("its size is wrong"));
        }
        let shared = Self::map(file)?;
        let value = |index| shared.word(index).load(Ordering::Relaxed);
        if value(header::MAGIC) != MAGIC || value(header::VERSION) != u64::from(VERSION) {
            return Err(ChannelError::Shared("it is of another version"));
        }
        Ok(shared)
    }

    fn map(file: impl AsFd) -> Result<Self, ChannelError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(ptr::null_mut(), BYTES, protection, MapFlags::SHARED, file, 0) }
            .map_err(|e| ChannelError::io("map shared memory")(e.into()))?;
        let start = NonNull::new(start.cast()).ok_or(ChannelError::Shared("it is nowhere"))?;
        Ok(Self { start })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is a mapping of WORDS words, page-aligned, that lives as long as `self`; the file behind it is
        // sealed against shrinking. Atomics may be changed by others at any time.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), WORDS) }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.words().get(index).unwrap_or(&NOWHERE)
    }

    /// The area of a vCPU, `None` for those that have none.
    pub fn area(&self, vcpu: u32) -> Option<Area<'_>> {
        if vcpu >= MAX_VCPUS {
            return None;
        }
        let first = PAGE_WORDS + vcpu as usize * AREA_WORDS;
        let words = self.words().get(first..first + AREA_WORDS)?;
        Some(Area { words })
    }

    /// The agent: how many vCPUs there are.
    pub fn set_vcpus(&self, vcpus: u32) {
        self.word(header::VCPUS).store(vcpus.into(), Ordering::Release);
    }

    /// The monitor: how many vCPUs there are, those that have no ring not counted.
    pub fn vcpus(&self) -> u32 {
        let said = self.word(header::VCPUS).load(Ordering::Acquire);
        u32::try_from(said).unwrap_or(MAX_VCPUS).min(MAX_VCPUS)
    }

    /// The agent: says that an event is there.
    pub(crate) fn ring_for_event(&self) {
        self.word(header::RUNG_ON).store(processor(), Ordering::Relaxed);
        self.ring_bell();
    }

    /// Wakes who waits for an event, so that it looks around.
    pub fn ring_bell(&self) {
        ring(half(self.word(header::BELL)), half(self.word(header::SLEEPS)));
    }

    /// How often the bell was rung.
    pub fn bell(&self) -> u32 {
        half(self.word(header::BELL)).load(Ordering::SeqCst)
    }

    /// The monitor: whether the bell is rung again, after it had been rung `seen` times, while it is worth while to wait awake.
    pub fn spin(&self, seen: u32, spin: &mut Spin) -> bool {
        let agent = || self.word(header::RUNG_ON).load(Ordering::Relaxed);
        spin.until(agent, || self.bell() != seen)
    }

    /// Sleeps until the bell is rung again after it had been rung `seen` times, at most `most`; may return early.
    pub fn sleep(&self, seen: u32, most: Duration) {
        let sleeps = half(self.word(header::SLEEPS));
        sleeps.fetch_add(1, Ordering::SeqCst);
        if self.bell() == seen {
            sleep(half(self.word(header::BELL)), seen, most);
        }
        sleeps.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; nobody has references into it beyond the life of `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), BYTES) };
    }
}

/// The low half of a word that is used as a futex, and only so.
fn half(word: &AtomicU64) -> &AtomicU32 {
    // SAFETY: a word is aligned to 8 and lives as long as the reference; these words are accessed as u32 only.
    unsafe { AtomicU32::from_ptr(word.as_ptr().cast()) }
}

/// Words of a vCPU's control page.
mod control {
    /// Records written so far; the agent's.
    pub(super) const HEAD: usize = 0;
    /// Records that were dropped; the agent's.
    pub(super) const DROPPED: usize = 1;
    /// Whether the agent waits for room (u32).
    pub(super) const WAITS_FOR_ROOM: usize = 2;
    /// The event that waits for its verdict, plus one; 0 where none does; the agent's.
    pub(super) const OPEN: usize = 3;
    /// Whether the agent sleeps until the verdict comes (u32).
    pub(super) const WAITS_FOR_VERDICT: usize = 4;
    /// Records read so far; the monitor's.
    pub(super) const TAIL: usize = 8;
    /// Rung where a record was read (u32).
    pub(super) const ROOM_BELL: usize = 9;
    /// The processor that the monitor was on when it read, plus one.
    pub(super) const READ_ON: usize = 10;
    /// The event that was answered last, plus one; the monitor's.
    pub(super) const ANSWERED: usize = 16;
    /// Rung where an event was answered (u32).
    pub(super) const VERDICT_BELL: usize = 17;
    /// The verdict. All of it but registers is in the cache line of the number above, which who waits for it has to fetch anyway.
    pub(super) const VERDICT: usize = 18;
}

/// Words of a verdict.
pub(crate) const VERDICT_WORDS: usize = 32;

/// What belongs to one vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Area<'m> {
    words: &'m [AtomicU64],
}

impl<'m> Area<'m> {
    fn word(self, index: usize) -> &'m AtomicU64 {
        self.words.get(index).unwrap_or(&NOWHERE)
    }

    pub(crate) fn head(self) -> &'m AtomicU64 {
        self.word(control::HEAD)
    }

    pub(crate) fn tail(self) -> &'m AtomicU64 {
        self.word(control::TAIL)
    }

    /// The processor that the monitor was on when it read last, plus one.
    pub(crate) fn read_on(self) -> &'m AtomicU64 {
        self.word(control::READ_ON)
    }

    /// How many records were dropped for want of room.
    pub fn dropped(self) -> &'m AtomicU64 {
        self.word(control::DROPPED)
    }

    pub(crate) fn open(self) -> &'m AtomicU64 {
        self.word(control::OPEN)
    }

    pub(crate) fn answered(self) -> &'m AtomicU64 {
        self.word(control::ANSWERED)
    }

    pub(crate) fn verdict(self) -> &'m [AtomicU64] {
        let range = control::VERDICT..control::VERDICT + VERDICT_WORDS;
        self.words.get(range).unwrap_or(&[])
    }

    /// The words of the record with this number.
    pub(crate) fn record(self, number: u64) -> &'m [AtomicU64] {
        let index = (number % RING_ENTRIES as u64) as usize;
        let first = PAGE_WORDS + index * RECORD_WORDS;
        self.words.get(first..first + RECORD_WORDS).unwrap_or(&[])
    }

    pub(crate) fn ring_room(self) {
        ring(
            half(self.word(control::ROOM_BELL)),
            half(self.word(control::WAITS_FOR_ROOM)),
        );
    }

    pub(crate) fn ring_verdict(self) {
        ring(
            half(self.word(control::VERDICT_BELL)),
            half(self.word(control::WAITS_FOR_VERDICT)),
        );
    }

    /// Sleeps until `ready`, at most `most`; a signal ends it early.
    pub(crate) fn sleep_for_room(self, ready: impl Fn() -> bool, most: Duration) {
        self.sleep(control::ROOM_BELL, control::WAITS_FOR_ROOM, ready, most);
    }

    /// As [`Self::sleep_for_room`].
    pub(crate) fn sleep_for_verdict(self, ready: impl Fn() -> bool, most: Duration) {
        self.sleep(control::VERDICT_BELL, control::WAITS_FOR_VERDICT, ready, most);
    }

    fn sleep(self, bell: usize, sleeps: usize, ready: impl Fn() -> bool, most: Duration) {
        let (bell, sleeps) = (half(self.word(bell)), half(self.word(sleeps)));
        sleeps.store(1, Ordering::SeqCst);
        let seen = bell.load(Ordering::SeqCst);
        if !ready() {
            sleep(bell, seen, most);
        }
        sleeps.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_see_the_same_memory() {
        let (agent, file) = Shared::create().unwrap();
        let monitor = Shared::open(&file).unwrap();
        agent.area(3).unwrap().dropped().store(7, Ordering::Relaxed);
        assert_eq!(monitor.area(3).unwrap().dropped().load(Ordering::Relaxed), 7);
        assert_eq!(monitor.area(2).unwrap().dropped().load(Ordering::Relaxed), 0);
        assert!(monitor.area(MAX_VCPUS - 1).is_some());
        assert!(monitor.area(MAX_VCPUS).is_none());
        assert!(monitor.area(u32::MAX).is_none());
        agent.set_vcpus(2);
        assert_eq!(monitor.vcpus(), 2);
        agent.word(header::VCPUS).store(u64::MAX, Ordering::Release);
        assert_eq!(monitor.vcpus(), MAX_VCPUS);
    }

    #[test]
    fn foreign_memory_is_refused() {
        // Not sealed: it could shrink under us.
        let file = memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, BYTES as u64).unwrap();
        assert!(matches!(Shared::open(&file), Err(ChannelError::Shared(_))));
        // Sealed, and without our magic.
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(matches!(
            Shared::open(&file),
            Err(ChannelError::Shared("it is of another version"))
        ));
        // Too small.
        let file = memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, 4096).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(matches!(
            Shared::open(&file),
            Err(ChannelError::Shared("its size is wrong"))
        ));
        // No memory file at all.
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(Shared::open(&file).is_err());
    }

    #[test]
    fn a_verdict_without_registers_comes_with_the_number_of_its_event() {
        let line = |word: &AtomicU64| std::ptr::from_ref(word).addr() / 64;
        let (shared, _file) = Shared::create().unwrap();
        let area = shared.area(1).unwrap();
        let before_registers = &area.verdict()[..4];
        assert!(
            before_registers
                .iter()
                .all(|word| line(word) == line(area.answered()))
        );
        // What the agent writes is elsewhere: each side would take the line from the other.
        assert_ne!(line(area.open()), line(area.answered()));
    }

    #[test]
    fn a_rung_bell_is_not_slept_over() {
        let (shared, _file) = Shared::create().unwrap();
        let seen = shared.bell();
        shared.ring_bell();
        // Would sleep for an hour had the bell not been rung.
        shared.sleep(seen, Duration::from_secs(3600));
        assert_ne!(shared.bell(), seen);
    }
}
