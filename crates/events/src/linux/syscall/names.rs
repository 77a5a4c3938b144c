//! Names of the numbers that arguments hold: the constants of the Linux ABI on x86 (include/uapi/…).

use std::fmt::Write;

use super::value::Value;

type Names = &'static [(u64, &'static str)];

const OPEN: Names = &[
    (0o100, "O_CREAT"),
    (0o200, "O_EXCL"),
    (0o400, "O_NOCTTY"),
    (0o1000, "O_TRUNC"),
    (0o2000, "O_APPEND"),
    (0o4000, "O_NONBLOCK"),
    // __O_TMPFILE|O_DIRECTORY and __O_SYNC|O_DSYNC: the longer ones first.
    (0o20_200_000, "O_TMPFILE"),
    (0o4_010_000, "O_SYNC"),
    (0o10_000, "O_DSYNC"),
    (0o20_000, "O_ASYNC"),
    (0o40_000, "O_DIRECT"),
    (0o100_000, "O_LARGEFILE"),
    (0o200_000, "O_DIRECTORY"),
    (0o400_000, "O_NOFOLLOW"),
    (0o1_000_000, "O_NOATIME"),
    (0o2_000_000, "O_CLOEXEC"),
    (0o10_000_000, "O_PATH"),
];
const PROTECTION: Names = &[(1, "PROT_READ"), (2, "PROT_WRITE"), (4, "PROT_EXEC")];
const MAP: Names = &[
    (0x10, "MAP_FIXED"),
    (0x20, "MAP_ANONYMOUS"),
    (0x40, "MAP_32BIT"),
    (0x100, "MAP_GROWSDOWN"),
    (0x800, "MAP_DENYWRITE"),
    (0x2000, "MAP_LOCKED"),
    (0x4000, "MAP_NORESERVE"),
    (0x8000, "MAP_POPULATE"),
    (0x1_0000, "MAP_NONBLOCK"),
    (0x2_0000, "MAP_STACK"),
    (0x4_0000, "MAP_HUGETLB"),
    (0x10_0000, "MAP_FIXED_NOREPLACE"),
];
const MAP_TYPE: Names = &[(1, "MAP_SHARED"), (2, "MAP_PRIVATE"), (3, "MAP_SHARED_VALIDATE")];
const AT: Names = &[
    (0x100, "AT_SYMLINK_NOFOLLOW"),
    (0x200, "AT_REMOVEDIR"),
    (0x400, "AT_SYMLINK_FOLLOW"),
    (0x800, "AT_NO_AUTOMOUNT"),
    (0x1000, "AT_EMPTY_PATH"),
];
const CLONE: Names = &[
    (0x80, "CLONE_NEWTIME"),
    (0x100, "CLONE_VM"),
    (0x200, "CLONE_FS"),
    (0x400, "CLONE_FILES"),
    (0x800, "CLONE_SIGHAND"),
    (0x1000, "CLONE_PIDFD"),
    (0x2000, "CLONE_PTRACE"),
    (0x4000, "CLONE_VFORK"),
    (0x8000, "CLONE_PARENT"),
    (0x1_0000, "CLONE_THREAD"),
    (0x2_0000, "CLONE_NEWNS"),
    (0x4_0000, "CLONE_SYSVSEM"),
    (0x8_0000, "CLONE_SETTLS"),
    (0x10_0000, "CLONE_PARENT_SETTID"),
    (0x20_0000, "CLONE_CHILD_CLEARTID"),
    (0x40_0000, "CLONE_DETACHED"),
    (0x80_0000, "CLONE_UNTRACED"),
    (0x100_0000, "CLONE_CHILD_SETTID"),
    (0x200_0000, "CLONE_NEWCGROUP"),
    (0x400_0000, "CLONE_NEWUTS"),
    (0x800_0000, "CLONE_NEWIPC"),
    (0x1000_0000, "CLONE_NEWUSER"),
    (0x2000_0000, "CLONE_NEWPID"),
    (0x4000_0000, "CLONE_NEWNET"),
    (0x8000_0000, "CLONE_IO"),
];
const MOUNT: Names = &[
    (1, "MS_RDONLY"),
    (2, "MS_NOSUID"),
    (4, "MS_NODEV"),
    (8, "MS_NOEXEC"),
    (16, "MS_SYNCHRONOUS"),
    (32, "MS_REMOUNT"),
    (1024, "MS_NOATIME"),
    (2048, "MS_NODIRATIME"),
    (4096, "MS_BIND"),
    (8192, "MS_MOVE"),
    (16384, "MS_REC"),
    (32768, "MS_SILENT"),
    (1 << 17, "MS_UNBINDABLE"),
    (1 << 18, "MS_PRIVATE"),
    (1 << 19, "MS_SLAVE"),
    (1 << 20, "MS_SHARED"),
    (1 << 21, "MS_RELATIME"),
];
const FAMILY: Names = &[
    (0, "AF_UNSPEC"),
    (1, "AF_UNIX"),
    (2, "AF_INET"),
    (10, "AF_INET6"),
    (16, "AF_NETLINK"),
    (17, "AF_PACKET"),
    (31, "AF_BLUETOOTH"),
    (38, "AF_ALG"),
    (40, "AF_VSOCK"),
    (44, "AF_XDP"),
];
const SOCKET_TYPE: Names = &[
    (1, "SOCK_STREAM"),
    (2, "SOCK_DGRAM"),
    (3, "SOCK_RAW"),
    (4, "SOCK_RDM"),
    (5, "SOCK_SEQPACKET"),
];
const SOCKET_FLAGS: Names = &[(0o4000, "SOCK_NONBLOCK"), (0o2_000_000, "SOCK_CLOEXEC")];
const MODULE: Names = &[
    (1, "MODULE_INIT_IGNORE_MODVERSIONS"),
    (2, "MODULE_INIT_IGNORE_VERMAGIC"),
    (4, "MODULE_INIT_COMPRESSED_FILE"),
];
const MEMFD: Names = &[
    (1, "MFD_CLOEXEC"),
    (2, "MFD_ALLOW_SEALING"),
    (4, "MFD_HUGETLB"),
    (8, "MFD_NOEXEC_SEAL"),
    (16, "MFD_EXEC"),
];
const PTRACE: Names = &[
    (0, "PTRACE_TRACEME"),
    (1, "PTRACE_PEEKTEXT"),
    (2, "PTRACE_PEEKDATA"),
    (3, "PTRACE_PEEKUSER"),
    (4, "PTRACE_POKETEXT"),
    (5, "PTRACE_POKEDATA"),
    (6, "PTRACE_POKEUSER"),
    (7, "PTRACE_CONT"),
    (8, "PTRACE_KILL"),
    (9, "PTRACE_SINGLESTEP"),
    (12, "PTRACE_GETREGS"),
    (13, "PTRACE_SETREGS"),
    (16, "PTRACE_ATTACH"),
    (17, "PTRACE_DETACH"),
    (24, "PTRACE_SYSCALL"),
    (0x4206, "PTRACE_SEIZE"),
];
const SIGNALS: [&str; 32] = [
    "0",
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

/// What a parameter called `name` of the system call `call` holds, where its numbers have names.
pub(super) fn symbolic(call: &str, name: &str, value: u64) -> Option<Value> {
    let low = value & 0xffff_ffff;
    let text = match (call, name) {
        ("open" | "openat" | "open_by_handle_at", "flags") => open(low),
        ("mmap" | "mprotect" | "pkey_mprotect", "prot") => flags(value, PROTECTION, "PROT_NONE"),
        ("mmap", "flags") => {
            let kind = MAP_TYPE.iter().find(|(v, _)| *v == value & 3);
            let rest = flags(value & !3, MAP, "");
            join(kind.map_or("0", |(_, n)| n), &rest)
        }
        ("clone", "clone_flags") | ("unshare", "unshare_flags") | ("setns", "flags" | "nstype") => {
            // The low byte is the signal at the child's end.
            let signal = (call == "clone")
                .then(|| SIGNALS.get((value & 0xff) as usize))
                .flatten();
            let all = flags(
                value & !0xff | value & 0x80 & if call == "clone" { 0 } else { !0 },
                CLONE,
                "",
            );
            match signal.filter(|_| value & 0xff != 0) {
                Some(signal) => join(&all, signal),
                None if all.is_empty() => "0".to_owned(),
                None => all,
            }
        }
        ("mount", "flags") => {
            // Older programs put a magic number into the upper half.
            let value = if low & 0xffff_0000 == 0xc0ed_0000 {
                low & 0xffff
            } else {
                low
            };
            flags(value, MOUNT, "0")
        }
        ("finit_module", "flags") => flags(low, MODULE, "0"),
        ("memfd_create", "flags") => flags(low, MEMFD, "0"),
        (
            "unlinkat" | "newfstatat" | "statx" | "linkat" | "fchownat" | "execveat" | "faccessat2",
            "flag" | "flags",
        ) => flags(low, AT, "0"),
        ("socket" | "socketpair", "family") => one(low, FAMILY),
        ("socket" | "socketpair", "type") => {
            join(&one(low & 0xf, SOCKET_TYPE), &flags(low & !0xf, SOCKET_FLAGS, ""))
        }
        ("accept4", "flags") => flags(low, SOCKET_FLAGS, "0"),
        ("ptrace", "request") => one(value, PTRACE),
        ("kill" | "tkill" | "tgkill" | "rt_sigaction" | "rt_sigqueueinfo" | "pidfd_send_signal", "sig") => {
            match SIGNALS.get(usize::try_from(low).ok()?) {
                Some(name) => (*name).to_owned(),
                None => return Some(Value::Signed(value as u32 as i32 as i64)),
            }
        }
        (_, "dfd" | "dirfd" | "olddfd" | "newdfd") if low as u32 as i32 == -100 => "AT_FDCWD".to_owned(),
        _ => return None,
    };
    Some(Value::Symbolic(text))
}

fn open(value: u64) -> String {
    let mode = match value & 3 {
        0 => "O_RDONLY",
        1 => "O_WRONLY",
        2 => "O_RDWR",
        _ => "O_ACCMODE",
    };
    join(mode, &flags(value & !3, OPEN, ""))
}

/// The names of all bits that are set, what has none in hexadecimal; `none` where no bit is.
fn flags(mut value: u64, names: Names, none: &str) -> String {
    let mut text = String::new();
    for (bits, name) in names {
        if *bits != 0 && value & bits == *bits {
            value &= !bits;
            text = join(&text, name);
        }
    }
    if value != 0 {
        let mut rest = String::new();
        let _ = write!(rest, "{value:#x}");
        text = join(&text, &rest);
    }
    if text.is_empty() { none.to_owned() } else { text }
}

fn one(value: u64, names: Names) -> String {
    match names.iter().find(|(v, _)| *v == value) {
        Some((_, name)) => (*name).to_owned(),
        None => value.to_string(),
    }
}

fn join(left: &str, right: &str) -> String {
    match (left, right) {
        ("", right) => right.to_owned(),
        (left, "") => left.to_owned(),
        (left, right) => format!("{left}|{right}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_manual_pages_write_them() {
        let text = |call, name, value| symbolic(call, name, value).map(|v| v.to_string());
        assert_eq!(
            text("openat", "flags", 0o2_000_000).unwrap(),
            "O_RDONLY|O_CLOEXEC"
        );
        assert_eq!(text("open", "flags", 0o1101).unwrap(), "O_WRONLY|O_CREAT|O_TRUNC");
        assert_eq!(text("open", "flags", 0o4_010_002).unwrap(), "O_RDWR|O_SYNC");
        assert_eq!(text("open", "flags", 0o20_200_001).unwrap(), "O_WRONLY|O_TMPFILE");
        assert_eq!(text("open", "flags", 0x8000_0000).unwrap(), "O_RDONLY|0x80000000");
        assert_eq!(text("openat", "dfd", 0xffff_ff9c).unwrap(), "AT_FDCWD");
        assert_eq!(text("openat", "dfd", 3), None);
        assert_eq!(text("mmap", "prot", 0).unwrap(), "PROT_NONE");
        assert_eq!(text("mmap", "flags", 0x22).unwrap(), "MAP_PRIVATE|MAP_ANONYMOUS");
        assert_eq!(text("clone", "clone_flags", 17).unwrap(), "SIGCHLD");
        assert_eq!(
            text("clone", "clone_flags", 0x120_0011).unwrap(),
            "CLONE_CHILD_CLEARTID|CLONE_CHILD_SETTID|SIGCHLD"
        );
        assert_eq!(text("unshare", "unshare_flags", 0x80).unwrap(), "CLONE_NEWTIME");
        assert_eq!(
            text("socket", "type", 0o2_000_001).unwrap(),
            "SOCK_STREAM|SOCK_CLOEXEC"
        );
        assert_eq!(text("kill", "sig", 9).unwrap(), "SIGKILL");
        assert_eq!(text("kill", "sig", 40).unwrap(), "40");
        assert_eq!(text("mount", "flags", 0xc0ed_1000).unwrap(), "MS_BIND");
    }
}
