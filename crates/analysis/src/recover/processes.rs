//! Tasks that are in no list: processes and threads that have ended, and whose `task_struct` was not used again.
//!
//! The kernel keeps tasks in slabs of their own. Freed, an object keeps all but one word of what it held until the next task gets
//! it, and a slab that is given back keeps it until its pages are used. So all objects of those slabs are looked at, and then
//! all other memory, for what can only be the rest of a task.

use std::ops::Range;

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::clock::{boot_time, rfc3339};
use vmsight_linux::listing::address;
use vmsight_linux::text::guest_array_text;
use vmsight_linux::{Kernel, LinuxError, Listing};

pub use super::certainty::Certainty;
use super::frames::Frames;
use super::member::{Member, Structure};
use super::remains;
use super::slab::Slabs;

/// Rows of one listing.
const MAX_ROWS: usize = 1 << 16;
/// PID_MAX_LIMIT on 64-bit (include/linux/threads.h).
const MAX_PID: i32 = 4 << 20;
/// `MAX_RT_PRIO` to `MAX_PRIO` (include/linux/sched/prio.h).
const STATIC_PRIO: Range<u64> = 100..140;
/// The largest `task_struct` that is believed.
const MAX_TASK: u64 = 64 << 10;
/// `TASK_DEAD`, `EXIT_DEAD`, `EXIT_ZOMBIE`, `PF_EXITING` (include/linux/sched.h): the same since 4.14.
const TASK_DEAD: u64 = 0x80;
const EXIT_DEAD: u64 = 0x10;
const EXIT_ZOMBIE: u64 = 0x20;
const PF_EXITING: u64 = 4;
/// `LIST_POISON2` of x86-64 (include/linux/poison.h): what a list's member is left with.
const LIST_POISON2: u64 = 0xdead_0000_0000_0122;
/// The last policy is `SCHED_EXT`.
const MAX_POLICY: u64 = 7;

/// A task that is in no list.
#[derive(Clone, Debug, Serialize)]
pub struct RemovedTask {
    /// Pid in the root namespace; of a thread, its own.
    pub pid: i32,
    /// The process that a thread belonged to.
    pub tgid: i32,
    /// The parent's pid, where that is still there.
    pub ppid: Option<i32>,
    /// Its name.
    pub name: String,
    /// `ended`; or `unlisted`: it looks alive and is in no list.
    pub state: &'static str,
    /// How sure it is that this was a task.
    pub certainty: Certainty,
    /// `slab` of tasks, or `memory` that was given back and not used since.
    pub found_in: &'static str,
    /// When it was started, RFC 3339.
    pub start_time: Option<String>,
    /// What it ended with, if by itself.
    pub exit_code: Option<u8>,
    /// The signal that ended it.
    pub signal: Option<u8>,
    /// The user that had logged in; `None` for services.
    pub loginuid: Option<u32>,
    /// Time on a processor in user mode, microseconds.
    pub utime_us: u64,
    /// Time on a processor in the kernel, microseconds.
    pub stime_us: u64,
    /// The `task_struct` as the kernel saw it.
    #[serde(serialize_with = "address::gva")]
    pub task: Gva,
}

/// The tasks that are in no list, in the order in which they were started.
///
/// # Errors
/// If tasks cannot be listed, or the kernel's types or symbols lack what is needed.
pub fn removed_tasks(kernel: &Kernel) -> Result<Listing<RemovedTask>, LinuxError> {
    let before = listed(kernel)?;
    let reader = TaskReader::new(kernel, &before)?;
    let mut out = Listing::default();
    if reader.slabs.cut {
        out.warn("tasks: cut, there are more slabs of them than can be");
    }
    reader.slabs(&mut out);
    reader.elsewhere(&mut out);
    if kernel.memory().is_live() {
        // A task that came or went meanwhile is none of these.
        let after = listed(kernel)?;
        out.rows.retain(|row| !after.contains_key(&row.task));
    }
    out.rows
        .sort_by(|a, b| (&a.start_time, a.pid, a.task.0).cmp(&(&b.start_time, b.pid, b.task.0)));
    Ok(out)
}

/// All tasks in lists, with their pids.
fn listed(kernel: &Kernel) -> Result<FxHashMap<Gva, i32>, LinuxError> {
    let threads = kernel.threads(None)?;
    Ok(threads.rows.iter().map(|row| (row.task, row.tid)).collect())
}

struct TaskReader<'k> {
    kernel: &'k Kernel,
    listed: &'k FxHashMap<Gva, i32>,
    frames: Frames,
    slabs: Slabs,
    boot: Option<i64>,
    init: Option<Gva>,
    size: usize,
    pid: Member,
    tgid: Member,
    comm: Member,
    state: Member,
    exit_state: Member,
    exit_code: Member,
    flags: Member,
    prio: Member,
    static_prio: Member,
    policy: Member,
    parent: Member,
    leader: Member,
    start: Member,
    start_boot: Member,
    utime: Member,
    stime: Member,
    cred: Member,
    mm: Member,
    prev: Member,
    loginuid: Option<Member>,
}

