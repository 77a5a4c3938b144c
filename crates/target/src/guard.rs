//! The watch over a paused VM: a VM must go on though we are killed.
//!
//! While a VM is paused a small shell process of its own process group holds a copy of our connection and the end
//! of a pipe whose other end only we have. When the pipe ends without a word from us (a panic that aborts, SIGKILL,
//! the out-of-memory killer) it sends what lets the VM go on. Signals that end us by default (SIGINT, SIGTERM,
//! SIGHUP) need no handler for the same reason.
//!
//! `/bin/sh` and not our own program: this library does not know what program it is linked into.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

/// `$1` is what to send, with octal escapes; `$2` is in the line that answers it, empty where answers have no lines.
/// Waiting matters: bytes that are still unread when a connection closes may be lost with it.
const SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM TSTP PIPE
read -r word && exit 0
printf "$1"
[ -n "$2" ] || { sleep 1; exit 0; }
while read -r line <&1; do case $line in *"$2"*) exit 0;; esac; done
"#;

/// The same for a stub with hooks, and with words that change what is sent: `hold` makes it what follows, or `$2` where
/// nothing does, `go` makes it `$1` again. The first is said twice: a vCPU that was in the midst of a step may stop once more.
const SWITCHED: &str = r#"
trap '' HUP INT QUIT TERM TSTP PIPE
say=$1
while read -r word rest; do
    case $word in
        hold) say=${rest:-$2};;
        go) say=$1;;
        *) exit 0;;
    esac
done
printf "$say"
[ "$say" != "$1" ] || { sleep 0.05 || sleep 1; printf "$say"; }
sleep 1
"#;

/// Runs a command when we are gone.
const RUN: &str = r#"
trap '' HUP INT QUIT TERM TSTP PIPE
read -r word && exit 0
exec "$@"
"#;

/// The watch. Dropped without [`Guard::dismiss`] it does what it is there for.
#[derive(Debug)]
pub(crate) struct Guard {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Sets up the watch: `last_words` (octal escapes as of `printf`) go to `connection` when we are gone, and the
    /// watch ends with the line that holds `answer`, or a second later where that is empty.
    pub(crate) fn set(connection: OwnedFd, last_words: &str, answer: &str) -> io::Result<Self> {
        Self::over(connection, &["-c", SCRIPT, "vmsight-guard", last_words, answer])
    }

    /// Sets up a watch over a connection whose answers have no lines: `go` is what it sends when we are gone, `hold`
    /// what it sends after [`Self::hold`].
    pub(crate) fn switched(connection: OwnedFd, go: &str, hold: &str) -> io::Result<Self> {
        Self::over(connection, &["-c", SWITCHED, "vmsight-guard", go, hold])
    }

    /// A shell whose standard output is the connection.
    fn over(connection: OwnedFd, args: &[&str]) -> io::Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(args)
            .env_clear()
            .env("PATH", "/usr/bin:/bin") // sleep is no builtin
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::from(connection))
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// A watch of [`Self::switched`] sends `words` from now on, or what it was given for that where they are empty.
    pub(crate) fn hold(&mut self, words: &str) -> io::Result<()> {
        self.tell(&format!("hold {words}\n"))
    }

    /// It lets the VM go on again.
    pub(crate) fn let_go(&mut self) -> io::Result<()> {
        self.tell("go\n")
    }

    /// In one piece: we may be killed in the midst of it.
    fn tell(&mut self, line: &str) -> io::Result<()> {
        match &mut self.pipe {
            Some(pipe) => pipe.write_all(line.as_bytes()),
            None => Ok(()),
        }
    }

    /// Sets up a watch that runs `command` when we are gone.
    pub(crate) fn command(command: &[&str]) -> io::Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", RUN, "vmsight-guard"])
            .args(command)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// Ends the watch: the VM goes on already.
    pub(crate) fn dismiss(mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(b"done\n");
        }
        let _ = self.child.wait();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The pipe closes; whoever runs in the child finds it out. Not waited for: it may have to wait itself.
        self.pipe = None;
    }
}
