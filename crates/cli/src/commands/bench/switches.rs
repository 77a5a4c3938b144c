//! What it costs that two threads hand over to each other: the floor of every way to ask another process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{CpuSet, futex, sched_getaffinity, sched_setaffinity};
use vmsight_gauge::Summary;

/// Of so many rounds at least one is to be as it should: nearly all are.
const TRIES: u64 = 10;
/// What the word is at the end. Nobody's turn has this number.
const END: u32 = u32::MAX;

/// Where the two threads are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Both on one processor: it puts one aside and runs the other.
    One,
    /// Each on a processor of its own: that processor is woken from the other.
    Two,
}

impl Place {
    /// What the row is called.
    pub(super) const fn row(self) -> &'static str {
        match self {
            Self::One => "two context switches, one processor",
            Self::Two => "two context switches, two processors",
        }
    }

    /// What it is called where something is compared with it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::One => "one processor",
            Self::Two => "two processors",
        }
    }
}

/// What two switches take in nanoseconds: on the first processor that this program may use, and between the first two, where there
/// are two.
pub(super) fn two_switches(rounds: u64) -> Vec<(Place, Result<Summary>)> {
    let allowed = match sched_getaffinity(None).context("asking for processors") {
        Ok(allowed) => allowed,
        Err(error) => return vec![(Place::One, Err(error))],
    };
    let mut processors = (0..CpuSet::MAX_CPU).filter(|at| allowed.is_set(*at));
    let first = processors.next().unwrap_or_default();
    let two = processors
        .next()
        .map(|second| (Place::Two, between(first, second, rounds)));
    [(Place::One, between(first, first, rounds))]
        .into_iter()
        .chain(two)
        .collect()
}

/// Between threads of their own, so that this one may run where it could before.
fn between(own: usize, other: usize, rounds: u64) -> Result<Summary> {
    let measuring = std::thread::spawn(move || measure(own, other, rounds));
    measuring.join().map_err(|_| anyhow!("the thread failed"))?
}

/// From waking another thread until it has woken this one: two switches, each by a futex. The two sleep in between: nobody spins.
fn measure(own: usize, other: usize, rounds: u64) -> Result<Summary> {
    // Odd: the other one's turn; even: ours. The end is the highest number.
    let word = Arc::new(AtomicU32::new(0));
    // A thread begins with the processors of the one that starts it.
    pin(other)?;
    let answering = {
        let word = Arc::clone(&word);
        std::thread::spawn(move || {
            let mut turn = 0;
            loop {
                (turn, _) = wait(&word, turn);
                if turn == END {
                    return;
                }
                turn += 1;
                set(&word, turn);
            }
        })
    };
    let samples = pin(own).map(|()| {
        (0..rounds.saturating_mul(TRIES))
            .filter_map(|round| {
                // It is to sleep before it is woken.
                std::thread::yield_now();
                let turn = 2 * round as u32 + 1;
                let begin = Instant::now();
                let woken = set(&word, turn);
                let (_, slept) = wait(&word, turn);
                let took = begin.elapsed().as_nanos() as f64;
                // Who met a thread that was still awake has saved a switch. On one processor that cannot be: who has not gone to sleep
                // yet was put aside for the one it woke.
                (woken && (slept || own == other)).then_some(took)
            })
            .take(usize::try_from(rounds).unwrap_or(usize::MAX))
            .collect::<Vec<_>>()
    });
    set(&word, END);
    let _ = answering.join();
    let samples = samples?;
    ensure!(samples.len() as u64 == rounds, "the threads did not sleep");
    Summary::of(&samples).context("no switch was measured")
}

/// Has this thread, and those that it starts, run on one processor only.
fn pin(processor: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only).with_context(|| format!("going to processor {processor}"))
}

/// Waits until the word is no longer `value`. What it is then, and whether this thread slept until it was woken.
fn wait(word: &AtomicU32, value: u32) -> (u32, bool) {
    let mut slept = false;
    loop {
        let now = word.load(Ordering::Acquire);
        if now != value {
            return (now, slept);
        }
        // Every outcome means: look again.
        slept |= futex::wait(word, futex::Flags::empty(), value, None).is_ok();
    }
}

/// Gives the turn to the other thread; true where it slept.
fn set(word: &AtomicU32, value: u32) -> bool {
    word.store(value, Ordering::Release);
    futex::wake(word, futex::Flags::empty(), 1).is_ok_and(|woken| woken > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_measured_on_one_processor_and_on_two() {
        let before = sched_getaffinity(None).unwrap();
        let measured = two_switches(100);
        let places: Vec<Place> = measured.iter().map(|(place, _)| *place).collect();
        let there = if before.count() > 1 {
            &[Place::One, Place::Two][..]
        } else {
            &[Place::One]
        };
        assert_eq!(places, there);
        for (place, summary) in measured {
            let summary = summary.unwrap_or_else(|e| panic!("{}: {e:#}", place.row()));
            assert_eq!(summary.count, 100);
            assert!(summary.min > 0.0 && summary.min <= summary.median);
        }
        assert_eq!(
            sched_getaffinity(None).unwrap(),
            before,
            "this thread may run where it could"
        );
    }

    #[test]
    fn a_thread_goes_where_it_is_to_go() {
        let allowed = sched_getaffinity(None).unwrap();
        for at in (0..CpuSet::MAX_CPU).filter(|at| allowed.is_set(*at)) {
            let went = std::thread::spawn(move || {
                pin(at).unwrap();
                rustix::thread::sched_getcpu()
            });
            assert_eq!(went.join().unwrap(), at);
        }
    }
}
