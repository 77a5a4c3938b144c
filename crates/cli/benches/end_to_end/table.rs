//! The table that is printed: what, how long at best and usually, what it was to be.

use std::time::Duration;

/// Milliseconds, sorted.
pub(crate) struct Times(Vec<f64>);

impl Times {
    pub(crate) fn new(times: impl IntoIterator<Item = Duration>) -> Times {
        let mut times: Vec<f64> = times.into_iter().map(|t| t.as_secs_f64() * 1e3).collect();
        times.sort_by(f64::total_cmp);
        assert!(!times.is_empty(), "every row has been run");
        Times(times)
    }

    pub(crate) fn best(&self) -> f64 {
        self.0[0]
    }

    pub(crate) fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }
}

/// Prints the table row by row.
pub(crate) struct Table;

impl Table {
    /// The head of the part with times, all of them milliseconds.
    pub(crate) fn times() -> Table {
        println!(
            "{:<58} {:>8} {:>8} {:>8} {:>8}  {:>8}",
            "ms", "best", "median", "cpu", "goal", "× floor"
        );
        Table
    }

    /// `cpu` and `floor` are medians. A goal is held against the median.
    pub(crate) fn row(
        &self,
        name: &str,
        times: &Times,
        cpu: Option<f64>,
        goal: Option<f64>,
        floor: Option<f64>,
    ) {
        let (best, median) = (times.best(), times.median());
        let cpu = cpu.map_or(String::new(), |ms| format!("{ms:.1}"));
        let goals = goal.map_or(String::new(), |g| format!("{g:.0}"));
        let floors = floor.map_or(String::new(), |f| format!("{:.1}", median / f));
        let line = format!(
            "{name:<58} {best:>8.1} {median:>8.1} {cpu:>8} {goals:>8}  {floors:>8}  {}",
            verdict(median, goal)
        );
        println!("{}", line.trim_end());
    }

    /// A row whose two figures come of those of other rows.
    pub(crate) fn derived(&self, name: &str, best: f64, median: f64, goal: Option<f64>, unit: &str) {
        let goals = goal.map_or(String::new(), |g| format!("{g}{unit}"));
        let line = format!(
            "{name:<58} {best:>8.1} {median:>8.1} {:>8} {goals:>8}  {:>8}  {}",
            "",
            "",
            verdict(median, goal)
        );
        println!("{}", line.trim_end());
    }
}

/// "ok" or "MISSED", where there is a goal.
pub(crate) fn verdict(value: f64, goal: Option<f64>) -> &'static str {
    match goal {
        Some(goal) if value <= goal => "ok",
        Some(_) => "MISSED",
        None => "",
    }
}
