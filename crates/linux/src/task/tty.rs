//! A process's controlling terminal.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::layouts::TtyLayout;
use crate::{Kernel, LinuxError};

/// Reads the names of `tty_struct`s, each once.
#[derive(Debug)]
pub(crate) struct TtyReader {
    kernel: Kernel,
    tty: Arc<TtyLayout>,
}

impl TtyReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            tty: kernel.layout()?,
        })
    }

    /// The name as ps shows it: the path below /dev.
    pub(crate) fn name(&self, at: Gva, cache: &mut FxHashMap<u64, String>) -> Result<String, ReadError> {
        if let Some(known) = cache.get(&at.0) {
            return Ok(known.clone());
        }
        let mut bytes = [0u8; 64];
        let len = bytes.len().min(self.tty.name.size() as usize);
        self.kernel
            .space()
            .read(self.tty.name.at(at), bytes.get_mut(..len).unwrap_or(&mut []))?;
        let name = below_dev(&crate::text::guest_array_text(&bytes));
        cache.insert(at.0, name.clone());
        Ok(name)
    }
}

/// The kernel names the slave of a pseudo terminal "pts0"; its node is /dev/pts/0. Others are called what their node is.
fn below_dev(name: &str) -> String {
    match name.strip_prefix("pts") {
        Some(number) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => {
            format!("pts/{number}")
        }
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn pseudo_terminals_are_named_as_their_nodes() {
        assert_eq!(super::below_dev("pts12"), "pts/12");
        assert_eq!(super::below_dev("ttyS0"), "ttyS0");
        assert_eq!(super::below_dev("pts"), "pts");
    }
}
