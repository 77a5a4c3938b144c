//! One HTML page that needs nothing else, and on which what a guest wrote is text.
//!
//! The page's own style and script are the only ones that a browser may use: the Content-Security-Policy has their digests, and forbids
//! everything else, so that a fault in [`escaped`] would still not run anything.

use std::fmt::Write;

use base64ct::{Base64, Encoding};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::output::shown;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");
/// Rows of one table, and characters of one cell: a guest can make as many as it likes.
const MAX_ROWS: usize = 50_000;
const MAX_CELL: usize = 4096;

/// A table of the page.
pub(super) struct Table {
    id: &'static str,
    title: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Row>,
    left_out: usize,
    /// What is to be said above it.
    pub(super) note: String,
}

struct Row {
    cells: Vec<String>,
    /// A word by which it can be coloured.
    class: &'static str,
    below: Vec<String>,
}

impl Table {
    pub(super) fn new(id: &'static str, title: &'static str, columns: &'static [&'static str]) -> Self {
        Self {
            id,
            title,
            columns,
            rows: Vec::new(),
            left_out: 0,
            note: String::new(),
        }
    }

    /// Adds a row of what has these names.
    pub(super) fn add(&mut self, row: &Map<String, Value>) {
        if self.rows.len() >= MAX_ROWS {
            self.left_out += 1;
            return;
        }
        let cell = |column: &&str| row.get(*column).map_or_else(String::new, cell);
        let class = ["severity", "result"]
            .into_iter()
            .find_map(|key| row.get(key)?.as_str())
            .map_or("", class);
        self.rows.push(Row {
            cells: self.columns.iter().map(cell).collect(),
            class,
            below: Vec::new(),
        });
    }

    /// What is shown below the row that was added last.
    pub(super) fn below(&mut self, lines: Vec<String>) {
        if let Some(row) = self.rows.last_mut().filter(|_| self.left_out == 0) {
            row.below = lines
                .iter()
                .map(|line| cell(&Value::from(line.as_str())))
                .collect();
        }
    }
}

/// The page as it grows.
pub(super) struct Page {
    html: String,
    links: String,
    title: String,
}

impl Page {
    pub(super) fn new(title: &str) -> Self {
        Self {
            html: String::new(),
            links: String::new(),
            title: cell(&Value::from(title)),
        }
    }

    /// Names and values, at the top.
    pub(super) fn summary(&mut self, rows: &[(String, Value)]) {
        self.html.push_str("<table id=\"summary\"><tbody>\n");
        for (name, value) in rows {
            let name = cell(&Value::from(name.as_str()));
            let _ = writeln!(
                self.html,
                "<tr><th scope=\"row\">{name}</th><td>{}</td></tr>",
                cell(value)
            );
        }
        self.html.push_str("</tbody></table>\n");
    }

    pub(super) fn table(&mut self, table: &Table) {
        let (id, title, count) = (table.id, table.title, table.rows.len() + table.left_out);
        let _ = write!(self.links, "<a href=\"#{id}\">{title}&nbsp;{count}</a> ");
        let html = &mut self.html;
        let _ = writeln!(html, "<section id=\"{id}\"><h2>{title} <span>{count}</span></h2>");
        if !table.note.is_empty() {
            let _ = writeln!(html, "<p>{}</p>", escaped(&table.note));
        }
        if table.left_out > 0 {
            let _ = writeln!(html, "<p>{} more rows are left out.</p>", table.left_out);
        }
        if table.rows.is_empty() {
            html.push_str("<p class=\"none\">none</p></section>\n");
            return;
        }
        html.push_str("<div class=\"wide\"><table class=\"sortable\"><thead><tr>");
        for column in table.columns {
            let _ = write!(html, "<th scope=\"col\">{}</th>", column.replace('_', " "));
        }
        html.push_str("</tr></thead>\n<tbody>\n");
        for row in &table.rows {
            let _ = write!(html, "<tr class=\"{}\">", row.class);
            for (cell, column) in row.cells.iter().zip(table.columns) {
                let _ = write!(html, "<td>{cell}");
                if *column == "explanation" && !row.below.is_empty() {
                    html.push_str("<details><summary>evidence</summary><ul>");
                    for line in &row.below {
                        let _ = write!(html, "<li>{line}</li>");
                    }
                    html.push_str("</ul></details>");
                }
                html.push_str("</td>");
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</tbody></table></div></section>\n");
    }

    pub(super) fn end(self) -> String {
        let digest = |text: &str| Base64::encode_string(&Sha256::digest(text));
        let Page { html, links, title } = self;
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; base-uri 'none'; form-action 'none'",
            digest(STYLE),
            digest(SCRIPT)
        );
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
             <meta name=\"viewport\" content=\"width=device-width\"><meta name=\"referrer\" content=\"no-referrer\">\n\
             <link rel=\"icon\" href=\"data:,\"><title>{title}</title>\n<style>{STYLE}</style></head>\n\
             <body><h1>{title}</h1>\n<nav>{links}</nav>\n{html}\
             <footer>vmsight {}. Everything here was read out of the guest's memory; whoever owns the guest may have written it.</footer>\n\
             <script>{SCRIPT}</script></body></html>\n",
            env!("CARGO_PKG_VERSION")
        )
    }
}

