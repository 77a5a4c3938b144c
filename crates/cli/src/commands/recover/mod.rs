//! `vmsight recover`: what can be got back out of a guest's memory.

mod arp;
mod commands;
mod conntrack;
mod elf;
mod files;
mod history;
mod input;
mod keys;
mod packets;
mod processes;
mod routes;
mod screen;
mod sockets;
mod tty;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde::Serialize;
use vmsight_linux::Listing;

use crate::{
    Outcome,
    args::Global,
    output::{Row, Sheet},
    session::Session,
};

/// Get back what is in a guest's memory: files, and what people and programs left behind.
#[derive(Args, Debug)]
pub(crate) struct Cmd {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Programs, libraries, modules and the kernel as ELF files: list them, write them out
    Elf(elf::Cmd),
    /// Files in the page cache, deleted ones too: list them, write them out
    Files(files::Cmd),
    /// What was typed into shells, with times
    History(history::Cmd),
    /// Commands that bash executed by name, and the files that it found for them
    Commands(commands::Cmd),
    /// Who is on the links: hardware addresses by IP address, of every network namespace
    Arp(arp::Cmd),
    /// Routes of every network namespace, IPv4 and IPv6, from all tables
    Routes(routes::Cmd),
    /// Connections that netfilter tracks
    Conntrack(conntrack::Cmd),
    /// Network packets that are still in the kernel's memory: list them, write a capture file
    Packets(packets::Cmd),
    /// Processes and threads that have ended, as far as their remains were not used again
    Processes(processes::Cmd),
    /// Sockets that were closed, as far as their remains were not used again, and those that nobody lists
    Sockets(sockets::Cmd),
    /// What is on the screen: virtual consoles as text, framebuffers as pictures
    Screen(screen::Cmd),
    /// What was typed at terminals and written to them, as far as it still is in their buffers
    Tty(tty::Cmd),
    /// Keys that were pressed, as far as they still are in the buffers of programs that read keyboards
    Input(input::Cmd),
    /// Cryptographic keys, each proven by its own mathematics
    Keys(keys::Cmd),
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        match &self.what {
            What::Elf(c) => c.run(global),
            What::Files(c) => c.run(global),
            What::History(c) => c.run(global),
            What::Commands(c) => c.run(global),
            What::Arp(c) => c.run(global),
            What::Routes(c) => c.run(global),
            What::Conntrack(c) => c.run(global),
            What::Packets(c) => c.run(global),
            What::Processes(c) => c.run(global),
            What::Sockets(c) => c.run(global),
            What::Screen(c) => c.run(global),
            What::Tty(c) => c.run(global),
            What::Input(c) => c.run(global),
            What::Keys(c) => c.run(global),
        }
    }

    /// Whether it shows something and writes nothing.
    pub(crate) fn can_repeat(&self) -> bool {
        match &self.what {
            What::Elf(c) => !c.writes(),
            What::Files(c) => !c.writes(),
            What::Arp(_) | What::Routes(_) | What::Conntrack(_) | What::History(_) | What::Processes(_) => {
                true
            }
            What::Commands(_) | What::Tty(_) | What::Input(_) | What::Sockets(_) => true,
            What::Screen(c) => !c.writes(),
            What::Packets(c) => !c.writes(),
            What::Keys(c) => !c.writes(),
        }
    }
}

/// Prints what was recovered. Nothing is an outcome of its own.
fn show<R: Row + Serialize>(
    session: &Session,
    columns: &'static [&'static str],
    listing: Listing<R>,
) -> Result<Outcome> {
    session.print(&Sheet::new(columns, &listing.rows, listing.warnings))?;
    Ok(match listing.rows.is_empty() {
        true => Outcome::Nothing,
        false => Outcome::Fine,
    })
}
