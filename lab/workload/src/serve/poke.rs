//! Talks to our kernel module `vmsight_poke`.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use vmsight_workload::orders::{Account, Poke, Poked, Reach, Register};

use super::work::{call, once};

const PATH: &str = "/dev/vmsight_poke";

/// `struct poke` of lab/modules/vmsight_poke.c.
#[derive(Debug, Default)]
#[repr(C)]
struct Message {
    verb: u64,
    how: u64,
    at: u64,
    number: u64,
    width: u64,
    restore: u64,
    first: u64,
    step: u64,
    count: u64,
    arguments: [u64; 4],
    old: u64,
    seen: u64,
    made: u64,
    faults: u64,
}

const WRITE: u64 = 0;
const READ: u64 = 1;
const GET: u64 = 2;
const SET: u64 = 3;
const CALL: u64 = 4;
/// `_IOWR('v', 1, struct poke)`.
const POKE: u64 = 3 << 30 | (size_of::<Message>() as u64) << 16 | (b'v' as u64) << 8 | 1;

/// The module's device, opened.
pub(super) struct Device {
    file: File,
}

impl Device {
    /// Opens it.
    pub(super) fn open() -> Result<Device> {
        let file = File::open(PATH).with_context(|| format!("{PATH} (is vmsight_poke loaded?)"))?;
        Ok(Device { file })
    }

    /// Has it do something.
    pub(super) fn poke(&mut self, poke: &Poke) -> Result<Account> {
        let mut message = message(poke)?;
        let argument = (&raw mut message) as u64;
        // SAFETY: the module reads and writes one message there.
        let returned = unsafe { call(libc::SYS_ioctl, [self.file.as_raw_fd() as u64, POKE, argument, 0]) };
        let Message {
            old,
            seen,
            made,
            faults,
            ..
        } = message;
        Ok(Account {
            poked: Some(Poked {
                old,
                seen,
                made,
                faults,
            }),
            ..once(returned)
        })
    }
}

fn message(poke: &Poke) -> Result<Message> {
    Ok(match *poke {
        Poke::Write {
            at,
            reach,
            width,
            first,
            step,
            count,
            restore,
        } => Message {
            verb: WRITE,
            how: how(reach),
            at,
            width,
            first,
            step,
            count,
            restore: restore.into(),
            ..Message::default()
        },
        Poke::Read {
            at,
            reach,
            width,
            count,
        } => Message {
            verb: READ,
            how: how(reach),
            at,
            width,
            count,
            ..Message::default()
        },
        Poke::Get { register } => {
            let (how, number) = which(register)?;
            Message {
                verb: GET,
                how,
                number,
                ..Message::default()
            }
        }
        Poke::Set {
            register,
            mask,
            value,
            count,
            restore,
        } => {
            let (how, number) = which(register)?;
            Message {
                verb: SET,
                how,
                number,
                first: value,
                step: mask,
                count,
                restore: restore.into(),
                ..Message::default()
            }
        }
        Poke::Call {
            at,
            ref arguments,
            count,
        } => {
            let mut four = [0; 4];
            four.get_mut(..arguments.len())
                .context("more than four arguments")?
                .copy_from_slice(arguments);
            Message {
                verb: CALL,
                at,
                count,
                arguments: four,
                ..Message::default()
            }
        }
    })
}

/// `enum how` of the module.
fn how(reach: Reach) -> u64 {
    match reach {
        Reach::Direct => 0,
        Reach::Wp => 1,
        Reach::Alias => 2,
        Reach::Physical => 3,
    }
}

/// `enum which` of the module, and the number of an MSR.
fn which(register: Register) -> Result<(u64, u64)> {
    Ok(match register {
        Register::Cr0 => (0, 0),
        Register::Cr2 => (2, 0),
        Register::Cr3 => (3, 0),
        Register::Cr4 => (4, 0),
        Register::Dr(number @ (0..=3 | 6 | 7)) => (0x10 + u64::from(number), 0),
        Register::Dr(number) => bail!("no debug register {number}"),
        Register::Xcr0 => (0x20, 0),
        Register::Idtr => (0x30, 0),
        Register::Msr(number) => (0x100, number.into()),
    })
}
