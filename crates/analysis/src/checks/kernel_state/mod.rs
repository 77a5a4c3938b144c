//! How the kernel is set: what it starts on its own, how it is hardened, and what it says of itself.

mod command_line;
mod helpers;
mod processor;
mod security;
mod settings;
mod taint;

pub(super) use helpers::HELPERS;
pub(super) use processor::PROCESSOR;
pub(super) use security::SECURITY_MODULES;
pub(super) use settings::SETTINGS;
pub(super) use taint::TAINT;
