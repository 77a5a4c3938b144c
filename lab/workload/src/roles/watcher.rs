//! Watches the system as monitoring agents do.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount, umount};
use nix::net::if_::if_nametoindex;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_keep_capabilities};

use vmsight_workload::perf::{FILE, PerfEvent};

use super::process::become_user;
use crate::play::{Held, join_cgroup, lacking};
use crate::watch::{
    BPF_LINK_CREATE, BPF_MAP_CREATE, BPF_RAW_TRACEPOINT_OPEN, CGROUP_INET_EGRESS, CGROUP_SKB, CPU_CLOCK,
    EVENT, KPROBE, RAW_TRACEPOINT, SOCKET_FILTER, SOFTWARE, Words, bpf, event, event_id, load, owned, perf,
    returning,
};

const GROUP: &str = "/system.slice/watcher.service";
const TRACEPOINT: &[u8] = b"sched_process_exec\0";

// Of include/uapi/linux/bpf.h.
const MAP_HASH: u32 = 1;
const MAP_ARRAY: u32 = 2;
/// Room for entries is made when they come.
const NO_PREALLOC: u32 = 1;
const XDP: u32 = 6;
const SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
const ATTACH_XDP: u32 = 37;

// Of include/uapi/linux/perf_event.h and hw_breakpoint.h.
const BREAKPOINT: u32 = 5;
const TASK_CLOCK: u64 = 1;
const PAGE_FAULTS: u64 = 2;
/// `perf_event_attr.disabled` and `freq`.
const DISABLED: u64 = 1;
const FREQUENCY: u64 = 1 << 10;
const HW_BREAKPOINT_W: u32 = 2;
const HW_BREAKPOINT_LEN_8: u64 = 8;

const PASS: i32 = 1;
const XDP_PASS: i32 = 2;

