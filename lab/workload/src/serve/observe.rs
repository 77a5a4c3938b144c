//! Watches the system as honest tools do, by bpf(2) and perf_event_open(2).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType};

use super::work::call;
use crate::watch::{
    BPF_LINK_CREATE, BPF_MAP_CREATE, BPF_RAW_TRACEPOINT_OPEN, CGROUP_INET_EGRESS, CGROUP_SKB, CPU_CLOCK,
    EVENT, KPROBE, RAW_TRACEPOINT, SOCKET_FILTER, SOFTWARE, Words, bpf, event as perf_event, load, owned,
    perf, returning,
};

/// Where control groups of version 2 are.
const GROUPS: &str = "/sys/fs/cgroup";
const TRACEPOINT: &[u8] = b"sched_process_exec\0";

// Of include/uapi/linux/bpf.h.
const BPF_PROG_ATTACH: u64 = 8;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const CGROUP_INET_INGRESS: u32 = 0;
/// Several programs may be attached to one group.
const ALLOW_MULTI: u32 = 2;

// Of include/uapi/linux/perf_event.h.
const SET_BPF: u64 = 0x4004_2408;
const ENABLE: u64 = 0x2400;
/// Nanoseconds between two samples.
const PERIOD: u64 = 100_000_000;

/// Calls `bpf_probe_write_user(0, a zero on the stack, 8)`, which fails whenever it is done.
fn writing() -> Vec<[u8; 8]> {
    let mut program = vec![
        [0x7a, 0x0a, 0xf8, 0xff, 0, 0, 0, 0],       // *(u64 *)(r10 - 8) = 0
        [0xbf, 0xa2, 0, 0, 0, 0, 0, 0],             // r2 = r10
        [0x07, 0x02, 0, 0, 0xf8, 0xff, 0xff, 0xff], // r2 -= 8
        [0xb7, 0x01, 0, 0, 0, 0, 0, 0],             // r1 = 0
        [0xb7, 0x03, 0, 0, 8, 0, 0, 0],             // r3 = 8
        [0x85, 0, 0, 0, 36, 0, 0, 0],               // call bpf_probe_write_user
    ];
    program.extend(returning(0));
    program
}

fn ioctl(fd: &OwnedFd, request: u64, argument: u64) -> Result<()> {
    // SAFETY: takes numbers only.
    let returned = unsafe { call(libc::SYS_ioctl, [fd.as_raw_fd() as u64, request, argument, 0]) };
    anyhow::ensure!(returned >= 0, "ioctl {request:#x}: {returned}");
    Ok(())
}

/// Attaches all of it. It lasts as long as what is returned.
pub(super) fn observe(event: u64, writes: bool) -> Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    let mut map = Words::default()
        .four(0, BPF_MAP_TYPE_ARRAY)
        .four(4, 4)
        .four(8, 8)
        .four(12, 1);
    held.push(owned(bpf(BPF_MAP_CREATE, &mut map, "a map")?, "a map")?);

    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let filter = load(SOCKET_FILTER, 0, &returning(0xffff), "a socket filter")?;
    let fd = filter.as_raw_fd();
    // SAFETY: the kernel reads the descriptor's number, which lives through the call.
    let returned = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_BPF,
            (&raw const fd).cast(),
            size_of_val(&fd) as u32,
        )
    };
    anyhow::ensure!(
        returned == 0,
        "attach to a socket: {}",
        std::io::Error::last_os_error()
    );
    held.extend([socket, filter]);

    let groups = OwnedFd::from(File::open(GROUPS).context(GROUPS)?);
    let (group, ingress) = (
        groups.as_raw_fd() as u32,
        load(
            CGROUP_SKB,
            CGROUP_INET_INGRESS,
            &returning(1),
            "a program of a group",
        )?,
    );
    let mut attach = Words::default()
        .four(0, group)
        .four(4, ingress.as_raw_fd() as u32)
        .four(8, CGROUP_INET_INGRESS)
        .four(12, ALLOW_MULTI);
    bpf(BPF_PROG_ATTACH, &mut attach, "attach to a group")?;
    let egress = load(
        CGROUP_SKB,
        CGROUP_INET_EGRESS,
        &returning(1),
        "a program of a group",
    )?;
    let mut link = Words::default()
        .four(0, egress.as_raw_fd() as u32)
        .four(4, group)
        .four(8, CGROUP_INET_EGRESS);
    held.push(owned(bpf(BPF_LINK_CREATE, &mut link, "a link")?, "a link")?);
    held.extend([groups, ingress, egress]);

    let point = load(RAW_TRACEPOINT, 0, &returning(0), "a program of a tracepoint")?;
    let mut open = Words::default()
        .eight(0, TRACEPOINT.as_ptr() as u64)
        .four(8, point.as_raw_fd() as u32);
    held.push(owned(
        bpf(BPF_RAW_TRACEPOINT_OPEN, &mut open, "a tracepoint")?,
        "a tracepoint",
    )?);
    held.push(point);

    let mut programs = vec![returning(0)];
    if writes {
        programs.push(writing());
    }
    for program in programs {
        let program = load(KPROBE, 0, &program, "a program of a probe")?;
        let probe = perf(&perf_event(EVENT, event, 1), -1, 0)?;
        ioctl(&probe, SET_BPF, program.as_raw_fd() as u64)?;
        ioctl(&probe, ENABLE, 0)?;
        held.extend([program, probe]);
    }
    for cpu in 0..std::thread::available_parallelism()?.get() as i32 {
        held.push(perf(&perf_event(SOFTWARE, CPU_CLOCK, PERIOD), -1, cpu)?);
    }
    Ok(held)
}
