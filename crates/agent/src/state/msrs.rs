//! The filter of MSRs: the VMM's own, with what is watched laid over it.

use std::collections::BTreeMap;
use std::io;

use kvm_bindings::KVM_MSR_EXIT_REASON_FILTER;
use vmsight_hooks::{Access, HookKind};

use super::State;
use crate::agent::Agent;
use crate::filter::Filter;
use crate::kvm;
use crate::table::Table;

impl State {
    pub(super) fn watched_msrs(&self) -> BTreeMap<u32, Access> {
        let mut watched = BTreeMap::new();
        for (armed, _) in self.hooks.values() {
            if let HookKind::Msr { index, access } = armed.hook.kind {
                *watched.entry(index).or_insert(Access::empty()) |= access;
            }
        }
        watched
    }

    /// Sets the filter of MSRs.
    pub(super) fn filter(&mut self, agent: &Agent) -> io::Result<()> {
        let watched = self.watched_msrs();
        if watched.is_empty() && !self.filtering {
            return Ok(());
        }
        let merged = self
            .vmm_filter
            .with(&watched)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let ours = if watched.is_empty() {
            0
        } else {
            KVM_MSR_EXIT_REASON_FILTER
        };
        if ours != 0 {
            kvm::exit_on_msr(agent.vm, self.vmm_reasons | ours)?;
            kvm::set_msr_filter(agent.vm, &merged)?;
        } else {
            kvm::set_msr_filter(agent.vm, &merged)?;
            kvm::exit_on_msr(agent.vm, self.vmm_reasons)?;
        }
        self.filtering = ours != 0;
        Ok(())
    }

    /// The VMM sets its filter.
    pub(crate) fn set_filter(&mut self, agent: &Agent, filter: Filter) -> Result<(), i32> {
        let old = std::mem::replace(&mut self.vmm_filter, filter);
        let set = match self.vmm_filter.with(&self.watched_msrs()) {
            Some(merged) => kvm::set_msr_filter(agent.vm, &merged),
            None => Err(io::Error::from_raw_os_error(libc::E2BIG)),
        };
        match set {
            Ok(()) => {
                self.republish(agent);
                Ok(())
            }
            Err(error) => {
                self.vmm_filter = old;
                Err(error.raw_os_error().unwrap_or(libc::EINVAL))
            }
        }
    }

    /// The VMM says which MSR accesses it wants to see.
    pub(crate) fn set_reasons(&mut self, agent: &Agent, reasons: u32) -> Result<(), i32> {
        let ours = if self.filtering {
            KVM_MSR_EXIT_REASON_FILTER
        } else {
            0
        };
        kvm::exit_on_msr(agent.vm, reasons | ours).map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL))?;
        self.vmm_reasons = reasons;
        self.republish(agent);
        Ok(())
    }

    fn republish(&mut self, agent: &Agent) {
        let table = Table {
            vmm_filter: self.vmm_filter.clone(),
            vmm_reasons: self.vmm_reasons,
            ..Table::clone(&agent.table())
        };
        agent.publish(table);
    }
}
