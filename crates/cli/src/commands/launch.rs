//! `vmsight launch`: a stock QEMU with the agent in it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use vmsight_events::agent::SOCKET_VARIABLE;

use crate::Outcome;

/// The agent's file name.
const LIBRARY: &str = "libvmsight_agent.so";
/// The longest path of a socket (unix(7), `sun_path`, less its end).
const LONGEST_PATH: usize = 107;

/// Start a stock QEMU with the agent in it, so that its guest can be hooked.
#[derive(Args, Debug)]
#[command(after_help = "\
QEMU is not changed: the agent is loaded into it and listens at a socket that only the same user and root can reach. It
hooks nothing until a monitor asks, and when the monitor is gone its hooks are, too. vmsight becomes the command it is
given, so the process keeps its id.

With KVM the agent is loaded by LD_PRELOAD. Where QEMU emulates the guest's processors it is loaded as a plugin (-plugin
is added to the command): when tcg is the accelerator that is asked for first (-accel, -machine accel=), or the first
that works; without any such option it is QEMU's default, unless the program's name ends in kvm.

For libvirt, print a wrapper once and name it in the domain's <emulator>:
  vmsight launch --wrapper -- /usr/bin/qemu-system-x86_64 >/usr/local/bin/vmsight-qemu
  chmod 755 /usr/local/bin/vmsight-qemu

The agent is looked for beside the program (libvmsight_agent.so) and in ../lib/vmsight; VMSIGHT_AGENT_LIBRARY names
another.")]
pub(crate) struct Cmd {
    /// Where the agent listens; its folder must be the user's own with mode 0700, and is made if it is not there
    /// [default: vmsight/PID.sock in $XDG_RUNTIME_DIR or /run, or /tmp/vmsight-UID/PID.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print a script that does this for libvirt's emulator element, and start nothing
    #[arg(long, conflicts_with = "socket")]
    wrapper: bool,
    /// The command: qemu-system-x86_64 and what it takes
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Cmd {
    pub(crate) fn run(&self) -> Result<Outcome> {
        let (program, arguments) = self.command.split_first().context("no command is given")?;
        let own = std::env::current_exe().context("finding this program")?;
        let library = library(&own)?;
        if self.wrapper {
            let script = wrapper(&own, &library, &self.command);
            io::stdout()
                .lock()
                .write_all(&script)
                .context("printing the wrapper")?;
            return Ok(Outcome::Fine);
        }
        let socket = match &self.socket {
            Some(path) => std::path::absolute(path).context("finding the socket's folder")?,
            None => default_socket()?,
        };
        prepare(&socket)?;
        let mut command = Command::new(program);
        command.args(arguments).env(SOCKET_VARIABLE, &socket);
        match emulates(program, arguments, has_kvm) {
            true => command.arg("-plugin").arg(plugin(&library)),
            false => command.env("LD_PRELOAD", preload(&library, std::env::var_os("LD_PRELOAD"))),
        };
        let error = command.exec();
        Err(error).with_context(|| format!("starting {}", Path::new(program).display()))
    }
}

/// Whether this command starts a QEMU that emulates its guest's processors.
fn emulates(program: &OsStr, arguments: &[OsString], has_kvm: impl Fn() -> bool) -> bool {
    let name = Path::new(program)
        .file_name()
        .unwrap_or(program)
        .to_string_lossy();
    if !name.contains("qemu") && !name.ends_with("kvm") {
        return false;
    }
    let mut wanted: Vec<String> = Vec::new();
    let mut words = arguments.iter().map(|word| word.to_string_lossy());
    while let Some(word) = words.next() {
        // QEMU takes both -x and --x.
        let option = match word.strip_prefix("--").or_else(|| word.strip_prefix('-')) {
            Some(option) => option,
            None => continue,
        };
        match option {
            "enable-kvm" => wanted.push("kvm".to_owned()),
            "accel" => {
                let value = words.next().unwrap_or_default();
                let first = value.split(',').next().unwrap_or_default();
                wanted.push(first.strip_prefix("accel=").unwrap_or(first).to_owned());
            }
            "machine" | "M" => {
                let value = words.next().unwrap_or_default();
                let accelerators = value.split(',').filter_map(|part| part.strip_prefix("accel="));
                wanted.extend(accelerators.flat_map(|list| list.split(':')).map(str::to_owned));
            }
            _ => {}
        }
    }
    if wanted.is_empty() {
        // As QEMU does it (system/vl.c, configure_accelerators).
        let default = if name.ends_with("kvm") {
            ["kvm", "tcg"]
        } else {
            ["tcg", "kvm"]
        };
        wanted.extend(default.map(str::to_owned));
    }
    let works = |name: &&String| *name != "kvm" || has_kvm();
    wanted.iter().find(works).is_some_and(|name| name == "tcg")
}

/// Whether KVM can be used here.
fn has_kvm() -> bool {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}

/// The agent as the value of -plugin, in which a comma begins another option.
fn plugin(library: &Path) -> OsString {
    let bytes = library.as_os_str().as_bytes();
    let mut doubled = Vec::with_capacity(bytes.len());
    for byte in bytes {
        doubled.extend(std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 }));
    }
    OsString::from_vec(doubled)
}

