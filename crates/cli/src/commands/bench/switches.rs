//! What it costs that two threads hand over to each other: the floor of every way to ask another process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::thread::futex;
use vmsight_gauge::Summary;

/// Waits until the word is no longer `value`.
fn wait(word: &AtomicU32, value: u32) {
    while word.load(Ordering::Acquire) == value {
        // Every outcome means: look again.
        let _ = futex::wait(word, futex::Flags::empty(), value, None);
    }
}

fn set(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    let _ = futex::wake(word, futex::Flags::empty(), 1);
}

/// Nanoseconds from waking another thread until it has woken this one: two switches, each by a futex. The two sleep in
/// between: nobody spins.
pub(super) fn two_switches(rounds: u64) -> Result<Summary> {
    // Odd: the other one's turn; even: ours. The end is the highest number.
    let word = Arc::new(AtomicU32::new(0));
    let other = {
        let word = Arc::clone(&word);
        std::thread::spawn(move || {
            let mut turn = 0;
            loop {
                wait(&word, turn);
                turn = word.load(Ordering::Acquire);
                if turn == u32::MAX {
                    return;
                }
                turn += 1;
                set(&word, turn);
            }
        })
    };
    let samples: Vec<f64> = (0..rounds)
        .map(|round| {
            // It is to sleep before it is woken.
            std::thread::yield_now();
            let turn = 2 * round as u32 + 1;
            let begin = Instant::now();
            set(&word, turn);
            wait(&word, turn);
            begin.elapsed().as_nanos() as f64
        })
        .collect();
    set(&word, u32::MAX);
    let _ = other.join();
    Summary::of(&samples).context("no switch was measured")
}

#[cfg(test)]
mod tests {
    #[test]
    fn switches_are_measured() {
        let summary = super::two_switches(100).unwrap();
        assert_eq!(summary.count, 100);
        assert!(summary.min > 0.0 && summary.min <= summary.median);
    }
}
