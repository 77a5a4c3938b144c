//! Everything in a guest's memory that has a time, in one order.
//!
//! The times are of several clocks, and each event says of which, and how far it can be trusted ([`Clock`]). None of them is proof:
//! root can set the guest's clock, and any process the modification times of its files.

mod logins;
mod moment;

use serde::Serialize;
use vmsight_linux::clock::{boot_time, rfc3339};
use vmsight_linux::{Kernel, LinuxError, Listing, ProcessFields};

pub use moment::parse_moment;

use crate::recover::files::{self, CachedFile};
use crate::recover::history::history;
use crate::recover::processes::{Certainty, removed_tasks};

/// Events of one timeline.
const MAX_EVENTS: usize = 1 << 21;

/// What an event is of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The guest as a whole: its boot, and when it was looked at.
    System,
    /// A process that runs.
    Process,
    /// A process that has ended, or is in no list.
    Ended,
    /// A line of the kernel's log.
    Log,
    /// A login, or another thing that is written down with them.
    Login,
    /// A file, directory or link that something of is in memory.
    File,
    /// What was typed into a shell.
    History,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 7] = [
        Kind::System,
        Kind::Process,
        Kind::Ended,
        Kind::Log,
        Kind::Login,
        Kind::File,
        Kind::History,
    ];

    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Kind::System => "system",
            Kind::Process => "process",
            Kind::Ended => "ended",
            Kind::Log => "log",
            Kind::Login => "login",
            Kind::File => "file",
            Kind::History => "history",
        }
    }
}

/// The clock that a time is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clock {
    /// The guest's wall clock now, less the time since boot: if it was set meanwhile, what was written down before is elsewhere.
    SinceBoot,
    /// The processor's own clock, as the kernel's log has it: it stands still while the guest sleeps, and differs from
    /// others by parts in a million.
    Processor,
    /// The wall clock as it was at that moment, to a tick of some milliseconds.
    Wall,
    /// As a program wrote it down, in whole seconds; or as any user could set it.
    Claimed,
}

impl Clock {
    /// How far such a time can be trusted.
    pub fn uncertainty(self) -> &'static str {
        match self {
            Clock::SinceBoot => "moves with the wall clock, if that was set since",
            Clock::Processor => "drifts by milliseconds; too early after sleep; moves with the wall clock",
            Clock::Wall => "a tick, some milliseconds",
            Clock::Claimed => "set by programs: whole seconds, or whatever they wanted",
        }
    }
}

/// Something that happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Event {
    /// When, RFC 3339 in UTC with milliseconds.
    pub time: String,
    /// What it is of.
    pub kind: Kind,
    /// What happened: `started`, `modified`, `typed`, …; of a file's times that are the same, all, with `+` between.
    pub action: String,
    /// The process, where it is one's.
    pub pid: Option<i32>,
    /// That process's name.
    pub name: Option<String>,
    /// The file's path, the log's line, what was typed, the process's arguments.
    pub subject: Option<String>,
    /// Where in the guest the time is kept.
    pub source: &'static str,
    /// How far it can be trusted.
    pub uncertainty: &'static str,
}

