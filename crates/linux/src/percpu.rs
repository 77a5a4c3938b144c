//! Per-CPU variables: one copy for each CPU, found by an offset (include/asm-generic/percpu.h, arch/x86/kernel/setup_percpu.c).

use vmsight_arch::Gva;

use crate::{Kernel, LinuxError};

/// NR_CPUS of the largest configuration there is.
const MAX_CPUS: usize = 8192;

/// The offsets that take a per-CPU variable's base address to each CPU's own copy.
#[derive(Clone, Debug)]
pub struct PerCpu {
    offsets: Vec<(u32, u64)>,
}

impl PerCpu {
    /// Reads `__per_cpu_offset` for the CPUs in `__cpu_possible_mask`. Neither changes after boot.
    pub(crate) fn read(kernel: &Kernel) -> Result<Self, LinuxError> {
        let table = kernel.symbol("__per_cpu_offset")?;
        let mut offsets = Vec::new();
        for cpu in cpu_mask(kernel, "__cpu_possible_mask")? {
            let at = table.wrapping_add(u64::from(cpu) * 8);
            let offset = kernel
                .space()
                .read_u64(at)
                .map_err(LinuxError::read("__per_cpu_offset", at))?;
            offsets.push((cpu, offset));
        }
        Ok(Self { offsets })
    }

    /// The CPUs that the kernel made room for, by rising number.
    pub fn cpus(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.offsets.iter().map(|&(cpu, _)| cpu)
    }

    /// CPU `cpu`'s copy of what lies at `base`: a per-CPU symbol's address or a `__percpu` pointer out of a structure.
    pub fn copy(&self, base: Gva, cpu: u32) -> Option<Gva> {
        let index = self.offsets.binary_search_by_key(&cpu, |&(cpu, _)| cpu).ok()?;
        self.offsets
            .get(index)
            .map(|&(_, offset)| base.wrapping_add(offset))
    }

    /// Every CPU's copy of what lies at `base`.
    pub fn copies(&self, base: Gva) -> impl ExactSizeIterator<Item = (u32, Gva)> + '_ {
        self.offsets
            .iter()
            .map(move |&(cpu, offset)| (cpu, base.wrapping_add(offset)))
    }
}

/// The CPUs whose bit is set in a `struct cpumask` variable (`__cpu_online_mask`, …).
pub(crate) fn cpu_mask(kernel: &Kernel, symbol: &str) -> Result<Vec<u32>, LinuxError> {
    let at = kernel.symbol(symbol)?;
    let size = kernel
        .types()
        .find_struct("cpumask")
        .and_then(|id| kernel.types().size_of(id))
        .unwrap_or(8)
        .min(MAX_CPUS as u64 / 8);
    let mut bits = vec![0u8; size as usize];
    kernel
        .space()
        .read(at, &mut bits)
        .map_err(LinuxError::read(symbol, at))?;
    let mut cpus = Vec::new();
    for (index, byte) in bits.iter().enumerate() {
        cpus.extend(
            (0..8)
                .filter(|bit| byte >> bit & 1 == 1)
                .map(|bit| (index * 8 + bit) as u32),
        );
    }
    Ok(cpus)
}
