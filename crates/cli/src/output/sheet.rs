//! A listing as rows of named values, whatever it is a listing of.

use std::borrow::Cow;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Format, Style};

/// A row with fixed fields.
pub(crate) trait Row: Serialize {
    /// The keys of its JSON form, in order: the columns that can be asked for.
    const COLUMNS: &'static [&'static str];
}

/// Rows of named values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sheet {
    /// Every column there is, in order. They are the keys of each row in JSON, whatever the row at hand has.
    pub(crate) keys: Vec<&'static str>,
    /// Those that a table shows when nobody says.
    pub(crate) columns: &'static [&'static str],
    pub(crate) rows: Vec<Map<String, Value>>,
    pub(crate) warnings: Vec<String>,
}

impl Sheet {
    /// An empty sheet.
    pub(crate) fn with_keys(keys: &[&'static str], columns: &'static [&'static str]) -> Sheet {
        Sheet {
            keys: keys.to_vec(),
            columns,
            ..Sheet::default()
        }
    }

    /// Turns typed rows into a sheet.
    pub(crate) fn new<T: Row>(
        columns: &'static [&'static str],
        rows: &[T],
        warnings: Vec<String>,
    ) -> Result<Sheet> {
        Ok(Sheet {
            keys: T::COLUMNS.to_vec(),
            columns,
            rows: rows.iter().map(to_map).collect::<Result<_>>()?,
            warnings,
        })
    }

    /// Adds a column behind the others, made from each row.
    pub(crate) fn add_column(&mut self, key: &'static str, value: impl Fn(&Map<String, Value>) -> Value) {
        self.keys.push(key);
        for row in &mut self.rows {
            let value = value(row);
            row.insert(key.to_owned(), value);
        }
    }

    /// The columns to print: those asked for, else the view's own in a table and all elsewhere.
    pub(crate) fn shown<'a>(&'a self, style: &'a Style) -> Result<Vec<&'a str>> {
        let Some(asked) = &style.columns else {
            return Ok(match style.format {
                Format::Table => self.columns.to_vec(),
                _ => self.keys.clone(),
            });
        };
        if asked.len() == 1 && asked[0] == "all" {
            return Ok(self.keys.clone());
        }
        if let Some(unknown) = asked.iter().find(|a| !self.keys.contains(&a.as_str())) {
            bail!("no column {unknown:?} here; there are: {}", self.keys.join(", "));
        }
        Ok(asked.iter().map(String::as_str).collect())
    }

    /// The row reduced to some keys; what it does not have is null, and its problems are then none.
    pub(crate) fn pick<'a>(&self, row: &'a Map<String, Value>, keys: &[&str]) -> Cow<'a, Map<String, Value>> {
        if row.len() == keys.len() && row.keys().zip(keys).all(|(a, b)| a == b) {
            return Cow::Borrowed(row);
        }
        let value = |key: &str| match row.get(key) {
            Some(value) => value.clone(),
            None if key == PROBLEMS => Value::Array(Vec::new()),
            None => Value::Null,
        };
        Cow::Owned(keys.iter().map(|k| ((*k).to_owned(), value(k))).collect())
    }

    /// Whether anything is known to be missing or wrong.
    pub(crate) fn is_doubtful(&self) -> bool {
        !self.warnings.is_empty() || self.rows.iter().any(|row| problems(row).next().is_some())
    }
}

/// The JSON object of one typed row.
pub(crate) fn to_map(row: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(row)? {
        Value::Object(map) => Ok(map),
        other => bail!("a row is {other:?}, not an object; this is a bug in vmsight"),
    }
}

/// The column in which a row says what of it is missing or not to be trusted, `"field: reason"` each.
pub(crate) const PROBLEMS: &str = "problems";

/// What a row says is wrong with it.
pub(crate) fn problems(row: &Map<String, Value>) -> impl Iterator<Item = &str> {
    row.get(PROBLEMS)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

/// Why a field of a row is null, where the row says so.
pub(crate) fn reason<'a>(row: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    problems(row).find_map(|p| p.strip_prefix(key)?.strip_prefix(": "))
}

/// Whether a row has a problem that a table of these columns does not show.
pub(crate) fn hides_problems(row: &Map<String, Value>, shown: &[&str]) -> bool {
    if shown.contains(&PROBLEMS) {
        return false;
    }
    let visible = |key: &&str| row.get(*key).is_none_or(Value::is_null) && reason(row, key).is_some();
    // One reason is shown for each empty cell; all others are hidden.
    problems(row).count() > shown.iter().filter(|key| visible(key)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sheet(rows: Value) -> Sheet {
        let Value::Array(rows) = rows else { panic!() };
        Sheet {
            rows: rows.into_iter().filter_map(|r| r.as_object().cloned()).collect(),
            ..Sheet::with_keys(&["pid", "name", "problems"], &["pid", "name"])
        }
    }

    fn asked(columns: &[&str], format: Format) -> Style {
        Style {
            columns: Some(columns.iter().map(|c| (*c).to_owned()).collect()),
            format,
            ..Style::default()
        }
    }

    fn written(sheet: &Sheet, style: &Style) -> String {
        let mut out = Vec::new();
        style.write(sheet, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_do_not_depend_on_the_rows() {
        for rows in [json!([]), json!([{"pid": 1, "name": "init"}])] {
            let sheet = sheet(rows);
            for format in [Format::Table, Format::Json, Format::Jsonl, Format::Csv] {
                assert!(sheet.shown(&asked(&["pid", "problems"], format)).is_ok());
                assert!(sheet.shown(&asked(&["pid", "nonsense"], format)).is_err());
                assert_eq!(
                    sheet.shown(&asked(&["all"], format)).unwrap(),
                    ["pid", "name", "problems"]
                );
            }
        }
    }

    #[test]
    fn json_rows_have_the_same_keys() {
        let sheet = sheet(json!([{"pid": 1, "name": "init", "problems": ["name: odd"]}, {"pid": 2}]));
        let style = Style {
            format: Format::Jsonl,
            ..Style::default()
        };
        assert_eq!(
            written(&sheet, &style),
            "{\"pid\":1,\"name\":\"init\",\"problems\":[\"name: odd\"]}\n\
             {\"pid\":2,\"name\":null,\"problems\":[]}\n"
        );
    }

    #[test]
    fn csv_has_its_header_without_rows_too() {
        let style = Style {
            format: Format::Csv,
            ..Style::default()
        };
        assert_eq!(written(&sheet(json!([])), &style), "pid,name,problems\n");
    }

    #[test]
    fn a_problem_that_no_column_shows_is_marked() {
        let row = |v: Value| v.as_object().cloned().unwrap();
        let hidden = row(json!({"pid": 1, "name": "a", "problems": ["exe: paged out"]}));
        let shown = row(json!({"pid": 1, "name": null, "problems": ["name: paged out"]}));
        let both = row(json!({"pid": 1, "name": null, "problems": ["name: paged out", "exe: paged out"]}));
        assert!(hides_problems(&hidden, &["pid", "name"]));
        assert!(!hides_problems(&shown, &["pid", "name"]));
        assert!(hides_problems(&both, &["pid", "name"]));
        assert!(!hides_problems(&both, &["pid", "problems"]));
        assert!(!hides_problems(&row(json!({"pid": 1})), &["pid"]));

        let mut sheet = sheet(json!([{"pid": 1, "name": "good"}]));
        sheet.rows.push(hidden);
        assert_eq!(
            written(&sheet, &Style::default()),
            "PID  NAME\n  1  good\n  1  a  !\n"
        );
    }
}
