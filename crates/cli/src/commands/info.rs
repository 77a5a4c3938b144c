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
#[command(after_help = "Everything but `evidence` is what the guest says of itself.")]
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
        let style = global.style();
        if global.output != Format::Table || style.columns.is_some() {
            let keys = [&["target", "profile"], Info::COLUMNS].concat();
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