impl<'k> TaskReader<'k> {
    fn new(kernel: &'k Kernel, listed: &'k FxHashMap<Gva, i32>) -> Result<Self, LinuxError> {
        let task = Structure::of(kernel, "task_struct")?;
        let size = task.size();
        if size == 0 || size > MAX_TASK {
            return Err(LinuxError::Implausible {
                what: "task_struct".to_owned(),
                reason: format!("it has {size} bytes"),
            });
        }
        Ok(Self {
            kernel,
            listed,
            frames: Frames::new(kernel)?,
            slabs: Slabs::find(kernel, "task_struct_cachep")?,
            boot: boot_time(kernel).ok(),
            init: kernel.find_symbol(&["init_task"]),
            size: size as usize,
            pid: task.member("pid")?,
            tgid: task.member("tgid")?,
            comm: task.member("comm")?,
            state: task.member("__state|state")?,
            exit_state: task.member("exit_state")?,
            exit_code: task.member("exit_code")?,
            flags: task.member("flags")?,
            prio: task.member("prio")?,
            static_prio: task.member("static_prio")?,
            policy: task.member("policy")?,
            parent: task.member("real_parent")?,
            leader: task.member("group_leader")?,
            start: task.member("start_time")?,
            start_boot: task.member("start_boottime|real_start_time")?,
            utime: task.member("utime")?,
            stime: task.member("stime")?,
            cred: task.member("real_cred")?,
            mm: task.member("mm")?,
            prev: task.member("tasks.prev")?,
            loginuid: task.find("loginuid.val"),
        })
    }

    /// All objects of the slabs that are in no list.
    fn slabs(&self, out: &mut Listing<RemovedTask>) {
        let mut bytes = vec![0; self.size];
        for at in self.slabs.objects() {
            let task = self.frames.seen(at);
            if self.listed.contains_key(&task) || self.kernel.memory().read(at, &mut bytes).is_err() {
                continue;
            }
            let Some(known) = self.looks(&bytes) else {
                continue;
            };
            let agrees = self.agrees(task, &bytes);
            let certainty = match (known, agrees) {
                (_, Agreement::All) => Certainty::Certain,
                (Look::Ended, Agreement::Most) => Certainty::Likely,
                (Look::Ended, Agreement::Little) => Certainty::Doubtful,
                // What looks alive and does not agree is the middle of being made or torn down.
                (Look::Alive, _) => continue,
            };
            if !self.add(task, &bytes, known, certainty, "slab", out) {
                return;
            }
        }
    }

    /// What is left of tasks in pages that were given back.
    fn elsewhere(&self, out: &mut Listing<RemovedTask>) {
        let memory = self.kernel.memory();
        let ended = |at| {
            let mut object = vec![0; self.size];
            memory.read(at, &mut object).ok()?;
            matches!(self.looks(&object), Some(Look::Ended)).then_some(object)
        };
        let found = remains::search(memory, &[&self.slabs], &self.static_prio, |at, prio: &[u8; 4]| {
            STATIC_PRIO.contains(&u64::from(u32::from_le_bytes(*prio))) && ended(at).is_some()
        });
        if found.unread > 0 {
            out.warn(format!(
                "tasks: {} places where there may be what is left of one could not be read",
                found.unread
            ));
        }
        let mut seen: FxHashSet<(i32, u64)> = out.rows.iter().map(|row| (row.pid, row.task.0)).collect();
        for at in found.places {
            // It may have changed meanwhile.
            let Some(object) = ended(at) else { continue };
            let task = self.frames.seen(at);
            let elsewhere = !self.slabs.holds(at) && self.agrees(task, &object) == Agreement::All;
            let new = elsewhere && seen.insert((self.number(&self.pid, &object) as i32, task.0));
            if new && !self.add(task, &object, Look::Ended, Certainty::Likely, "memory", out) {
                return;
            }
        }
    }

    fn number(&self, member: &Member, task: &[u8]) -> u64 {
        member.of(task).unwrap_or(0)
    }

    /// Whether these bytes can be a task at all, and then whether it had ended. The cheapest and rarest comes first.
    fn looks(&self, task: &[u8]) -> Option<Look> {
        let is_pid = |member: &Member| {
            let pid = self.number(member, task) as i32;
            pid > 0 && pid <= MAX_PID
        };
        let prio = self.number(&self.prio, task) as i32;
        let possible = STATIC_PRIO.contains(&self.number(&self.static_prio, task))
            && is_pid(&self.pid)
            && is_pid(&self.tgid)
            && (-1..140).contains(&prio)
            && self.number(&self.policy, task) <= MAX_POLICY
            && is_kernel(self.number(&self.parent, task))
            && is_kernel(self.number(&self.leader, task))
            && self.number(&self.start, task) != 0
            && is_name(self.comm.bytes(task).unwrap_or(&[]));
        if !possible {
            return None;
        }
        let exit = self.number(&self.exit_state, task);
        let gone = exit & (EXIT_DEAD | EXIT_ZOMBIE) != 0 && self.number(&self.flags, task) & PF_EXITING != 0;
        match exit {
            0 => Some(Look::Alive),
            _ if gone && exit & !(EXIT_DEAD | EXIT_ZOMBIE) == 0 => Some(Look::Ended),
            _ => None,
        }
    }

