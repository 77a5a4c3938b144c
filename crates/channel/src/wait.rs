//! Waiting for the other side: a short spin that learns whether it pays, then a futex.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::thread::futex;
use rustix::time::Timespec;

/// Most rounds of a spin, about 50 µs on a processor of 3 GHz.
const MOST: u32 = 1 << 10;
/// Fewest rounds of a spin that failed again and again: enough to notice that it would pay again.
const LEAST: u32 = 1 << 4;

/// How long a spin is worth while: doubled where it ended well, halved where it did not.
#[derive(Debug)]
pub struct Spin {
    rounds: u32,
    alone: bool,
}

impl Default for Spin {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            rounds: MOST / 4,
            alone: processors < 2,
        }
    }
}

impl Spin {
    /// Spins until `ready`, or until it is not worth while any more. Whoever shares one processor with the other side
    /// does not spin at all.
    pub fn until(&mut self, ready: impl Fn() -> bool) -> bool {
        if self.alone {
            return ready();
        }
        for _ in 0..self.rounds {
            if ready() {
                self.rounds = (self.rounds * 2).min(MOST);
                return true;
            }
            std::hint::spin_loop();
        }
        self.rounds = (self.rounds / 2).max(LEAST);
        ready()
    }
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
