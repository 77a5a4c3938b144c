//! Orders: what a test has a guest do, at the moment of its choosing, and what the guest then says of it.
//!
//! With `vmsight.orders` on the kernel command line the guest serves them on its third serial port: a line of JSON in, a
//! line of JSON out.
//!
//! ```text
//! {"id":1,"do":"getpid","count":10000,"cpu":0}
//! {"id":1,"ok":{"pid":412,"made":10000,"returned":412,"nanoseconds":52113020,"ended":{"exited":0}}}
//! ```
//!
//! Each order is carried out by a process of its own, which is gone when the answer comes. Orders need not wait for each
//! other: several may be out at once. Where something must happen between knowing the process and its doing the work (a
//! hook is set on its memory, say), [`Work::Prepare`] has it stop short of the work, and [`Work::Go`] lets it, and others at the
//! same moment, go on.

use serde::{Deserialize, Serialize};

pub use crate::poke::{Poke, Poked, Reach, Register};
pub use crate::tamper::{Tamper, Tampered};
use crate::text::Text;

/// An order on its way into the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Comes back with the answer.
    pub id: u64,
    /// The order.
    #[serde(flatten)]
    pub order: Order,
}

/// The guest's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The id of the request.
    pub id: u64,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How an order went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was carried out, which says nothing of whether the system calls in it succeeded.
    Ok(Box<Account>),
    /// It could not be carried out.
    Error(String),
}

/// What is to be done, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The only CPU that its process may run on; any, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// What is to be done.
    #[serde(flatten)]
    pub work: Work,
}

impl From<Work> for Order {
    fn from(work: Work) -> Order {
        Order { cpu: None, work }
    }
}

