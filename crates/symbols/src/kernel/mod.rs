//! Finding the running kernel's image in guest memory, and proving it by the guest's own page tables.

mod image;

pub use image::KernelImage;
pub(crate) use image::release_of;
