//! `vmsight translate`: from a virtual address to a physical one, every table entry on the way shown.

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value};
use vmsight_arch::Gva;
use vmsight_arch::paging::{PageFault, Steps, Translation};

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
Exit code 1 if an address is not mapped. A table has a row for each entry read. JSON, CSV and --columns have a row for
each address: pml5 to pt are the values of the entries met (null where the walk did not come there), `entries` their
physical addresses from the top down.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Addresses: SYMBOL, SYMBOL+0x10, 0xffff…
    #[arg(required = true, value_name = "ADDRESS")]
    places: Vec<Place>,
    #[command(flatten)]
    space: Where,
}

/// The processor's names of the x86 tables, the last one's first: those of Linux change with the number of levels.
const LEVELS: [&str; 5] = ["pt", "pd", "pdpt", "pml4", "pml5"];

/// One row an address, as programs want it: the entries by the names of their levels.
const COLUMNS: &[&str] = &[
    "place",
    "gva",
    "gpa",
    "page_size",
    "write",
    "user",
    "execute",
    "accessed",
    "dirty",
    "global",
    "fault",
    "pml5",
    "pml4",
    "pdpt",
    "pd",
    "pt",
    "entries",
];

/// One row an entry, as people want it.
const WALK: &[&str] = &["gva", "level", "entry", "value", "result"];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let space = self.space.address_space(&session)?;
        let as_walk = global.output == Format::Table && global.columns.is_none();
        let mut sheet = match as_walk {
            true => Sheet::with_keys(WALK, WALK),
            false => Sheet::with_keys(COLUMNS, &["gva", "gpa"]),
        };
        let mut missing = false;
        for place in &self.places {
            let gva = session.gva(place, self.space.cpu)?;
            let outcome = space.translate(gva);
            missing |= outcome.is_err();
            if as_walk {
                sheet.rows.extend(walk(gva, &outcome));
            } else {
                sheet.rows.push(object(place, gva, &outcome));
            }
        }
        session.print(&sheet)?;
        Ok(if missing { Outcome::Nothing } else { Outcome::Fine })
    }
}

fn steps(outcome: &Result<Translation, PageFault>) -> Steps {
    match outcome {
        Ok(translation) => translation.steps,
        Err(fault) => fault.steps,
    }
}

/// A row for each entry read, the result in the last one's.
fn walk(gva: Gva, outcome: &Result<Translation, PageFault>) -> Vec<Map<String, Value>> {
    let result = match outcome {
        Ok(t) => format!(
            "{:#x}, {} page, {}",
            t.gpa,
            human_size(1u64.checked_shl(u32::from(t.page_shift)).unwrap_or(0)),
            rights(&t.access)
        ),
        Err(fault) => fault.to_string(),
    };
    let mut rows: Vec<_> = steps(outcome)
        .iter()
        .map(|step| {
            row([
                ("gva", format!("{gva:#x}").into()),
                ("level", level(step.level).into()),
                ("entry", format!("{:#x}", step.entry_gpa).into()),
                ("value", format!("{:#x}", step.value).into()),
                ("result", "".into()),
            ])
        })
        .collect();
    match rows.last_mut() {
        Some(last) => {
            last.insert("result".into(), result.into());
        }
        None => rows.push(row([
            ("gva", format!("{gva:#x}").into()),
            ("result", result.into()),
        ])),
    }
    rows
}

/// One flat object: what the address leads to or why it does not, and the entries met.
fn object(place: &Place, gva: Gva, outcome: &Result<Translation, PageFault>) -> Map<String, Value> {
    let mut object = row([
        ("place", place.to_string().into()),
        ("gva", format!("{gva:#x}").into()),
    ]);
    match outcome {
        Ok(t) => object.extend(row([
            ("gpa", format!("{:#x}", t.gpa).into()),
            ("page_size", 1u64.checked_shl(u32::from(t.page_shift)).into()),
            ("write", t.access.write.into()),
            ("user", t.access.user.into()),
            ("execute", t.access.execute.into()),
            ("accessed", t.access.accessed.into()),
            ("dirty", t.access.dirty.into()),
            ("global", t.access.global.into()),
        ])),
        Err(fault) => {
            object.insert("fault".into(), fault.to_string().into());
        }
    }
    let steps = steps(outcome);
    for step in steps.iter() {
        object.insert(level(step.level).into(), format!("{:#x}", step.value).into());
    }
    let entries: Vec<Value> = steps
        .iter()
        .map(|s| format!("{:#x}", s.entry_gpa).into())
        .collect();
    object.insert("entries".into(), entries.into());
    object
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_a_column_for_every_level() {
        for number in 1..=5 {
            assert!(COLUMNS.contains(&level(number)));
        }
        assert_eq!((level(0), level(6)), ("?", "?"));
        assert_eq!(level(4), "pml4");
    }
}
