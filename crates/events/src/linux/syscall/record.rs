//! A system call that was seen.

use std::fmt;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use vmsight_linux::Current;
use vmsight_linux::syscall::Abi;

use super::Argument;

/// Errors of system calls are results from -4095 to -1 (include/linux/err.h).
const MAX_ERRNO: i64 = 4095;

/// A system call.
#[derive(Clone, Debug)]
pub struct SyscallRecord {
    /// The number of the event at its beginning.
    pub sequence: u64,
    /// When it began, by the host's clock.
    pub time: SystemTime,
    /// Which vCPU it began on.
    pub vcpu: u32,
    /// Who made it, as he was then.
    pub current: Current,
    /// How it was made.
    pub abi: Abi,
    /// Its number.
    pub number: u32,
    /// Its name; `syscall_N` where the kernel has none.
    pub name: String,
    /// What it was given.
    pub arguments: Vec<Argument>,
    /// What it gave; `None` for one that does not return.
    pub result: Option<i64>,
    /// How long it took, by the host's clock, the time that hooks cost included.
    pub duration: Option<Duration>,
}

impl SyscallRecord {
    /// The name of the error, where the call failed: `ENOENT`.
    pub fn error(&self) -> Option<String> {
        let result = self.result?;
        if !(-MAX_ERRNO..0).contains(&result) {
            return None;
        }
        let number = i32::try_from(-result).ok()?;
        Some(match number {
            // What the kernel keeps to itself: the call is made again, or EINTR (include/linux/errno.h).
            512 => "ERESTARTSYS".to_owned(),
            513 => "ERESTARTNOINTR".to_owned(),
            514 => "ERESTARTNOHAND".to_owned(),
            516 => "ERESTART_RESTARTBLOCK".to_owned(),
            524 => "ENOTSUPP".to_owned(),
            _ => match Errno::from_raw(number) {
                Errno::UnknownErrno => format!("errno {number}"),
                known => format!("{known:?}"),
            },
        })
    }
}

impl fmt::Display for SyscallRecord {
    /// `openat(AT_FDCWD, "/etc/passwd", O_RDONLY) = 3`, as strace writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.name)?;
        for (i, argument) in self.arguments.iter().enumerate() {
            write!(f, "{}{}", if i > 0 { ", " } else { "" }, argument.value)?;
        }
        f.write_str(")")?;
        match (self.result, self.error()) {
            (None, _) => f.write_str(" = ?"),
            (Some(_), Some(error)) => write!(f, " = -1 {error}"),
            (Some(result), None) if is_address(&self.name) => write!(f, " = {result:#x}"),
            (Some(result), None) => write!(f, " = {result}"),
        }
    }
}

/// Whether its result is an address.
fn is_address(call: &str) -> bool {
    matches!(call, "mmap" | "brk" | "mremap" | "shmat")
}

#[cfg(test)]
mod tests {
    use vmsight_arch::Gva;

    use super::super::Value;
    use super::*;

    fn record(name: &str, result: Option<i64>) -> SyscallRecord {
        SyscallRecord {
            sequence: 1,
            time: SystemTime::UNIX_EPOCH,
            vcpu: 0,
            current: Current {
                pid: 1,
                tid: 1,
                name: "init".into(),
                uid: Some(0),
                task: Gva(1),
            },
            abi: Abi::X64,
            number: 0,
            name: name.into(),
            arguments: vec![
                Argument {
                    name: "fd".into(),
                    value: Value::Signed(3),
                },
                Argument {
                    name: "buf".into(),
                    value: Value::Pointer(0),
                },
            ],
            result,
            duration: None,
        }
    }

    #[test]
    fn results_as_strace_writes_them() {
        assert_eq!(record("read", Some(5)).to_string(), "read(3, NULL) = 5");
        assert_eq!(record("read", Some(-2)).to_string(), "read(3, NULL) = -1 ENOENT");
        assert_eq!(
            record("read", Some(-512)).to_string(),
            "read(3, NULL) = -1 ERESTARTSYS"
        );
        assert_eq!(record("exit_group", None).to_string(), "exit_group(3, NULL) = ?");
        assert_eq!(record("mmap", Some(0x7f00)).to_string(), "mmap(3, NULL) = 0x7f00");
        assert_eq!(record("lseek", Some(-5000)).error(), None);
    }
}