/// BPF of several kinds, attached to what there is, and perf events; one program is loaded by a user.
pub(super) fn bpf_and_perf() -> Result<Held> {
    join_cgroup(GROUP)?;
    let visits = map(MAP_HASH, [4, 16, 64], NO_PREALLOC, b"visits\0\0")?;
    let state = map(MAP_ARRAY, [4, 8, 3], 0, b"state\0\0\0")?;
    let mut held = vec![
        load(
            SOCKET_FILTER,
            0,
            &using(&[&visits, &state]),
            "a program with maps",
        )?,
        load(KPROBE, 0, &returning(0), "a program of a probe")?,
    ];
    held.extend([visits, state]);
    let egress = load(
        CGROUP_SKB,
        CGROUP_INET_EGRESS,
        &returning(PASS),
        "a program of a group",
    )?;
    let group = OwnedFd::from(File::open(format!("/sys/fs/cgroup{GROUP}"))?);
    held.push(link(&egress, group.as_raw_fd() as u32, CGROUP_INET_EGRESS).context("a group")?);
    held.push(egress);
    let point = load(RAW_TRACEPOINT, 0, &returning(0), "a program of a tracepoint")?;
    let mut open = Words::default()
        .eight(0, TRACEPOINT.as_ptr() as u64)
        .four(8, point.as_raw_fd() as u32);
    let opened = bpf(BPF_RAW_TRACEPOINT_OPEN, &mut open, "a tracepoint")?;
    held.extend([owned(opened, "a tracepoint")?, point]);
    // Both since 5.9.
    let namespace = OwnedFd::from(File::open("/proc/self/ns/net")?);
    let attached = [
        (
            "sk_lookup",
            SK_LOOKUP,
            PASS,
            namespace.as_raw_fd() as u32,
            ATTACH_SK_LOOKUP,
        ),
        ("xdp", XDP, XDP_PASS, if_nametoindex("dummy0")?, ATTACH_XDP),
    ];
    for (what, kind, verdict, target, attach) in attached {
        let program = load(kind, attach, &returning(verdict), what)?;
        match link(&program, target, attach) {
            Ok(link) => held.push(link),
            Err(error) => lacking(what, format!("{error:#}")),
        }
        held.push(program);
    }
    let events = events()?;
    set_keep_capabilities(true)?;
    become_user(1000, 1000, &[])?;
    let few = CapabilitySet::BPF;
    set_capabilities(
        None,
        CapabilitySets {
            effective: few,
            permitted: few,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    held.push(load(SOCKET_FILTER, 0, &returning(0xffff), "a user's program")?);
    Ok(Box::new((held, events)))
}

/// Perf events of several kinds, which are written down for the guest's account.
fn events() -> Result<Vec<OwnedFd>> {
    static TOUCHED: u64 = 0;
    let own = std::process::id();
    let mut wanted = vec![
        // Every second, on the first CPU.
        (
            event(SOFTWARE, CPU_CLOCK, 1_000_000_000),
            "cpu-clock".to_owned(),
            None,
            Some(0),
        ),
        (
            event(SOFTWARE, TASK_CLOCK, 1_000_000),
            "task-clock".to_owned(),
            Some(own),
            None,
        ),
        // A thousand samples a second. Of clocks the kernel would make a period of that.
        (
            event(SOFTWARE, PAGE_FAULTS, 1000).eight(40, DISABLED | FREQUENCY),
            "page-faults".to_owned(),
            Some(own),
            Some(0),
        ),
    ];
    match tracepoint("sched", "sched_process_exit") {
        Ok(id) => wanted.push((
            event(EVENT, id, 1),
            "sched:sched_process_exit".to_owned(),
            None,
            Some(0),
        )),
        Err(error) => lacking("a tracepoint", format!("{error:#}")),
    }
    let at = &raw const TOUCHED as u64;
    let breakpoint = event(BREAKPOINT, 0, 1)
        .four(52, HW_BREAKPOINT_W)
        .eight(56, at)
        .eight(64, HW_BREAKPOINT_LEN_8);
    wanted.push((breakpoint, format!("mem:{at:#x}:w"), Some(own), None));
    let (mut held, mut told) = (Vec::new(), Vec::new());
    for (words, name, pid, cpu) in wanted {
        let (process, processor) = (
            pid.map_or(-1, |pid| pid as i32),
            cpu.map_or(-1, |cpu: u32| cpu as i32),
        );
        let fd = match perf(&words, process, processor) {
            Ok(fd) => fd,
            Err(error) => {
                lacking(&name, format!("{error:#}"));
                continue;
            }
        };
        told.push(PerfEvent {
            id: event_id(&fd)?,
            kind: words.0[0] as u32,
            config: words.0[1],
            event: name,
            pid,
            cpu,
            period: words.0[2],
            is_frequency: words.0[5] & FREQUENCY != 0,
            enabled: words.0[5] & DISABLED == 0,
            owner: (own, fd.as_raw_fd() as u32),
        });
        held.push(fd);
    }
    std::fs::write(FILE, serde_json::to_vec(&told)?).context(FILE)?;
    Ok(held)
}

/// The number of a tracepoint, out of a tracefs that is gone afterwards.
fn tracepoint(system: &str, name: &str) -> Result<u64> {
    const FOLDER: &str = "/run/watcher-tracefs";
    std::fs::create_dir_all(FOLDER)?;
    let none = None::<&str>;
    mount(Some("tracefs"), FOLDER, Some("tracefs"), MsFlags::empty(), none).context("tracefs")?;
    let id = std::fs::read_to_string(format!("{FOLDER}/events/{system}/{name}/id"));
    umount(FOLDER).context("tracefs")?;
    std::fs::remove_dir(FOLDER)?;
    Ok(id?.trim().parse()?)
}

/// A map with these sizes of keys and values and so many entries.
fn map(kind: u32, [key, value, entries]: [u32; 3], flags: u32, name: &[u8; 8]) -> Result<OwnedFd> {
    let mut words = Words::default()
        .four(0, kind)
        .four(4, key)
        .four(8, value)
        .four(12, entries)
        .four(16, flags)
        .four(28, u32::from_le_bytes([name[0], name[1], name[2], name[3]]))
        .four(32, u32::from_le_bytes([name[4], name[5], name[6], name[7]]));
    owned(bpf(BPF_MAP_CREATE, &mut words, "a map")?, "a map")
}

fn link(program: &OwnedFd, target: u32, attach: u32) -> Result<OwnedFd> {
    let mut words = Words::default()
        .four(0, program.as_raw_fd() as u32)
        .four(4, target)
        .four(8, attach);
    owned(bpf(BPF_LINK_CREATE, &mut words, "a link")?, "a link")
}

/// `r1 = map` of each map, and a call of a function of its own, which has all of a packet taken.
fn using(maps: &[&OwnedFd]) -> Vec<[u8; 8]> {
    let mut program = Vec::new();
    for map in maps {
        let [a, b, c, d] = map.as_raw_fd().to_le_bytes();
        // BPF_PSEUDO_MAP_FD in the place of the source register.
        program.extend([[0x18, 0x11, 0, 0, a, b, c, d], [0; 8]]);
    }
    // BPF_PSEUDO_CALL there: of what stands behind the exit.
    program.extend([[0x85, 0x10, 0, 0, 1, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]]);
    program.extend(returning(0xffff));
    program
}
