//! The process that carries out an order, seen from the server that started it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stdout};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::{CpuSet, sched_setaffinity};
use vmsight_workload::orders::{Account, Ended, Order};

use super::page::Page;
use super::work;
use crate::sys::{self, Side};

/// What is kept of what a process prints, bytes.
const OUTPUT: usize = 64 << 10;
/// Lets a held process do its work.
const GO: u8 = b'g';
/// Ends a held process.
const END: u8 = b'e';

/// What a process tells the server, a line each: that it stands ready, and how it went.
type Told = Result<Account, String>;

/// A running order.
pub(super) struct Child {
    /// Its process.
    pub(super) pid: u32,
    /// What it waits for while it is held. That this is closed it need not see: children started later have it too.
    gate: Option<File>,
    telling: Option<File>,
    told: Vec<u8>,
    printing: Option<File>,
    printed: Vec<u8>,
}

/// What has become of an order.
pub(super) enum News {
    /// It stands ready.
    Ready(Account),
    /// Its process is gone.
    Over(Told),
}

impl Child {
    /// Starts the process. If it is `held`, it stops short of the work.
    pub(super) fn start(order: Order, held: bool, shared: Page) -> Result<Child> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).context("pipe");
        let (gate, tell, print) = (pipe()?, pipe()?, pipe()?);
        match sys::fork_with_pid()? {
            (Side::Child, _) => {
                // The other ends are the server's.
                drop((gate.1, tell.0, print.0));
                perform(order, held.then_some(gate.0), tell.1, &print.1, shared)
            }
            (Side::Parent, pid) => Ok(Child {
                pid: pid as u32,
                gate: held.then(|| File::from(gate.1)),
                telling: Some(File::from(tell.0)),
                told: Vec::new(),
                printing: Some(File::from(print.0)),
                printed: Vec::new(),
            }),
        }
    }

    /// What to wait for: either has something to read, or was closed.
    pub(super) fn sources(&self) -> impl Iterator<Item = &File> {
        self.telling.iter().chain(&self.printing)
    }

    /// Lets it go on.
    pub(super) fn go(&mut self) -> bool {
        self.open_gate(GO)
    }

    /// Whether it stands ready, or soon will.
    pub(super) fn is_held(&self) -> bool {
        self.gate.is_some()
    }

    /// Ends it, if it is held.
    pub(super) fn abandon(&mut self) -> bool {
        self.open_gate(END)
    }

    fn open_gate(&mut self, word: u8) -> bool {
        self.gate
            .take()
            .is_some_and(|mut gate| gate.write_all(&[word]).is_ok())
    }

    /// Reads from one of the [sources](Child::sources), the first or the second, that has something.
    pub(super) fn read(&mut self, first: bool) -> Option<News> {
        let (source, bytes) = if first && self.telling.is_some() {
            (&mut self.telling, &mut self.told)
        } else {
            (&mut self.printing, &mut self.printed)
        };
        let mut buffer = [0; 4096];
        let got = source
            .as_mut()
            .map_or(0, |file| file.read(&mut buffer).unwrap_or(0));
        if got == 0 {
            *source = None;
        }
        bytes.extend_from_slice(&buffer[..got]);
        self.printed.truncate(OUTPUT);
        if self.telling.is_none() && self.printing.is_none() {
            return Some(News::Over(self.over()));
        }
        if self.is_held() && self.told.contains(&b'\n') {
            let told = self.told.drain(..).collect::<Vec<_>>();
            // That it could not be made ready it says as it ends.
            match serde_json::from_slice::<Told>(&told) {
                Ok(Ok(account)) => {
                    return Some(News::Ready(Account {
                        pid: self.pid,
                        ..account
                    }));
                }
                _ => self.told = told,
            }
        }
        None
    }

    fn over(&mut self) -> Told {
        let ended = match waitpid(Pid::from_raw(self.pid as i32), None) {
            Ok(WaitStatus::Exited(_, code)) => Ended::Exited(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Ended::Signalled(signal as i32),
            other => return Err(format!("process {}: {other:?}", self.pid)),
        };
        // One that executed another program, or was killed, says nothing.
        let account = if self.told.is_empty() {
            Account::default()
        } else {
            serde_json::from_slice::<Told>(&self.told)
                .unwrap_or_else(|error| Err(format!("process {} garbled: {error}", self.pid)))?
        };
        Ok(Account {
            pid: self.pid,
            ended: Some(ended),
            output: std::mem::take(&mut self.printed).into(),
            ..account
        })
    }
}

/// What the process does.
fn perform(order: Order, gate: Option<OwnedFd>, tell: OwnedFd, print: &OwnedFd, shared: Page) -> ! {
    let mut tell = File::from(tell);
    let mut say = move |told: &Told| {
        if let Ok(mut line) = serde_json::to_vec(told) {
            line.push(b'\n');
            let _ = tell.write_all(&line);
        }
    };
    let mut work = || -> Result<Option<Account>> {
        dup2_stdout(print.as_fd()).context("standard output")?;
        if let Some(cpu) = order.cpu {
            let mut set = CpuSet::new();
            set.set(usize::try_from(cpu)?);
            sched_setaffinity(None, &set).with_context(|| format!("run on CPU {cpu}"))?;
        }
        let ready = work::prepare(order.work.clone(), shared)?;
        if let Some(gate) = &gate {
            say(&Ok(ready.account.clone()));
            let mut word = [END];
            rustix::io::read(gate, &mut word)?;
            if word != [GO] {
                return Ok(None);
            }
        }
        ready.finish().map(Some)
    };
    let told = work().map_err(|error| format!("{error:#}"));
    let code = i32::from(told.is_err());
    if let Some(told) = told.transpose() {
        say(&told);
    }
    std::process::exit(code)
}
