//! One guest with all of it, and what its dump has.

use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::AtomicBool;

use vmsight_analysis::keys::{self, Form, Owned, VolumeKey};
use vmsight_analysis::recover::DeviceMemory;
use vmsight_analysis::recover::history::HistoryEntry;
use vmsight_analysis::recover::input::KeyEvent;
use vmsight_lab::{Format, Guest, Kernel as Version, Spec, Work};
use vmsight_linux::{AttachOptions, Kernel, Listing};
use vmsight_memory::{GuestMemory, dump};
use vmsight_target::{Target, TargetSpec};

use crate::{agent, disks, history, keyboard, screen, tls};

pub(crate) struct Subject {
    pub(crate) agent: agent::Made,
    pub(crate) sessions: Vec<tls::Made>,
    pub(crate) volumes: Listing<VolumeKey>,
    /// The keys of the dump, and what was said beside.
    pub(crate) found: Vec<Owned>,
    pub(crate) notes: Vec<String>,
    pub(crate) zsh: i32,
    pub(crate) keyboard: keyboard::Made,
    /// While it ran, and from the dump.
    pub(crate) history: [(&'static str, Listing<HistoryEntry>); 2],
    pub(crate) typed: [(&'static str, Listing<KeyEvent>); 2],
    pub(crate) pictures: [(&'static str, screen::Pictures); 2],
    pub(crate) forged: screen::Forged,
}

/// What all tests look at. The guest is gone by then.
pub(crate) static SUBJECT: LazyLock<Subject> = LazyLock::new(make);

fn make() -> Subject {
    let mut spec = Spec::new(Version::V6_1).idle().orders().programs();
    spec.qemu_args.extend(screen::CARDS.map(str::to_owned));
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let agent = agent::make(&guest);
    let sessions = tls::make(&guest);
    disks::make(&guest);
    let zsh = history::make(&guest);
    screen::load_drivers(&guest);
    let keyboard = keyboard::make(&guest);
    screen::draw(&guest);

    let attached = target(&guest);
    let running = kernel(attached.memory.clone());
    let cards = DeviceMemory::new(|| attached.device_memory().map_err(|e| e.to_string()));
    let pictures = screen::when_shown(&running, &cards);
    let (history, typed) = (history::found(&running), keyboard::found(&running));
    // QEMU serves one client at a time.
    drop((cards, running));
    drop(attached);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    guest.dump(Format::Raw, &path).unwrap_or_else(|e| panic!("{e:?}"));
    drop(guest);

    let kernel = attach(&path);
    let found = keys::search(kernel.memory(), &AtomicBool::new(false), &|_| {});
    let (found, notes) = keys::owned(&kernel, found);
    let volumes = keys::volume_keys(&kernel, &found).unwrap_or_else(|e| panic!("{e}"));
    let dumped = screen::Pictures::of(&kernel, &screen::dumped());
    Subject {
        agent,
        sessions,
        volumes,
        found,
        notes,
        zsh,
        keyboard,
        history: [("running", history), ("dumped", history::found(&kernel))],
        typed: [("running", typed), ("dumped", keyboard::found(&kernel))],
        // The dump is another one from here on.
        forged: screen::forge(&path, &kernel, &dumped),
        pictures: [("running", pictures), ("dumped", dumped)],
    }
}

/// The guest as it runs.
fn target(guest: &Guest) -> Target {
    let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
    vmsight_target::attach(&spec, &Default::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// The kernel of a dump.
pub(crate) fn attach(path: &Path) -> Kernel {
    kernel(dump::open(path, None).unwrap().memory)
}

fn kernel(memory: GuestMemory) -> Kernel {
    Kernel::attach(memory, AttachOptions::default()).unwrap_or_else(|e| panic!("{e}"))
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

/// Has the guest load a module.
pub(crate) fn load(guest: &Guest, module: &str) {
    let account = guest
        .order(Work::Load {
            name: module.into(),
            parameters: String::new(),
            from_memory: false,
        })
        .unwrap_or_else(|e| panic!("{module}: {e:#}"));
    assert_eq!(account.returned, Some(0), "{module}");
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
