//! Waiting for a guest's events: by which backend, and until when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM, SIGTSTP};
use vmsight_events::{EventError, Monitor, Occurrence, OpenOptions, open};
use vmsight_hooks::BackendKind;

use crate::{args::Global, session::Session};

/// How long a wait for an event lasts before it is asked whether to go on at all.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long the guest may wait for us at an event: we are at work all that time, so more means that we are stuck.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);

/// When to end, and by what events come.
#[derive(Args, Debug)]
pub(crate) struct Until {
    /// End after this many events
    #[arg(long, value_name = "N", help_heading = "How")]
    pub(crate) count: Option<u64>,
    /// End after this many seconds
    #[arg(long = "for", value_name = "SECONDS", help_heading = "How")]
    seconds: Option<f64>,
    /// By which backend [default: the best that reaches the VM]
    #[arg(long, value_name = "NAME", value_parser = backend, help_heading = "How")]
    backend: Option<BackendKind>,
}

/// A flag that Ctrl-C and SIGTERM set, from now on. The second one ends the program at once: whoever asks twice is not to
/// wait for us.
pub(crate) fn on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_default(signal, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    Ok(stop)
}

/// A flag that Ctrl-Z sets, from now on, instead of stopping the program: the guest may be waiting for it, and by the gdb stub there is
/// nobody else to let it go on.
fn on_suspend() -> Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGTSTP, asked.clone())?;
    Ok(asked)
}

/// For clap: a backend by its name.
pub(crate) fn backend(text: &str) -> Result<BackendKind, String> {
    let all = [BackendKind::GdbStub, BackendKind::AgentKvm, BackendKind::AgentTcg];
    all.into_iter().find(|b| b.name() == text).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|b| b.name()).collect();
        format!("there are: {}", names.join(", "))
    })
}

impl Until {
    /// From now on Ctrl-C and SIGTERM end the waiting and not the program, and Ctrl-Z does not stop it.
    pub(crate) fn begin(&self) -> Result<Waiting> {
        let end = match self.seconds {
            Some(s) if s.is_finite() && (0.0..=1e9).contains(&s) => {
                Some(Instant::now() + Duration::from_secs_f64(s))
            }
            Some(_) => bail!("--for takes seconds"),
            None => None,
        };
        Ok(Waiting {
            stop: on_interrupt()?,
            suspend: on_suspend()?,
            end,
        })
    }

    /// The monitor of the session's target.
    pub(crate) fn open(&self, global: &Global, session: &Session) -> Result<Monitor> {
        let options = OpenOptions {
            backend: self.backend,
            timeout: Duration::from_secs_f64(global.timeout),
        };
        open(session.target(), options).with_context(|| format!("hooking {}", session.name()))
    }
}

/// A wait that has begun.
pub(crate) struct Waiting {
    stop: Arc<AtomicBool>,
    suspend: Arc<AtomicBool>,
    end: Option<Instant>,
}

impl Waiting {
    /// The next event; `None` when it is time to end, or the VM has ended.
    pub(crate) fn next(&self, session: &Session, monitor: &Monitor) -> Result<Option<Occurrence>> {
        while !self.stop.load(Ordering::Relaxed) {
            if self.suspend.swap(false, Ordering::Relaxed) {
                let style = session.style();
                style.warn("not suspended: the guest would wait for this program; Ctrl-C ends it");
            }
            let wait = match self.end {
                Some(end) => end.saturating_duration_since(Instant::now()).min(PATIENCE),
                None => PATIENCE,
            };
            if wait.is_zero() {
                break;
            }
            match monitor.next(wait) {
                Ok(Some(occurrence)) => return Ok(Some(occurrence)),
                Ok(None) => {}
                Err(EventError::Gone) => {
                    session.style().warn("the VM ended");
                    break;
                }
                Err(error) => return Err(error).context("waiting for events"),
            }
        }
        Ok(None)
    }
}
