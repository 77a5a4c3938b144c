//! `vmsight info`: what the guest is.

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value};
use vmsight_linux::Info;

use crate::{
    Outcome,
    args::Global,
    output::{Format, Row, Sheet, to_map},
    session::Session,
};

/// What the guest is: kernel, paging, times, name.
#[derive(Args, Debug)]
#[command(after_help = "\
Everything but `evidence` and `chosen_by` is what the guest says of itself. A guest's root can write a second kernel into
memory for us to find; only --thorough looks for all of them and asks the vCPUs which one they run. `other_kernels` are
those found beside it: dead ones of a kexec or warm reset, or decoys.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
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
            if value.is_null() {
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
