//! `vmsight types`: how the kernel's structures are laid out.

use std::io::Write;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_symbols::{
    Kinds,
    layout::{self, Layout, LayoutOptions},
};

use crate::{
    Outcome,
    args::Global,
    output::{Format, PROBLEMS, Sheet, escape, to_map},
    session::{Session, closest},
};

/// Kernel types with their members' offsets, out of the guest's own memory.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vmsight types T task_struct
  vmsight types T 'struct cred' --expand 1 -o json
  vmsight types T --search 'tcp_*'
The kernel's own types come first, then those that only a module has (--module).
Exit code 1 if nothing matches.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Types to show: task_struct, 'struct cred', pid_t, 'enum zone_type'
    #[arg(value_name = "TYPE", required_unless_present = "search")]
    names: Vec<String>,
    /// List types whose name matches (part of it, or * and ?)
    #[arg(long, value_name = "PATTERN", conflicts_with = "names")]
    search: Option<String>,
    /// Types of this module
    #[arg(long, value_name = "NAME")]
    module: Option<String>,
    /// Open named structures inside, this many levels
    #[arg(long, value_name = "LEVELS", default_value_t = 0)]
    expand: u32,
    /// Mark where cache lines begin
    #[arg(long)]
    cachelines: bool,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        let module_types;
        let types = match &self.module {
            None => kernel.types(),
            Some(name) => {
                module_types = kernel.module_types(name)?;
                &module_types
            }
        };
        if types.is_empty() {
            bail!(
                "there are no types: this kernel carries no BTF; give --symbols FILE (ISF, or vmlinux with DWARF)"
            );
        }
        if let Some(pattern) = &self.search {
            let found: Vec<_> = layout::search(types, pattern, Kinds::all()).collect();
            let columns = &["kind", "name", "size", "members"];
            session.print(&Sheet::new(columns, &found, Vec::new()))?;
            return Ok(if found.is_empty() {
                Outcome::Nothing
            } else {
                Outcome::Fine
            });
        }
        let options = LayoutOptions {
            expand: self.expand,
            cachelines: self.cachelines,
        };
        let mut layouts = Vec::new();
        let mut outcome = Outcome::Fine;
        let mut warnings = Vec::new();
        for name in &self.names {
            let ids = layout::named(types, name);
            if ids.is_empty() {
                let names = types.iter().map(|t| t.name()).filter(|n| !n.is_empty());
                warnings.push(format!("no type {name:?}{}", closest(name, names)));
                outcome = Outcome::Nothing;
            }
            layouts.extend(
                ids.into_iter()
                    .filter_map(|id| layout::layout(types, id, &options)),
            );
        }
        for cut in layouts.iter().filter(|l| l.cut) {
            warnings.push(format!(
                "{} has more members than are shown: its type data is broken",
                cut.name
            ));
        }
        let style = session.style();
        if style.format != Format::Table || style.columns.is_some() {
            let sheet = Sheet {
                rows: layouts.iter().map(rows).collect::<Result<Vec<_>>>()?.concat(),
                warnings,
                ..Sheet::with_keys(COLUMNS, &["of", "offset", "size", "type", "name", "value"])
            };
            session.print(&sheet)?;
            return Ok(outcome);
        }
        let mut out = style.out()?;
        for layout in &layouts {
            for line in layout.to_string().lines() {
                writeln!(out, "{}", escape(line).replace("\\t", "\t"))?;
            }
        }
        out.flush()?;
        drop(out);
        warnings.iter().for_each(|w| style.warn(w));
        session.finish(false)?;
        Ok(outcome)
    }
}

/// Members and values of all types asked for, in one listing: `id` tells apart types that share a name.
const COLUMNS: &[&str] = &[
    "of",
    "id",
    "offset",
    "bit_offset",
    "bit_size",
    "size",
    "type",
    "name",
    "value",
    PROBLEMS,
];

/// A type as rows: its members, its values, or where it has neither, itself.
fn rows(layout: &Layout) -> Result<Vec<Map<String, Value>>> {
    let mut rows = layout.rows().map(to_map).collect::<Result<Vec<_>>>()?;
    for value in &layout.values {
        rows.push(to_map(value)?);
    }
    if rows.is_empty() {
        let mut itself = Map::new();
        itself.insert("size".into(), layout.size.into());
        itself.insert("type".into(), layout.name.as_str().into());
        rows.push(itself);
    }
    for row in &mut rows {
        row.insert("of".into(), layout.name.as_str().into());
        row.insert("id".into(), layout.id.0.into());
    }
    if let Some(last) = rows.last_mut().filter(|_| layout.cut) {
        let problem = "of: it has more members than are shown";
        last.insert(PROBLEMS.into(), vec![problem].into());
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::typed::tests::{int, member};
    use vmsight_symbols::{
        TypeId,
        types::{Builder, Def},
    };

    fn shown(builder: Builder, id: TypeId) -> Vec<Map<String, Value>> {
        let types = builder.finish().unwrap();
        let rows = rows(&layout::layout(&types, id, &LayoutOptions::default()).unwrap()).unwrap();
        for key in rows.iter().flat_map(Map::keys) {
            assert!(COLUMNS.contains(&key.as_str()), "{key}");
        }
        rows
    }

    #[test]
    fn members_values_and_bare_types_have_the_same_columns() {
        let mut b = Builder::new();
        let number = int(&mut b, "int", 4);
        let members = [member("a", number, 0, Some(3)), member("b", number, 32, None)];
        let pair = b.add(&Def::Struct {
            name: "pair",
            size: 8,
            members: &members,
        });
        let rows = shown(b, pair);
        assert_eq!(
            (&rows[0]["of"], &rows[0]["bit_size"]),
            (&"struct pair".into(), &3.into())
        );
        assert_eq!(rows[1]["name"], "b");

        let mut b = Builder::new();
        let colour = b.add(&Def::Enum {
            name: "colour",
            size: 4,
            signed: false,
            values: &[("RED", 1)],
        });
        assert_eq!(shown(b, colour)[0]["value"], 1);

        let mut b = Builder::new();
        let number = int(&mut b, "int", 4);
        let rows = shown(b, number);
        assert_eq!((rows.len(), &rows[0]["size"]), (1, &4.into()));
    }

    #[test]
    fn a_type_that_is_cut_says_so_in_its_rows() {
        let mut b = Builder::new();
        let number = int(&mut b, "int", 4);
        let id = b.reserve();
        let members = [member("x", number, 0, None), member("", id, 0, None)];
        b.define(
            id,
            &Def::Struct {
                name: "",
                size: 8,
                members: &members,
            },
        );
        let rows = shown(b, id);
        assert!(rows.last().unwrap()[PROBLEMS].is_array(), "{rows:?}");
    }
}
