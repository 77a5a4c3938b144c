//! A session on a pseudo-terminal: one end holds the master, at the other a user works in a shell.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::unistd::setsid;

use super::process::become_user;
use crate::play::{Held, STAGE, join_cgroup};

/// The last words before the shell is ready for more.
const DONE: &[u8] = b"history-complete-9";

/// Holds the master, as sshd or a terminal emulator does.
pub(super) fn master() -> Result<Held> {
    join_cgroup("/user.slice/user-1000.slice/session-3.scope")?;
    let mut master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ptsname_r(&master)?;
    let child = Command::new(format!("{STAGE}/terminal-user"))
        .arg0("-bash")
        .arg(&slave)
        .env_clear()
        .envs([
            ("TERM", "vt100"),
            ("USER", "alice"),
            ("HOME", "/home/alice"),
            ("PATH", "/bin"),
        ])
        .stdin(Stdio::null())
        .spawn()
        .context("start the terminal's user")?;
    for line in [
        "echo first-command-of-alice",
        "ls /srv/data",
        "export TOKEN=s3cr3t-t0ken",
        "echo history-complete-$((4+5))",
    ] {
        master.write_all(line.as_bytes())?;
        master.write_all(b"\n")?;
    }
    let mut seen = Vec::new();
    let mut buffer = [0u8; 512];
    while !seen.windows(DONE.len()).any(|w| w == DONE) {
        match master.read(&mut buffer)? {
            0 => bail!("the terminal closed: {}", String::from_utf8_lossy(&seen)),
            n => seen.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(Box::new((master, child, unread()?, console()?)))
}

/// Both ends of a terminal at which somebody types and nobody reads: a line, and one that is not complete.
fn unread() -> Result<Held> {
    let mut master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(ptsname_r(&master)?)?;
    master.write_all(b"typed and never read\nnot yet \x1b[31mcomplete")?;
    Ok(Box::new((master, slave)))
}

/// A virtual console behind the one in front, with something on it.
fn console() -> Result<Held> {
    let mut console = File::options()
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/tty2")
        .context("open the second console")?;
    console.write_all(b"on the second console\r\n\r\n  and \x1b[31mred\x1b[0m, further down\r\n")?;
    Ok(Box::new(console))
}

/// Makes the terminal its own and becomes the user's shell: bash where the guest has one, else busybox.
pub(super) fn user() -> Result<Held> {
    let slave = std::env::args().nth(1).context("no terminal given")?;
    setsid()?;
    // The first terminal that the leader of a new session opens becomes its controlling one.
    let terminal = File::options()
        .read(true)
        .write(true)
        .open(&slave)
        .with_context(|| slave.clone())?;
    let (input, output) = (terminal.try_clone()?, terminal.try_clone()?);
    std::os::unix::fs::chown(&slave, Some(1000), Some(5))?;
    become_user(1000, 1000, &[27, 100, 1000])?;
    let mut shell = if Path::new("/bin/bash").exists() {
        let mut shell = Command::new("/bin/bash");
        shell
            .arg0("-bash")
            .args(["--noprofile", "--norc", "-i"])
            .env("HISTFILE", "/home/alice/.bash_history");
        shell
    } else {
        let mut shell = Command::new("/bin/busybox");
        shell.arg0("-sh").arg("-i");
        shell
    };
    // Nothing of this end may stay open but the three.
    drop(slave);
    let error = shell.stdin(input).stdout(output).stderr(terminal).exec();
    Err(error).context("become a shell")
}
