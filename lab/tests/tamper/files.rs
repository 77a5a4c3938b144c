//! Files that are hidden: one that its directory does not have, and one whose name is not in the table of names. The guest itself
//! bears witness to what its programs see.

use vmsight_lab::orders::{Prepared, Tamper};
use vmsight_lab::{Work, orders::Account};

use super::{Expected, Lab, expect, hex};

const DIRECTORY: &str = "/tmp/hides";
const UNLISTED: &str = "/tmp/hides/unlisted";
const UNNAMED: &str = "/tmp/hides/unnamed";
const SHOWN: &str = "/tmp/hides/shown";
const TEXT: &str = "what it says";
/// `-ENOENT`.
const NO_SUCH_FILE: i64 = -2;

pub(super) struct Hidden<'l> {
    lab: &'l Lab,
    holder: Prepared<'l>,
    tampers: [Tamper; 2],
    dentries: [u64; 2],
}

impl<'l> Hidden<'l> {
    pub(super) fn hide(lab: &'l Lab) -> Hidden<'l> {
        lab.run(&["mkdir", DIRECTORY]);
        for path in [UNLISTED, UNNAMED, SHOWN] {
            lab.write(path, TEXT);
        }
        let holder = lab.guest.prepare(Work::Hold { path: UNNAMED.into() }).unwrap();
        assert_eq!(listing(lab), ["shown", "unlisted", "unnamed"]);
        let tampers = [
            Tamper::FileList {
                path: UNLISTED.into(),
            },
            Tamper::FileName { path: UNNAMED.into() },
        ];
        let dentries = [0, 1].map(|n: usize| lab.tamper(&tampers[n], false).object);
        // To programs in the guest the first is only there by its name, and the second is not there.
        assert_eq!(listing(lab), ["shown"]);
        assert_eq!(read(lab, UNLISTED).bytes, *TEXT);
        assert_eq!(read(lab, UNNAMED).returned, Some(NO_SUCH_FILE));
        Hidden {
            lab,
            holder,
            tampers,
            dentries,
        }
    }

    pub(super) fn expected(&self) -> Vec<Expected> {
        let facts = |dentry: u64, answers: &[&str]| {
            let facts = answers.iter().map(|answer| (*answer).to_owned());
            facts.chain([hex(dentry)]).collect::<Vec<_>>()
        };
        let held = format!("held by: {} (", self.holder.pid());
        vec![
            expect(
                "hidden-files",
                format!("file {UNLISTED}"),
                facts(
                    self.dentries[0],
                    &[
                        "in its directory: no",
                        "in the table of names: yes",
                        "a name that its file has: yes",
                        "its file in the filesystem's list: yes",
                        "open or mapped: no, and need not be",
                        "links: 1",
                        "size: 12",
                        "pages in the page cache: 1",
                    ],
                ),
            ),
            expect(
                "hidden-files",
                format!("file {UNNAMED}"),
                facts(
                    self.dentries[1],
                    &[
                        "in its directory: yes",
                        "in the table of names: no",
                        "a name that its file has: yes",
                        "open or mapped: yes",
                        &held,
                        "links: 1",
                        "pages in the page cache: 1",
                    ],
                ),
            ),
        ]
    }

    pub(super) fn show(self) {
        self.lab.undo_all(&self.tampers);
        assert_eq!(listing(self.lab), ["shown", "unlisted", "unnamed"]);
        assert_eq!(read(self.lab, UNNAMED).bytes, *TEXT);
        drop(self.holder);
        self.lab.run(&["rm", "-r", DIRECTORY]);
    }
}

/// What a program in the guest sees in the directory.
fn listing(lab: &Lab) -> Vec<String> {
    let work = Work::Exec {
        path: "/bin/busybox".into(),
        argv: vec!["ls".into(), "-1a".into(), DIRECTORY.into()],
        envp: Vec::new(),
    };
    let account = lab.guest.order(work).unwrap();
    let names = account.output.lossy();
    let names = names.lines().filter(|name| !name.starts_with('.'));
    names.map(str::to_owned).collect()
}

fn read(lab: &Lab, path: &str) -> Account {
    let work = Work::ReadFile {
        path: path.into(),
        limit: 4096,
    };
    lab.guest.order(work).unwrap()
}
