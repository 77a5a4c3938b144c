//! `vmsight timeline`: everything that has a time.

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use vmsight_analysis::timeline::{Event, Kind, parse_moment, timeline};
use vmsight_linux::clock::rfc3339;

use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row, Sheet},
    session::Session,
};

/// Everything in memory that has a time, in order.
#[derive(Args, Debug)]
#[command(after_help = "\
Boot and now; starts of processes, those that have ended too, as far as their remains were not used again; lines of the
kernel's log; logins, as utmp, wtmp, btmp, lastlog and systemd's logind have written them to files that are in memory;
modification, change and access of files that something of is in memory; what was typed into shells. Times are in UTC.
`source` says where in the guest a time is kept, `uncertainty` how far it can be trusted: root can set the guest's clock, and
every user his files' times.

What cannot be seen: when a process ended, a module was loaded (but for what the log says of it) or a connection was made: the
kernel keeps no time of these. Of a module in sysfs there is only when somebody first looked at it there.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Nothing before this: 2026-11-28, 2026-11-28T09:30, 2026-11-28T09:30:15.250+01:00; UTC where no offset is given
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Nothing after this
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// Only these kinds
    #[arg(long, value_name = "KIND,…", value_delimiter = ',')]
    kind: Vec<Which>,
}

/// Kinds of events.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Which {
    /// Boot, and when the guest was looked at
    System,
    /// Processes that run
    Process,
    /// Processes that have ended, or are in no list
    Ended,
    /// The kernel's log
    Log,
    /// Logins and logouts, failed ones too
    Login,
    /// Files of which something is in memory
    File,
    /// What was typed into shells
    History,
}

impl From<Which> for Kind {
    fn from(which: Which) -> Kind {
        match which {
            Which::System => Kind::System,
            Which::Process => Kind::Process,
            Which::Ended => Kind::Ended,
            Which::Log => Kind::Log,
            Which::Login => Kind::Login,
            Which::File => Kind::File,
            Which::History => Kind::History,
        }
    }
}

/// A moment in the form that events have theirs in: as texts they are in order.
#[derive(Clone, Debug)]
struct Moment(String);

fn moment(text: &str) -> Result<Moment, String> {
    let parsed = parse_moment(text).and_then(rfc3339);
    parsed
        .map(Moment)
        .ok_or_else(|| "no moment in ISO 8601, such as 2026-11-28T09:30:15Z".to_owned())
}

impl Row for Event {
    const COLUMNS: &'static [&'static str] = &[
        "time",
        "kind",
        "action",
        "pid",
        "name",
        "subject",
        "source",
        "uncertainty",
    ];
}

const COLUMNS: &[&str] = &["time", "kind", "action", "pid", "name", "subject"];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        if let (Some(since), Some(until)) = (&self.since, &self.until) {
            ensure!(since.0 <= until.0, "--since is after --until");
        }
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "gathering times");
        let kinds: Vec<Kind> = match self.kind.as_slice() {
            [] => Kind::ALL.to_vec(),
            some => some.iter().map(|which| (*which).into()).collect(),
        };
        let kernel = session.kernel().context("gathering times")?;
        let mut listing = timeline(kernel, &kinds);
        drop(progress);
        listing.rows.retain(|event| self.wants(event));
        let any = !listing.rows.is_empty();
        session.print(&Sheet::new(COLUMNS, &listing.rows, listing.warnings))?;
        session.let_go(listing.rows);
        Ok(if any { Outcome::Fine } else { Outcome::Nothing })
    }

    fn wants(&self, event: &Event) -> bool {
        self.since.as_ref().is_none_or(|since| since.0 <= event.time)
            && self.until.as_ref().is_none_or(|until| event.time <= until.0)
    }
}
