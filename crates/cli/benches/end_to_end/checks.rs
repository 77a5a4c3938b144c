//! All checks, of dumps and of a guest that runs; and made again of that, as `vmsight check --watch` does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmsight_analysis::{Context, Known, checks, run};
use vmsight_linux::{AttachOptions, Kernel};
use vmsight_symbols::cache::Cache as Profiles;
use vmsight_target::TargetSpec;

use crate::run::timed;
use crate::table::{Table, Times};
use crate::{Cache, vmsight};

/// Goals, in milliseconds: 1 GiB, 8 GiB, and again.
const SMALL: f64 = 1000.0;
const LARGE: f64 = 3000.0;
const AGAIN: f64 = 50.0;

/// What is checked by the program itself.
pub(crate) struct Checked<'p> {
    pub(crate) small: &'p Path,
    pub(crate) large: Option<&'p Path>,
    /// A running guest's QMP socket.
    pub(crate) running: Option<PathBuf>,
}

impl Checked<'_> {
    pub(crate) fn measure(&self, cache: &Cache, rounds: usize, table: &Table) {
        let running = self
            .running
            .as_ref()
            .map(|socket| format!("qmp:{}", socket.display()));
        let of = |path: &Path| path.display().to_string();
        let targets = [
            Some(("1 GiB dump", of(self.small), SMALL)),
            self.large.map(|large| ("8 GiB dump", of(large), LARGE)),
            running.map(|running| ("running, 1 GiB", running, SMALL)),
        ];
        for (name, target, goal) in targets.into_iter().flatten() {
            let mut runs: Vec<_> = (0..=rounds)
                .map(|_| {
                    let mut command = vmsight();
                    command
                        .args(["check", "--quiet", &target])
                        .env("VMSIGHT_PROFILES", &cache.kept);
                    timed(&mut command)
                })
                .collect();
            // The first does not count.
            runs.remove(0);
            let cpu = Times::new(runs.iter().map(|run| run.cpu)).median();
            let walls = Times::new(runs.iter().map(|run| run.wall));
            table.row(
                &format!("all checks: {name}"),
                &walls,
                Some(cpu),
                Some(goal),
                None,
            );
        }
        if let Some(socket) = &self.running {
            let known = Known::default();
            let first = look(socket, cache, &known);
            let again = Times::new((0..rounds).map(|_| look(socket, cache, &known)));
            assert!(known.unchanged_functions() > 10_000, "nothing was known again");
            let name = "in a program: all checks, running, 1 GiB";
            table.row(name, &Times::new([first]), None, None, None);
            table.row(&format!("{name}, again"), &again, None, Some(AGAIN), None);
        }
    }
}

/// One look, with all that is done for it: attaching, the kernel, the checks.
fn look(socket: &Path, cache: &Cache, known: &Known) -> Duration {
    let start = Instant::now();
    let target = vmsight_target::attach(&TargetSpec::Qmp(socket.to_owned()), &Default::default()).unwrap();
    let registers = target.registers(None).map_err(|e| e.to_string());
    let options = AttachOptions {
        cache: Profiles::open(&cache.kept).unwrap(),
        ..AttachOptions::default()
    };
    let kernel = Kernel::attach(target.memory.clone(), options).unwrap();
    let context = Context::new(kernel)
        .with_registers(registers)
        .with_known(known.clone());
    let outcomes = run(&context, checks::ALL, &|_| {});
    let took = start.elapsed();
    assert!(
        outcomes
            .iter()
            .all(|outcome| !outcome.failed && outcome.looked_at > 0)
    );
    took
}
