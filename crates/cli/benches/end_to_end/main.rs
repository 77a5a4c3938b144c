//! How long it takes from nothing to a full list of processes: the released program, started as a user starts it.
//!
//! `script/bench` runs it and makes what it needs: `VMSIGHT_BENCH_DUMPS` names a folder with the dumps `1g.elf`, `8g.elf` and
//! `10000.elf` (a guest with 10,000 processes more), `VMSIGHT_BENCH_LAB` the program `vmsight-lab`, which boots the guests
//! that run. What is not there is not measured, and said so. `VMSIGHT_BENCH_ROUNDS` is how often everything is run.
//!
//! All runs take turns, so that a noisy machine is noisy for all. The page cache is warm: a round goes before those that count.
//! "nothing cached" is a run with an empty profile cache, which it fills, as a user's first run on a kernel does. The floors
//! are processes that map the same dump until as much of it is in their page tables as vmsight had. What a page of it costs
//! depends on how the page cache holds it, so the largest listing is run with that known, too. "in a program" is the same
//! by the libraries, in this process: from attaching to the list as values, without the start of a process and a table. These rows
//! are the goal's own words, "from attach to a full process list".

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench stops at the first surprise"
)]

mod checks;
mod floor;
mod guest;
mod listing;
mod pieces;
mod run;
mod table;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vmsight_memory::{GuestMemory, dump};
use vmsight_symbols::Profile;
use vmsight_symbols::kernel::{Found, Hints, find};

use guest::Guest;
use listing::{Listing, Source};
use pieces::Pieces;
use run::{Peak, Run, timed, watched};
use table::{Table, Times, verdict};

/// Goals, in milliseconds: a 1 GiB guest with its profile cached, and with nothing cached; symbols and types alone.
const CACHED: f64 = 10.0;
const COLD: f64 = 150.0;
const PARSE: f64 = 60.0;
/// And for 10,000 processes more, by the libraries, where the page cache has the dump in large pieces: of one in single pages, what the
/// kernel takes to map them is more already (see the floor).
const PROCESSES: f64 = 10.0;
/// How much longer than a 1 GiB dump one of 8 GiB may take.
const LARGE: f64 = 1.5;
/// Memory of its own, in units of a million bytes.
const MEMORY: f64 = 80.0;

/// What is run every round: `vmsight ps TARGET`.
struct Case {
    name: String,
    target: OsString,
    /// Whether the kernel is known from an earlier run.
    cached: bool,
    /// What else is said on the command line: which columns, or JSON of all fields.
    arguments: &'static [&'static str],
    goal: Option<f64>,
    /// No answer with fewer rows is a right one.
    least: usize,
    runs: Vec<Run>,
}

impl Case {
    fn cached(name: &str, target: impl Into<OsString>) -> Case {
        Case {
            name: format!("{name}, profile cached"),
            target: target.into(),
            cached: true,
            arguments: &[],
            goal: Some(CACHED),
            least: 50,
            runs: Vec::new(),
        }
    }

    fn cold(name: &str, target: impl Into<OsString>) -> Case {
        Case {
            name: format!("{name}, nothing cached"),
            cached: false,
            goal: Some(COLD),
            ..Case::cached(name, target)
        }
    }

    fn without_goal(self) -> Case {
        Case { goal: None, ..self }
    }

    fn in_json(self) -> Case {
        Case {
            name: format!("{}, JSON of all fields", self.name),
            arguments: &["--output", "json"],
            goal: None,
            ..self
        }
    }

    /// What volatility3's pslist shows, but for the address of the task and the ids of the group.
    fn with_few_columns(self) -> Case {
        Case {
            name: format!("{}, pslist's columns", self.name),
            arguments: &["--columns", "pid,ppid,name,uid"],
            goal: None,
            ..self
        }
    }