/// Finds the agent.
fn library(own: &Path) -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("VMSIGHT_AGENT_LIBRARY") {
        let path = PathBuf::from(named);
        ensure!(
            path.is_absolute() && path.is_file(),
            "VMSIGHT_AGENT_LIBRARY names {}, which is not the full path of a file",
            path.display()
        );
        return Ok(path);
    }
    let folder = own.parent().unwrap_or(Path::new("/"));
    let places = [folder.join(LIBRARY), folder.join("../lib/vmsight").join(LIBRARY)];
    let found = places.iter().find(|place| place.is_file());
    let Some(found) = found else {
        bail!(
            "the agent is neither at {} nor at {}: build or install it (crate vmsight-agent), or name it in \
             VMSIGHT_AGENT_LIBRARY",
            places[0].display(),
            places[1].display()
        );
    };
    let path = fs::canonicalize(found).context("finding the agent")?;
    // The loader takes blanks and colons for the end of a name (ld.so(8)).
    ensure!(
        !path.as_os_str().as_bytes().iter().any(|b| b" \t\n:".contains(b)),
        "the agent's path {} has a blank or a colon in it, which LD_PRELOAD cannot name",
        path.display()
    );
    Ok(path)
}

/// The agent first, then what was to be loaded anyway.
fn preload(library: &Path, others: Option<OsString>) -> OsString {
    let mut preload = library.as_os_str().to_owned();
    if let Some(others) = others.filter(|o| !o.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    preload
}

fn default_socket() -> Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let folder = match runtime.filter(|folder| folder.is_absolute() && folder.is_dir()) {
        Some(folder) => folder.join("vmsight"),
        None if uid == 0 => PathBuf::from("/run/vmsight"),
        None => PathBuf::from(format!("/tmp/vmsight-{uid}")),
    };
    Ok(folder.join(format!("{}.sock", std::process::id())))
}

/// Sees to it that the agent will be able to listen there: it has nobody to complain to.
fn prepare(socket: &Path) -> Result<()> {
    let len = socket.as_os_str().len();
    ensure!(
        len <= LONGEST_PATH,
        "the socket's path {} has {len} bytes; a socket's has at most {LONGEST_PATH}",
        socket.display()
    );
    let folder = socket.parent().context("the socket has no folder")?;
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("making the folder {}", folder.display()));
        }
        _ => {}
    }
    let there = fs::metadata(folder).with_context(|| format!("looking at {}", folder.display()))?;
    let own = rustix::process::geteuid().as_raw();
    ensure!(
        there.is_dir() && there.uid() == own && there.mode() & 0o077 == 0,
        "{} belongs to user {} and has mode {:o}: the folder of the agent's socket must be one's own and closed to all \
         others (mode 0700); --socket names another",
        folder.display(),
        there.uid(),
        there.mode() & 0o7777
    );
    Ok(())
}

