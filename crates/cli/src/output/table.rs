//! Tables for people: aligned, as wide as the terminal, cut with an ellipsis there and nowhere else.

use std::io::Write;
use std::ops::Range;

use anyhow::Result;
use serde::Serialize;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::{
    Style,
    cell::{escape, escape_into},
    fields::{Fields, Record, Sink},
    sheet::{PROBLEMS, Problems, Sheet},
    terminal,
    text::{self, Kind},
};

/// No cell is longer than this, however wide the terminal; JSON has it whole.
const CELL_LIMIT: usize = 4096;

/// Stands behind a row that has problems which no column shows.
const MARK: &str = "  !";

/// Between columns.
const GAP: usize = 2;

/// Before and behind a title, and a row that has problems, where there are colours: bold, bright yellow.
const TITLE: (&str, &str) = ("\x1b[1m", "\x1b[0m");
const TROUBLE: (&str, &str) = ("\x1b[38;5;11m", "\x1b[39m");

/// Writes a sheet as a table. How many rows are marked.
pub(super) fn write<R: Record>(sheet: &Sheet<R>, style: &Style, out: &mut dyn Write) -> Result<usize> {
    let width = match style.wide {
        true => None,
        false => terminal::width(),
    };
    Table::read(sheet, style)?.write(style, width, style.color.enabled(), out)
}

/// One cell: where its text lies and how many columns it takes on a terminal.
#[derive(Clone, Debug, Default)]
struct Cell {
    text: Range<usize>,
    width: usize,
}

/// What is known of a row besides its cells.
struct RowState {
    /// It has problems that no column shows.
    marked: bool,
    /// It has problems.
    troubled: bool,
}

/// What is known of a column.
#[derive(Clone, Default)]
struct Column {
    title: String,
    /// Of its widest cell or its title.
    width: usize,
    numbers: bool,
    others: bool,
}

impl Column {
    fn is_numeric(&self) -> bool {
        self.numbers && !self.others
    }
}

/// All cells that are shown, and one text that has them all.
struct Table {
    text: String,
    columns: Vec<Column>,
    /// Row by row.
    cells: Vec<Cell>,
    rows: Vec<RowState>,
    /// Cells were cut at [`CELL_LIMIT`].
    shortened: bool,
}

/// The row at hand.
struct Current {
    text: String,
    /// By key of the sheet.
    cells: Vec<(Kind, Range<usize>)>,
    problems: Problems,
    /// The key that has the problems.
    problems_at: Option<usize>,
}

impl Sink for Current {
    fn cell<T: Serialize + ?Sized>(&mut self, column: usize, value: &T) -> serde_json::Result<()> {
        if self.problems_at == Some(column) {
            self.problems.read(value)?;
        }
        let start = self.text.len();
        let kind = text::append(&mut self.text, value)?;
        if let Some(cell) = self.cells.get_mut(column) {
            *cell = (kind, start..self.text.len());
        }
        Ok(())
    }
}

impl Table {
    fn read<R: Record>(sheet: &Sheet<R>, style: &Style) -> Result<Table> {
        let shown = sheet.shown(style)?;
        let places = shown
            .iter()
            .map(|k| sheet.column(k))
            .collect::<Result<Vec<_>>>()?;
        let mut table = Table {
            text: String::new(),
            columns: Vec::with_capacity(shown.len()),
            cells: Vec::with_capacity(shown.len() * sheet.rows.len()),
            rows: Vec::with_capacity(sheet.rows.len()),
            shortened: false,
        };
        for key in &shown {
            let title = match style.no_headers {
                true => String::new(),
                false => escape(&key.to_uppercase()),
            };
            table.columns.push(Column {
                width: title.width(),
                title,
                ..Column::default()
            });
        }
        let current = Current {
            text: String::new(),
            cells: vec![(Kind::Missing, 0..0); sheet.keys.len()],
            problems: Problems::default(),
            problems_at: sheet.column(PROBLEMS).ok(),
        };
        let wanted = |key: &str| key == PROBLEMS || shown.contains(&key);
        let mut fields = Fields::new(&sheet.keys, wanted, current);
        for row in &sheet.rows {
            fields.sink.cells.fill((Kind::Missing, 0..0));
            fields.sink.problems.0.clear();
            fields.take(row)?;
            let Current {
                text,
                cells,
                problems,
                ..
            } = &mut fields.sink;
            // One reason is shown for each empty cell; all others are hidden.
            let mut visible = 0;
            for ((key, place), column) in shown.iter().zip(&places).zip(&mut table.columns) {
                let Some((kind, found)) = cells.get(*place) else {
                    continue;
                };
                match kind {
                    Kind::Number => column.numbers = true,
                    Kind::Missing => {}
                    Kind::Empty | Kind::Other => column.others = true,
                }
                let reason = match kind {
                    Kind::Missing => problems.reason(key),
                    _ => None,
                };
                let place = match (kind, reason) {
                    (Kind::Missing, Some(reason)) => {
                        visible += 1;
                        let start = text.len();
                        text.push('<');
                        escape_into(text, reason);
                        text.push('>');
                        start..text.len()
                    }
                    (Kind::Missing | Kind::Empty, _) => {
                        text.push('-');
                        text.len() - 1..text.len()
                    }
                    (Kind::Number | Kind::Other, _) => found.clone(),
                };
                let cell = limited(text, place, &mut table.shortened);
                column.width = column.width.max(cell.width);
                table.cells.push(cell);
            }
            let problems = problems.0.len();
            table.rows.push(RowState {
                marked: !shown.contains(&PROBLEMS) && problems > visible,
                troubled: problems > 0,
            });
        }
        table.text = fields.sink.text;
        Ok(table)
    }

