//! One guest for all tests, and its dump.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use vmsight_arch::Gva;
use vmsight_lab::{Format, Guest, Kernel as Version, Spec};
use vmsight_linux::{AttachOptions, Kernel};
use vmsight_memory::{GuestMemory, dump};
use vmsight_target::TargetSpec;

/// A guest, and a raw dump of it: in that, a physical address is an offset.
pub(crate) struct Subject {
    pub(crate) guest: Guest,
    pub(crate) dump: PathBuf,
    /// Attached to once: QEMU serves one client at a time.
    running: Kernel,
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
    let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let target = vmsight_target::attach(&spec, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
    let subject = Arc::new(Subject {
        running: attach(target.memory),
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
        [("running", self.running.clone()), ("dumped", self.dumped())]
    }
}

/// A copy of the dump that is written to.
pub(crate) struct Forgery {
    path: PathBuf,
    /// The kernel as it was before.
    pub(crate) kernel: Kernel,
    file: fs::File,
    _folder: tempfile::TempDir,
}

impl Forgery {
    pub(crate) fn of(subject: &Subject) -> Self {
        Self::of_file(&subject.dump, subject.dumped())
    }

    /// Of a raw dump and its kernel.
    pub(crate) fn of_file(dump: &Path, kernel: Kernel) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("forged");
        fs::copy(dump, &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        Self {
            file: OpenOptions::new().write(true).open(&path).unwrap(),
            path,
            kernel,
            _folder: folder,
        }
    }

    pub(crate) fn put(&self, at: Gva, bytes: &[u8]) {
        let gpa = self.kernel.space().translate(at).unwrap().gpa;
        self.file.write_all_at(bytes, gpa.0).unwrap();
    }

    pub(crate) fn member(&self, structure: &str, path: &str, at: Gva) -> Gva {
        at.wrapping_add(self.kernel.offset(structure, path).unwrap())
    }

    pub(crate) fn pointer(&self, at: Gva) -> Gva {
        Gva(self.kernel.space().read_u64(at).unwrap())
    }

    /// Writes at a physical address.
    pub(crate) fn put_at(&self, gpa: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, gpa).unwrap();
    }

    /// The kernel as it looks now.
    pub(crate) fn forged(&self) -> Kernel {
        attach(dump::open(&self.path, None).unwrap().memory)
    }
}