/// How rows are coloured: words of ours, never the guest's.
fn class(word: &str) -> &'static str {
    match word {
        "critical" | "high" => "bad",
        "medium" | "findings" => "odd",
        "low" | "not checked" => "low",
        _ => "",
    }
}

/// A value as a cell: short enough, without characters that deceive, and with none that HTML knows.
fn cell(value: &Value) -> String {
    if value.is_null() {
        return String::new();
    }
    let text = match value {
        // Sentences one a line, words in one line.
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(shown).collect();
            let sentences = items.iter().any(|item| item.contains(' '));
            items.join(if sentences { "\n" } else { ", " })
        }
        one => shown(one),
    };
    let mut short: String = text.chars().take(MAX_CELL).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    escaped(&short)
}

/// Text that is text wherever in HTML it stands.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '`' => out.push_str("&#96;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn whatever_a_guest_writes_is_text() {
        let hostile =
            "</td></table><script>alert('x')</script><img src=x onerror=\"y\">\u{202e}\u{1b}[2J&amp;";
        let mut table = Table::new("t", "T", &["severity", "explanation"]);
        table.add(&map(
            json!({"severity": hostile, "explanation": [hostile, {"a": hostile}]}),
        ));
        table.below(vec![hostile.to_owned()]);
        let mut page = Page::new(hostile);
        page.summary(&[(hostile.to_owned(), json!(hostile))]);
        page.table(&table);
        let html = page.end();
        assert_eq!(html.matches("<script>").count(), 1, "its own");
        assert_eq!(html.matches("<img").count() + html.matches("</table>").count(), 2);
        assert_eq!(html.matches("&lt;script&gt;alert(&#39;x&#39;)").count(), 8);
        assert!(!html.contains('\u{202e}') && !html.contains('\u{1b}'));
        assert!(html.contains("&amp;amp;"));
    }

    #[test]
    fn a_page_has_no_more_than_can_be_shown() {
        let mut table = Table::new("t", "T", &["a"]);
        let row = map(json!({"a": 1}));
        (0..MAX_ROWS + 3).for_each(|_| table.add(&row));
        assert_eq!((table.rows.len(), table.left_out), (MAX_ROWS, 3));
        let long = cell(&json!("<".repeat(MAX_CELL + 1)));
        assert_eq!(long, format!("{}…", "&lt;".repeat(MAX_CELL)));
    }

    #[test]
    fn the_policy_has_the_digests_of_what_is_on_the_page() {
        let html = Page::new("t").end();
        for (open, close, name) in [
            ("<style>", "</style>", "style-src"),
            ("<script>", "</script>", "script-src"),
        ] {
            let (_, rest) = html.split_once(open).expect("the element");
            let (text, _) = rest.split_once(close).expect("its end");
            let digest = Base64::encode_string(&Sha256::digest(text));
            assert!(html.contains(&format!("{name} 'sha256-{digest}'")), "{name}");
        }
        assert!(!html.contains("http://") && !html.contains("https://"));
    }
}
