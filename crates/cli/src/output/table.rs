//! Tables for people: aligned, as wide as the terminal, cut with an ellipsis there and nowhere else.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value;

use super::{
    Style,
    cell::{escape, shown},
    sheet::{Sheet, hides_problems, problems, reason},
};

/// No cell is longer than this, however wide the terminal; JSON has it whole.
const CELL_LIMIT: usize = 4096;

/// Stands behind a row that has problems which no column shows.
const MARK: &str = "  !";

pub(super) fn write(sheet: &Sheet, style: &Style, out: &mut dyn Write) -> Result<()> {
    let keys = sheet.shown(style)?;
    let marks: Vec<bool> = sheet.rows.iter().map(|row| hides_problems(row, &keys)).collect();
    let color = style.color.enabled();
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if io::stdout().is_terminal() && !style.wide {
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_truncation_indicator("…");
        if marks.contains(&true)
            && let Some(width) = table.width()
        {
            table.set_width(width.saturating_sub(MARK.len() as u16));
        }
    } else {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    if color {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    if !style.no_headers {
        let titles = keys.iter().map(|k| escape(&k.to_uppercase()));
        table.set_header(titles.map(|title| {
            let cell = Cell::new(title);
            if color {
                cell.add_attribute(comfy_table::Attribute::Bold)
            } else {
                cell
            }
        }));
    }
    let mut shortened = false;
    for row in &sheet.rows {
        let coloured = color && problems(row).next().is_some();
        let cells = keys.iter().map(|key| {
            let text = match row.get(*key) {
                None | Some(Value::Null) => match reason(row, key) {
                    Some(why) => format!("<{}>", escape(why)),
                    None => "-".to_owned(),
                },
                Some(Value::Array(none)) if none.is_empty() => "-".to_owned(),
                Some(v) => shown(v),
            };
            limit(text, &mut shortened)
        });
        let cells = cells.map(|text| {
            let cell = Cell::new(text);
            if coloured {
                cell.fg(comfy_table::Color::Yellow)
            } else {
                cell
            }
        });
        let mut line = comfy_table::Row::from(cells.collect::<Vec<_>>());
        if io::stdout().is_terminal() && !style.wide {
            line.max_height(1);
        }
        table.add_row(line);
    }
    for (i, key) in keys.iter().copied().enumerate() {
        let numeric = sheet
            .rows
            .iter()
            .all(|r| matches!(r.get(key), None | Some(Value::Null | Value::Number(_))))
            && sheet
                .rows
                .iter()
                .any(|r| matches!(r.get(key), Some(Value::Number(_))));
        if let Some(column) = table.column_mut(i) {
            column.set_padding((0, if i + 1 == keys.len() { 0 } else { 2 }));
            if numeric {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    // Every row is one line: cells have no line breaks, and on a terminal their height is limited.
    let header = (!style.no_headers).then_some(&false);
    for (line, mark) in table.lines().zip(header.into_iter().chain(&marks)) {
        let mark = if *mark { MARK } else { "" };
        writeln!(out, "{}{mark}", line.trim_end())?;
    }
    if shortened {
        writeln!(
            out,
            "# cells over {CELL_LIMIT} characters are cut with …; -o json has them whole"
        )?;
    }
    Ok(())
}

fn limit(text: String, shortened: &mut bool) -> String {
    if text.len() <= CELL_LIMIT {
        return text;
    }
    *shortened = true;
    let mut cut = CELL_LIMIT;
    while !text.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}…", &text[..cut])
}