/// What can be ordered. "Makes" a system call means that the instruction is executed that often, whatever comes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Work {
    /// Does nothing. `nanoseconds` is the guest's CLOCK_MONOTONIC.
    Ping,
    /// Makes getpid(2) `count` times, and no other getpid(2). Those that return anything but the pid have `failed`.
    GetPid {
        /// How often.
        count: u64,
    },
    /// Makes a system call of 32-bit programs `count` times, by INT 0x80: one that takes no address, and at most two arguments.
    Int80 {
        /// Its number (arch/x86/entry/syscalls/syscall_32.tbl).
        number: u32,
        /// What it is given.
        #[serde(default)]
        arguments: [u32; 2],
        /// How often.
        #[serde(default = "one")]
        count: u64,
    },
    /// Opens a file `count` times, and closes it each time it was opened.
    Open {
        /// The path.
        path: Text,
        /// As in openat(2).
        #[serde(default)]
        flags: i32,
        /// How often.
        #[serde(default = "one")]
        count: u64,
    },
    /// Reads a file, at most `limit` bytes, which are told in `bytes`.
    ReadFile {
        /// The path.
        path: Text,
        /// Bytes.
        #[serde(default = "page")]
        limit: u32,
    },
    /// Writes to a file with one write(2). It is made and emptied first, as far as such a file can be.
    WriteFile {
        /// The path.
        path: Text,
        /// What to write.
        bytes: Text,
    },
    /// Opens a file, to be read, and stands with it where it is prepared.
    Hold {
        /// The path.
        path: Text,
    },
    /// Connects a TCP socket.
    Connect {
        /// An address and a port, such as `127.0.0.1:80` or `[::1]:80`.
        address: String,
        /// Listen there first.
        #[serde(default)]
        listen: bool,
    },
    /// Executes a program in place of the order's process. `output` and `ended` are the program's; where it could not be
    /// executed, `returned` says why. The program [`WITNESS`] tells what it was started with.
    Exec {
        /// The path.
        path: Text,
        /// From the zeroth on.
        #[serde(default)]
        argv: Vec<Text>,
        /// `NAME=value` each.
        #[serde(default)]
        envp: Vec<Text>,
    },
    /// The same with a copy of the program in memory (`memfd_create(2)`), which has no name in any file system.
    ExecMemory {
        /// The path of what is copied.
        path: Text,
        /// From the zeroth on.
        #[serde(default)]
        argv: Vec<Text>,
    },
    /// Does nothing as this user: prepared, its process has been this user's from the begin on, and stands.
    Stand {
        /// Its user and group.
        uid: u32,
    },
    /// Poses as somebody else: prepared, its process has had this name since, and these as its only argument, and stands.
    Pose {
        /// At most 15 bytes of it are kept.
        name: String,
        /// What takes the place of its arguments.
        argument: Text,
    },
    /// Is confined: prepared, its process has a seccomp filter that allows everything, and stands.
    Confine,
    /// Watches the system as honest tools do: a BPF program on a socket, on a kernel event's probe, on the traffic of all control groups
    /// (attached, and by a link) and on a tracepoint, a map, and a sampling perf event on each CPU. Prepared, they are there.
    Observe {
        /// The id of an event of tracefs.
        event: u64,
        /// With a program more that may write to the memory of processes.
        #[serde(default)]
        writes: bool,
    },
    /// Makes a table of nftables with a base chain that sees all IPv4 packets which come in (`values` are what came of each message).
    FilterPackets,
    /// Makes an io_uring, and stands with it where it is prepared.
    Ring,
    /// Writes [`OVERWRITTEN`] over the first instructions of another process's program (at `address`), as a debugger could.
    Overwrite {
        /// Who.
        pid: u32,
    },
    /// Has another process map a page, writable and executable (at `address`), writes [`INJECTED`] to it, and has the process go on
    /// there.
    Inject {
        /// Who.
        pid: u32,
    },
    /// Forks `count` children (told in `children`), one after the other; the nth exits with code n modulo 128 (`values`).
    Fork {
        /// How many.
        count: u32,
    },
    /// Ends with this exit code.
    Exit {
        /// 0 to 255.
        code: i32,
    },
    /// Sends a signal with kill(2).
    Kill {
        /// To whom; if not given, to a child made for this (told in `children`), whose end is told in `values`: exit code, signal.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pid: Option<u32>,
        /// Its number.
        signal: i32,
    },
    /// Sets all user ids with setresuid(2). `values` are the real, effective and saved one afterwards.
    SetUid {
        /// The user.
        uid: u32,
    },
    /// Writes `count` values of 64 bits to one place in memory, each in one instruction: `first`, `first + step`, and so on. The
    /// place (`address`, and its physical page in `frame`) holds zero before, or with `shared` what was last written.
    Write {
        /// The first value.
        first: u64,
        /// What each is more than the one before (modulo 2^64).
        #[serde(default)]
        step: u64,
        /// How many.
        count: u64,
        /// Where in the page: a multiple of 8 below 4096.
        #[serde(default)]
        offset: u64,
        /// In the one page that all orders share, at the same address; else in a page of its own.
        #[serde(default)]
        shared: bool,
    },
    /// Reads 64 bits from one place in memory `count` times. `checksum` is the sum of what it read (modulo 2^64).
    Read {
        /// What the place holds at first.
        #[serde(default)]
        value: u64,
        /// How often.
        count: u64,
        /// Where in the page: a multiple of 8 below 4096.
        #[serde(default)]
        offset: u64,
    },
    /// Calls a function (at `address`, in `frame`) `count` times, with 0, 1, 2 and so on: it returns its argument plus one.
    /// `checksum` is the sum of what it returned (modulo 2^64).
    Call {
        /// How often.
        count: u64,
    },
    /// Maps memory from `address` on, and touches each of its pages once, lowest first: as many page faults.
    Touch {
        /// How many.
        pages: u64,
    },
    /// Raises an exception in user mode. Unless somebody sees to it, its process dies of a signal.
    Raise {
        /// Which one.
        exception: Exception,
    },
    /// Executes CPUID `count` times. `values` are EAX, EBX, ECX and EDX of the last.
    CpuId {
        /// EAX.
        leaf: u32,
        /// ECX.
        #[serde(default)]
        subleaf: u32,
        /// How often.
        #[serde(default = "one")]
        count: u64,
    },
    /// Writes a byte to an I/O port `count` times, through the kernel (/dev/port).
    Port {
        /// The port.
        port: u16,
        /// The byte.
        value: u8,
        /// How often.
        #[serde(default = "one")]
        count: u64,
    },
    /// Computes without a system call: `checksum` depends on nothing but `rounds` (see [`checksum`]).
    Compute {
        /// Of some nanoseconds each.
        rounds: u64,
    },
    /// Makes system calls of several kinds, six a round: getppid, read, lseek, fstat, sched_yield, and a write.
    Syscalls {
        /// How many rounds.
        rounds: u64,
    },
    /// Keeps secrets: bytes in memory of its own, where `values` say, an AES key in a socket of the kernel's crypto API
    /// (`cbc(aes)`), and one in its user's keyring. Prepared, it has them; then it lets go of them.
    Keep {
        /// Bytes, and at which offset of a page they begin. What goes on in further pages lies in frames that are no neighbours,
        /// as far as the kernel has such.
        #[serde(default)]
        memory: Vec<(Text, u64)>,
        /// 16, 24 or 32 bytes.
        #[serde(default)]
        aes: Text,
        /// Type, description and payload as in add_key(2).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<(String, String, Text)>,
    },
    /// Loads a kernel module: of this name, of our own or of those of every guest, or from a path.
    Load {
        /// The name, or a path with a slash.
        name: String,
        /// Its parameters.
        #[serde(default)]
        parameters: String,
        /// With init_module(2) instead of finit_module(2).
        #[serde(default)]
        from_memory: bool,
    },
    /// Unloads a kernel module with delete_module(2).
    Unload {
        /// Its name.
        name: String,
    },
    /// Has our module `vmsight_poke`, which must be loaded, do something in the kernel. `poked` says what it saw.
    Poke {
        /// What.
        poke: Poke,
    },
    /// Has our module `vmsight_tamper`, which must be loaded, change something in the kernel. `tampered` says what.
    Tamper {
        /// What.
        tamper: Tamper,
        /// Change it back.
        #[serde(default)]
        undo: bool,
    },
    /// Starts this order's process and has it stop short of the work. The answer tells its pid, and the `address` and `frame` of the
    /// memory that it will work on.
    Prepare {
        /// The order.
        order: Box<Order>,
    },
    /// Lets prepared orders go on, all at once. Their accounts are in `together`, in the same order.
    Go {
        /// Who.
        pids: Vec<u32>,
    },
    /// Ends a prepared order without its work being done.
    Abandon {
        /// Who.
        pid: u32,
    },
}