    /// Writes the table. `terminal` is how many columns there are for it, where that is known.
    fn write(
        &self,
        style: &Style,
        terminal: Option<usize>,
        color: bool,
        out: &mut dyn Write,
    ) -> Result<usize> {
        let marked = self.rows.iter().filter(|row| row.marked).count();
        let mut widths: Vec<usize> = self.columns.iter().map(|c| c.width).collect();
        if let Some(terminal) = terminal {
            let gaps = GAP * widths.len().saturating_sub(1);
            let mark = if marked > 0 { MARK.len() } else { 0 };
            fit(&mut widths, terminal.saturating_sub(gaps + mark));
        }
        let mut line = Line::default();
        if !style.no_headers {
            line.colour = color.then_some(TITLE);
            for (i, (column, width)) in self.columns.iter().zip(&widths).enumerate() {
                let last = i + 1 == widths.len();
                line.cell(
                    &column.title,
                    column.title.width(),
                    *width,
                    column.is_numeric(),
                    last,
                );
            }
            line.end("", out)?;
        }
        let mut cells = self.cells.iter();
        for row in &self.rows {
            line.colour = (color && row.troubled).then_some(TROUBLE);
            for (i, (column, width)) in self.columns.iter().zip(&widths).enumerate() {
                let Some(cell) = cells.next() else { break };
                let text = self.text.get(cell.text.clone()).unwrap_or_default();
                let last = i + 1 == widths.len();
                line.cell(text, cell.width, *width, column.is_numeric(), last);
            }
            line.end(if row.marked { MARK } else { "" }, out)?;
        }
        if self.shortened {
            writeln!(
                out,
                "# cells over {CELL_LIMIT} characters are cut with …; -o json has them whole"
            )?;
        }
        Ok(marked)
    }
}

/// A cell of this text, cut where it is longer than anybody reads.
fn limited(text: &mut String, mut place: Range<usize>, shortened: &mut bool) -> Cell {
    let mut cell = text.get(place.clone()).unwrap_or_default();
    if cell.len() > CELL_LIMIT {
        *shortened = true;
        let mut end = place.start + CELL_LIMIT;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let cut = format!("{}…", text.get(place.start..end).unwrap_or_default());
        place = text.len()..text.len() + cut.len();
        text.push_str(&cut);
        cell = text.get(place.clone()).unwrap_or_default();
    }
    Cell {
        width: if cell.is_ascii() { cell.len() } else { cell.width() },
        text: place,
    }
}

/// Narrows columns until all of them together take no more than there is: the widest first, none to nothing.
fn fit(widths: &mut [usize], available: usize) {
    let mut order: Vec<usize> = widths.to_vec();
    order.sort_unstable();
    let mut left = available;
    for (i, width) in order.iter().enumerate() {
        let columns = order.len() - i;
        if *width <= left / columns {
            left -= width;
            continue;
        }
        // This one and all wider ones share what is left.
        let (share, mut more) = ((left / columns).max(1), left % columns);
        for wide in widths.iter_mut().filter(|w| **w >= *width) {
            *wide = share + usize::from(more > 0 && *wide > share);
            more = more.saturating_sub(1);
        }
        return;
    }
}

/// One line as it is put together.
#[derive(Default)]
struct Line {
    text: String,
    /// Blanks that are only there if something comes behind them.
    blanks: usize,
    /// What stands before and behind each cell.
    colour: Option<(&'static str, &'static str)>,
}

impl Line {
    /// Adds a cell in a column this wide.
    fn cell(&mut self, text: &str, width: usize, column: usize, right: bool, last: bool) {
        let short;
        let (text, width) = if width > column {
            short = cut(text, column);
            (short.as_str(), column)
        } else {
            (text, width)
        };
        let fill = column - width;
        let (before, behind) = match (right, last) {
            (true, true) => (fill, 0),
            (true, false) => (fill, GAP),
            (false, true) => (0, 0),
            (false, false) => (0, fill + GAP),
        };
        self.blanks += before;
        match self.colour {
            Some((start, end)) => {
                self.text.push_str(start);
                self.flush();
                self.text.push_str(text);
                self.blanks = behind;
                self.flush();
                self.text.push_str(end);
            }
            None => {
                let shown = if text.ends_with(' ') {
                    text.trim_end_matches(' ')
                } else {
                    text
                };
                if !shown.is_empty() {
                    self.flush();
                    self.text.push_str(shown);
                }
                self.blanks += text.len() - shown.len() + behind;
            }
        }
    }