    /// With the profile cache that is kept, or with an empty one.
    fn attached(&self, cache: &Cache) -> Command {
        let mut command = vmsight();
        command.args(["ps", "--quiet"]).arg(&self.target);
        command.env(
            "VMSIGHT_PROFILES",
            if self.cached { &cache.kept } else { &cache.new },
        );
        if !self.cached {
            let _ = std::fs::remove_dir_all(&cache.new);
        }
        command
    }

    fn command(&self, cache: &Cache) -> Command {
        let mut command = self.attached(cache);
        command.args(self.arguments);
        command
    }

    /// What answers wrongly must not be measured.
    fn prove(&self, cache: &Cache) {
        let output = self.attached(cache).args(["--output", "jsonl"]).output().unwrap();
        assert!(
            output.status.success(),
            "{}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        let rows = output.stdout.split(|&byte| byte == b'\n').count();
        assert!(rows > self.least, "{}: {rows} processes", self.name);
    }

    fn wall(&self) -> Times {
        Times::new(self.runs.iter().map(|run| run.wall))
    }

    fn cpu(&self) -> Times {
        Times::new(self.runs.iter().map(|run| run.cpu))
    }
}

struct Cache {
    kept: PathBuf,
    new: PathBuf,
}

fn vmsight() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vmsight"))
}

/// From a kernel that was found to its symbols and types.
struct Parse {
    memory: GuestMemory,
    found: Found,
    times: Vec<Duration>,
}

impl Parse {
    fn new(dump: &Path) -> Parse {
        let memory = dump::open(dump, None).unwrap().memory;
        let found = find(&memory, &Hints::default()).unwrap();
        Parse {
            memory,
            found,
            times: Vec::new(),
        }
    }

    fn round(&mut self) {
        let start = Instant::now();
        let profile = Profile::from_memory(&self.memory, self.found.image()).unwrap();
        self.times.push(start.elapsed());
        assert!(profile.symbols.address("init_task").is_some());
    }
}

