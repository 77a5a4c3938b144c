//! Keys that a guest really uses are found where their users keep them: in dm-crypt volumes, in an ssh-agent, in TLS connections of
//! OpenSSL. All of them are made in the guest, for one run, by the programs that the field uses.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod agent;
mod disks;
mod support;
mod tls;
