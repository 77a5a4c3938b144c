//! Watches the system as honest tools do, by bpf(2) and perf_event_open(2).

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType};

use super::work::call;

/// Where control groups of version 2 are.
const GROUPS: &str = "/sys/fs/cgroup";
const TRACEPOINT: &[u8] = b"sched_process_exec\0";

// Of include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: u64 = 0;
const BPF_PROG_LOAD: u64 = 5;
const BPF_PROG_ATTACH: u64 = 8;
const BPF_RAW_TRACEPOINT_OPEN: u64 = 17;
const BPF_LINK_CREATE: u64 = 28;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const SOCKET_FILTER: u32 = 1;
const KPROBE: u32 = 2;
const CGROUP_SKB: u32 = 8;
const RAW_TRACEPOINT: u32 = 17;
const CGROUP_INET_INGRESS: u32 = 0;
const CGROUP_INET_EGRESS: u32 = 1;
/// Several programs may be attached to one group.
const ALLOW_MULTI: u32 = 2;

// Of include/uapi/linux/perf_event.h.
const SOFTWARE: u32 = 1;
const EVENT: u32 = 2;
const CPU_CLOCK: u64 = 0;
const SET_BPF: u64 = 0x4004_2408;
const ENABLE: u64 = 0x2400;
/// Nanoseconds between two samples.
const PERIOD: u64 = 100_000_000;

/// `r0 = number; exit`.
fn returning(number: i32) -> Vec<[u8; 8]> {
    let [a, b, c, d] = number.to_le_bytes();
    vec![[0xb7, 0, 0, 0, a, b, c, d], [0x95, 0, 0, 0, 0, 0, 0, 0]]
}

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

/// `union bpf_attr`, or another structure of words: values of 4 or 8 bytes at their offsets.
#[derive(Default)]
struct Words([u64; 16]);

impl Words {
    fn four(mut self, at: usize, value: u32) -> Self {
        self.0[at / 8] |= u64::from(value) << (at % 8 * 8);
        self
    }

    fn eight(mut self, at: usize, value: u64) -> Self {
        self.0[at / 8] = value;
        self
    }
}

fn owned(returned: i64, what: &str) -> Result<OwnedFd> {
    let fd = i32::try_from(returned)?;
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(-fd)).with_context(|| what.to_owned());
    }
    // SAFETY: a descriptor that the kernel has just given to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: u64, words: &Words, what: &str) -> Result<i64> {
    let arguments = [command, words.0.as_ptr() as u64, size_of_val(&words.0) as u64, 0];
    // SAFETY: the kernel reads the words and what they point to, which live through the call.
    let returned = unsafe { call(libc::SYS_bpf, arguments) };
    if returned < 0 {
        return Err(std::io::Error::from_raw_os_error(-returned as i32)).with_context(|| what.to_owned());
    }
    Ok(returned)
}

fn load(kind: u32, attached: u32, program: &[[u8; 8]], what: &str) -> Result<OwnedFd> {
    let words = Words::default()
        .four(0, kind)
        .four(4, program.len() as u32)
        .eight(8, program.as_ptr() as u64)
        .eight(16, c"GPL".as_ptr() as u64)
        .eight(48, u64::from_le_bytes(*b"vmsight\0"))
        .four(68, attached);
    owned(bpf(BPF_PROG_LOAD, &words, what)?, what)
}

fn perf(kind: u32, config: u64, period: u64, cpu: u64) -> Result<OwnedFd> {
    /// `PERF_ATTR_SIZE_VER0`.
    const SIZE: u32 = 64;
    let words = Words::default()
        .four(0, kind)
        .four(4, SIZE)
        .eight(8, config)
        .eight(16, period);
    // SAFETY: the kernel reads the attributes, which live through the call; the fifth argument, flags, is whatever is there.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            words.0.as_ptr(),
            -1i32,
            cpu as i32,
            -1i32,
            0u64,
        )
    };
    if returned < 0 {
        return Err(std::io::Error::last_os_error()).context("perf_event_open");
    }
    owned(returned, "perf_event_open")
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
    let map = Words::default()
        .four(0, BPF_MAP_TYPE_ARRAY)
        .four(4, 4)
        .four(8, 8)
        .four(12, 1);
    held.push(owned(bpf(BPF_MAP_CREATE, &map, "a map")?, "a map")?);

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
    let attach = Words::default()
        .four(0, group)
        .four(4, ingress.as_raw_fd() as u32)
        .four(8, CGROUP_INET_INGRESS)
        .four(12, ALLOW_MULTI);
    bpf(BPF_PROG_ATTACH, &attach, "attach to a group")?;
    let egress = load(
        CGROUP_SKB,
        CGROUP_INET_EGRESS,
        &returning(1),
        "a program of a group",
    )?;
    let link = Words::default()
        .four(0, egress.as_raw_fd() as u32)
        .four(4, group)
        .four(8, CGROUP_INET_EGRESS);
    held.push(owned(bpf(BPF_LINK_CREATE, &link, "a link")?, "a link")?);
    held.extend([groups, ingress, egress]);

    let point = load(RAW_TRACEPOINT, 0, &returning(0), "a program of a tracepoint")?;
    let open = Words::default()
        .eight(0, TRACEPOINT.as_ptr() as u64)
        .four(8, point.as_raw_fd() as u32);
    held.push(owned(
        bpf(BPF_RAW_TRACEPOINT_OPEN, &open, "a tracepoint")?,
        "a tracepoint",
    )?);
    held.push(point);

    let mut programs = vec![returning(0)];
    if writes {
        programs.push(writing());
    }
    for program in programs {
        let program = load(KPROBE, 0, &program, "a program of a probe")?;
        let probe = perf(EVENT, event, 1, 0)?;
        ioctl(&probe, SET_BPF, program.as_raw_fd() as u64)?;
        ioctl(&probe, ENABLE, 0)?;
        held.extend([program, probe]);
    }
    for cpu in 0..std::thread::available_parallelism()?.get() as u64 {
        held.push(perf(SOFTWARE, CPU_CLOCK, PERIOD, cpu)?);
    }
    Ok(held)
}
