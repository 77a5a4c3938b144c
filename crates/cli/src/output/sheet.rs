//! A listing as rows of named values, whatever it is a listing of.

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Format, Style,
    fields::{Fields, Record, Sink},
};

/// A row with fixed fields.
pub(crate) trait Row: Serialize {
    /// The keys of its JSON form, in order: the columns that can be asked for.
    const COLUMNS: &'static [&'static str];
}

/// Rows of named values.
#[derive(Clone, Debug)]
pub(crate) struct Sheet<R = Map<String, Value>> {
    /// Every column there is, in order. They are the keys of each row in JSON, whatever the row at hand has.
    pub(crate) keys: Vec<&'static str>,
    /// Those that a table shows when nobody says.
    pub(crate) columns: &'static [&'static str],
    pub(crate) rows: Vec<R>,
    pub(crate) warnings: Vec<String>,
}

impl Sheet {
    /// Rows that have the columns of a listing, and `more` for what was done with them.
    pub(crate) fn of_done(
        listed: &[&'static str],
        more: &[&'static str],
        columns: &'static [&'static str],
        rows: &[impl Serialize],
        warnings: Vec<String>,
    ) -> Result<Sheet> {
        Ok(Sheet {
            keys: [listed, more].concat(),
            columns,
            rows: rows.iter().map(to_map).collect::<Result<_>>()?,
            warnings,
        })
    }

    /// An empty sheet.
    pub(crate) fn with_keys(keys: &[&'static str], columns: &'static [&'static str]) -> Sheet {
        Sheet {
            keys: keys.to_vec(),
            columns,
            rows: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

impl<'a, T: Row> Sheet<&'a T> {
    /// Typed rows as a sheet.
    pub(crate) fn new(columns: &'static [&'static str], rows: &'a [T], warnings: Vec<String>) -> Self {
        Sheet {
            keys: T::COLUMNS.to_vec(),
            columns,
            rows: rows.iter().collect(),
            warnings,
        }
    }
}

impl<R: Record> Sheet<R> {
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

    /// Which of the keys a column is.
    pub(super) fn column(&self, key: &str) -> Result<usize> {
        let column = self.keys.iter().position(|k| *k == key);
        column.with_context(|| format!("there is no column {key:?}; this is a bug in vmsight"))
    }

    /// What stands, in JSON, for a value that a row does not have: null, and its problems are then none.
    pub(super) fn absent(&self, column: usize) -> &'static [u8] {
        match self.keys.get(column) {
            Some(&PROBLEMS) => b"[]",
            _ => b"null",
        }
    }

    /// Whether anything is known to be missing or wrong. Looks through all rows.
    pub(crate) fn is_doubtful(&self) -> Result<bool> {
        let mut fields = Fields::new(&self.keys, |key| key == PROBLEMS, Problems::default());
        for row in &self.rows {
            fields.take(row)?;
            if !fields.sink.0.is_empty() {
                return Ok(true);
            }
        }
        Ok(!self.warnings.is_empty())
    }
}

#[cfg(test)]
impl<R: Record> Sheet<R> {
    /// The rows as whoever reads their JSON sees them.
    pub(crate) fn maps(&self) -> Vec<Map<String, Value>> {
        let style = Style {
            format: Format::Json,
            ..Style::default()
        };
        let mut out = Vec::new();
        style.write(self, &mut out).unwrap();
        serde_json::from_slice(&out).unwrap()
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
#[derive(Default)]
pub(super) struct Problems(pub(super) Vec<String>);

impl Problems {
    pub(super) fn read<T: Serialize + ?Sized>(&mut self, value: &T) -> serde_json::Result<()> {
        self.0.clear();
        if let Value::Array(problems) = serde_json::to_value(value)? {
            self.0.extend(problems.into_iter().filter_map(|p| match p {
                Value::String(problem) => Some(problem),
                _ => None,
            }));
        }
        Ok(())
    }

    /// Why a field of the row is null, where the row says so.
    pub(super) fn reason(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find_map(|p| p.strip_prefix(key)?.strip_prefix(": "))
    }
}

impl Sink for Problems {
    fn cell<T: Serialize + ?Sized>(&mut self, _: usize, value: &T) -> serde_json::Result<()> {
        self.read(value)
    }
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
        let hidden = json!({"pid": 1, "name": "a", "problems": ["exe: paged out"]});
        let shown = json!({"pid": 1, "name": null, "problems": ["name: paged out"]});
        let both = json!({"pid": 1, "name": null, "problems": ["name: paged out", "exe: paged out"]});
        let good = json!({"pid": 1, "name": "good"});
        let sheet = sheet(json!([good, hidden, shown, both]));
        assert_eq!(
            written(&sheet, &Style::default()),
            "PID  NAME\n  1  good\n  1  a  !\n  1  <paged out>\n  1  <paged out>  !\n"
        );
        let marks = |columns: &[&str]| {
            let style = asked(columns, Format::Table);
            written(&sheet, &style).matches("  !\n").count()
        };
        assert_eq!(marks(&["pid"]), 3);
        assert_eq!(marks(&["pid", "problems"]), 0);
    }

    #[test]
    fn a_sheet_is_doubtful_by_a_row_or_a_warning() {
        let good = sheet(json!([{"pid": 1}, {"pid": 2, "problems": []}]));
        assert!(!good.is_doubtful().unwrap());
        assert!(
            sheet(json!([{"pid": 1, "problems": ["exe: paged out"]}, {"pid": 2}]))
                .is_doubtful()
                .unwrap()
        );
        let warnings = vec!["a list is cut".to_owned()];
        assert!(Sheet { warnings, ..good }.is_doubtful().unwrap());
    }
}
