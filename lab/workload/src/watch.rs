//! bpf(2) and perf_event_open(2): watching the system as honest tools do.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

// Of include/uapi/linux/bpf.h.
pub(crate) const BPF_MAP_CREATE: u64 = 0;
pub(crate) const BPF_PROG_LOAD: u64 = 5;
pub(crate) const BPF_RAW_TRACEPOINT_OPEN: u64 = 17;
pub(crate) const BPF_LINK_CREATE: u64 = 28;
pub(crate) const SOCKET_FILTER: u32 = 1;
pub(crate) const KPROBE: u32 = 2;
pub(crate) const CGROUP_SKB: u32 = 8;
pub(crate) const RAW_TRACEPOINT: u32 = 17;
pub(crate) const CGROUP_INET_EGRESS: u32 = 1;

// Of include/uapi/linux/perf_event.h.
pub(crate) const SOFTWARE: u32 = 1;
pub(crate) const EVENT: u32 = 2;
pub(crate) const CPU_CLOCK: u64 = 0;

/// `r0 = number; exit`.
pub(crate) fn returning(number: i32) -> Vec<[u8; 8]> {
    let [a, b, c, d] = number.to_le_bytes();
    vec![[0xb7, 0, 0, 0, a, b, c, d], [0x95, 0, 0, 0, 0, 0, 0, 0]]
}

/// `union bpf_attr`, or another structure of words: values of 4 or 8 bytes at their offsets.
#[derive(Default)]
pub(crate) struct Words(pub(crate) [u64; 16]);

impl Words {
    pub(crate) fn four(mut self, at: usize, value: u32) -> Self {
        self.0[at / 8] |= u64::from(value) << (at % 8 * 8);
        self
    }

    pub(crate) fn eight(mut self, at: usize, value: u64) -> Self {
        self.0[at / 8] = value;
        self
    }
}

/// The descriptor that a system call gave; `what` is what it is of.
pub(crate) fn owned(returned: i64, what: &str) -> Result<OwnedFd> {
    let fd = i32::try_from(returned)?;
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(-fd)).with_context(|| what.to_owned());
    }
    // SAFETY: a descriptor that the kernel has just given to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2). The kernel may write to what the words point to, and to themselves.
pub(crate) fn bpf(command: u64, words: &mut Words, what: &str) -> Result<i64> {
    let (at, size) = (words.0.as_mut_ptr(), size_of_val(&words.0));
    // SAFETY: the words, and what the callers have them point to, live through the call and are nobody else's.
    let returned = unsafe { libc::syscall(libc::SYS_bpf, command, at, size) };
    if returned < 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| what.to_owned());
    }
    Ok(returned)
}

/// Loads a program that is called `vmsight`.
pub(crate) fn load(kind: u32, attached: u32, program: &[[u8; 8]], what: &str) -> Result<OwnedFd> {
    let mut words = Words::default()
        .four(0, kind)
        .four(4, program.len() as u32)
        .eight(8, program.as_ptr() as u64)
        .eight(16, c"GPL".as_ptr() as u64)
        .eight(48, u64::from_le_bytes(*b"vmsight\0"))
        .four(68, attached);
    owned(bpf(BPF_PROG_LOAD, &mut words, what)?, what)
}

/// `struct perf_event_attr` of an event: what it counts, and after how many there is a sample, 0 for none.
pub(crate) fn event(kind: u32, config: u64, period: u64) -> Words {
    /// `PERF_ATTR_SIZE_VER1`.
    const SIZE: u32 = 72;
    Words::default()
        .four(0, kind)
        .four(4, SIZE)
        .eight(8, config)
        .eight(16, period)
}

/// perf_event_open(2), of a process on any CPU (`-1`), or of all (`-1`) on one.
pub(crate) fn perf(event: &Words, pid: i32, cpu: i32) -> Result<OwnedFd> {
    let (at, group, flags) = (event.0.as_ptr(), -1i32, 0u64);
    // SAFETY: the kernel reads the attributes, which live through the call.
    let returned = unsafe { libc::syscall(libc::SYS_perf_event_open, at, pid, cpu, group, flags) };
    if returned < 0 {
        return Err(std::io::Error::last_os_error()).context("perf_event_open");
    }
    owned(returned, "perf_event_open")
}

/// The number of a perf event.
pub(crate) fn event_id(event: &OwnedFd) -> Result<u64> {
    /// PERF_EVENT_IOC_ID.
    const ID: u64 = 0x8008_2407;
    let mut id = 0u64;
    // SAFETY: the kernel writes 8 bytes, which live through the call.
    let returned = unsafe { libc::syscall(libc::SYS_ioctl, event.as_raw_fd(), ID, &raw mut id) };
    if returned < 0 {
        return Err(std::io::Error::last_os_error()).context("PERF_EVENT_IOC_ID");
    }
    Ok(id)
}
