//! `vmsight info`: what the guest is.

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Sheet},
    session::Session,
};

/// What the guest is: kernel, paging, times, name.
#[derive(Args, Debug)]
#[command(after_help = "Everything but `evidence` is what the guest says of itself.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        let Value::Object(mut fields) = serde_json::to_value(kernel.info())? else {
            return Ok(Outcome::Nothing);
        };
        let mut row = Map::new();
        row.insert("target".into(), session.name().into());
        row.insert("profile".into(), kernel.profile().source.to_string().into());
        let problems = fields.remove("problems");
        row.extend(fields);
        if let Some(problems) = problems {
            row.insert("problems".into(), problems);
        }
        let style = global.style();
        if global.output != Format::Table || style.columns.is_some() {
            style.print(&Sheet {
                rows: vec![row],
                columns: &["release", "hostname"],
                warnings: Vec::new(),
            })?;
            return Ok(Outcome::Fine);
        }
        // For people one field a line.
        let mut sheet = Sheet {
            columns: &["field", "value"],
            ..Sheet::default()
        };
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
        crate::output::Style {
            no_headers: true,
            ..style
        }
        .print(&sheet)?;
        Ok(Outcome::Fine)
    }
}
