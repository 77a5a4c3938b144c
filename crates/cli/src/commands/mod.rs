//! One module per command or family of commands.

pub(crate) mod bench;
pub(crate) mod beside;
pub(crate) mod check;
pub(crate) mod columns;
pub(crate) mod debug;
pub(crate) mod disas;
pub(crate) mod dump;
pub(crate) mod guard;
pub(crate) mod hooks;
pub(crate) mod info;
pub(crate) mod kmsg;
pub(crate) mod launch;
pub(crate) mod list;
pub(crate) mod listing;
pub(crate) mod raw;
pub(crate) mod recover;
pub(crate) mod regs;
pub(crate) mod shell;
pub(crate) mod stream;
pub(crate) mod strings;
pub(crate) mod symbols;
pub(crate) mod trace;
pub(crate) mod translate;
pub(crate) mod types;
pub(crate) mod until;
pub(crate) mod write;