    fn flush(&mut self) {
        const BLANKS: &str = "                                                                ";
        while self.blanks > 0 {
            let some = self.blanks.min(BLANKS.len());
            self.text.push_str(BLANKS.get(..some).unwrap_or_default());
            self.blanks -= some;
        }
    }

    /// Writes the line, without the blanks at its end, and begins another.
    fn end(&mut self, mark: &str, out: &mut dyn Write) -> std::io::Result<()> {
        self.text.push_str(mark);
        self.text.push('\n');
        out.write_all(self.text.as_bytes())?;
        self.text.clear();
        self.blanks = 0;
        Ok(())
    }
}

/// The beginning of a text, with an ellipsis, in so many columns.
fn cut(text: &str, columns: usize) -> String {
    let mut left = columns.saturating_sub(1);
    let mut short = String::new();
    for c in text.chars() {
        let width = c.width().unwrap_or(0);
        if width > left {
            break;
        }
        left -= width;
        short.push(c);
    }
    short.push('…');
    // Of a wide character there is no half.
    short.extend(std::iter::repeat_n(' ', left));
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn sheet(rows: Value) -> Sheet {
        let Value::Array(rows) = rows else { panic!() };
        Sheet {
            rows: rows.into_iter().filter_map(|r| r.as_object().cloned()).collect(),
            ..Sheet::with_keys(&["pid", "name", "cmdline", PROBLEMS], &["pid", "name", "cmdline"])
        }
    }

    fn written(sheet: &Sheet, terminal: Option<usize>, color: bool) -> String {
        let (style, mut out) = (Style::default(), Vec::new());
        let table = Table::read(sheet, &style).unwrap();
        table.write(&style, terminal, color, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn fitted<const N: usize>(mut widths: [usize; N], available: usize) -> [usize; N] {
        fit(&mut widths, available);
        widths
    }

    #[test]
    fn the_widest_columns_are_narrowed_first() {
        assert_eq!(fitted([3, 5, 7], 15), [3, 5, 7]);
        assert_eq!(fitted([3, 50, 7], 20), [3, 10, 7]);
        assert_eq!(fitted([30, 50, 7], 28), [11, 10, 7]);
        assert_eq!(fitted([30, 5, 30], 6), [2, 2, 2]);
        assert_eq!(fitted([30, 5, 30], 0), [1, 1, 1]);
        assert_eq!(fitted([0, 9], 0), [0, 1]);
        assert!(fitted([], 7).is_empty());
    }

    #[test]
    fn a_text_is_cut_at_whole_characters() {
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("abcdef", 1), "…");
        assert_eq!(cut("日本語", 4), "日… ");
        assert_eq!(cut("日本語", 5), "日本…");
    }

    #[test]
    fn no_line_is_wider_than_its_terminal() {
        let long = "/usr/bin/something --with many --arguments in one --line";
        let sheet = sheet(json!([
            {"pid": 1, "name": "日本語の名前", "cmdline": long},
            {"pid": 22, "name": "b", "cmdline": "b", "problems": ["exe: paged out"]},
        ]));
        for terminal in 13..100 {
            for line in written(&sheet, Some(terminal), false).lines() {
                assert!(line.width() <= terminal, "{terminal}: {line:?}");
            }
        }
        assert!(written(&sheet, Some(40), false).contains("/usr/bin/somethin…"));
        assert!(written(&sheet, None, false).contains(long));
    }

    #[test]
    fn one_long_cell_pads_no_other_row() {
        let sheet = sheet(json!([
            {"pid": 1, "name": "a", "cmdline": "x".repeat(1000)},
            {"pid": 2, "name": "a", "cmdline": ""},
            {"pid": 3, "name": "", "cmdline": "x"},
        ]));
        let text = written(&sheet, None, false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[2..], ["  2  a", "  3        x"]);
    }

    #[test]
    fn titles_are_bold_and_rows_with_problems_yellow() {
        let sheet = sheet(json!([
            {"pid": 1, "name": "ab", "cmdline": "x"},
            {"pid": 2, "name": "c", "problems": ["cmdline: paged out"]},
        ]));
        assert_eq!(
            written(&sheet, None, true),
            "\x1b[1mPID  \x1b[0m\x1b[1mNAME  \x1b[0m\x1b[1mCMDLINE\x1b[0m\n\
             \x20 1  ab    x\n\
             \x1b[38;5;11m  2  \x1b[39m\x1b[38;5;11mc     \x1b[39m\x1b[38;5;11m<paged out>\x1b[39m\n"
        );
    }
}