/// The listing with its dump in the page cache in small and in large pieces, next to a floor that has the same. In large pieces,
/// where it is not the page cache that takes the time, also by the libraries, and how much longer that takes than `without`.
fn by_pieces(case: &Case, cache: &Cache, own: u64, rounds: usize, table: &Table, without: &Times) {
    let file = Path::new(&case.target);
    for (pieces, what) in [(Pieces::Small, "pages of 4 KiB"), (Pieces::Large, "large pieces")] {
        pieces::read_anew(file, pieces);
        let bytes = watched(&mut case.command(cache)).mapped.saturating_sub(own);
        let (mut runs, mut floors) = (Vec::new(), Vec::new());
        let name = format!("10,000 processes more, dump in {what}");
        let mut listing = Listing::new(&name, Source::Dump(file.to_owned()), true, None).of_at_least(10_000);
        for _ in 0..rounds {
            floors.push(timed(&mut floor::command(file, bytes)).wall);
            runs.push(timed(&mut case.command(cache)));
            if pieces == Pieces::Large {
                listing.round(cache);
            }
        }
        let floors = Times::new(floors);
        let floor_name = format!("floor, dump in {what}: {:.0} MB mapped", bytes as f64 / 1e6);
        table.row(&floor_name, &floors, None, None, None);
        let walls = Times::new(runs.iter().map(|run| run.wall));
        let cpu = Times::new(runs.iter().map(|run| run.cpu)).median();
        table.row(&name, &walls, Some(cpu), None, Some(floors.median()));
        if pieces == Pieces::Large {
            let with = listing.times();
            table.row(&listing.name, &with, None, None, None);
            table.derived(
                "in a program: the same, difference to the 1 GiB dump",
                with.best() - without.best(),
                with.median() - without.median(),
                Some(PROCESSES),
                "",
            );
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((word, rest)) = arguments.split_first()
        && word == floor::WORD
    {
        return floor::main(rest);
    }
    let Some(dumps) = std::env::var_os("VMSIGHT_BENCH_DUMPS").map(PathBuf::from) else {
        eprintln!("nothing measured: VMSIGHT_BENCH_DUMPS names no folder with memory dumps");
        return;
    };
    let rounds: usize =
        std::env::var("VMSIGHT_BENCH_ROUNDS").map_or(15, |n| n.parse().expect("a number of rounds"));
    let scratch = tempfile::tempdir().unwrap();
    let cache = Cache {
        kept: scratch.path().join("kept"),
        new: scratch.path().join("new"),
    };

    let small = dumps.join("1g.elf");
    let mut cases = vec![
        Case::cold("1 GiB dump", &small),
        Case::cached("1 GiB dump", &small),
        Case::cached("1 GiB dump", &small).in_json(),
    ];
    let present = |file: &str, cases: &[Case]| {
        let file = dumps.join(file);
        let there = file.exists();
        if !there {
            println!("not measured: {} (it is not there)", file.display());
        }
        there.then_some((file, cases.len()))
    };
    let large = present("8g.elf", &cases).map(|(file, at)| {
        cases.push(Case::cold("8 GiB dump", &file).without_goal());
        cases.push(Case::cached("8 GiB dump", &file).without_goal());
        at
    });
    let many = present("10000.elf", &cases).map(|(file, at)| {
        for case in [
            Case::cached("10,000 processes more", &file).without_goal(),
            Case::cached("10,000 processes more", &file).in_json(),
            Case::cached("10,000 processes more", &file).with_few_columns(),
        ] {
            cases.push(Case {
                least: 10_000,
                ..case
            });
        }
        at
    });
    let mut guests = Vec::new();
    match std::env::var_os("VMSIGHT_BENCH_LAB").map(PathBuf::from) {
        None => println!("not measured: running guests (VMSIGHT_BENCH_LAB does not name vmsight-lab)"),
        Some(lab) => {
            let shared = Guest::boot(&lab, &["--backing", "file"]);
            let private = Guest::boot(&lab, &["--backing", "private", "--no-qmp"]);
            for (what, target) in [
                ("running, shared, by QMP", shared.by_qmp()),
                ("running, private, by pid", private.by_pid()),
            ] {
                cases.push(Case::cold(what, &target));
                cases.push(Case::cached(what, &target));
            }
            guests.extend([shared, private]);
        }
    }

    // The round that does not count: caches warm up, and answers are looked at.
    cases.iter().for_each(|case| case.prove(&cache));
    let own = watched(vmsight().arg("--version")).mapped;
    let floors = [0, 1].map(|index| {
        let case: &Case = &cases[index];
        watched(&mut case.command(&cache)).mapped.saturating_sub(own)
    });
    let of_small = || Source::Dump(small.clone());
    let mut listings = vec![
        Listing::new("1 GiB dump, nothing cached", of_small(), false, Some(COLD)),
        Listing::new("1 GiB dump, profile cached", of_small(), true, Some(CACHED)),
    ];
    if let Some(many) = many {
        let dump = Source::Dump(PathBuf::from(&cases[many].target));
        listings.push(Listing::new("10,000 processes more", dump, true, None).of_at_least(10_000));
    }
    if let [shared, private] = guests.as_slice() {
        for (what, target) in [
            ("running, shared, by QMP", shared.by_qmp()),
            ("running, private, by pid", private.by_pid()),
        ] {
            let name = format!("{what}, profile cached");
            listings.push(Listing::new(&name, Source::Running(target), true, Some(CACHED)));
        }
    }
    let many_mapped = many.map(|many| {
        watched(&mut cases[many].command(&cache))
            .mapped
            .saturating_sub(own)
    });
    let mut parse = Parse::new(&small);

    let (mut starts, mut floor_runs) = (Vec::new(), [Vec::new(), Vec::new()]);
    let mut many_floor_runs = Vec::new();
    for _ in 0..rounds {
        starts.push(timed(vmsight().arg("--version")).wall);
        for (bytes, runs) in floors.iter().zip(&mut floor_runs) {
            runs.push(timed(&mut floor::command(&small, *bytes)).wall);
        }
        if let (Some(many), Some(bytes)) = (many, many_mapped) {
            let file = Path::new(&cases[many].target);
            many_floor_runs.push(timed(&mut floor::command(file, bytes)).wall);
        }
        for case in &mut cases {
            let run = timed(&mut case.command(&cache));
            case.runs.push(run);
        }
        listings.iter_mut().for_each(|listing| listing.round(&cache));
        parse.round();
    }

    let table = Table::times();
    table.row(
        "starting a process: vmsight --version",
        &Times::new(starts),
        None,
        None,
        None,
    );
    let floor_times = floor_runs.map(Times::new);
    for ((name, bytes), times) in ["nothing cached", "profile cached"]
        .into_iter()
        .zip(&floors)
        .zip(&floor_times)
    {
        let name = format!("floor, {name}: {:.1} MB mapped", *bytes as f64 / 1e6);
        table.row(&name, times, None, None, None);
    }
    let many_floor = many_mapped.map(|bytes| {
        let name = format!(
            "floor, 10,000 processes more: {:.0} MB mapped",
            bytes as f64 / 1e6
        );
        let times = Times::new(many_floor_runs);
        table.row(&name, &times, None, None, None);
        times.median()
    });
    for case in &cases {
        let of_many = many_floor.filter(|_| case.least >= 10_000);
        let floor = of_many.unwrap_or(floor_times[usize::from(case.cached)].median());
        table.row(
            &case.name,
            &case.wall(),
            Some(case.cpu().median()),
            case.goal,
            Some(floor),
        );
    }
    for listing in &listings {
        table.row(&listing.name, &listing.times(), None, listing.goal, None);
    }
    table.row(
        "kallsyms and BTF, from memory to profile",
        &Times::new(parse.times),
        None,
        Some(PARSE),
        None,
    );
    if let Some(many) = many {
        let listed = |index: usize| listings[index].times();
        for (name, with, without) in [
            ("", cases[many].wall(), cases[1].wall()),
            (", JSON of all fields", cases[many + 1].wall(), cases[2].wall()),
            (", pslist's columns", cases[many + 2].wall(), cases[1].wall()),
            (", in a program", listed(2), listed(1)),
        ] {
            table.derived(
                &format!("10,000 processes more{name}, difference"),
                with.best() - without.best(),
                with.median() - without.median(),
                None,
                "",
            );
        }
    }
    if let Some(many) = many {
        by_pieces(&cases[many], &cache, own, rounds, &table, &listings[1].times());
    }
    if let Some(large) = large {
        for (index, what) in ["nothing cached", "profile cached"].into_iter().enumerate() {
            let (with, without) = (cases[large + index].wall(), cases[index].wall());
            table.derived(
                &format!("8 GiB to 1 GiB, {what}"),
                with.best() / without.best(),
                with.median() / without.median(),
                Some(LARGE),
                " ×",
            );
        }
    }

    checks::Checked {
        small: &small,
        large: large.map(|at| Path::new(&cases[at].target)),
        running: guests.first().map(Guest::qmp),
    }
    .measure(&cache, rounds, &table);

    println!(
        "\n{:<58} {:>8} {:>8} {:>8} {:>8}",
        "MB at the peak", "own", "mapped", "total", "goal"
    );
    for case in &cases {
        let peak = (0..rounds.min(5)).fold(Peak::default(), |peak, _| {
            peak.max(watched(&mut case.command(&cache)))
        });
        let [own, mapped, total] = [peak.anonymous, peak.mapped, peak.total].map(|bytes| bytes as f64 / 1e6);
        println!(
            "{:<58} {own:>8.1} {mapped:>8.1} {total:>8.1} {MEMORY:>8.0}  {}",
            case.name,
            verdict(own, Some(MEMORY))
        );
    }
    drop(guests);
}
