//! One guest for all tests, and its dump.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use vmsight_lab::{Format, Guest, Kernel as Version, Spec};
use vmsight_linux::{AttachOptions, Kernel};
use vmsight_memory::{GuestMemory, dump};
use vmsight_target::TargetSpec;

/// A guest, and a raw dump of it: in that, a physical address is an offset.
pub(crate) struct Subject {
    pub(crate) guest: Guest,
    pub(crate) dump: PathBuf,
    _folder: tempfile::TempDir,
}

static SUBJECT: LazyLock<Mutex<Weak<Subject>>> = LazyLock::new(Mutex::default);

/// The guest, which is there as long as a test uses it.
pub(crate) fn subject() -> Arc<Subject> {
    let mut slot = SUBJECT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(subject) = slot.upgrade() {
        return subject;
    }
    let guest = Guest::boot(&Spec::new(Version::V6_12)).unwrap_or_else(|e| panic!("{e:?}"));
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("memory");
    guest.dump(Format::Raw, &dump).unwrap_or_else(|e| panic!("{e:?}"));
    let subject = Arc::new(Subject {
        guest,
        dump,
        _folder: folder,
    });
    *slot = Arc::downgrade(&subject);
    subject
}

pub(crate) fn attach(memory: GuestMemory) -> Kernel {
    Kernel::attach(memory, AttachOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

impl Subject {
    /// The kernel of the dump.
    pub(crate) fn dumped(&self) -> Kernel {
        attach(dump::open(&self.dump, None).unwrap().memory)
    }

    /// The kernel of the guest as it runs, and as it was dumped.
    pub(crate) fn both(&self) -> [(&'static str, Kernel); 2] {
        let spec = TargetSpec::Qmp(self.guest.qmp_path().unwrap());
        let target = vmsight_target::attach(&spec, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
        [("running", attach(target.memory)), ("dumped", self.dumped())]
    }
}