impl Work {
    /// On this CPU only.
    pub fn on(self, cpu: u32) -> Order {
        Order {
            cpu: Some(cpu),
            work: self,
        }
    }
}

/// The path of a program for [`Work::Exec`]: it prints its arguments and its environment, a line each (`arg …`, `env …`), and exits
/// with the code that its argument `--exit=N` asks for.
pub const WITNESS: &str = "/srv/bin/witness";

/// The code that [`Work::Inject`] writes: `endbr64`, and then for ever pause(2), which a signal ends.
pub const INJECTED: [u8; 16] = [
    0xf3, 0x0f, 0x1e, 0xfa, 0xb8, 0x22, 0x00, 0x00, 0x00, 0x0f, 0x05, 0xeb, 0xf7, 0x90, 0x90, 0x90,
];

/// What [`Work::Overwrite`] writes: `xor eax, eax; ret`, and NOPs.
pub const OVERWRITTEN: [u8; 8] = [0x31, 0xc0, 0xc3, 0x90, 0x90, 0x90, 0x90, 0x90];

/// An exception to raise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exception {
    /// #DE: a division by zero.
    Divide,
    /// #BP: INT3.
    Breakpoint,
    /// #UD: UD2.
    InvalidOpcode,
    /// #GP: HLT in user mode.
    Protection,
    /// #PF: a write to an address where nothing is mapped ([`UNMAPPED`]).
    PageFault,
}

/// Where [`Exception::PageFault`] writes to.
pub const UNMAPPED: u64 = 0x1122_3000;

/// What the guest says of an order. What an order does not bring about is absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The process that carried it out.
    pub pid: u32,
    /// How often the thing was done.
    #[serde(default, skip_serializing_if = "zero")]
    pub made: u64,
    /// How many of those failed.
    #[serde(default, skip_serializing_if = "zero")]
    pub failed: u64,
    /// What the last system call returned, as the kernel returns it: from -4095 to -1 it is an errno.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub returned: Option<i64>,
    /// How long the work took, by CLOCK_MONOTONIC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nanoseconds: Option<u64>,
    /// The result of a computation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<u64>,
    /// The virtual address that was worked on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u64>,
    /// The number of its physical page, which stays the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame: Option<u64>,
    /// Numbers; the order says which.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<u64>,
    /// What was read.
    #[serde(default, skip_serializing_if = "Text::is_empty")]
    pub bytes: Text,
    /// What the process printed.
    #[serde(default, skip_serializing_if = "Text::is_empty")]
    pub output: Text,
    /// Children that it made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<u32>,
    /// What was done in the kernel, and seen there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poked: Option<Poked>,
    /// What was changed in the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tampered: Option<Tampered>,
    /// How its process ended; absent as long as it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// The accounts of several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub together: Vec<Account>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// With an exit code.
    Exited(i32),
    /// By a signal.
    Signalled(i32),
}

/// What [`Work::Compute`] computes: xorshift64 numbers, added up after a multiplication.
pub fn checksum(rounds: u64) -> u64 {
    let (mut state, mut sum) = (0x9e37_79b9_7f4a_7c15u64, 0u64);
    for _ in 0..rounds {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        sum = sum
            .rotate_left(5)
            .wrapping_add(state.wrapping_mul(0x2545_f491_4f6c_dd1d));
    }
    sum
}

fn one() -> u64 {
    1
}

fn page() -> u32 {
    4096
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn zero(number: &u64) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_are_as_documented() {
        let line = r#"{"id":1,"do":"getpid","count":10000,"cpu":0}"#;
        let request: Request = serde_json::from_str(line).unwrap();
        assert_eq!(
            request,
            Request {
                id: 1,
                order: Work::GetPid { count: 10_000 }.on(0)
            }
        );
        let line = r#"{"id":1,"ok":{"pid":412,"made":10000,"returned":412,"ended":{"exited":0}}}"#;
        let answer: Answer = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&answer).unwrap(), line);
        let line = r#"{"id":2,"error":"no such module"}"#;
        let answer: Answer = serde_json::from_str(line).unwrap();
        assert_eq!(answer.outcome, Outcome::Error("no such module".into()));
    }

    #[test]
    fn orders_come_back_whole() {
        let order = Work::Prepare {
            order: Box::new(
                Work::Write {
                    first: u64::MAX,
                    step: 1 << 63,
                    count: 3,
                    offset: 8,
                    shared: true,
                }
                .on(1),
            ),
        };
        let request = Request {
            id: u64::MAX,
            order: order.into(),
        };
        let line = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    }

    #[test]
    fn the_checksum_is_the_same_everywhere() {
        assert_eq!(checksum(0), 0);
        assert_ne!(checksum(1000), checksum(1001));
    }
}
