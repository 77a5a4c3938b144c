//! One judgement: rules on the bytes of a piece, or on all pieces of a process.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use boreal::memory::FragmentedMemory;
use boreal::scanner::{
    CallbackEvents, EvaluatedRule, ScanCallbackResult, ScanError, ScanEvent, ScanParams, StringMatch,
};

use super::{Limits, Match, Rules};

/// Bytes kept of each match, and before and behind it.
pub(super) const KEPT: usize = 64;
pub(super) const AROUND: usize = 16;
/// Judgements that may take longer than they may, before no more are made: with such rules it would go on for hours.
const MAX_LATE: usize = 4;

/// Rules with what their scan has come to so far, on any number of threads.
pub(super) struct Run<'r> {
    rules: &'r Rules,
    scanner: boreal::Scanner,
    limits: Limits,
    found: AtomicUsize,
    late: AtomicUsize,
    cut: AtomicBool,
}

/// A match before its surroundings are known.
pub(super) struct Bare {
    /// The match, with the bytes that were kept of it.
    pub(super) found: Match,
    /// Where the region begins that it lies in.
    pub(super) base: usize,
}

impl<'r> Run<'r> {
    pub(super) fn new(rules: &'r Rules, limits: Limits, process: bool) -> Self {
        let mut scanner = rules.scanner.clone();
        scanner.set_scan_params(
            ScanParams::default()
                .compute_full_matches(true)
                .match_max_length(KEPT)
                .string_max_nb_matches(limits.per_pattern)
                .timeout_duration(Some(limits.patience))
                .process_memory(process)
                .callback_events(CallbackEvents::RULE_MATCH | CallbackEvents::STRING_REACHED_MATCH_LIMIT),
        );
        Self {
            rules,
            scanner,
            limits,
            found: AtomicUsize::new(0),
            late: AtomicUsize::new(0),
            cut: AtomicBool::new(false),
        }
    }

    /// Judges a piece as a file.
    pub(super) fn piece(&self, bytes: &[u8]) -> Vec<Bare> {
        let mut out = Vec::new();
        if !self.is_over() {
            let end = self
                .scanner
                .scan_mem_with_callback(bytes, |event| self.take(event, &mut out));
            self.ended(end);
        }
        out
    }

    /// Judges pieces as a process.
    pub(super) fn pieces(&self, memory: impl FragmentedMemory) -> Vec<Bare> {
        let mut out = Vec::new();
        if !self.is_over() {
            let end = self
                .scanner
                .scan_fragmented_with_callback(memory, |event| self.take(event, &mut out));
            self.ended(end);
        }
        out
    }

    fn is_full(&self) -> bool {
        self.found.load(Ordering::Relaxed) > self.limits.in_all
    }

    fn is_over(&self) -> bool {
        self.is_full() || self.late.load(Ordering::Relaxed) >= MAX_LATE
    }

    fn ended(&self, end: Result<(), ScanError>) {
        if matches!(end, Err(ScanError::Timeout)) {
            self.late.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn take(&self, event: ScanEvent<'_, '_>, out: &mut Vec<Bare>) -> ScanCallbackResult {
        match event {
            ScanEvent::RuleMatch(rule) => self.rule(&rule, out),
            ScanEvent::StringReachedMatchLimit(_) => self.cut.store(true, Ordering::Relaxed),
            _ => {}
        }
        match self.is_full() {
            true => ScanCallbackResult::Abort,
            false => ScanCallbackResult::Continue,
        }
    }

    fn rule(&self, rule: &EvaluatedRule<'_>, out: &mut Vec<Bare>) {
        let Some(facts) = self.rules.named(rule.namespace, rule.name) else {
            return;
        };
        let mut keep = |pattern: Option<&str>, of: Option<&StringMatch>| {
            if self.found.fetch_add(1, Ordering::Relaxed) >= self.limits.in_all {
                return;
            }
            let (base, offset) = of.map_or((0, 0), |of| (of.base, of.offset));
            out.push(Bare {
                found: Match {
                    rule: facts.clone(),
                    pattern: pattern.map(|name| format!("${name}")),
                    address: base.wrapping_add(offset) as u64,
                    length: of.map_or(0, |of| of.length as u64),
                    matched: of.map_or_else(Vec::new, |of| of.data.to_vec()),
                    before: Vec::new(),
                    after: Vec::new(),
                },
                base,
            });
        };
        let mut any = false;
        for string in &rule.matches {
            for one in &string.matches {
                any = true;
                keep(Some(string.name), Some(one));
            }
        }
        if !any {
            keep(None, None);
        }
    }

    /// What is to be said of the scan.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let late = self.late.load(Ordering::Relaxed);
        if late > 0 {
            let seconds = self.limits.patience.as_secs();
            let rest = if late >= MAX_LATE {
                "; the scan was ended"
            } else {
                ""
            };
            notes.push(format!(
                "for {late} pieces of memory the rules took longer than {seconds} s: not all matches are shown{rest}"
            ));
        }
        if self.cut.load(Ordering::Relaxed) {
            notes.push(format!(
                "of some patterns there are more than {} matches in one piece of memory: the rest is left out",
                self.limits.per_pattern
            ));
        }
        if self.is_full() {
            notes.push(format!(
                "more than {} matches: the rest is left out",
                self.limits.in_all
            ));
        }
        notes
    }
}

/// The bytes around a match in what it was found in.
pub(super) fn surround(found: &mut Match, bytes: &[u8], start: usize) {
    let get = |from: usize, to: usize| bytes.get(from..to.min(bytes.len())).unwrap_or_default().to_vec();
    found.before = get(start.saturating_sub(AROUND), start);
    if found.length == found.matched.len() as u64 {
        let end = start.saturating_add(found.matched.len());
        found.after = get(end, end.saturating_add(AROUND));
    }
}
