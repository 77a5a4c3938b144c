//! A listing as rows of named values, whatever it is a listing of.

use std::borrow::Cow;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Format, Style};

/// What a listing is called and which of its fields a table shows when nobody says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    /// Keys of the default columns, in order.
    pub(crate) columns: &'static [&'static str],
}

/// Rows of named values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sheet {
    pub(crate) rows: Vec<Map<String, Value>>,
    pub(crate) columns: &'static [&'static str],
    pub(crate) warnings: Vec<String>,
}

impl Sheet {
    /// Turns typed rows into a sheet.
    pub(crate) fn new<T: Serialize>(view: View, rows: &[T], warnings: Vec<String>) -> Result<Sheet> {
        let rows = rows
            .iter()
            .map(|r| match serde_json::to_value(r)? {
                Value::Object(map) => Ok(map),
                other => bail!("a row is {other:?}, not an object; this is a bug in vmsight"),
            })
            .collect::<Result<_>>()?;
        Ok(Sheet {
            rows,
            columns: view.columns,
            warnings,
        })
    }

    /// Every key any row has, in the order of the first row that has it.
    pub(crate) fn all_keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for row in &self.rows {
            if row.keys().all(|k| seen.contains(k)) {
                continue;
            }
            for key in row.keys() {
                if seen.insert(key.clone()) {
                    keys.push(key.clone());
                }
            }
        }
        keys
    }

    /// The columns to print: those asked for, else the view's own in a table and all (`None`) elsewhere.
    pub(crate) fn keys(&self, style: &Style) -> Result<Option<Vec<String>>> {
        let Some(asked) = &style.columns else {
            return Ok(match style.format {
                Format::Table => Some(self.columns.iter().map(|c| (*c).to_owned()).collect()),
                _ => None,
            });
        };
        if asked.len() == 1 && asked[0] == "all" {
            return Ok(Some(self.all_keys()));
        }
        if !self.rows.is_empty() {
            let known = self.all_keys();
            if let Some(unknown) = asked
                .iter()
                .find(|a| !known.contains(a) && !self.columns.contains(&a.as_str()))
            {
                bail!("no column {unknown:?} here; there are: {}", known.join(", "));
            }
        }
        Ok(Some(asked.clone()))
    }

    /// The row reduced to some keys (a missing one is null), or as it is.
    pub(crate) fn pick<'a>(
        &self,
        row: &'a Map<String, Value>,
        keys: Option<&[String]>,
    ) -> Cow<'a, Map<String, Value>> {
        match keys {
            None => Cow::Borrowed(row),
            Some(keys) => Cow::Owned(
                keys.iter()
                    .map(|k| (k.clone(), row.get(k).cloned().unwrap_or(Value::Null)))
                    .collect(),
            ),
        }
    }
}

/// Why a field of a row is null, where the row says so in its `problems` (`"field: reason"`).
pub(crate) fn reason<'a>(row: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    row.get("problems")?
        .as_array()?
        .iter()
        .filter_map(Value::as_str)
        .find_map(|p| p.strip_prefix(key)?.strip_prefix(": "))
}
