//! The writers held against the long way: each row as a map of values, each cell as a text of its own.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::{Map, Value};
use unicode_width::UnicodeWidthStr;

use super::cell::{escape, field, shown};
use super::{Fields, Format, PROBLEMS, Record, Row, Sheet, Sink, Style, json, to_map};

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Running,
    Asleep,
}

#[derive(Serialize)]
struct Wrapped(u16);

#[derive(Serialize)]
struct Counters {
    received: u64,
    sent: u64,
}

/// As the libraries write addresses.
fn hex<S: serde::Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(n) => serializer.collect_str(&format_args!("{n:#x}\n")),
        None => serializer.serialize_none(),
    }
}

/// A row with a value of every kind.
#[derive(Serialize)]
struct Sample {
    id: i32,
    name: String,
    state: State,
    size: Option<u64>,
    load: f64,
    small: Wrapped,
    letter: char,
    good: bool,
    #[serde(rename = "type")]
    kind: &'static str,
    list: Vec<String>,
    pair: (u8, Option<u8>),
    nothing: (),
    #[serde(serialize_with = "hex")]
    flags: Option<u64>,
    text: Option<String>,
    problems: Vec<String>,
}

impl Row for Sample {
    const COLUMNS: &'static [&'static str] = &[
        "id", "name", "state", "size", "load", "small", "letter", "good", "type", "list", "pair", "nothing",
        "flags", "text", PROBLEMS,
    ];
}

fn sample(id: i32, name: &str, text: Option<&str>, problems: &[&str]) -> Sample {
    Sample {
        id,
        name: name.to_owned(),
        state: if id % 2 == 0 {
            State::Running
        } else {
            State::Asleep
        },
        size: u64::try_from(id).ok().map(|n| n << 40),
        load: f64::from(id) / 3.0,
        small: Wrapped(7),
        letter: if id == 1 { '"' } else { 'x' },
        good: id > 0,
        kind: "=1+1",
        list: vec![name.to_owned(); usize::try_from(id).unwrap_or(0)],
        pair: (1, None),
        nothing: (),
        flags: (id > 1).then_some(u64::MAX),
        text: text.map(str::to_owned),
        problems: problems.iter().map(|p| (*p).to_owned()).collect(),
    }
}

fn samples() -> Vec<Sample> {
    vec![
        sample(0, "init", Some("/sbin/init splash   "), &[]),
        sample(1, "", None, &["text: paged out"]),
        sample(2, "日本\u{202e}exe.png", Some(""), &["list: it has no end"]),
        sample(
            3,
            "a\u{9b}31m\x1b[2J\\\t\"b\"",
            Some("\u{7f}"),
            &["size: a", "text: b"],
        ),
        sample(-4, "-largé", None, &["size: not\nthere"]),
        sample(5, &"long ".repeat(1000), Some(&"é".repeat(4000)), &[]),
        sample(6, "null", Some("[]"), &["flags: x"]),
    ]
}

/// A row with computed columns on both sides.
struct Marked<'a>(&'a Sample);

impl Record for Marked<'_> {
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> serde_json::Result<()> {
        to.field("depth", &self.0.id.abs())?;
        self.0.fields(to)?;
        to.field("mark", self.0.kind)
    }
}

/// What a listing is made of, the long way: its keys, the columns of its table, its rows.
struct Long {
    keys: Vec<&'static str>,
    table: &'static [&'static str],
    rows: Vec<Map<String, Value>>,
}

