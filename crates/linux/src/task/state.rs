//! What the numbers in a task say: state, scheduling policy, flags.

/// PF_WQ_WORKER: a kernel thread that serves work queues. The value is the same from 2.6.36 on.
pub(crate) const PF_WQ_WORKER: u32 = 0x20;
/// PF_KTHREAD: a thread of the kernel's own. The value is the same from 2.6.27 on (include/linux/sched.h).
pub(crate) const PF_KTHREAD: u32 = 0x20_0000;
/// Bit 0 of `task_struct.atomic_flags`: PFA_NO_NEW_PRIVS.
pub(crate) const PFA_NO_NEW_PRIVS: u64 = 1;

const TASK_UNINTERRUPTIBLE: u64 = 0x2;
const TASK_REPORT: u64 = 0x7f;
const TASK_NOLOAD: u64 = 0x400;
const TASK_RTLOCK_WAIT: u64 = 0x1000;
const TASK_FROZEN: u64 = 0x8000;

/// The letter that /proc/PID/stat and ps show: R S D T t X Z P I.
///
/// As `task_state_index` computes it (include/linux/sched.h): the highest bit of state and exit state that is reported, with idle
/// kernel threads, real-time lock waiters and frozen tasks told apart. The bits are the same from 4.14 on; RTLOCK_WAIT came with 5.15
/// and FROZEN with 6.1, and neither bit meant anything to a reader before.
pub(crate) fn letter(state: u64, exit_state: u64) -> char {
    const IDLE: u64 = TASK_UNINTERRUPTIBLE | TASK_NOLOAD;
    if state & IDLE == IDLE && exit_state == 0 {
        return 'I';
    }
    let mut reported = (state | exit_state) & TASK_REPORT;
    if reported == 0 && state & (TASK_RTLOCK_WAIT | TASK_FROZEN) != 0 {
        reported = TASK_UNINTERRUPTIBLE;
    }
    let index = (u64::BITS - reported.leading_zeros()) as usize;
    b"RSDTtXZP".get(index).map_or('?', |&b| char::from(b))
}

/// The scheduling policy's name (include/uapi/linux/sched.h).
pub(crate) fn policy(value: u32) -> &'static str {
    match value {
        0 => "normal",
        1 => "fifo",
        2 => "rr",
        3 => "batch",
        5 => "idle",
        6 => "deadline",
        7 => "ext",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::letter;

    #[test]
    fn letters_are_those_of_proc() {
        assert_eq!(letter(0, 0), 'R');
        assert_eq!(letter(1, 0), 'S');
        assert_eq!(letter(2, 0), 'D');
        assert_eq!(letter(0x2001, 0), 'S', "interruptible and freezable (6.1)");
        assert_eq!(letter(0x402, 0), 'I');
        assert_eq!(letter(0x2402, 0), 'I', "idle and freezable (6.1)");
        assert_eq!(letter(4, 0), 'T');
        assert_eq!(letter(0x104, 0), 'T', "stopped and killable");
        assert_eq!(letter(8, 0), 't');
        assert_eq!(letter(0x80, 0x20), 'Z');
        assert_eq!(letter(0x80, 0x10), 'X');
        assert_eq!(letter(0x40, 0), 'P');
        assert_eq!(letter(0x1000, 0), 'D');
        assert_eq!(letter(0x8000, 0), 'D');
    }
}
