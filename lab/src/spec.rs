//! What a guest is made of, and which guests the tests are run on.

use std::fmt;
use std::path::PathBuf;

use crate::kernel::Kernel;
use crate::qemu::Qemu;

/// Depth of the guest's page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Paging {
    /// Four levels.
    Four,
    /// Five levels (LA57).
    Five,
}

/// The machine QEMU plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Machine {
    /// i440FX; memory below 4 GiB ends at 3 GiB at most (3.5 GiB for guests that fit).
    Pc,
    /// Q35; memory below 4 GiB ends at 2 GiB for guests with more.
    Q35,
}

/// Where the guest's memory is on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Memory {
    /// In a file that others can map.
    File,
    /// In a memfd, shared, which others reach through /proc/PID/fd.
    Memfd,
    /// In QEMU's own anonymous memory: plain `-m`, as most people start guests by hand.
    Private,
}

/// A guest to boot. KASLR is always on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Spec {
    /// The kernel.
    pub kernel: Kernel,
    /// What it runs in.
    pub qemu: Qemu,
    /// The library of an agent that is loaded into QEMU as a plugin, to listen at [`crate::Guest::agent_path`].
    pub agent: Option<PathBuf>,
    /// The program whose `launch` loads the agent, however it does it.
    pub launcher: Option<PathBuf>,
    /// Depth of its page tables.
    pub paging: Paging,
    /// The machine.
    pub machine: Machine,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Where the memory is.
    pub memory: Memory,
    /// Processors.
    pub vcpus: u32,
    /// Whether it has a QMP socket. Without one, nobody has prepared anything: it cannot be dumped either.
    pub qmp: bool,
    /// Whether it takes [orders](crate::orders), on a third serial port.
    pub orders: bool,
    /// Whether it has [modules of our own](crate::modules), not loaded, in `/lib/modules/vmsight`.
    pub modules: bool,
    /// Whether it has [programs of Debian's](crate::programs): OpenSSH, OpenSSL, dmsetup, zsh; and drivers of QEMU's graphics cards, not loaded.
    pub programs: bool,
    /// More words for the kernel command line; `vmsight.procs=N` adds N sleeping processes, `vmsight.idle` leaves the
    /// workload out.
    pub kernel_args: Vec<String>,
    /// More arguments for QEMU.
    pub qemu_args: Vec<String>,
}

/// Above this, memory lies on both sides of the hole below 4 GiB.
const LARGE_MIB: u32 = 5120;

impl Spec {
    /// A small guest: 4 levels, pc, 512 MiB in a shared file, one processor, with a QMP socket.
    pub fn new(kernel: Kernel) -> Spec {
        Spec {
            kernel,
            qemu: Qemu::System,
            agent: None,
            launcher: None,
            paging: Paging::Four,
            machine: Machine::Pc,
            memory_mib: 512,
            memory: Memory::File,
            vcpus: 1,
            qmp: true,
            orders: false,
            modules: false,
            programs: false,
            kernel_args: Vec::new(),
            qemu_args: Vec::new(),
        }
    }

    /// A guest that nobody prepared for being looked at: private memory, no QMP socket.
    pub fn unprepared(kernel: Kernel) -> Spec {
        Spec {
            memory: Memory::Private,
            qmp: false,
            ..Spec::new(kernel)
        }
    }

    /// With no workload: it boots faster, and next to nothing runs in it.
    pub fn idle(mut self) -> Spec {
        self.kernel_args.push("vmsight.idle".to_owned());
        self
    }

    /// Taking orders.
    pub fn orders(mut self) -> Spec {
        self.orders = true;
        self
    }

    /// With modules of our own.
    pub fn modules(mut self) -> Spec {
        self.modules = true;
        self
    }

    /// With programs of Debian's.
    pub fn programs(mut self) -> Spec {
        self.programs = true;
        self
    }

    /// With this many sleeping processes more.
    pub fn sleepers(mut self, count: u32) -> Spec {
        self.kernel_args.push(format!("vmsight.procs={count}"));
        self
    }

    /// With this much memory.
    pub fn memory_mib(mut self, mib: u32) -> Spec {
        self.memory_mib = mib;
        self
    }

    /// The `-cpu` argument.
    pub(crate) fn cpu(&self) -> &'static str {
        match self.paging {
            Paging::Four => "max,la57=off",
            Paging::Five => "max,la57=on",
        }
    }

    /// The name of the machine type.
    pub(crate) fn machine_type(&self) -> &'static str {
        match self.machine {
            Machine::Pc => "pc",
            Machine::Q35 => "q35",
        }
    }
}

