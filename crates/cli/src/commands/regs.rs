//! `vmsight regs`: what the vCPUs hold.

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value};
use vmsight_arch::{Registers, paging::PagingMode};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Sheet},
    session::Session,
};

/// Registers of a live VM's vCPUs, or those that a dump recorded.
#[derive(Args, Debug)]
#[command(after_help = "\
Live registers come over QMP without stopping the VM (each vCPU is read at its own moment), or over gdb, which
stops it for that long. MSRs are shown where the source gives them.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this vCPU
    #[arg(long, value_name = "N")]
    vcpu: Option<u32>,
    /// Only these registers, by name (rip, cr3, lstar …)
    #[arg(value_name = "REGISTER")]
    names: Vec<String>,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::without_kernel(global, &self.target)?;
        let vcpus = session.registers(self.vcpu)?;
        let mut rows = Vec::new();
        for registers in &vcpus {
            for (name, value) in registers.rows() {
                if !self.names.is_empty() && !self.names.iter().any(|n| n.eq_ignore_ascii_case(name)) {
                    continue;
                }
                let mut row = Map::new();
                row.insert("vcpu".into(), registers.vcpu.into());
                row.insert("register".into(), name.into());
                row.insert("value".into(), format!("{value:#x}").into());
                let flags = Registers::flags(name, value).map(|f| f.to_string());
                row.insert("flags".into(), flags.map_or(Value::Null, Value::from));
                rows.push(row);
            }
            if self.names.is_empty()
                && global.output == Format::Table
                && let Some(mode) = PagingMode::from_registers(registers)
            {
                let mut row = Map::new();
                row.insert("vcpu".into(), registers.vcpu.into());
                row.insert("register".into(), "paging".into());
                row.insert("value".into(), mode.to_string().into());
                rows.push(row);
            }
        }
        let warnings: Vec<String> = self
            .names
            .iter()
            .filter(|n| !vcpus.iter().any(|r| r.by_name(&n.to_lowercase()).is_some()))
            .map(|n| format!("no register {n:?} in what this target gives"))
            .collect();
        let found = !rows.is_empty() && warnings.is_empty();
        let columns = &["vcpu", "register", "value", "flags"];
        let sheet = Sheet {
            rows,
            warnings,
            ..Sheet::with_keys(columns, columns)
        };
        session.style().print(&sheet)?;
        Ok(if found { Outcome::Fine } else { Outcome::Nothing })
    }
}
