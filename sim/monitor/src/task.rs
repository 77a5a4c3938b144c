//! Processes and threads.

use vmsight_sim_abi::{Event, Kind, Member, Policy, TEXT};

use crate::{Context, Memory};

/// Bytes of a thread's name in the kernel (`TASK_COMM_LEN`).
const COMM: usize = 16;

/// Address of the running thread's `task_struct`.
pub(crate) fn current<M: Memory>(context: &Context<'_, M>, policy: &Policy) -> Option<u64> {
    let at = policy.member(Member::Current)?;
    context.u64(context.rest.gs_base.wrapping_add(at))
}

/// The pointer in a member of the structure at `base`.
pub(crate) fn pointer<M: Memory>(
    context: &Context<'_, M>,
    policy: &Policy,
    base: u64,
    member: Member,
) -> Option<u64> {
    context.u64(base.wrapping_add(policy.member(member)?))
}

/// A member of 4 bytes.
pub(crate) fn number<M: Memory>(
    context: &Context<'_, M>,
    policy: &Policy,
    base: u64,
    member: Member,
) -> Option<u32> {
    context.u32(base.wrapping_add(policy.member(member)?))
}

/// Pid and tgid of the task at an address; zeros where they cannot be read.
pub(crate) fn ids<M: Memory>(context: &Context<'_, M>, policy: &Policy, task: Option<u64>) -> (u32, u32) {
    let of = |member| {
        task.and_then(|task| number(context, policy, task, member))
            .unwrap_or(0)
    };
    (of(Member::TaskPid), of(Member::TaskTgid))
}

/// An event of the running thread's.
pub(crate) fn event<M: Memory>(context: &Context<'_, M>, policy: &Policy, kind: Kind) -> Event {
    let (pid, tgid) = ids(context, policy, current(context, policy));
    Event {
        kind: kind as u32,
        pid,
        tgid,
        ..Event::EMPTY
    }
}

/// Puts the text at an address into an event.
pub(crate) fn put_text<M: Memory>(context: &Context<'_, M>, event: &mut Event, address: u64) {
    let mut text = [0; TEXT];
    let (length, cut) = context.text(address, &mut text);
    event.text = text;
    (event.length, event.cut) = (length as u32, u32::from(cut));
}

/// Puts a task's name into one.
pub(crate) fn put_name<M: Memory>(
    context: &Context<'_, M>,
    policy: &Policy,
    event: &mut Event,
    task: Option<u64>,
) {
    let mut name = [0; COMM];
    let at = task.and_then(|task| Some(task.wrapping_add(policy.member(Member::TaskComm)?)));
    let (length, _) = at.map_or((0, true), |at| context.text(at, &mut name));
    for (to, from) in event.text.iter_mut().zip(name.iter().take(length)) {
        *to = *from;
    }
    event.length = length as u32;
}

/// Whether a file is root's and setuid, by the address of its `struct file`.
pub(crate) fn is_setuid_root<M: Memory>(context: &Context<'_, M>, policy: &Policy, file: u64) -> bool {
    /// `S_ISUID`, and `S_IFMT` and `S_IFREG` for what is a file.
    const SETUID: u16 = 0o4000;
    const KIND: u16 = 0o170_000;
    const REGULAR: u16 = 0o100_000;
    let asked = || {
        let inode = pointer(context, policy, file, Member::FileInode)?;
        let mode = context.u16(inode.wrapping_add(policy.member(Member::InodeMode)?))?;
        let owner = number(context, policy, inode, Member::InodeUid)?;
        Some(mode & SETUID != 0 && mode & KIND == REGULAR && owner == 0)
    };
    asked().unwrap_or(false)
}
