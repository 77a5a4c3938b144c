//! `vmsight types`: how the kernel's structures are laid out.

use std::io::Write;

use anyhow::{Result, bail};
use clap::Args;
use vmsight_symbols::{
    Kinds,
    layout::{self, LayoutOptions},
};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Sheet, View, escape},
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
            let view = View {
                columns: &["kind", "name", "size", "members"],
            };
            global.style().print(&Sheet::new(view, &found, Vec::new())?)?;
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
        for name in &self.names {
            let ids = layout::named(types, name);
            if ids.is_empty() {
                let names = types.iter().map(|t| t.name()).filter(|n| !n.is_empty());
                bail!("no type {name:?}{}", closest(name, names));
            }
            for id in ids {
                let Some(layout) = layout::layout(types, id, &options) else {
                    continue;
                };
                if global.output == Format::Table {
                    for line in layout.to_string().lines() {
                        writeln!(std::io::stdout(), "{}", escape(line).replace("\\t", "\t"))?;
                    }
                    continue;
                }
                let mut sheet = Sheet::new(
                    View {
                        columns: &["offset", "size", "type", "name"],
                    },
                    &layout.rows().collect::<Vec<_>>(),
                    Vec::new(),
                )?;
                if layout.rows().next().is_none() {
                    sheet = Sheet::new(
                        View {
                            columns: &["name", "value"],
                        },
                        &layout.values,
                        Vec::new(),
                    )?;
                }
                for row in &mut sheet.rows {
                    row.shift_insert(0, "of".into(), layout.name.as_str().into());
                }
                global.style().print(&sheet)?;
            }
        }
        Ok(Outcome::Fine)
    }
}