/// All events of some kinds, by time; what could not be looked at is a warning.
pub fn timeline(kernel: &Kernel, kinds: &[Kind]) -> Listing<Event> {
    let mut out = Gathered(Listing::default());
    let boot = boot_time(kernel);
    if let Err(error) = &boot {
        out.0.warn(format!("boot: {error}"));
    }
    // Logins are in files, all of which are gone through once.
    let wanted = |kind: &Kind| kinds.contains(kind) || *kind == Kind::File && kinds.contains(&Kind::Login);
    for kind in Kind::ALL.into_iter().filter(wanted) {
        let done = match (kind, &boot) {
            (Kind::System, Ok(boot)) => {
                system(kernel, *boot, &mut out);
                Ok(())
            }
            (Kind::Log, Ok(boot)) => log(kernel, *boot, &mut out),
            (Kind::System | Kind::Log, Err(_)) => Ok(()),
            (Kind::Process, _) => processes(kernel, &mut out),
            (Kind::Ended, _) => ended(kernel, &mut out),
            (Kind::Login, _) => Ok(()),
            (Kind::File, _) => cached_files(kernel, kinds, &mut out),
            (Kind::History, _) => typed(kernel, &mut out),
        };
        if let Err(error) = done {
            out.0.warn(format!("{}: {error}", kind.name()));
        }
    }
    let mut listing = out.0;
    // Texts of one form are in order as the times are. What has one time stays in the order of its source.
    listing.rows.sort_by(|a, b| a.time.cmp(&b.time));
    listing
}

struct Gathered(Listing<Event>);

impl Gathered {
    fn add(&mut self, event: Event) {
        match self.0.rows.len() < MAX_EVENTS {
            true => self.0.rows.push(event),
            false => self.0.warn("cut: there are too many events"),
        }
    }

    fn warnings(&mut self, kind: Kind, warnings: Vec<String>) {
        for warning in warnings {
            self.0.warn(format!("{}: {warning}", kind.name()));
        }
    }
}

fn event(kind: Kind, action: &str, time: String, source: &'static str, clock: Clock) -> Event {
    Event {
        time,
        kind,
        action: action.to_owned(),
        pid: None,
        name: None,
        subject: None,
        source,
        uncertainty: clock.uncertainty(),
    }
}

fn system(kernel: &Kernel, boot: i64, out: &mut Gathered) {
    let info = kernel.info();
    let add = |out: &mut Gathered, action, time: Option<String>| {
        if let Some(time) = time {
            out.add(Event {
                subject: Some(info.banner.trim().to_owned()),
                ..event(Kind::System, action, time, "timekeeper", Clock::SinceBoot)
            });
        }
    };
    add(out, "booted", rfc3339(boot));
    add(out, "looked at", info.time.clone());
}

fn log(kernel: &Kernel, boot: i64, out: &mut Gathered) -> Result<(), LinuxError> {
    let listing = kernel.kmsg()?;
    out.warnings(Kind::Log, listing.warnings);
    for line in listing.rows {
        let since = i64::try_from(line.time_us)
            .ok()
            .and_then(|us| us.checked_mul(1000));
        let Some(time) = since.and_then(|since| rfc3339(boot.checked_add(since)?)) else {
            continue;
        };
        out.add(Event {
            name: line.comm,
            subject: line.text,
            ..event(Kind::Log, "logged", time, "printk_info.ts_nsec", Clock::Processor)
        });
    }
    Ok(())
}

fn processes(kernel: &Kernel, out: &mut Gathered) -> Result<(), LinuxError> {
    let listing = kernel.processes(ProcessFields::START | ProcessFields::CMDLINE)?;
    out.warnings(Kind::Process, listing.warnings);
    let mut without = 0;
    for process in listing.rows {
        let Some(time) = process.start_time else {
            without += 1;
            continue;
        };
        out.add(Event {
            pid: Some(process.pid),
            subject: process.cmdline.map(String::from),
            name: Some(process.name.into()),
            ..event(
                Kind::Process,
                "started",
                time.into(),
                "task_struct.start_boottime",
                Clock::SinceBoot,
            )
        });
    }
    if without > 0 {
        out.0
            .warn(format!("process: {without} have no start that can be read"));
    }
    Ok(())
}

