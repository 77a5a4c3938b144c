//! Who becomes root.

use vmsight_sim_abi::{Handler, Kind, Member, Policy, Verdict, Watch};

use crate::handlers::{errno, refuse};
use crate::task::{current, event, is_setuid_root, number, pointer, put_name};
use crate::{Context, Memory};

/// Real, effective, saved, and file-system user id, in the first user namespace.
type Ids = [u32; 4];

fn ids<M: Memory>(context: &Context<'_, M>, policy: &Policy, cred: u64) -> Option<Ids> {
    let of = |member| number(context, policy, cred, member);
    Some([
        of(Member::CredUid)?,
        of(Member::CredEuid)?,
        of(Member::CredSuid)?,
        of(Member::CredFsuid)?,
    ])
}

/// `commit_creds(new)`: told if none of the thread's ids was 0 and one of the new ones is. What cannot be read is told as
/// well, as ids that are all ones.
pub(crate) fn committed<M: Memory>(context: &Context<'_, M>, watch: &mut Watch) -> Verdict {
    let policy = &watch.policy;
    let task = current(context, policy);
    let old = task
        .and_then(|task| pointer(context, policy, task, Member::TaskCred))
        .and_then(|cred| ids(context, policy, cred));
    let new = ids(context, policy, context.frame.rdi);
    let was_root = old.is_some_and(|ids| ids.contains(&0));
    let is_root = new.is_none_or(|ids| ids.contains(&0));
    if was_root || !is_root {
        return Verdict::Continue;
    }
    let setuid = task.is_some_and(|task| executes_setuid(context, policy, task));
    let mut event = event(context, policy, Kind::Credentials);
    put_name(context, policy, &mut event, task);
    let unknown = [u32::MAX; 4];
    let [uid, euid, ..] = old.unwrap_or(unknown);
    let [new_uid, new_euid, ..] = new.unwrap_or(unknown);
    let [a, b, c, d, e, ..] = &mut event.words;
    (*a, *b, *c, *d, *e) = (
        uid.into(),
        euid.into(),
        new_uid.into(),
        new_euid.into(),
        setuid.into(),
    );
    let verdict = if setuid {
        Verdict::Continue
    } else {
        refuse(watch, Handler::Credentials, None)
    };
    event.errno = errno(verdict);
    watch.ring.push(&event);
    verdict
}

/// Whether the task is in the middle of executing a file that is root's and setuid. The kernel has given it the new
/// program's memory by then, which knows the file.
fn executes_setuid<M: Memory>(context: &Context<'_, M>, policy: &Policy, task: u64) -> bool {
    let asked = || {
        let bit = policy.member(Member::TaskInExecve)?;
        let word = context.u32(task.wrapping_add(bit / 32 * 4))?;
        if word >> (bit % 32) & 1 == 0 {
            return None;
        }
        let memory = pointer(context, policy, task, Member::TaskMm)?;
        pointer(context, policy, memory, Member::MmExeFile)
    };
    asked().is_some_and(|file| is_setuid_root(context, policy, file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Guest, ROOT, USER, guest_at};

    const OLD: u64 = 0x2_1000;
    const NEW: u64 = 0x3_0000;

    fn commit(guest: &mut Guest, old: Ids, new: Ids) -> Verdict {
        guest.cred(guest_at(OLD), old);
        guest.cred(guest_at(NEW), new);
        guest.call(Handler::Credentials, [guest_at(NEW), 0, 0, 0])
    }

    #[test]
    fn who_becomes_root_is_told() {
        let mut guest = Guest::new();
        // Root stays root or gives it up, somebody changes to somebody, who kept the right to be root takes it up again.
        for (old, new) in [
            (ROOT, ROOT),
            (ROOT, USER),
            (USER, [1001; 4]),
            ([1000, 1000, 0, 1000], [1000, 0, 0, 0]),
        ] {
            assert_eq!(commit(&mut guest, old, new), Verdict::Continue);
        }
        assert!(guest.told().is_empty());
        assert_eq!(commit(&mut guest, USER, ROOT), Verdict::Continue);
        assert_eq!(commit(&mut guest, USER, [1000, 1000, 1000, 0]), Verdict::Continue);
        guest.may_refuse(Handler::Credentials, -1);
        assert_eq!(commit(&mut guest, USER, [1000, 0, 0, 0]), Verdict::Refuse(-1));
        assert_eq!(
            guest.told(),
            [
                r#"0 credentials pid=57 tgid=56 uid=1000 euid=1000 new-uid=0 new-euid=0 setuid=0 name="sh""#,
                r#"1 credentials pid=57 tgid=56 uid=1000 euid=1000 new-uid=1000 new-euid=1000 setuid=0 name="sh""#,
                r#"2 credentials pid=57 tgid=56 uid=1000 euid=1000 new-uid=1000 new-euid=0 setuid=0 name="sh" refused=1"#,
            ]
        );
    }

    #[test]
    fn executing_a_setuid_file_is_how_it_should_be() {
        let mut guest = Guest::new();
        guest.may_refuse(Handler::Credentials, -1);
        let in_execve = guest_at(0x2_0070 + 4);
        let verdict = |guest: &mut Guest, executes: u8, mode, owner| {
            guest.put(in_execve, &[executes << 1]);
            guest.file(0x2_4000, mode, owner);
            commit(guest, USER, [1000, 0, 0, 0])
        };
        assert_eq!(verdict(&mut guest, 1, 0o104_755, 0), Verdict::Continue);
        assert!(guest.told()[0].contains("setuid=1"));
        // A setuid program after that, a file that is not, a file of somebody else's, no file.
        assert_eq!(verdict(&mut guest, 0, 0o104_755, 0), Verdict::Refuse(-1));
        assert_eq!(verdict(&mut guest, 1, 0o100_755, 0), Verdict::Refuse(-1));
        assert_eq!(verdict(&mut guest, 1, 0o104_755, 1000), Verdict::Refuse(-1));
        assert_eq!(verdict(&mut guest, 1, 0o044_755, 0), Verdict::Refuse(-1));
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let mut guest = Guest::new();
        guest.may_refuse(Handler::Credentials, -1);
        for bad in [0, u64::MAX, 1 << 47, guest_at(0x10_0000 - 8)] {
            guest.member(Guest::current(), Member::TaskCred, &bad.to_le_bytes());
            guest.cred(guest_at(NEW), USER);
            assert_eq!(
                guest.call(Handler::Credentials, [guest_at(NEW), 0, 0, 0]),
                Verdict::Continue
            );
            assert_eq!(
                guest.call(Handler::Credentials, [bad, 0, 0, 0]),
                Verdict::Refuse(-1)
            );
            assert!(guest.told()[0].contains("uid=4294967295"));
        }
    }
}
