//! What memory may be used for: the kernel's pages, and those of processes.

mod kernel_pages;
mod processes;
mod program;

pub(super) use kernel_pages::KERNEL_PAGES;
pub(super) use processes::PROCESS_MEMORY;
