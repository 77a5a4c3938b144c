//! `vmsight debug`: a server for gdb and lldb over our hooks.

mod listen;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use vmsight_events::debug::{DebugError, Debugger, Parting};
use vmsight_events::{EventError, OpenOptions, open};
use vmsight_hooks::BackendKind;
use vmsight_symbols::export::{self, PlacedSymbol};

use super::beside::write_beside;
use super::until::{backend, on_interrupt};
use crate::output::{Format, escape};
use crate::session::symbol::is_in_image;
use crate::{Outcome, args::Global, session::Session};
use listen::{Address, Listener};

/// How long a wait for a debugger lasts before it is asked whether to go on at all.
const PATIENCE: Duration = Duration::from_millis(200);

/// Lets gdb or lldb debug a guest's kernel, or one process of the guest, over the gdb remote protocol.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vmsight debug web1 --symbols-out web1.elf            then: gdb web1.elf -ex 'target remote …'
  vmsight debug web1 --listen 127.0.0.1:1234           for a debugger that cannot use a Unix socket
  vmsight debug web1 --pid 812                         one process: nobody else stops

The guest runs until a debugger connects; then all of it stands still until the debugger lets it go on. When the
debugger detaches, kills or disconnects, when this ends or is killed, all hooks come out and the guest goes on.

The kernel: each vCPU is a thread. Breakpoints stop whoever comes by. Addresses in the lower half are those of the
process that the vCPU runs.
A process (--pid): it is one thread to the debugger, the one that stopped; breakpoints and watchpoints are its own.
While it is not on a vCPU in user mode it can only be stopped when it runs: the registers shown are those with which
it will return to user mode, they cannot be changed, and a step waits until the process has made it. After an exec
attach anew.

Registers: general ones, flags and RIP can be changed on the vCPU whose event stopped the guest; segments, CR0 to
CR4 and EFER can be read; floating point is not shown. While one vCPU makes a step the others stand. Memory is
written through the page tables whatever they say about writing; an emulated guest (TCG) may go on with code that it
has translated already.

A vCPU that sleeps in HLT makes its step when it has woken: until then all go on. A Unix socket is for you alone;
whoever can connect to a port of this host's loopback owns the guest.")]
pub(crate) struct Cmd {
    /// What to debug: a running VM
    target: String,
    /// Where to listen: 127.0.0.1:PORT (0 for any free one), an IPv6 one in brackets, or the path of a Unix socket
    /// [default: a Unix socket in a new folder of our own]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Address>,
    /// Debug this process (root namespace), not the kernel
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Write an ELF file with the kernel's and its modules' symbols at this boot's addresses, for the debugger
    #[arg(long, value_name = "FILE")]
    symbols_out: Option<PathBuf>,
    /// Wait for the next debugger when one has gone, until interrupted
    #[arg(long)]
    multi: bool,
    /// By which backend [default: the best that reaches the VM]
    #[arg(long, value_name = "NAME", value_parser = backend)]
    backend: Option<BackendKind>,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let stop = on_interrupt()?;
        // Debuggers write registers and memory.
        let session = Session::for_writing(global, &self.target, true)?;
        let vcpus = session.registers(None)?.iter().map(|r| r.vcpu).max();
        let vcpus = vcpus.unwrap_or(0).saturating_add(1);
        if let Some(file) = &self.symbols_out {
            write_symbols(&session, file)?;
        }
        let options = OpenOptions {
            backend: self.backend,
            timeout: Duration::from_secs_f64(global.timeout),
        };
        let monitor = open(session.target(), options).with_context(|| format!("hooking {}", self.target))?;
        let mut debugger = Debugger::new(monitor, session.kernel()?, vcpus, self.pid)?;
        let listener = Listener::bind(self.listen.as_ref())?;
        self.announce(&session, &listener)?;
        while !stop.load(Ordering::Relaxed) {
            if session.target().has_exited() {
                session.style().warn("the VM ended");
                break;
            }
            let Some(wire) = listener.accept(PATIENCE).context("waiting for a debugger")? else {
                continue;
            };
            tracing::info!("somebody connected");
            match debugger.serve(wire, &stop) {
                Ok(Parting::Ended) => {
                    session.style().warn("the VM ended");
                    break;
                }
                Ok(Parting::Stranger) => {
                    session.style().warn("somebody connected who is no debugger");
                    continue;
                }
                Ok(parting) => tracing::info!("the debugger has gone ({parting:?}); the guest goes on"),
                // One that goes in the midst of an answer is gone like others.
                Err(error @ (DebugError::Connection(_) | DebugError::Protocol(_))) => {
                    session.style().warn(&escape(&error.to_string()));
                }
                Err(DebugError::Event(EventError::Gone)) => break,
                Err(error) => return Err(error).context("debugging"),
            }
            if !self.multi {
                break;
            }
        }
        Ok(Outcome::Fine)
    }

    /// Says what to type.
    fn announce(&self, session: &Session, listener: &Listener) -> Result<()> {
        let mut out = std::io::stdout().lock();
        let symbols = self.symbols_out.as_deref();
        if session.style().format != Format::Table {
            let line = json!({
                "listen": listener.to_string(),
                "url": listener.url(),
                "symbols": symbols.map(|file| file.display().to_string()),
            });
            writeln!(out, "{line}")?;
            return Ok(out.flush()?);
        }
        let remote = escape(&listener.to_string());
        writeln!(out, "In gdb:")?;
        if let Some(file) = symbols {
            writeln!(out, "  symbol-file {}", escape(&file.display().to_string()))?;
        }
        writeln!(out, "  target remote {remote}")?;
        writeln!(out, "In lldb:")?;
        if let Some(file) = symbols {
            writeln!(out, "  target create {}", escape(&file.display().to_string()))?;
        }
        writeln!(
            out,
            "  process connect --plugin gdb-remote {}",
            escape(&listener.url())
        )?;
        Ok(out.flush()?)
    }
}

/// Writes the symbols beside the file's name and then moves them there: nobody finds half of them.
fn write_symbols(session: &Session, file: &Path) -> Result<()> {
    let kernel = session.kernel()?;
    let image = kernel.image();
    let of_kernel = kernel.profile().symbols.iter().map(|symbol| PlacedSymbol {
        name: symbol.name,
        address: match is_in_image(&symbol) {
            true => image.runtime(symbol.address).0,
            false => symbol.address,
        },
        size: 0,
        kind: symbol.kind,
    });
    let of_modules = session.modules()?.iter().map(|symbol| PlacedSymbol {
        name: &symbol.name,
        address: symbol.address.0,
        size: symbol.size,
        kind: u8::try_from(symbol.kind).unwrap_or(b'?'),
    });
    let count = write_beside(file, "the symbols", |out| {
        export::elf(of_kernel.chain(of_modules), out).context("writing the symbols")
    })?;
    tracing::info!("{count} symbols in {}", file.display());
    Ok(())
}