/// A script that starts the command with the agent. `exec` keeps the process, which libvirt watches.
fn wrapper(own: &Path, library: &Path, command: &[OsString]) -> Vec<u8> {
    let mut script =
        b"#!/bin/sh\n# Starts QEMU with vmsight's agent in it; for <emulator> of libvirt.\n".to_vec();
    script.extend(b"VMSIGHT_AGENT_LIBRARY=");
    script.extend(quoted(library.as_os_str()));
    script.extend(b" exec ");
    script.extend(quoted(own.as_os_str()));
    script.extend(b" launch --");
    for word in command {
        script.push(b' ');
        script.extend(quoted(word));
    }
    script.extend(b" \"$@\"\n");
    script
}

/// A word as the shell takes it literally.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(b"'\\''"),
            _ => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_was_to_be_loaded_is_loaded_too() {
        let library = Path::new("/usr/lib/vmsight/libvmsight_agent.so");
        assert_eq!(preload(library, None), library.as_os_str());
        assert_eq!(preload(library, Some("".into())), library.as_os_str());
        let both = preload(library, Some("/a.so".into()));
        assert_eq!(both, "/usr/lib/vmsight/libvmsight_agent.so:/a.so");
    }

    #[test]
    fn how_the_agent_is_loaded_is_seen_from_the_command() {
        let emulates = |kvm: bool, line: &str| {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            super::emulates(&words[0], &words[1..], || kvm)
        };
        for line in [
            "qemu-system-x86_64 -m 512",
            "/usr/bin/qemu-system-x86_64 -accel tcg,thread=multi -m 512",
            "qemu-system-x86_64 --accel accel=tcg",
            "qemu-system-x86_64 -machine pc,accel=tcg:kvm",
            "qemu-system-x86_64 -M accel=tcg -accel kvm",
        ] {
            assert!(emulates(true, line) && emulates(false, line), "{line}");
        }
        for line in [
            "qemu-system-x86_64 -accel kvm -accel tcg",
            "qemu-system-x86_64 -M q35,accel=kvm:tcg -m 1G",
            "/usr/libexec/qemu-kvm -m 512",
            "kvm -m 512",
        ] {
            assert!(!emulates(true, line) && emulates(false, line), "{line}");
        }
        for line in [
            "qemu-system-x86_64 -enable-kvm",
            "qemu-system-x86_64 -accel kvm",
            "qemu-system-x86_64 -machine none,accel=kvm",
            "firecracker --accel tcg",
            "qemu-system-x86_64 -accel",
        ] {
            assert!(!emulates(true, line) && !emulates(false, line), "{line}");
        }
        assert_eq!(plugin(Path::new("/a,b/l.so")), "/a,,b/l.so");
    }

    #[test]
    fn a_wrapper_passes_words_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("wrapper");
        // In place of vmsight a script that says what it was given.
        let own = folder.path().join("it's vmsight");
        fs::write(
            &own,
            "#!/bin/sh\necho \"$VMSIGHT_AGENT_LIBRARY\"\nprintf '<%s>' \"$@\"\n",
        )
        .unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
        let command = ["qemu $HOME".into(), "-x".into()];
        fs::write(&path, wrapper(&own, Path::new("/l.so"), &command)).unwrap();
        let output = Command::new("sh")
            .arg(&path)
            .args(["-name", "a b"])
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "/l.so\n<launch><--><qemu $HOME><-x><-name><a b>"
        );
    }

    #[test]
    fn a_folder_that_is_open_to_others_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        prepare(&own.join("vm.sock")).unwrap();
        assert_eq!(fs::metadata(&own).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&own, fs::Permissions::from_mode(0o770)).unwrap();
        let error = prepare(&own.join("vm.sock")).unwrap_err().to_string();
        assert!(
            error.contains("mode 770") && error.contains("--socket"),
            "{error}"
        );
        let long = folder.path().join("x".repeat(120));
        assert!(prepare(&long).unwrap_err().to_string().contains("at most 107"));
    }
}
