//! New processes and threads, and programs that are executed.

use vmsight_sim_abi::{Kind, Member, Verdict, Watch};

use crate::task::{event, ids, is_setuid_root, pointer, put_name, put_text};
use crate::{Context, Memory};

/// `wake_up_new_task(task)`: the new task is complete and has not run yet.
pub(crate) fn created<M: Memory>(context: &Context<'_, M>, watch: &mut Watch) -> Verdict {
    let policy = &watch.policy;
    let task = context.frame.rdi;
    let mut event = event(context, policy, Kind::Process);
    let (child, child_tgid) = ids(context, policy, Some(task));
    let parent = pointer(context, policy, task, Member::TaskRealParent);
    let (parent, parent_tgid) = ids(context, policy, parent);
    let is_kernels = pointer(context, policy, task, Member::TaskMm) == Some(0);
    event.words = [
        child.into(),
        child_tgid.into(),
        parent.into(),
        parent_tgid.into(),
        is_kernels.into(),
        0,
        0,
    ];
    put_name(context, policy, &mut event, Some(task));
    watch.ring.push(&event);
    Verdict::Continue
}

/// `begin_new_exec(bprm)`: the file is one that can be executed, and the old program is about to be given up.
pub(crate) fn executed<M: Memory>(context: &Context<'_, M>, watch: &mut Watch) -> Verdict {
    let policy = &watch.policy;
    let bprm = context.frame.rdi;
    let mut event = event(context, policy, Kind::Exec);
    let file = pointer(context, policy, bprm, Member::BprmFile);
    let [setuid, ..] = &mut event.words;
    *setuid = file
        .is_some_and(|file| is_setuid_root(context, policy, file))
        .into();
    if let Some(path) = pointer(context, policy, bprm, Member::BprmFilename) {
        put_text(context, &mut event, path);
    }
    watch.ring.push(&event);
    Verdict::Continue
}

#[cfg(test)]
mod tests {
    use vmsight_sim_abi::Handler;

    use super::*;
    use crate::guest::{Guest, guest_at};

    #[test]
    fn a_process_is_told_with_its_parent() {
        let mut guest = Guest::new();
        let child = guest.task(0x3_0000, (58, 58), b"name\"of15bytes", Guest::current());
        assert_eq!(guest.call(Handler::Process, [child, 0, 0, 0]), Verdict::Continue);
        guest.member(child, Member::TaskMm, &[0; 8]);
        guest.call(Handler::Process, [child, 0, 0, 0]);
        assert_eq!(
            guest.told(),
            [
                r#"0 process pid=57 tgid=56 child=58 child-tgid=58 parent=57 parent-tgid=56 kernel=0 name="name\"of15bytes""#,
                r#"1 process pid=57 tgid=56 child=58 child-tgid=58 parent=57 parent-tgid=56 kernel=1 name="name\"of15bytes""#,
            ]
        );
    }

    #[test]
    fn a_program_is_told_with_its_path() {
        let mut guest = Guest::new();
        let (bprm, path) = (guest_at(0x3_0000), guest_at(0x3_1ffa));
        let file = guest.file(0x3_4000, 0o104_755, 0);
        guest.member(bprm, Member::BprmFile, &file.to_le_bytes());
        guest.member(bprm, Member::BprmFilename, &path.to_le_bytes());
        guest.put(path, b"/bin/su\0");
        guest.call(Handler::Exec, [bprm, 0, 0, 0]);
        guest.put(path, &[b'x'; 300]);
        guest.file(0x3_4000, 0o104_755, 1000);
        guest.call(Handler::Exec, [bprm, 0, 0, 0]);
        let lines = guest.told();
        assert_eq!(lines[0], r#"0 exec pid=57 tgid=56 setuid=1 path="/bin/su""#);
        let long = "x".repeat(vmsight_sim_abi::TEXT);
        assert_eq!(
            lines[1],
            std::format!(r#"1 exec pid=57 tgid=56 setuid=0 path="{long}...""#)
        );
    }

    /// Wherever the pointers lead, something is told, and nothing else happens.
    #[test]
    fn pointers_that_lead_nowhere_are_told_as_nothing() {
        let mut guest = Guest::new();
        for bad in [0, 1, 0xfff, 1 << 47, u64::MAX - 7, u64::MAX, guest_at(0xf_fffc)] {
            guest.call(Handler::Process, [bad, 0, 0, 0]);
            guest.call(Handler::Exec, [bad, 0, 0, 0]);
            let lines = guest.told();
            assert!(
                lines[0].contains("child=0 child-tgid=0 parent=0"),
                "{bad:#x} {lines:?}"
            );
            assert!(lines[1].contains("setuid=0"), "{bad:#x} {lines:?}");
        }
        // A task that is its own parent, and parents that lead in a circle.
        let task = Guest::current();
        guest.member(task, Member::TaskRealParent, &task.to_le_bytes());
        guest.call(Handler::Process, [task, 0, 0, 0]);
        assert!(guest.told()[0].contains("child=57 child-tgid=56 parent=57 parent-tgid=56"));
    }

    extern crate std;
}
