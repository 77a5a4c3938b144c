//! What memory may be used for: the kernel's pages, and those of processes.

mod code;
mod kernel_pages;
mod processes;
mod program;

pub(super) use code::PROCESS_CODE;
pub(super) use kernel_pages::KERNEL_PAGES;
pub(super) use processes::PROCESS_MEMORY;
