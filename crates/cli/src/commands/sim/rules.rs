//! What a monitor tells and refuses, beyond what it always tells.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use sha2::{Digest, Sha256};
use vmsight_sim_policy::{KernelImage, Wanted, policy};

use super::guest::read;

/// EPERM.
const DENIED: u16 = 1;

/// Rules of a policy.
#[derive(Args, Debug)]
pub(super) struct Rules {
    /// Tell each of these system calls with its arguments, by name or number
    #[arg(
        long,
        value_name = "CALL,…",
        value_delimiter = ',',
        requires = "kernel",
        help_heading = "Monitor"
    )]
    tell: Vec<String>,
    /// Refuse these system calls, with this error number (EPERM where none is given)
    #[arg(
        long,
        value_name = "CALL[=ERRNO],…",
        value_delimiter = ',',
        requires = "kernel",
        help_heading = "Monitor"
    )]
    deny: Vec<String>,
    /// Refuse system calls of 32 bits and of x32
    #[arg(long, requires = "kernel", help_heading = "Monitor")]
    deny_other_calls: bool,
    /// Refuse modules other than these files, as the guest has them (compressed or not)
    #[arg(
        long,
        value_name = "FILE,…",
        value_delimiter = ',',
        requires = "kernel",
        help_heading = "Monitor"
    )]
    modules: Vec<PathBuf>,
    /// Refuse to become root but by executing a setuid file
    #[arg(long, requires = "kernel", help_heading = "Monitor")]
    deny_root: bool,
}

impl Rules {
    /// Whether any is given.
    pub(super) fn are_any(&self) -> bool {
        !(self.tell.is_empty() && self.deny.is_empty() && self.modules.is_empty())
            || self.deny_other_calls
            || self.deny_root
    }

    /// The policy for a kernel.
    pub(super) fn policy(&self, kernel: &[u8]) -> Result<Vec<u8>> {
        let kernel = KernelImage::read(kernel)?;
        let number = |call: &str| match call.parse() {
            Ok(number) => Ok(number),
            Err(_) => kernel
                .call_number(call)
                .with_context(|| format!("this kernel has no system call {call}")),
        };
        let mut wanted = Wanted {
            refuse_other_calls: self.deny_other_calls,
            refuse_root: self.deny_root,
            ..Wanted::default()
        };
        for call in &self.tell {
            wanted.told.push(number(call)?);
        }
        for rule in &self.deny {
            let (call, errno) = denied(rule)?;
            wanted.refused.push((number(call)?, errno));
        }
        if !self.modules.is_empty() {
            let hashes: Result<_> = self
                .modules
                .iter()
                .map(|file| Ok(Sha256::digest(read(file)?).into()))
                .collect();
            wanted.modules = Some(hashes?);
        }
        Ok(policy(&kernel, &wanted)?.to_bytes().to_vec())
    }
}

/// A system call, and the error with which it is refused.
fn denied(rule: &str) -> Result<(&str, u16)> {
    let Some((call, errno)) = rule.split_once('=') else {
        return Ok((rule, DENIED));
    };
    let number = errno.parse().unwrap_or(0);
    ensure!(
        (1..=4095).contains(&number),
        "{errno} is no error number (1 to 4095)"
    );
    Ok((call, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_refused_with_an_error() {
        assert_eq!(denied("mkdir").unwrap(), ("mkdir", 1));
        assert_eq!(denied("mkdir=13").unwrap(), ("mkdir", 13));
        for wrong in ["mkdir=0", "mkdir=EACCES", "mkdir=4096", "mkdir="] {
            assert!(denied(wrong).is_err(), "{wrong}");
        }
    }
}
