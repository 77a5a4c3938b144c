//! Process 1 of a lab guest.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::waitpid;
use nix::unistd::{chdir, chroot, sethostname};
use vmsight_workload::frame;

use crate::play::{Part, STAGE, busybox, join_cgroup, send};
use crate::{machine, modules, roles};

/// Says that this is the second start.
const SWITCHED: &str = "--switched-root";

/// Sets the guest up, starts the workload, has its account written, and then only waits.
pub(crate) fn run() -> Result<()> {
    if std::process::id() != 1 {
        bail!("this is the init of a lab guest and starts as process 1");
    }
    // Started a second time from the new root, as the init of a real system is.
    let outcome = if std::env::args().any(|arg| arg == SWITCHED) {
        guest()
    } else {
        move_off_rootfs()
    };
    if let Err(error) = outcome {
        let line = format!("{}{error:#}\n", frame::FAILED);
        // Whatever of the two works.
        let _ = std::io::stderr().write_all(line.as_bytes());
        let _ = send(line.as_bytes());
    }
    loop {
        // Take leave of orphans; with none left, just stand.
        if waitpid(None, None).is_err() {
            nix::unistd::pause();
        }
    }
}

fn guest() -> Result<()> {
    machine::kernel_mounts()?;
    let options = Options::read()?;
    machine::settings();
    modules::load()?;
    sethostname("vmsight-lab")?;
    fs::create_dir_all(STAGE)?;
    for name in roles::names().chain(["collector", "orders", "witness"]) {
        fs::hard_link("/init", format!("{STAGE}/{name}")).with_context(|| format!("link {name}"))?;
    }
    join_cgroup("/init.scope")?;
    let mut lacking = Vec::new();
    let mut swap_out = 0;
    if !options.idle {
        machine::files()?;
        machine::interfaces()?;
        lacking.extend(machine::more_mounts()?);
        lacking.extend(machine::disks());
        say_odd_things()?;
        for part in roles::parts() {
            let name = part.name();
            let (pid, lacks) = part.start()?;
            lacking.extend(lacks);
            if name == "paged-out" {
                swap_out = pid;
            }
        }
    }
    if options.sleepers > 0 {
        Part::new("sleepers")
            .args(["sleepers".to_owned(), options.sleepers.to_string()])
            .start()?;
    }
    if options.orders {
        // A workload has seen to it; without one there is still an order that connects.
        if options.idle && !options.silent {
            busybox("ip link set lo up")?;
        }
        Part::new("orders").start()?;
    }
    if !options.idle {
        // The last thing, because it lasts for a minute only.
        leave_time_wait()?;
    }
    if !options.silent {
        collect(swap_out, lacking)?;
    }
    send(format!("{}\n", frame::READY).as_bytes())
}

/// The kernel's first root cannot be pivoted away from, which containers want to do: move to a tmpfs of our own.
fn move_off_rootfs() -> Result<()> {
    fs::create_dir_all("/new")?;
    mount(
        Some("root"),
        "/new",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=0755,size=80%"),
    )?;
    for entry in fs::read_dir("/")? {
        let path = entry?.path();
        if path != Path::new("/new") {
            take_along(&path, &Path::new("/new").join(path.strip_prefix("/")?))?;
        }
    }
    chdir("/new")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/").context("the new root")?;
    let error = Command::new("/init")
        .arg0("/sbin/init")
        .args([SWITCHED, "splash"])
        .env_clear()
        .env("HOME", "/")
        .exec();
    Err(error).context("start anew from the new root")
}

/// Moves a file or a folder to another file system, and copies a link. Devices are left behind: devtmpfs makes them anew.
fn take_along(from: &Path, to: &Path) -> Result<()> {
    let kind = fs::symlink_metadata(from)?.file_type();
    if kind.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let path = entry?.path();
            take_along(&path, &to.join(path.strip_prefix(from)?))?;
        }
    } else if kind.is_file() {
        fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
        fs::remove_file(from)?;
    } else if kind.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)
            .with_context(|| format!("link {}", to.display()))?;
    }
    Ok(())
}

/// What the kernel command line asks for.
struct Options {
    /// `vmsight.idle`: no workload.
    idle: bool,
    /// `vmsight.silent`: no account of itself, and nothing that takes busybox.
    silent: bool,
    /// `vmsight.procs=N`: that many processes more.
    sleepers: u32,
    /// `vmsight.orders`: serve orders.
    orders: bool,
}

impl Options {
    fn read() -> Result<Options> {
        let line = fs::read_to_string("/proc/cmdline")?;
        let mut options = Options {
            idle: false,
            silent: false,
            sleepers: 0,
            orders: false,
        };
        for word in line.split_ascii_whitespace() {
            if word == "vmsight.idle" {
                options.idle = true;
            } else if word == "vmsight.silent" {
                options.silent = true;
            } else if word == "vmsight.orders" {
                options.orders = true;
            } else if let Some(number) = word.strip_prefix("vmsight.procs=") {
                options.sleepers = number.parse().with_context(|| format!("'{word}'"))?;
            }
        }
        Ok(options)
    }
}

/// Lines of the kernel log that a careless reader of it trips over.
fn say_odd_things() -> Result<()> {
    for line in [
        &b"<6>vmsight-lab: plain line"[..],
        b"<4>vmsight-lab: escapes \x1b[31mred\x1b[0m, tab\tand \\ and \"quotes\"",
        "<5>vmsight-lab: Gr\u{fc}\u{df}e \u{2603}".as_bytes(),
        b"<3>vmsight-lab: not UTF-8 \xff\xfe",
        b"<27>vmsight-lab: from a daemon",
        b"<6>vmsight-lab: first\nsecond line of the same record",
    ] {
        // One write is one record.
        fs::OpenOptions::new()
            .write(true)
            .open("/dev/kmsg")?
            .write_all(line)
            .context("write /dev/kmsg")?;
    }
    Ok(())
}

/// Leaves a connection of each family in TIME_WAIT, over which some bytes went.
fn leave_time_wait() -> Result<()> {
    for address in ["127.0.0.1:7999", "[::1]:7999"] {
        let listener = TcpListener::bind(address)?;
        let mut near = TcpStream::connect(address)?;
        let (mut far, _) = listener.accept()?;
        near.write_all(&[b'w'; 300])?;
        far.read_exact(&mut [0; 300])?;
        near.shutdown(std::net::Shutdown::Write)?;
        drop(near);
        drop(far);
    }
    Ok(())
}

/// Runs the collector, which leaves no trace of itself.
fn collect(swap_out: u32, lacking: Vec<String>) -> Result<()> {
    let status = Command::new(format!("{STAGE}/collector"))
        .arg(swap_out.to_string())
        .args(lacking)
        .env_clear()
        .stdin(std::process::Stdio::null())
        .status()
        .context("start the collector")?;
    if !status.success() {
        bail!("the collector failed: {status}");
    }
    Ok(())
}
