//! Real guests for tests and demos: Debian kernels under QEMU with a workload that says what it is.
//!
//! ```no_run
//! use vmsight_lab::{Format, Guest, Kernel, Spec};
//!
//! let guest = Guest::boot(&Spec::new(Kernel::V6_1))?;
//! assert_eq!(guest.truth().named("web-frontend").map(|p| p.nice), Some(5));
//! guest.dump(Format::Elf, &guest.folder().join("memory.elf"))?;
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! A [`Guest`] has printed its [`truth`] and is quiet; it runs until it is dropped. Everything that can be kept is kept
//! in the [cache](cache::folder): kernels (see `lab/setup`) and initramfs images by the hash of what is in them.

pub mod cache;
pub mod chance;
pub mod compare;
pub mod connections;
pub mod cpio;
mod flat;
mod folder;
pub mod guest;
mod host;
pub mod initramfs;
pub mod kernel;
pub mod modules;
pub mod nested;
pub mod orders;
pub mod programs;
pub mod qemu;
pub mod qmp;
pub mod spec;
pub mod vtx;

pub use guest::{Format, Guest};
pub use kernel::Kernel;
pub use orders::{Account, Order, Orders, Work};
pub use qemu::Qemu;
pub use spec::{Machine, Memory, Paging, Spec, full_matrix, matrix, matrix_of};
/// What a guest says of itself.
pub use vmsight_workload as truth;
