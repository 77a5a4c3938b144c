//! One guest with all of it, and what its dump has.

use std::sync::LazyLock;
use std::sync::atomic::AtomicBool;

use vmsight_analysis::keys::{self, Form, Owned, VolumeKey};
use vmsight_lab::{Format, Guest, Kernel as Version, Spec, Work};
use vmsight_linux::{AttachOptions, Kernel, Listing};
use vmsight_memory::dump;

use crate::{agent, disks, tls};

pub(crate) struct Subject {
    pub(crate) agent: agent::Made,
    pub(crate) sessions: Vec<tls::Made>,
    pub(crate) volumes: Listing<VolumeKey>,
    /// The keys of the dump, and what was said beside.
    pub(crate) found: Vec<Owned>,
    pub(crate) notes: Vec<String>,
}

/// What all tests look at. The guest is gone by then.
pub(crate) static SUBJECT: LazyLock<Subject> = LazyLock::new(make);

fn make() -> Subject {
    let spec = Spec::new(Version::V6_1).idle().orders().programs();
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let agent = agent::make(&guest);
    let sessions = tls::make(&guest);
    disks::make(&guest);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    guest.dump(Format::Elf, &path).unwrap_or_else(|e| panic!("{e:?}"));
    drop(guest);

    let memory = dump::open(&path, None).unwrap().memory;
    let found = keys::search(&memory, &AtomicBool::new(false), &|_| {});
    let kernel = Kernel::attach(memory, AttachOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    let (found, notes) = keys::owned(&kernel, found);
    let volumes = keys::volume_keys(&kernel, &found).unwrap_or_else(|e| panic!("{e}"));
    Subject {
        agent,
        sessions,
        volumes,
        found,
        notes,
    }
}

impl Subject {
    /// The keys in this form that a process has.
    pub(crate) fn of(&self, pid: i32, form: Form) -> impl Iterator<Item = &Owned> {
        let has = move |owned: &&Owned| owned.holders.iter().any(|holder| holder.pid == Some(pid));
        self.found
            .iter()
            .filter(move |owned| owned.hit.form == form)
            .filter(has)
    }
}

/// Has the guest's shell do something, and gives what it prints. What is to last must have let go of standard output.
pub(crate) fn shell(guest: &Guest, script: &str) -> String {
    let set = "set -e; exec 2>&1 </dev/null; umask 077; cd /tmp\n";
    let account = guest
        .order(Work::Exec {
            path: "/bin/busybox".into(),
            argv: vec!["sh".into(), "-c".into(), format!("{set}{script}").as_str().into()],
            envp: vec!["PATH=/usr/bin:/bin:/tmp/bin".into(), "HOME=/tmp".into()],
        })
        .unwrap_or_else(|e| panic!("{script}: {e:#}"));
    let output = String::from_utf8_lossy(account.output.bytes()).into_owned();
    assert_eq!(
        account.ended,
        Some(vmsight_lab::orders::Ended::Exited(0)),
        "{script}: {output}"
    );
    output
}
