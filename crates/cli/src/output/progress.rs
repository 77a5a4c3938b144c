//! Signs of life during long work, for people who watch.

use std::io::{self, IsTerminal};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What takes less time than this shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);

/// A line on standard error that says what is being done and how far it has come, until it is dropped. Nothing where
/// standard error is no terminal, or nobody wants to know.
pub(crate) struct Progress {
    bar: ProgressBar,
    waiting: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Work of unknown length.
    pub(crate) fn spinner(quiet: bool, what: &str) -> Progress {
        Self::start(quiet, ProgressBar::no_length(), "{spinner} {msg} {elapsed}", what)
    }

    /// Work over so many bytes.
    pub(crate) fn bytes(quiet: bool, what: &str, total: u64) -> Progress {
        let form = "{spinner} {msg} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left";
        Self::start(quiet, ProgressBar::new(total), form, what)
    }

    fn start(quiet: bool, bar: ProgressBar, form: &str, what: &str) -> Progress {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        if quiet || !io::stderr().is_terminal() {
            return Progress { bar, waiting: None };
        }
        if let Ok(style) = ProgressStyle::with_template(form) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        let (done, wait) = channel::<()>();
        let shown = bar.clone();
        let thread = std::thread::spawn(move || {
            if wait.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                shown.set_draw_target(ProgressDrawTarget::stderr());
                shown.enable_steady_tick(Duration::from_millis(100));
            }
        });
        Progress {
            bar,
            waiting: Some((done, thread)),
        }
    }

    /// Something else is being done, or more of it.
    pub(crate) fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// So many bytes more are done.
    pub(crate) fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.waiting.take() {
            drop(done);
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
    }
}
