//! Running checks side by side.

use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

use crate::{Certainty, Check, Context, Finding, Findings};

/// How often what was found in a guest that runs is looked at again.
const REREADS: u32 = 2;
/// The pause before that: what was seen in the middle of being changed has then settled.
const PAUSE: Duration = Duration::from_millis(20);

/// What one check came to.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The check's name.
    pub check: &'static str,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// How many things were looked at. 0 with a note: nothing could be checked.
    pub looked_at: u64,
    /// What could not be checked, and why.
    pub notes: Vec<String>,
    /// Whether the check could not be made at all; the last note says why.
    pub failed: bool,
    /// How long it took.
    pub took_ms: f64,
}

/// Runs `checks` side by side; their outcomes in the same order. `done` is told of each that ends.
///
/// In a guest that runs, what is found is looked at again, with the modules and all else read anew; what is not seen each
/// time is no finding, and a note says so. What an earlier look at this guest had found ([`Context::with_known`]) has been
/// looked at again by this one.
pub fn run(context: &Context, checks: &[&Check], done: &(dyn Fn(&Check) + Sync)) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = checks
        .par_iter()
        .map(|check| {
            let outcome = once(context, check);
            done(check);
            outcome
        })
        .collect();
    if context.is_changing() {
        let known = context.known();
        let mut doubtful: Vec<&mut Outcome> = outcomes
            .iter_mut()
            .filter_map(|o| (!known.is_some_and(|known| known.saw(&mut o.findings))).then_some(o))
            .collect();
        look_again(context, checks, &mut doubtful);
        if let Some(known) = known {
            known.keep_findings(&outcomes);
        }
    }
    outcomes
}

/// Looks at what was found again, and again.
fn look_again(context: &Context, checks: &[&Check], doubtful: &mut Vec<&mut Outcome>) {
    for read in 0..REREADS {
        doubtful.retain(|o| !o.findings.is_empty());
        if doubtful.is_empty() {
            break;
        }
        std::thread::sleep(PAUSE);
        let anew = context.anew();
        doubtful.par_iter_mut().for_each(|outcome| {
            if let Some(check) = checks.iter().find(|c| c.name == outcome.check) {
                still(outcome, &once(&anew, check), read + 2);
            }
        });
    }
}

fn once(context: &Context, check: &Check) -> Outcome {
    let start = Instant::now();
    let mut findings = Findings::of(check);
    let failed = match (check.run)(context, &mut findings) {
        Ok(()) => false,
        Err(error) => {
            findings.note(format!("not checked: {error}"));
            true
        }
    };
    let (mut findings, notes, looked_at) = findings.into_parts();
    let certainty = match context.is_changing() {
        true => Certainty::Seen(1),
        false => Certainty::Still,
    };
    findings.iter_mut().for_each(|f| f.certainty = certainty);
    Outcome {
        check: check.name,
        findings,
        looked_at,
        notes,
        failed,
        took_ms: start.elapsed().as_secs_f64() * 1e3,
    }
}

/// Keeps what `again` says too.
fn still(outcome: &mut Outcome, again: &Outcome, times: u32) {
    let before = outcome.findings.len();
    outcome
        .findings
        .retain(|f| again.findings.iter().any(|a| a.is_of(f)));
    let gone = before - outcome.findings.len();
    outcome
        .findings
        .iter_mut()
        .for_each(|f| f.certainty = Certainty::Seen(times));
    if gone > 0 {
        outcome.notes.push(format!(
            "{gone} findings were not there any more when read anew: the guest was changing them"
        ));
    }
    outcome.took_ms += again.took_ms;
}
