//! Programs that call themselves as the kernel's threads are called.

use vmsight_lab::Work;

use super::{Lab, expect};

/// One that took the name, and one whose arguments are what ps shows of such a thread.
pub(crate) fn check(lab: &Lab) {
    let pose = |name: &str, argument: &str| {
        let work = Work::Pose {
            name: name.into(),
            argument: argument.into(),
        };
        lab.guest.prepare(work).unwrap()
    };
    let named = pose("kworker/u9:7", "/usr/sbin/cron");
    let shown = pose("cron", "[kworker/0:1-events]");
    // Brackets are no pose, nor is a name that is not the file's.
    let honest = pose("celery", "[celeryd: worker]");
    lab.tells(
        "programs that pose",
        &[
            expect(
                "process-names",
                format!("process {} (kworker/u9:7)", named.pid()),
                [
                    "name: kworker/u9:7",
                    "first argument: /usr/sbin/cron",
                    "program: ",
                ]
                .map(str::to_owned),
            ),
            expect(
                "process-names",
                format!("process {} (cron)", shown.pid()),
                ["first argument: [kworker/0:1-events]".to_owned()],
            ),
        ],
    );
    drop((named, shown, honest));
    lab.is_clean("nobody poses any more");
}
