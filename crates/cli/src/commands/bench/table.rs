//! The rows that the bench has measured, and their table.

use anyhow::Result;
use serde_json::Map;
use vmsight_gauge::Summary;

use super::survival::END;
use crate::output::{Sheet, Style};

const KEYS: &[&str] = &[
    "host",
    "by",
    "hook",
    "delivery",
    "samples",
    "min_ns",
    "median_ns",
    "max_ns",
    "sd_ns",
    "ratio",
    "of",
    "goal",
    "met",
    "problem",
];
const SHOWN: &[&str] = &[
    "host",
    "by",
    "hook",
    "delivery",
    "min_ns",
    "median_ns",
    "max_ns",
    "sd_ns",
    "ratio",
    "of",
    "goal",
    "met",
];

/// One line of the table.
pub(super) struct Row {
    pub(super) host: String,
    pub(super) by: &'static str,
    pub(super) hook: &'static str,
    pub(super) delivery: &'static str,
    pub(super) outcome: Result<Summary, String>,
    /// What its median is compared with, or the longest of those that outlived their monitor: its name, how long that is, and the highest
    /// ratio that is wanted.
    pub(super) against: Option<(&'static str, f64, Option<f64>)>,
}

/// Prints them, and what could not be measured.
pub(super) fn print(style: &Style, rows: &[Row], warnings: Vec<String>) -> Result<()> {
    let mut sheet = Sheet::with_keys(KEYS, SHOWN);
    for row in rows {
        let mut cells = Map::new();
        cells.insert("host".into(), row.host.clone().into());
        cells.insert("by".into(), row.by.into());
        cells.insert("hook".into(), row.hook.into());
        cells.insert("delivery".into(), row.delivery.into());
        match &row.outcome {
            Ok(summary) => {
                cells.insert("samples".into(), summary.count.into());
                cells.insert("min_ns".into(), whole(summary.min));
                cells.insert("median_ns".into(), whole(summary.median));
                cells.insert("max_ns".into(), whole(summary.max));
                cells.insert("sd_ns".into(), whole(summary.sd));
                if let Some((of, other, goal)) = row.against.filter(|(_, other, _)| *other > 0.0) {
                    let survives = END.iter().any(|end| end.name() == row.delivery);
                    let own = if survives { summary.max } else { summary.median };
                    let ratio = own / other;
                    cells.insert("ratio".into(), ((ratio * 1000.0).round() / 1000.0).into());
                    cells.insert("of".into(), of.into());
                    if let Some(goal) = goal {
                        cells.insert("goal".into(), goal.into());
                        cells.insert("met".into(), (ratio <= goal).into());
                    }
                }
            }
            Err(problem) => {
                cells.insert("problem".into(), problem.clone().into());
            }
        }
        sheet.rows.push(cells);
    }
    sheet.warnings = warnings;
    for row in rows {
        if let Err(problem) = &row.outcome {
            let (host, by, hook, delivery) = (&row.host, row.by, row.hook, row.delivery);
            sheet.warnings.push(format!(
                "not measured: {host}, {by}, {hook}, {delivery}: {problem}"
            ));
        }
    }
    style.print(&sheet)
}

/// Nanoseconds, as exactly as they are known.
fn whole(nanoseconds: f64) -> serde_json::Value {
    (nanoseconds.round() as u64).into()
}
