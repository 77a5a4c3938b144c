//! `vmsight translate`: from a virtual address to a physical one, every table entry on the way shown.

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value, json};
use vmsight_arch::paging::{PageFault, Steps};

use crate::{
    Outcome,
    args::Global,
    commands::raw::Where,
    output::{Format, Sheet},
    place::Place,
    session::Session,
};

/// Translate virtual addresses and show the walk.
#[derive(Args, Debug)]
#[command(after_help = "\
Exit code 1 if an address is not mapped. In JSON each address is one object with its `steps`; in a table each
entry read is a row.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Addresses: SYMBOL, SYMBOL+0x10, 0xffff…
    #[arg(required = true, value_name = "ADDRESS")]
    places: Vec<Place>,
    #[command(flatten)]
    space: Where,
}

/// Names of the x86 table levels, PTE first.
const LEVELS: [&str; 5] = ["pte", "pmd", "pud", "p4d", "pgd"];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let space = self.space.address_space(&session)?;
        let mut sheet = Sheet {
            columns: &["gva", "level", "entry", "value", "result"],
            ..Sheet::default()
        };
        let mut missing = false;
        for place in &self.places {
            let gva = session.gva(place)?;
            let outcome = space.translate(gva);
            let (steps, result): (Steps, Value) = match &outcome {
                Ok(t) => (t.steps, format!("{:#x}", t.gpa).into()),
                Err(PageFault { steps, .. }) => {
                    missing = true;
                    (*steps, Value::Null)
                }
            };
            let detail = match &outcome {
                Ok(t) => format!(
                    "{:#x}, {} page, {}",
                    t.gpa,
                    human_size(1u64.checked_shl(u32::from(t.page_shift)).unwrap_or(0)),
                    rights(&t.access)
                ),
                Err(fault) => fault.to_string(),
            };
            if global.output == Format::Table {
                for step in steps.iter() {
                    sheet.rows.push(row([
                        ("gva", format!("{gva:#x}").into()),
                        ("level", level(step.level).into()),
                        ("entry", format!("{:#x}", step.entry_gpa).into()),
                        ("value", format!("{:#x}", step.value).into()),
                        ("result", "".into()),
                    ]));
                }
                if let Some(last) = sheet.rows.last_mut().filter(|_| !steps.is_empty()) {
                    last.insert("result".into(), detail.into());
                } else {
                    sheet.rows.push(row([
                        ("gva", format!("{gva:#x}").into()),
                        ("result", detail.into()),
                    ]));
                }
                continue;
            }
            let mut object = row([
                ("place", place.to_string().into()),
                ("gva", format!("{gva:#x}").into()),
            ]);
            object.insert("gpa".into(), result);
            if let Ok(t) = &outcome {
                object.insert(
                    "page_size".into(),
                    1u64.checked_shl(u32::from(t.page_shift)).into(),
                );
                object.insert("write".into(), t.access.write.into());
                object.insert("user".into(), t.access.user.into());
                object.insert("execute".into(), t.access.execute.into());
                object.insert("accessed".into(), t.access.accessed.into());
                object.insert("dirty".into(), t.access.dirty.into());
                object.insert("global".into(), t.access.global.into());
            } else {
                object.insert("fault".into(), detail.into());
            }
            let steps: Vec<Value> = steps
                .iter()
                .map(|s| {
                    json!({ "level": level(s.level), "entry": format!("{:#x}", s.entry_gpa),
                            "value": format!("{:#x}", s.value) })
                })
                .collect();
            object.insert("steps".into(), steps.into());
            sheet.rows.push(object);
        }
        global.style().print(&sheet)?;
        Ok(if missing { Outcome::Nothing } else { Outcome::Fine })
    }
}

fn row<const N: usize>(pairs: [(&str, Value); N]) -> Map<String, Value> {
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

fn level(level: u8) -> &'static str {
    usize::from(level)
        .checked_sub(1)
        .and_then(|i| LEVELS.get(i))
        .copied()
        .unwrap_or("?")
}

/// Access rights as `rwx` with who may, e.g. `rw- user, accessed dirty`.
fn rights(access: &vmsight_arch::paging::Access) -> String {
    let mut text = format!(
        "r{}{} {}",
        if access.write { 'w' } else { '-' },
        if access.execute { 'x' } else { '-' },
        if access.user { "user" } else { "kernel" }
    );
    for (set, name) in [
        (access.accessed, " accessed"),
        (access.dirty, " dirty"),
        (access.global, " global"),
    ] {
        if set {
            text.push_str(name);
        }
    }
    text
}

/// `4 KiB`, `2 MiB`, `1 GiB`.
pub(crate) fn human_size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >= 1 << shift {
            let whole = bytes >> shift;
            let tenths = ((bytes & ((1 << shift) - 1)) * 10) >> shift;
            return if tenths == 0 {
                format!("{whole} {unit}")
            } else {
                format!("{whole}.{tenths} {unit}")
            };
        }
    }
    format!("{bytes} B")
}
