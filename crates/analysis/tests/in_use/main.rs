//! What a guest really uses is found where its users keep it: keys in dm-crypt volumes, in an ssh-agent, in TLS connections of OpenSSL;
//! pictures on graphics cards, what was typed into zsh and on a keyboard. All of it is made in the guest, for one run, by the programs
//! that the field uses.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod agent;
mod disks;
mod history;
mod keyboard;
mod screen;
mod support;
mod tls;
