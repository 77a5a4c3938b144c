//! What a guest, its monitor and the hypervisor of Secure In-VM Monitoring say to each other: calls by VMCALL, the views
//! of the extended page tables, and the structures that several sides know.
//!
//! `no_std`, no allocation: linked by the hypervisor, the monitor and programs that run inside the guest.
#![no_std]

mod call;
mod frame;
mod image;
pub mod view;

pub use call::{Call, Part, SIGNATURE, SIGNATURE_LEAF, Status, VERSION};
pub use frame::{Frame, Verdict};
pub use image::{Handler, Header, MAGIC, SITES, State, WINDOW};