impl fmt::Display for Spec {
    /// A short name, such as `6.1-5level-q35-5120m-private-2cpu-noqmp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paging = match self.paging {
            Paging::Four => "4level",
            Paging::Five => "5level",
        };
        let memory = match self.memory {
            Memory::File => "file",
            Memory::Memfd => "memfd",
            Memory::Private => "private",
        };
        let qmp = if self.qmp { "" } else { "-noqmp" };
        let qemu = match self.qemu {
            Qemu::System => "",
            Qemu::Backports => "-qemu10",
        };
        write!(
            f,
            "{}-{paging}-{}-{}m-{memory}-{}cpu{qmp}{qemu}",
            self.kernel,
            self.machine_type(),
            self.memory_mib,
            self.vcpus
        )
    }
}

/// The guests that tests are run on: for each kernel few, in which every value of every property meets every value of
/// every other one (a pairwise covering choice; a test holds it to that).
pub fn matrix() -> Vec<Spec> {
    Kernel::ALL.into_iter().flat_map(matrix_of).collect()
}

/// The part of [`matrix`] with this kernel.
pub fn matrix_of(kernel: Kernel) -> Vec<Spec> {
    use Machine::{Pc, Q35};
    use Memory::{File, Memfd, Private};
    use Paging::{Five, Four};
    [
        (Four, Pc, 512, File, 1, true),
        (Five, Q35, LARGE_MIB, Private, 1, true),
        (Five, Q35, 512, File, 2, false),
        (Five, Pc, LARGE_MIB, Memfd, 2, true),
        (Four, Q35, 512, Private, 2, false),
        (Four, Pc, LARGE_MIB, Private, 1, false),
    ]
    .into_iter()
    .map(|(paging, machine, memory_mib, memory, vcpus, qmp)| Spec {
        paging: if kernel.has_five_levels() { paging } else { Four },
        machine,
        memory_mib,
        memory,
        vcpus,
        qmp,
        ..Spec::new(kernel)
    })
    .collect()
}

/// Every combination of every property: for patient people.
pub fn full_matrix() -> Vec<Spec> {
    let mut specs = Vec::new();
    for kernel in Kernel::ALL {
        for paging in [Paging::Four, Paging::Five] {
            if paging == Paging::Five && !kernel.has_five_levels() {
                continue;
            }
            for machine in [Machine::Pc, Machine::Q35] {
                for memory_mib in [512, LARGE_MIB] {
                    for memory in [Memory::File, Memory::Memfd, Memory::Private] {
                        for vcpus in [1, 2] {
                            for qmp in [true, false] {
                                specs.push(Spec {
                                    paging,
                                    machine,
                                    memory_mib,
                                    memory,
                                    vcpus,
                                    qmp,
                                    ..Spec::new(kernel)
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    specs
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The properties of a guest as words; shared memory is one value, in a file or in a memfd.
    fn words(spec: &Spec) -> Vec<String> {
        let shared = if spec.memory == Memory::Private {
            "private"
        } else {
            "shared"
        };
        vec![
            format!("{:?}", spec.paging),
            format!("{:?}", spec.machine),
            format!("{} MiB", spec.memory_mib),
            shared.to_owned(),
            format!("{} vcpus", spec.vcpus),
            format!("qmp {}", spec.qmp),
        ]
    }

    fn pairs(specs: &[Spec]) -> BTreeSet<(String, String)> {
        let mut pairs = BTreeSet::new();
        for words in specs.iter().map(words) {
            for a in 0..words.len() {
                for b in a + 1..words.len() {
                    pairs.insert((words[a].clone(), words[b].clone()));
                }
            }
        }
        pairs
    }

    #[test]
    fn every_pair_of_properties_meets() {
        let full = full_matrix();
        for kernel in Kernel::ALL {
            let all: Vec<Spec> = full.iter().filter(|s| s.kernel == kernel).cloned().collect();
            let chosen = matrix_of(kernel);
            assert!(chosen.len() <= 6);
            let missing: Vec<_> = pairs(&all).difference(&pairs(&chosen)).cloned().collect();
            assert!(missing.is_empty(), "{kernel}: {missing:?}");
        }
    }

    #[test]
    fn names_tell_guests_apart() {
        let specs = full_matrix();
        let names: BTreeSet<String> = specs.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), specs.len());
    }
}
