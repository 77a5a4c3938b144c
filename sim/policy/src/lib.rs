//! Policies of Secure In-VM Monitoring: what a monitor looks at in one build of a kernel, found in the kernel's own image.
//!
//! A kernel that can be booted carries its symbols (kallsyms) and its types (BTF), which are read as they are read out of a
//! guest's memory. Functions are found by name, and each is looked at: a hook needs the five bytes that tracing reserves.

#![forbid(unsafe_code)]

mod image;
mod lz4;
mod make;
mod unpack;

pub use image::{ImageError, KernelImage};
pub use make::{PolicyError, Wanted, policy};
