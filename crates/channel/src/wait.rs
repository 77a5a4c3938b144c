//! Waiting for the other side: a short spin that learns whether it pays, then a futex.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;
use rustix::time::Timespec;

/// The longest spin. To sleep and be woken by another processor takes about as long.
const MOST: Duration = Duration::from_micros(50);
/// The spin that is left where it failed again and again. Somebody who waits for this side in a spin of his own answers sooner (1 to
/// 3 µs), so that one who would answer at once is noticed: a spin that is too short for that would never learn that it pays again.
const LEAST: Duration = Duration::from_micros(5);
/// How often is looked between two looks at the clock.
const LOOKS: u32 = 32;

/// How long a spin is worth while: doubled where it ended well, halved where it did not.
#[derive(Debug)]
pub struct Spin {
    length: Duration,
}

impl Default for Spin {
    fn default() -> Self {
        Self { length: MOST / 4 }
    }
}

impl Spin {
    /// Spins until `ready`, or until it is not worth while any more. Whoever has the processor that the other side was on does not
    /// spin at all: the other can do nothing before it is free. `other` is where that was, as [`processor`] gives it.
    pub(crate) fn until(&mut self, other: impl Fn() -> u64, ready: impl Fn() -> bool) -> bool {
        let mut is_ready = ready();
        let start = Instant::now();
        while !is_ready && start.elapsed() < self.length {
            let here = processor();
            if here != 0 && here == other() {
                return ready();
            }
            for _ in 0..LOOKS {
                is_ready = ready();
                if is_ready {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        // The last look is after the time: who was not given a processor meanwhile has not failed.
        is_ready = is_ready || ready();
        self.length = match is_ready {
            true => (self.length * 2).min(MOST),
            false => (self.length / 2).max(LEAST),
        };
        is_ready
    }
}

/// The processor that this thread is on, plus one. It may be on another one a moment later: good for a guess only.
pub(crate) fn processor() -> u64 {
    u64::try_from(rustix::thread::sched_getcpu()).map_or(0, |number| number.saturating_add(1))
}

/// Sleeps while `word` holds `value`, at most `most`. Returns early for any reason, a signal among them.
pub(crate) fn sleep(word: &AtomicU32, value: u32, most: Duration) {
    let timeout = Timespec {
        tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: most.subsec_nanos().into(),
    };
    // Every outcome means: look again.
    let _ = futex::wait(word, futex::Flags::empty(), value, Some(&timeout));
}

/// Rings the bell `word` and wakes those who said in `sleepers` that they sleep.
pub(crate) fn ring(word: &AtomicU32, sleepers: &AtomicU32) {
    // Sequentially consistent against the sleeper, who says that it sleeps and then looks at the bell.
    word.fetch_add(1, Ordering::SeqCst);
    if sleepers.load(Ordering::SeqCst) != 0 {
        let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody is there.
    const ELSEWHERE: u64 = u64::MAX;

    #[test]
    fn a_spin_that_never_paid_is_still_long_enough_to_learn_that_it_does() {
        let mut spin = Spin { length: MOST };
        for _ in 0..100 {
            assert!(!spin.until(|| ELSEWHERE, || false));
        }
        assert_eq!(spin.length, LEAST);
        let answered = |spin: &mut Spin, after: Duration| {
            let start = Instant::now();
            spin.until(|| ELSEWHERE, || start.elapsed() >= after)
        };
        assert!(answered(&mut spin, LEAST / 5), "one who answers at once");
        assert_eq!(spin.length, 2 * LEAST);
        while spin.length < MOST {
            assert!(answered(&mut spin, Duration::ZERO));
        }
        assert!(!spin.until(|| ELSEWHERE, || false));
        assert_eq!(spin.length, MOST / 2);
    }

    #[test]
    fn who_keeps_the_other_side_from_running_does_not_spin() {
        let mut spin = Spin { length: MOST };
        // Wherever this thread is by now, the other was there.
        let looks = std::cell::Cell::new(0);
        let ready = || {
            looks.set(looks.get() + 1);
            false
        };
        assert!(!spin.until(processor, ready));
        assert!(looks.get() <= 2, "{} looks", looks.get());
        assert_eq!(spin.length, MOST, "nothing was learnt");
    }
}