impl Long {
    fn written(&self, style: &Style) -> String {
        let keys: Vec<&str> = match (&style.columns, style.format) {
            (Some(columns), _) if columns == &["all"] => self.keys.clone(),
            (Some(columns), _) => columns.iter().map(String::as_str).collect(),
            (None, Format::Table) => self.table.to_vec(),
            (None, _) => self.keys.clone(),
        };
        let value = |row: &Map<String, Value>, key: &str| match row.get(key) {
            Some(value) => value.clone(),
            None if key == PROBLEMS => Value::Array(Vec::new()),
            None => Value::Null,
        };
        let picked = |row: &Map<String, Value>| -> Map<String, Value> {
            keys.iter().map(|k| ((*k).to_owned(), value(row, k))).collect()
        };
        let text = |value: &Value| {
            let mut out = Vec::new();
            json::write(&mut out, value).unwrap();
            String::from_utf8(out).unwrap()
        };
        let objects = || {
            self.rows
                .iter()
                .map(|r| text(&Value::Object(picked(r))))
                .collect::<Vec<_>>()
        };
        match style.format {
            Format::Table => self.table(&keys, style),
            Format::Json => format!("[\n{}\n]\n", objects().join(",\n")),
            Format::Jsonl => objects().iter().map(|o| format!("{o}\n")).collect(),
            Format::Sarif | Format::Html => unreachable!("not a listing's"),
            Format::Csv => {
                let mut csv = csv::Writer::from_writer(Vec::new());
                csv.write_record(keys.iter().map(|k| field(k))).unwrap();
                for row in &self.rows {
                    csv.write_record(keys.iter().map(|k| match value(row, k) {
                        Value::Null => String::new(),
                        Value::String(s) => field(&s),
                        other => text(&other),
                    }))
                    .unwrap();
                }
                String::from_utf8(csv.into_inner().unwrap()).unwrap()
            }
        }
    }

    fn table(&self, keys: &[&str], style: &Style) -> String {
        let problems = |row: &Map<String, Value>| -> Vec<String> {
            let list = row
                .get(PROBLEMS)
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default();
            list.iter()
                .filter_map(|p| p.as_str().map(str::to_owned))
                .collect()
        };
        let reason = |row: &Map<String, Value>, key: &str| {
            problems(row)
                .iter()
                .find_map(|p| p.strip_prefix(&format!("{key}: ")).map(str::to_owned))
        };
        let mut cut = false;
        let mut lines: Vec<Vec<String>> = vec![keys.iter().map(|k| k.to_uppercase()).collect()];
        let mut marks = vec![""];
        for row in &self.rows {
            let cell = |key: &&str| {
                let text = match row.get(*key) {
                    None | Some(Value::Null) => {
                        reason(row, key).map_or("-".to_owned(), |why| format!("<{}>", escape(&why)))
                    }
                    Some(Value::Array(none)) if none.is_empty() => "-".to_owned(),
                    Some(value) => shown(value),
                };
                let whole = text.len() <= 4096;
                let short: Cow<'_, str> = if whole {
                    Cow::Borrowed(&text)
                } else {
                    let end = (0..=4096).rev().find(|n| text.is_char_boundary(*n)).unwrap();
                    Cow::Owned(format!("{}…", &text[..end]))
                };
                (short.into_owned(), whole)
            };
            let cells: Vec<_> = keys.iter().map(cell).collect();
            cut |= cells.iter().any(|(_, whole)| !whole);
            lines.push(cells.into_iter().map(|(text, _)| text).collect());
            let visible = keys
                .iter()
                .filter(|k| row.get(**k).is_none_or(Value::is_null) && reason(row, k).is_some());
            let hidden = !keys.contains(&PROBLEMS) && problems(row).len() > visible.count();
            marks.push(if hidden { "  !" } else { "" });
        }
        let numeric = |key: &str| {
            let values = || {
                self.rows
                    .iter()
                    .filter_map(|row| row.get(key))
                    .filter(|v| !v.is_null())
            };
            values().all(Value::is_number) && values().next().is_some()
        };
        let width = |at: usize| lines.iter().map(|line| line[at].width()).max().unwrap_or(0);
        let mut out = String::new();
        for (line, mark) in lines.iter().zip(marks).skip(usize::from(style.no_headers)) {
            let mut text = String::new();
            for (at, (cell, key)) in line.iter().zip(keys).enumerate() {
                let fill = " ".repeat(width(at) - cell.width());
                let (before, behind) = if numeric(key) { (&*fill, "") } else { ("", &*fill) };
                text.push_str(&format!("{before}{cell}{behind}  "));
            }
            out.push_str(&format!("{}{mark}\n", text.trim_end()));
        }
        if cut {
            out.push_str("# cells over 4096 characters are cut with …; -o json has them whole\n");
        }
        out
    }
}

