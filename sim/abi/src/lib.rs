//! What a guest, its monitor and the hypervisor of Secure In-VM Monitoring say to each other: calls by VMCALL, the views
//! of the extended page tables, and the structures that several sides know.
//!
//! `no_std`, no allocation: linked by the hypervisor, the monitor and programs that run inside the guest.
#![no_std]

mod call;
mod event;
mod frame;
mod image;
mod policy;
pub mod view;

pub use call::{Call, Part, SIGNATURE, SIGNATURE_LEAF, Status, VERSION};
pub use event::{EVENT_WORDS, EVENTS, Event, FULL, Kind, Ring, TEXT};
pub use frame::{Frame, Verdict};
pub use image::{
    Handler, Header, KEPT_ALL, KEPT_GENERAL, MAGIC, SITE_STRIDE, SITES, State, Vectors, WINDOW, Watch,
    site_offset,
};
pub use policy::{
    ABSENT, CALLS, CallRule, FENTRY_NOP, HOOKS, Hook, LISTED_MODULES_ONLY, MEMBERS, MODULES, Malformed,
    Member, POLICY_LENGTH, POLICY_MAGIC, Policy, REFUSE_OTHER_CALLS,
};
