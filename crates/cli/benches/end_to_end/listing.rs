//! From a target to the list of its processes as values: by the libraries, in this process.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmsight_linux::{AttachError, AttachOptions, Kernel, ProcessFields};
use vmsight_memory::{GuestMemory, dump};
use vmsight_symbols::cache::Cache as Profiles;
use vmsight_target::{Target, TargetSpec};

use crate::Cache;
use crate::table::Times;

/// What is listed.
pub(crate) enum Source {
    /// A file.
    Dump(PathBuf),
    /// A VM, by whatever names it on a command line.
    Running(String),
}

/// One row: a listing that is made every round.
pub(crate) struct Listing {
    pub(crate) name: String,
    pub(crate) goal: Option<f64>,
    source: Source,
    cached: bool,
    least: usize,
    times: Vec<Duration>,
}

impl Listing {
    /// Of `source`, with the profile cache that is kept or (not `cached`) an empty one.
    pub(crate) fn new(name: &str, source: Source, cached: bool, goal: Option<f64>) -> Listing {
        Listing {
            name: format!("in a program: {name}"),
            goal,
            source,
            cached,
            least: 50,
            times: Vec::new(),
        }
    }

    /// Fewer rows than `least` are a wrong answer.
    pub(crate) fn of_at_least(self, least: usize) -> Listing {
        Listing { least, ..self }
    }

    /// Makes the listing once.
    pub(crate) fn round(&mut self, cache: &Cache) {
        if !self.cached {
            let _ = std::fs::remove_dir_all(&cache.new);
        }
        let profiles = if self.cached { &cache.kept } else { &cache.new };
        let start = Instant::now();
        // What was attached to is let go when the clock has stopped.
        let (_target, kernel) = match &self.source {
            Source::Dump(file) => {
                let memory = dump::open(file, None).unwrap().memory;
                (None, found(memory, profiles).unwrap())
            }
            Source::Running(name) => {
                let (target, kernel) = running(name, profiles);
                (Some(target), kernel)
            }
        };
        let listing = kernel.processes(ProcessFields::default()).unwrap();
        self.times.push(start.elapsed());
        let rows = listing.rows.len();
        assert!(rows >= self.least, "{}: {rows} processes", self.name);
    }

    /// How long the rounds took.
    pub(crate) fn times(&self) -> Times {
        Times::new(self.times.iter().copied())
    }
}

fn found(memory: GuestMemory, profiles: &Path) -> Result<Kernel, AttachError> {
    let options = AttachOptions {
        cache: Profiles::open(profiles).unwrap(),
        ..AttachOptions::default()
    };
    Kernel::attach(memory, options)
}

/// A running guest as `vmsight` attaches to it: the kernel is looked for while the monitor is asked where memory lies, and where
/// nobody tells, it proves the layout.
fn running(name: &str, profiles: &Path) -> (Target, Kernel) {
    let spec: TargetSpec = name.parse().unwrap();
    let foreseen = RefCell::new(None);
    let foresee = |memory: &GuestMemory| {
        foreseen.replace(Kernel::foresee(memory, &Profiles::open(profiles).unwrap()));
    };
    let proven = RefCell::new(None);
    let prove = |memory: &GuestMemory| {
        let kernel = found(memory.clone(), profiles).map_err(|e| e.to_string())?;
        let how = kernel.confirm_memory_end().map_err(|e| e.to_string())?;
        proven.replace(Some(kernel));
        Ok(how)
    };
    let options = vmsight_target::AttachOptions {
        prove: Some(&prove),
        ahead: Some(&foresee),
        ..Default::default()
    };
    let target = vmsight_target::attach(&spec, &options).unwrap();
    let foreseen = foreseen.into_inner().filter(|_| target.ahead);
    let kernel = match foreseen {
        Some(foreseen) => Kernel::foreseen(target.memory.clone(), foreseen),
        None => match proven.into_inner() {
            Some(kernel) => kernel,
            None => found(target.memory.clone(), profiles).unwrap(),
        },
    };
    (target, kernel)
}
