//! Return addresses that tracing has put its own in the place of: the function that is traced returns into a trampoline, and the
//! kernel keeps where to go from there.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::AddressSpace;

use super::Task;
use crate::Kernel;
use crate::layout::{Field, Place, layout};

/// Functions of one task that return into a kretprobe at a time.
const MAX_NODES: usize = 64;
/// Bytes of the stack of traced functions: a page since 6.11, an array of 50 before (kernel/trace/fgraph.c).
const SHADOW: usize = 4096;

layout! {
    /// What a kretprobe keeps (kernel/trace/rethook.c; before 6.0 kernel/kprobes.c).
    struct NodeLayout = "rethook_node" | "kretprobe_instance" {
        list: Place = "llist",
        address: Field<u64> = "ret_addr",
        frame: Field<u64> = "frame" | "fp",
    }
}

layout! {
    /// What function tracing keeps.
    struct ReturnLayout = "ftrace_ret_stack" {
        address: Field<u64> = "ret",
        slot: Field<u64> = "retp",
    }
}

/// Tells trampolines, and finds what they stand for.
pub(super) struct Hooked {
    graph: Option<Gva>,
    probes: Vec<Gva>,
    node: Option<Arc<NodeLayout>>,
    returns: Option<Arc<ReturnLayout>>,
}

impl Hooked {
    pub(super) fn new(kernel: &Kernel) -> Self {
        Self {
            graph: kernel.find_symbol(&["return_to_handler"]),
            // Renamed in 5.16, and again in 6.0; both are there where both are built in.
            probes: [
                "arch_rethook_trampoline",
                "__kretprobe_trampoline",
                "kretprobe_trampoline",
            ]
            .iter()
            .filter_map(|name| kernel.find_symbol(&[name]))
            .collect(),
            node: kernel.layout().ok(),
            returns: kernel.layout().ok(),
        }
    }

    /// Whether `at` is a trampoline's first instruction, where traced functions return to.
    pub(super) fn is_trampoline(&self, at: u64) -> bool {
        self.graph == Some(Gva(at)) || self.probes.contains(&Gva(at))
    }

    /// What stood in the stack at `slot` before.
    pub(super) fn original(&self, space: &AddressSpace, task: &Task, slot: u64) -> Option<u64> {
        let found = self
            .of_probe(space, task, slot)
            .or_else(|| self.of_graph(space, task, slot));
        found.filter(|address| !self.is_trampoline(*address))
    }

    fn of_probe(&self, space: &AddressSpace, task: &Task, slot: u64) -> Option<u64> {
        let node = self.node.as_deref()?;
        let mut at = task.probes;
        for _ in 0..MAX_NODES {
            if at.is_null() {
                break;
            }
            let base = node.list.container(at);
            let address = node.address.read(space, base).ok()?;
            // Two probes of one function: the later one keeps the trampoline of the other.
            if node.frame.read(space, base).ok()? == slot && !self.is_trampoline(address) {
                return Some(address);
            }
            at = space.read_u64(at).map(Gva).ok()?;
        }
        None
    }

    /// However the entries are laid out between releases, each says which place on the stack it is about.
    fn of_graph(&self, space: &AddressSpace, task: &Task, slot: u64) -> Option<u64> {
        let layout = self.returns.as_deref().filter(|_| !task.returns.is_null())?;
        let mut shadow = vec![0; SHADOW];
        let read = space.read_partial(task.returns, &mut shadow);
        let whole = match read.into_iter().next() {
            Some((range, Ok(()))) if range.start == 0 => range.end,
            _ => return None,
        };
        let word = |at: u64| {
            let bytes = shadow.get(..whole)?.get(usize::try_from(at).ok()?..)?;
            Some(u64::from_le_bytes(bytes.first_chunk::<8>().copied()?))
        };
        let (of_slot, of_address) = (layout.slot.extent().offset, layout.address.extent().offset);
        // From the end: what was pushed last is what counts.
        (0..SHADOW as u64 / 8)
            .rev()
            .map(|index| index * 8)
            .find(|base| word(base + of_slot) == Some(slot))
            .and_then(|base| word(base + of_address))
    }
}