fn written<R: Record>(sheet: &Sheet<R>, style: &Style) -> String {
    let mut out = Vec::new();
    style.write(sheet, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// Every format, with several choices of columns.
fn assert_same<R: Record>(sheet: &Sheet<R>, rows: Vec<Map<String, Value>>) {
    let long = Long {
        keys: sheet.keys.clone(),
        table: sheet.columns,
        rows,
    };
    let choices: [Option<&[&str]>; 6] = [
        None,
        Some(&["all"]),
        Some(&["text", "id"]),
        Some(&["name"]),
        Some(&["list", "load", "flags", "pair", PROBLEMS]),
        Some(&["size", "good", "text"]),
    ];
    for format in [Format::Table, Format::Json, Format::Jsonl, Format::Csv] {
        for columns in choices {
            let style = Style {
                format,
                columns: columns.map(|c| c.iter().map(|c| (*c).to_owned()).collect()),
                // No terminal, wherever the test is run.
                wide: true,
                color: super::Color::Never,
                ..Style::default()
            };
            assert_eq!(
                written(sheet, &style),
                long.written(&style),
                "{format:?} {columns:?}"
            );
        }
    }
}

const TABLE: &[&str] = &["id", "name", "state", "size", "type", "text"];

#[test]
fn typed_rows_are_written_as_their_values_would_be() {
    let rows = samples();
    let maps = rows.iter().map(|r| to_map(r).unwrap()).collect();
    assert_same(&Sheet::new(TABLE, &rows, Vec::new()), maps);
}

#[test]
fn computed_columns_are_written_like_the_others() {
    let rows = samples();
    let map = |row: &Sample| {
        let mut map = Map::new();
        map.insert("depth".to_owned(), row.id.abs().into());
        map.extend(to_map(row).unwrap());
        map.insert("mark".to_owned(), row.kind.into());
        map
    };
    let maps = rows.iter().map(map).collect();
    let sheet = Sheet {
        keys: [&["depth"], Sample::COLUMNS, &["mark"]].concat(),
        columns: &["mark", "depth", "name"],
        rows: rows.iter().map(Marked).collect(),
        warnings: Vec::new(),
    };
    assert_same(&sheet, maps);
}

#[test]
fn rows_that_lack_keys_or_have_nested_values_are_written_as_they_are() {
    let counters = Counters {
        received: 1,
        sent: u64::MAX,
    };
    let mut maps: Vec<_> = samples().iter().map(|r| to_map(r).unwrap()).collect();
    for (i, map) in maps.iter_mut().enumerate() {
        map.remove(["id", "name", "problems", "text"][i % 4]);
        map.insert("unknown".to_owned(), 1.into());
        map.insert("load".to_owned(), serde_json::to_value(&counters).unwrap());
    }
    let sheet = Sheet {
        rows: maps.clone(),
        ..Sheet::with_keys(Sample::COLUMNS, TABLE)
    };
    assert_same(&sheet, maps);
}

#[test]
fn a_column_asked_for_twice_is_there_twice_where_that_can_be() {
    let rows = [sample(1, "a", None, &[])];
    let sheet = Sheet::new(TABLE, &rows, Vec::new());
    let twice = |format| {
        let style = Style {
            format,
            columns: Some(vec!["id".to_owned(), "id".to_owned()]),
            ..Style::default()
        };
        written(&sheet, &style)
    };
    assert_eq!(twice(Format::Table), "ID  ID\n 1   1\n");
    assert_eq!(twice(Format::Csv), "id,id\n1,1\n");
    assert_eq!(twice(Format::Jsonl), "{\"id\":1}\n");
}