fn ended(kernel: &Kernel, out: &mut Gathered) -> Result<(), LinuxError> {
    let listing = removed_tasks(kernel)?;
    out.warnings(Kind::Ended, listing.warnings);
    for task in listing.rows.into_iter().filter(|task| task.pid == task.tgid) {
        let Some(time) = task.start_time else { continue };
        let how = match (task.exit_code, task.signal) {
            (_, Some(signal)) => format!("killed by signal {signal}"),
            (Some(code), None) => format!("exit code {code}"),
            (None, None) => task.state.to_owned(),
        };
        let sure = match task.certainty {
            Certainty::Certain => "certain",
            Certainty::Likely => "likely",
            Certainty::Doubtful => "doubtful",
        };
        out.add(Event {
            pid: Some(task.pid),
            name: Some(task.name),
            subject: Some(format!("{how}; {sure}")),
            ..event(
                Kind::Ended,
                "started",
                time,
                "task_struct.start_boottime",
                Clock::SinceBoot,
            )
        });
    }
    Ok(())
}

fn cached_files(kernel: &Kernel, kinds: &[Kind], out: &mut Gathered) -> Result<(), LinuxError> {
    let listing = files::list(kernel)?;
    out.warnings(Kind::File, listing.warnings);
    for file in listing.rows {
        if kinds.contains(&Kind::Login) {
            logins::add(kernel, &file, out);
        }
        if !kinds.contains(&Kind::File) {
            continue;
        }
        let subject = subject_of(&file);
        let times = [
            (file.modified, "modified", "inode mtime"),
            (file.changed, "changed", "inode ctime"),
            (file.accessed, "accessed", "inode atime"),
        ];
        for (time, action, source) in together(times) {
            // Programs set modification and access; change is the kernel's.
            let clock = match source {
                "inode ctime" => Clock::Wall,
                _ => Clock::Claimed,
            };
            out.add(Event {
                subject: Some(subject.clone()),
                ..event(Kind::File, &action, time, source, clock)
            });
        }
    }
    Ok(())
}

fn subject_of(file: &CachedFile) -> String {
    let path = match &file.path {
        Some(path) => path.clone(),
        None => format!("{}/{}", file.device, file.inode),
    };
    let note = if file.deleted { " (deleted)" } else { "" };
    format!("{path}{note}")
}

/// A file's times, each once: those that are the same are one event, of the source that is hardest to set.
fn together(times: [(Option<String>, &'static str, &'static str); 3]) -> Vec<(String, String, &'static str)> {
    let mut out: Vec<(String, String, &'static str)> = Vec::new();
    for (time, action, source) in times {
        let Some(time) = time else { continue };
        match out.iter_mut().find(|(known, ..)| *known == time) {
            Some((_, actions, of)) => {
                actions.push('+');
                actions.push_str(action);
                if source == "inode ctime" {
                    *of = source;
                }
            }
            None => out.push((time, action.to_owned(), source)),
        }
    }
    out
}

fn typed(kernel: &Kernel, out: &mut Gathered) -> Result<(), LinuxError> {
    let listing = history(kernel, None)?;
    out.warnings(Kind::History, listing.warnings);
    for entry in listing.rows {
        let Some(time) = entry.time else { continue };
        let source = match entry.form {
            "zsh" => "histent.stim",
            _ => "HIST_ENTRY.timestamp",
        };
        out.add(Event {
            pid: Some(entry.pid),
            name: Some(entry.name),
            subject: Some(entry.command),
            ..event(Kind::History, "typed", time, source, Clock::Claimed)
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_a_file_that_are_the_same_are_one_event() {
        let at = |time: &str| Some(time.to_owned());
        let all = together([
            (at("2"), "modified", "inode mtime"),
            (at("2"), "changed", "inode ctime"),
            (at("3"), "accessed", "inode atime"),
        ]);
        assert_eq!(
            all,
            [
                ("2".to_owned(), "modified+changed".to_owned(), "inode ctime"),
                ("3".to_owned(), "accessed".to_owned(), "inode atime"),
            ]
        );
        let none = together([
            (None, "modified", "inode mtime"),
            (None, "changed", "inode ctime"),
            (None, "accessed", "inode atime"),
        ]);
        assert!(none.is_empty());
    }
}