    /// How much of what must be so of such a task is so.
    fn agrees(&self, at: Gva, task: &[u8]) -> Agreement {
        let number = |member: &Member| self.number(member, task);
        let is_task = |member: &Member| {
            let to = Gva(number(member));
            self.listed.contains_key(&to)
                || to == at
                || self
                    .frames
                    .behind(to)
                    .is_some_and(|gpa| self.slabs.is_object(gpa))
                || self.init == Some(to)
        };
        let ended = number(&self.exit_state) != 0;
        let (cred, prev) = (number(&self.cred), number(&self.prev));
        let (start, boot) = (number(&self.start), number(&self.start_boot));
        let leads = number(&self.pid) == number(&self.tgid);
        let points = [
            is_task(&self.parent),
            is_task(&self.leader) && (!leads || ended || number(&self.leader) == at.0),
            boot >= start && boot - start < u64::MAX >> 4,
            match ended {
                true => number(&self.state) & TASK_DEAD != 0 && number(&self.exit_state) & EXIT_DEAD != 0,
                false => number(&self.state) & TASK_DEAD == 0,
            },
            // Credentials and memory are let go before the task itself is.
            (cred == 0) == ended && (!ended || number(&self.mm) == 0),
            // A thread is in no list of processes; one that was, was taken out.
            !ended || !leads || prev == LIST_POISON2,
        ];
        match points.iter().filter(|point| !**point).count() {
            0 => Agreement::All,
            1 | 2 => Agreement::Most,
            _ => Agreement::Little,
        }
    }

    /// Adds a row; false where there is no room.
    fn add(
        &self,
        at: Gva,
        task: &[u8],
        look: Look,
        certainty: Certainty,
        found_in: &'static str,
        out: &mut Listing<RemovedTask>,
    ) -> bool {
        if out.rows.len() >= MAX_ROWS {
            out.warn(format!("tasks: cut after {MAX_ROWS} that are in no list"));
            return false;
        }
        let number = |member: &Member| self.number(member, task);
        let ended = look == Look::Ended;
        let status = number(&self.exit_code) as u32;
        let signal = (status & 0x7f) as u8;
        let start = number(&self.start_boot);
        let wall = |boot: i64| rfc3339(boot.checked_add(i64::try_from(start).ok()?)?);
        out.rows.push(RemovedTask {
            pid: number(&self.pid) as i32,
            tgid: number(&self.tgid) as i32,
            ppid: self.parent_of(task),
            name: guest_array_text(self.comm.bytes(task).unwrap_or(&[])),
            state: if ended { "ended" } else { "unlisted" },
            certainty,
            found_in,
            start_time: self.boot.and_then(wall),
            exit_code: (ended && signal == 0).then_some((status >> 8) as u8),
            signal: (ended && signal != 0).then_some(signal),
            loginuid: self
                .loginuid
                .and_then(|member| member.of(task))
                .map(|uid| uid as u32)
                .filter(|uid| *uid != u32::MAX),
            utime_us: number(&self.utime) / 1000,
            stime_us: number(&self.stime) / 1000,
            task: at,
        });
        true
    }

    /// The parent's pid: if it still is in the lists, and was started before.
    fn parent_of(&self, task: &[u8]) -> Option<i32> {
        let parent = Gva(self.number(&self.parent, task));
        let started = self.start_boot.number(self.kernel.space(), parent).ok()?;
        let pid = self.listed.get(&parent).copied()?;
        (started <= self.number(&self.start_boot, task)).then_some(pid)
    }
}

/// What a task looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Look {
    Ended,
    Alive,
}

/// How much of it agrees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Agreement {
    All,
    Most,
    Little,
}

/// Whether a number is an address of the kernel's half, of a word.
fn is_kernel(pointer: u64) -> bool {
    (0xff00_0000_0000_0000..u64::MAX - 4096).contains(&pointer) && pointer.is_multiple_of(8)
}

/// Whether these bytes can be a task's name: text with its end.
fn is_name(comm: &[u8]) -> bool {
    let end = comm.iter().position(|&byte| byte == 0).unwrap_or(0);
    end > 0
        && comm
            .get(..end)
            .is_some_and(|name| name.iter().all(|&byte| byte >= b' ' && byte != 0x7f))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_text_with_an_end() {
        assert!(is_name(b"bash\0\0\0\0\0\0\0\0\0\0\0\0"));
        assert!(is_name("Gr\u{fc}\u{df}e\0\0\0\0\0\0\0\0\0".as_bytes()));
        for other in [&b""[..], b"\0bash", b"no end", b"\x01bash\0", b"\x7f\0"] {
            assert!(!is_name(other), "{other:?}");
        }
    }

    #[test]
    fn addresses_are_of_the_kernels_half() {
        assert!(is_kernel(0xffff_8880_0000_0000) && is_kernel(0xff11_0000_0000_1000));
        for other in [0, 0x7fff_ffff_0000, LIST_POISON2, u64::MAX, 0xffff_8880_0000_0001] {
            assert!(!is_kernel(other), "{other:#x}");
        }
    }
}
