//! What happened how often, and how long it took.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::row::Row;
use crate::output::Sheet;

/// Most different things that are counted; further ones are counted together.
const MAX_SUBJECTS: usize = 4096;

/// Counts of events.
#[derive(Default)]
pub(super) struct Summary {
    counts: HashMap<(&'static str, String), Count>,
}

#[derive(Default)]
struct Count {
    events: u64,
    errors: u64,
    timed: u64,
    time: Duration,
    longest: Duration,
}

impl Summary {
    pub(super) fn add(&mut self, row: &Row) {
        let mut key = (row.event(), row.subject());
        if self.counts.len() >= MAX_SUBJECTS && !self.counts.contains_key(&key) {
            key.1 = "(others)".to_owned();
        }
        let count = self.counts.entry(key).or_default();
        count.events += 1;
        if let Row::Syscall(record) = row {
            count.errors += u64::from(record.error().is_some());
            if let Some(duration) = record.duration {
                count.timed += 1;
                count.time = count.time.saturating_add(duration);
                count.longest = count.longest.max(duration);
            }
        }
    }

    /// How many events there were.
    pub(super) fn events(&self) -> u64 {
        self.counts.values().map(|c| c.events).sum()
    }

    /// The most time first, then the most events.
    pub(super) fn sheet(&self) -> Sheet {
        let columns = &[
            "event", "subject", "count", "errors", "total_us", "mean_us", "max_us",
        ];
        let mut sheet = Sheet::with_keys(columns, columns);
        let mut all: Vec<_> = self.counts.iter().collect();
        all.sort_by_key(|((event, subject), c)| {
            (std::cmp::Reverse((c.time, c.events)), *event, subject.clone())
        });
        for ((event, subject), count) in all {
            let mut row = Map::new();
            row.insert("event".into(), (*event).into());
            row.insert("subject".into(), subject.clone().into());
            row.insert("count".into(), count.events.into());
            row.insert("errors".into(), count.errors.into());
            let timed = |value: u128| {
                if count.timed == 0 {
                    Value::Null
                } else {
                    json!(value as u64)
                }
            };
            row.insert("total_us".into(), timed(count.time.as_micros()));
            row.insert(
                "mean_us".into(),
                timed(count.time.as_micros() / u128::from(count.timed.max(1))),
            );
            row.insert("max_us".into(), timed(count.longest.as_micros()));
            sheet.rows.push(row);
        }
        sheet
    }
}
