//! A ring of records with one writer (a vCPU's thread in the agent) and one reader (the monitor).
//!
//! Both count records from zero and never wrap in practice (2^64). Each keeps its own count and believes the other's
//! only as far as it can be true.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::record::{RECORD_WORDS, Record};
use crate::shared::{Area, RING_ENTRIES};
use crate::wait::processor;
use crate::{ChannelError, Shared};

/// The agent's end of a vCPU's ring.
#[derive(Debug)]
pub struct Producer {
    vcpu: u32,
    head: u64,
}

impl Producer {
    /// The end for `vcpu`, of a ring to which nothing was written yet.
    pub fn new(vcpu: u32) -> Self {
        Self { vcpu, head: 0 }
    }

    /// Whether there is room for a record. A monitor that says that it read what was not written yet has no room.
    pub fn has_room(&self, shared: &Shared) -> bool {
        let Some(area) = shared.area(self.vcpu) else {
            return false;
        };
        room(area, self.head)
    }

    /// Writes a record and wakes the monitor; false where there is no room.
    pub fn push(&mut self, shared: &Shared, record: &Record) -> bool {
        let Some(area) = shared.area(self.vcpu) else {
            return false;
        };
        if !room(area, self.head) {
            return false;
        }
        for (to, from) in area.record(self.head).iter().zip(record.words()) {
            to.store(*from, Ordering::Relaxed);
        }
        self.head += 1;
        // What was written before is seen by who sees the new head.
        area.head().store(self.head, Ordering::Release);
        shared.ring_for_event();
        true
    }

    /// Sleeps until there is room, at most `most`; a signal ends it early.
    pub fn sleep_for_room(&self, shared: &Shared, most: Duration) {
        if let Some(area) = shared.area(self.vcpu) {
            area.sleep_for_room(|| room(area, self.head), most);
        }
    }
}

fn room(area: Area<'_>, head: u64) -> bool {
    let tail = area.tail().load(Ordering::Acquire);
    head.wrapping_sub(tail) < RING_ENTRIES as u64
}

/// The monitor's end of a vCPU's ring.
#[derive(Debug)]
pub struct Consumer {
    vcpu: u32,
    tail: u64,
}

impl Consumer {
    /// The end for `vcpu`, of a ring of which nothing was read yet.
    pub fn new(vcpu: u32) -> Self {
        Self { vcpu, tail: 0 }
    }

    /// The next record; `None` where there is none yet.
    ///
    /// # Errors
    /// Where the agent says that it wrote more than the ring holds.
    pub fn pop(&mut self, shared: &Shared) -> Result<Option<Record>, ChannelError> {
        let area = shared
            .area(self.vcpu)
            .ok_or(ChannelError::Shared("there is no such vCPU"))?;
        let head = area.head().load(Ordering::Acquire);
        match head.wrapping_sub(self.tail) {
            0 => return Ok(None),
            n if n <= RING_ENTRIES as u64 => {}
            _ => return Err(ChannelError::Shared("a ring holds more than it can")),
        }
        let mut words = [0; RECORD_WORDS];
        for (to, from) in words.iter_mut().zip(area.record(self.tail)) {
            *to = from.load(Ordering::Relaxed);
        }
        self.tail += 1;
        area.read_on().store(processor(), Ordering::Relaxed);
        area.tail().store(self.tail, Ordering::Release);
        area.ring_room();
        Ok(Some(Record::from_words(words)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u64) -> Record {
        let mut words = [n; RECORD_WORDS];
        words[0] = n;
        Record::from_words(words)
    }

    #[test]
    fn records_come_in_order_and_wrap_around() {
        let (shared, _file) = Shared::create().unwrap();
        let (mut producer, mut consumer) = (Producer::new(1), Consumer::new(1));
        assert!(consumer.pop(&shared).unwrap().is_none());
        let mut next = 0;
        for round in 0..5 {
            let mut pushed = 0;
            while producer.push(&shared, &record(next + pushed)) {
                pushed += 1;
            }
            // Full in the first round, then as much as was read.
            let room = if round == 0 { RING_ENTRIES as u64 } else { 300 };
            assert_eq!(pushed, room);
            assert!(!producer.has_room(&shared));
            let first = if round == 0 {
                0
            } else {
                next - (RING_ENTRIES as u64 - 300)
            };
            for n in 0..300 {
                let read = consumer.pop(&shared).unwrap().unwrap();
                assert_eq!(read.words(), record(first + n).words());
            }
            next += pushed;
        }
    }

    #[test]
    fn two_threads_lose_nothing() {
        const RECORDS: u64 = 20_000;
        let (agent, file) = Shared::create().unwrap();
        let monitor = Shared::open(&file).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut producer = Producer::new(0);
                for n in 0..RECORDS {
                    while !producer.push(&agent, &record(n)) {
                        producer.sleep_for_room(&agent, Duration::from_millis(50));
                    }
                }
            });
            let mut consumer = Consumer::new(0);
            for n in 0..RECORDS {
                let read = loop {
                    let seen = monitor.bell();
                    match consumer.pop(&monitor).unwrap() {
                        Some(read) => break read,
                        None => monitor.sleep(seen, Duration::from_millis(50)),
                    }
                };
                assert_eq!(read.words(), record(n).words());
            }
        });
    }

    #[test]
    fn counts_that_cannot_be_true_are_not_believed() {
        let (shared, _file) = Shared::create().unwrap();
        let area = shared.area(0).unwrap();
        let mut consumer = Consumer::new(0);
        for lie in [RING_ENTRIES as u64 + 1, u64::MAX, 1 << 63] {
            area.head().store(lie, Ordering::Release);
            assert!(consumer.pop(&shared).is_err(), "{lie}");
        }
        let mut producer = Producer::new(0);
        for lie in [1, u64::MAX - RING_ENTRIES as u64, 1 << 63] {
            area.tail().store(lie, Ordering::Release);
            assert!(!producer.push(&shared, &record(0)), "{lie}");
        }
        area.tail().store(0, Ordering::Release);
        assert!(producer.push(&shared, &record(0)));
        assert!(!Producer::new(u32::MAX).has_room(&shared));
    }
}
