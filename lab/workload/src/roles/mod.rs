//! The parts of the workload. Each is played by a process that runs this binary under the part's name, brings about
//! one thing worth seeing from outside, says that it is ready, and stands still.

mod container;
mod files;
mod memory;
mod process;
mod sockets;
mod tcp;
mod terminal;
mod watcher;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use anyhow::{Context, Result};

use crate::play::{Held, Part, ready, stand};

pub(crate) use container::made as containers;

/// How a part is played: it gives what it holds on to.
type Role = fn() -> Result<Held>;

/// Every name and what it does. Those that never come back say for themselves that they are ready.
const ROLES: &[(&str, Role)] = &[
    ("alternate-root", process::jailed),
    ("app-server", process::with_descendants),
    ("backup-agent", process::few_capabilities),
    ("batch-job", process::batch),
    ("bound-box", process::seccomp_filter),
    ("containerd-shim", container::shim),
    ("dynamic", process::dynamic),
    ("file-holder", files::holder),
    ("leaderless", process::leaderless),
    ("long-arguments", process::plain),
    ("low-priority", process::low_priority),
    ("mapper", memory::mapper),
    ("nested-pid", container::nested),
    ("nginx", container::service),
    ("odd-arguments", process::plain),
    ("paged-out", memory::paged_out),
    ("pool", process::pool),
    ("realtime", process::realtime),
    ("retitled", process::retitled),
    ("rootless", container::rootless),
    ("runc", container::runc),
    ("sleepers", process::sleepers),
    ("split-files", files::split),
    ("socket-mix", sockets::mix),
    ("stopped", process::stopped),
    ("strict-box", process::seccomp_strict),
    ("tcp-states", tcp::states),
    ("terminal", terminal::master),
    ("terminal-user", terminal::user),
    ("traced", process::plain),
    ("tracer", process::tracer),
    ("uninterruptible", process::uninterruptible),
    ("unix-mix", sockets::unix),
    ("vsock-mix", sockets::vsock),
    ("watcher", watcher::bpf_and_perf),
    ("web-frontend", process::web_frontend),
    ("worker", process::plain),
    ("zombie-child", process::ends),
    ("zombie-parent", process::zombie_parent),
];

/// Every part has some memory locked: pages that stay where they are, for walks through its page tables.
const PAGES_LOCKED: usize = 3;

/// The names under which the binary must be found.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    ROLES.iter().map(|(name, _)| *name)
}

/// Plays one part, for ever.
pub(crate) fn perform(name: &str) -> Result<()> {
    let (_, role) = ROLES.iter().find(|(n, _)| *n == name).context("no such part")?;
    // The sleepers are forked by the thousand, which this would slow down.
    if name != "sleepers" {
        memory::locked(PAGES_LOCKED)?;
    }
    let _held = role()?;
    ready()?;
    stand()
}

/// What init starts, in this order; some start others.
pub(crate) fn parts() -> Vec<Part> {
    vec![
        Part::new("web-frontend")
            .args([
                "web-frontend",
                "--listen=0.0.0.0:8080",
                "",
                "--title=Gr\u{fc}\u{df}e aus K\u{f6}ln \u{2603}",
                "-v",
            ])
            .env("LANG", "de_DE.UTF-8")
            .env("APP_SECRET", "correct horse battery staple")
            .env("EMPTY", ""),
        Part::new("odd-arguments")
            .args(odd_arguments())
            .env("TERM", "\x1b[2J"),
        long_arguments(),
        Part::new("retitled").args([
            "/usr/sbin/retitled",
            "--with",
            "--many",
            "--arguments=to-write-over",
        ]),
        Part::new("backup-agent")
            .args(["backup-agent", "--all"])
            .env("HOME", "/home/alice"),
        Part::new("bound-box"),
        Part::new("strict-box"),
        Part::new("low-priority"),
        Part::new("batch-job"),
        Part::new("realtime"),
        Part::new("app-server").args(["app-server", "3"]),
        Part::new("pool"),
        Part::new("leaderless"),
        Part::new("stopped"),
        Part::new("zombie-parent"),
        Part::new("uninterruptible"),
        Part::new("traced"),
        Part::new("tracer"),
        Part::new("dynamic"),
        Part::new("alternate-root"),
        Part::new("terminal"),
        Part::new("file-holder"),
        Part::new("split-files"),
        Part::new("mapper"),
        Part::new("unix-mix"),
        Part::new("socket-mix"),
        Part::new("vsock-mix"),
        Part::new("tcp-states"),
        Part::new("watcher"),
        Part::new("containerd-shim").args([
            "/usr/bin/containerd-shim-runc-v2",
            "-namespace",
            "moby",
            "-id",
            container::ID,
        ]),
        Part::new("rootless"),
        paged_out(),
    ]
}

fn odd_arguments() -> Vec<OsString> {
    let mut args: Vec<OsString> = [
        &b"odd-arguments"[..],
        b"\x1b[31mred\x1b[0m",
        b"tab\there",
        b"new\nline",
        b"carriage\rreturn",
        b"not UTF-8: \xff\xfe\x80",
        b"quote\"and'backslash\\",
        b"  blanks  ",
        b"\x07",
    ]
    .iter()
    .map(|bytes| OsString::from_vec(bytes.to_vec()))
    .collect();
    args.extend(std::iter::repeat_n(OsString::new(), 5));
    args.push("\u{202e}right-to-left".into());
    args
}

/// Arguments and environment of several pages each.
fn long_arguments() -> Part {
    let args = (0..220).map(|n| format!("--option-{n:03}={}", "x".repeat(50)));
    let mut part = Part::new("long-arguments").args(std::iter::once("long-arguments".to_owned()).chain(args));
    for n in 0..180 {
        part = part.env(format!("VARIABLE_{n:03}"), "y".repeat(40));
    }
    part
}

fn paged_out() -> Part {
    let args = (0..300).map(|n| format!("--paged-out-{n:03}={}", "z".repeat(60)));
    Part::new("paged-out").args(std::iter::once("paged-out".to_owned()).chain(args))
}
