//! `vmsight info`: what the guest is.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_linux::{Info, Kernel, LinuxError};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Row, Sheet, to_map},
    session::Session,
};

/// What is in JSON one object, and for people a list of its own.
const VMCOREINFO: &str = "vmcoreinfo";

/// What the guest is: kernel, paging, times, name.
#[derive(Args, Debug)]
#[command(after_help = "\
Everything but `evidence` and `chosen_by` is what the guest says of itself. A guest's root can write a second kernel into
memory for us to find; only --thorough looks for all of them and asks the vCPUs which one they run. `other_kernels` are
those found beside it: dead ones of a kexec or warm reset, or decoys. `vmcoreinfo` is what the kernel keeps ready for a crash: in JSON
and CSV all of it, for people with --vmcoreinfo.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// The lines of the kernel's VMCOREINFO note, and nothing else
    #[arg(long)]
    vmcoreinfo: bool,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        if self.vmcoreinfo {
            return vmcoreinfo(&session, kernel);
        }
        let fields = to_map(&kernel.info())?;
        let mut row = Map::new();
        row.insert("target".into(), session.name().into());
        row.insert("profile".into(), kernel.profile().source.to_string().into());
        row.extend(fields);
        let found = kernel.found();
        row.insert("chosen_by".into(), found.map(|f| f.why.as_str()).into());
        let others = found.into_iter().flat_map(|f| {
            let others = f.candidates.iter().enumerate().filter(|(i, _)| *i != f.chosen);
            others.map(|(_, image)| Value::from(format!("{} at {}", image.banner.trim(), image.phys)))
        });
        row.insert("other_kernels".into(), others.collect::<Vec<_>>().into());
        let style = global.style();
        if global.output != Format::Table || style.columns.is_some() {
            let keys = [
                &["target", "profile"],
                Info::COLUMNS,
                &["chosen_by", "other_kernels"],
            ]
            .concat();
            let mut sheet = Sheet::with_keys(&keys, &["release", "hostname"]);
            sheet.rows.push(row);
            session.print(&sheet)?;
            return Ok(Outcome::Fine);
        }
        // For people one field a line.
        let mut sheet = Sheet::with_keys(&["field", "value"], &["field", "value"]);
        for (key, value) in row {
            // A page of numbers is not what they ask for here.
            if value.is_null() || key == VMCOREINFO {
                continue;
            }
            let values = match value {
                Value::Array(items) => items,
                one => vec![one],
            };
            for (i, value) in values.into_iter().enumerate() {
                let mut line = Map::new();
                line.insert(
                    "field".into(),
                    if i == 0 {
                        key.replace('_', " ").into()
                    } else {
                        "".into()
                    },
                );
                line.insert("value".into(), value);
                sheet.rows.push(line);
            }
        }
        let style = crate::output::Style {
            no_headers: true,
            ..style
        };
        session.print_as(&style, &sheet)?;
        Ok(Outcome::Fine)
    }
}

/// A row for each line of the note. None is there: exit code 1.
fn vmcoreinfo(session: &Session, kernel: &Kernel) -> Result<Outcome> {
    let mut sheet = Sheet::with_keys(&["key", "value"], &["key", "value"]);
    match kernel.vmcoreinfo() {
        Ok(note) => {
            for (key, value) in note.lines {
                let mut row = Map::new();
                row.insert("key".into(), key.into());
                row.insert("value".into(), value.into());
                sheet.rows.push(row);
            }
        }
        Err(error @ (LinuxError::NoSymbol { .. } | LinuxError::NotFound(_))) => {
            sheet.warnings.push(format!("there is no VMCOREINFO: {error}"));
        }
        Err(error) => return Err(error).context("reading VMCOREINFO"),
    }
    session.print(&sheet)?;
    Ok(match sheet.rows.is_empty() {
        true => Outcome::Nothing,
        false => Outcome::Fine,
    })
}
