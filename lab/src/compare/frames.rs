//! Walks through the page tables of processes.

use vmsight_arch::Gva;
use vmsight_linux::Kernel;

use super::Differences;
use crate::truth::Truth;

/// Compares where pages of processes lie, by walks through each one's own tables, with `/proc/PID/pagemap`; the sizes of the pages
/// with `smaps`; and what is in them with `/proc/PID/mem`. All are pages that stay where they are: locked ones and such of the
/// reserved pool.
pub fn frames(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    for said in &truth.processes {
        let space = kernel.process_space(i32::try_from(said.pid)?);
        let at = |what: &str| format!("{what} of {} ({})", said.pid, said.task_comm());
        // A kworker of then may be gone by now.
        if said.is_transient() {
            continue;
        }
        let space = space?;
        out.same(at("memory"), space.is_some(), said.vm.is_some());
        let Some(space) = space else { continue };
        for page in &said.frames {
            let at = |what: &str| at(&format!("{what} at {:#x}", page.address));
            match space.translate(Gva(page.address)) {
                Ok(found) => {
                    out.same(at("frame"), found.gpa.0 >> 12, page.frame);
                    if page.page_size != 0 {
                        out.same(at("size of the page"), found.page_size(), page.page_size);
                    }
                }
                Err(fault) => out.differs(format!("{}: {fault}", at("walk"))),
            }
            out.same(
                at("word"),
                space.read_u64(Gva(page.address)).ok(),
                Some(page.word),
            );
        }
    }
    Ok(out)
}
