//! What a guest's code is to be, out of whatever there is of it: baselines, kernels, modules, packages, folders.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rustc_hash::FxHashMap;
use vmsight_linux::module::Module;

use super::file::{MAGIC, is_baseline};
use super::{Baseline, BaselineError, KernelFileError, ModuleFile, ModuleFileError, package, packed};
use crate::Context;

/// No kernel's file is longer, nor a module's.
const MAX_FILE: u64 = 1 << 30;
/// What all modules' files may hold together.
const MAX_MODULES: u64 = 1 << 30;
/// Where an ELF file says what it is, and what a module says there (`ET_REL`).
const RELOCATABLE: (usize, u8) = (16, 1);

/// Why something is of no use as a trusted copy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustedError {
    /// It cannot be read.
    #[error("reading {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is something else.
    #[error("{0} is neither a baseline nor a kernel, a module, a Debian package or a folder of modules")]
    Foreign(PathBuf),
    /// A baseline, and damaged.
    #[error("reading {path}")]
    Baseline {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: BaselineError,
    },
    /// A kernel, and not this guest's.
    #[error("holding the kernel against {path}")]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: KernelFileError,
    },
    /// A module, and damaged.
    #[error("reading module {module} in {path}")]
    Module {
        /// Which file.
        path: PathBuf,
        /// Which module.
        module: String,
        /// Why.
        source: ModuleFileError,
    },
    /// Of another kernel.
    #[error("{path} is of another kernel: {what} there is {there}, the guest's {guest}")]
    Other {
        /// Which file.
        path: PathBuf,
        /// What was compared.
        what: String,
        /// What it is in the file.
        there: String,
        /// What it is in the guest.
        guest: String,
    },
    /// Nothing of the guest's is in it.
    #[error("{0} holds neither the guest's kernel nor any module that is loaded in it")]
    Nothing(PathBuf),
    /// Two of them have the same.
    #[error("{0} has the kernel's code, and so has another")]
    Twice(PathBuf),
}

/// Something that is given as a trusted copy: opened, and known to be of a kind that there is.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    kind: SourceKind,
}

#[derive(Debug)]
enum SourceKind {
    Baseline(Baseline),
    Kernel(Vec<u8>),
    Module(Vec<u8>),
    Package(File),
    Folder,
}

impl Source {
    /// Opens a file or folder and looks what it is: not by its name.
    ///
    /// # Errors
    /// If it cannot be read, or is of no kind that is known.
    pub fn open(path: &Path) -> Result<Self, TrustedError> {
        let failed = |source| TrustedError::Io {
            path: path.to_owned(),
            source,
        };
        let of = |kind| Self {
            path: path.to_owned(),
            kind,
        };
        if path.is_dir() {
            return Ok(of(SourceKind::Folder));
        }
        let mut file = File::open(path).map_err(failed)?;
        let mut begin = Vec::new();
        file.by_ref()
            .take(MAGIC.len().max(package::ARCHIVE.len()) as u64)
            .read_to_end(&mut begin)
            .map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        if is_baseline(&begin) {
            let read = Baseline::read(BufReader::new(file));
            let read = read.map_err(|source| TrustedError::Baseline {
                path: path.to_owned(),
                source,
            });
            return Ok(of(SourceKind::Baseline(read?)));
        }
        if begin.starts_with(package::ARCHIVE) {
            return Ok(of(SourceKind::Package(file)));
        }
        let bytes = packed::whole(file, MAX_FILE).map_err(failed)?;
        match bytes.get(RELOCATABLE.0) {
            Some(kind) if bytes.starts_with(b"\x7fELF") && *kind == RELOCATABLE.1 => {
                Ok(of(SourceKind::Module(bytes)))
            }
            _ if Baseline::is_kernel_file(&bytes) => Ok(of(SourceKind::Kernel(bytes))),
            _ => Err(TrustedError::Foreign(path.to_owned())),
        }
    }
}

/// What a guest's code is to be.
#[derive(Clone, Default, Debug)]
pub struct Trusted {
    /// As it was, or the kernel's as its file has it.
    pub(crate) baseline: Option<Baseline>,
    /// Of modules that are loaded, by name.
    pub(crate) modules: FxHashMap<String, ModuleFile>,
}

impl From<Baseline> for Trusted {
    fn from(baseline: Baseline) -> Self {
        Self {
            baseline: Some(baseline),
            modules: FxHashMap::default(),
        }
    }
}

impl Trusted {
    /// What is in the sources of this guest's kernel and the modules that are loaded in it. A package is read once, from its first
    /// byte to its last, and nothing else of it is kept.
    ///
    /// # Errors
    /// If something is damaged, or of another kernel, or of no use at all.
    pub fn read(context: &Context, sources: Vec<Source>) -> Result<Self, TrustedError> {
        let mut trusted = Self::default();
        for source in sources {
            let found = Found::read(context, source)?;
            if let Some(kernel) = found.kernel
                && trusted.baseline.replace(kernel).is_some()
            {
                return Err(TrustedError::Twice(found.path));
            }
            trusted.modules.extend(found.modules);
        }
        Ok(trusted)
    }

    /// How many modules have a file of their own in it.
    pub fn module_files(&self) -> usize {
        self.modules.len()
    }
}

/// What was found in one source.
struct Found<'c> {
    context: &'c Context,
    path: PathBuf,
    loaded: FxHashMap<&'c str, &'c Module>,
    kernel: Option<Baseline>,
    /// A kernel, but not this one.
    other_kernel: Option<KernelFileError>,
    modules: FxHashMap<String, ModuleFile>,
    /// Of modules of the same name, but not those that are loaded.
    other_modules: FxHashMap<String, ModuleFile>,
    left: u64,
}

impl<'c> Found<'c> {
    fn read(context: &'c Context, source: Source) -> Result<Self, TrustedError> {
        let modules = context.modules().iter();
        let mut found = Self {
            context,
            path: source.path.clone(),
            loaded: modules.map(|module| (module.name.as_str(), module)).collect(),
            kernel: None,
            other_kernel: None,
            modules: FxHashMap::default(),
            other_modules: FxHashMap::default(),
            left: MAX_MODULES,
        };
        match source.kind {
            SourceKind::Baseline(baseline) => found.kernel = Some(baseline),
            SourceKind::Kernel(file) => found.kernel(&file)?,
            SourceKind::Module(file) => found.module("the file", &file)?,
            SourceKind::Package(file) => {
                let path = found.path.clone();
                package::package(&path, file, &mut |name, from| found.entry(name, from))?;
            }
            SourceKind::Folder => {
                let folder = found.path.clone();
                package::folder(&folder, &mut |name, from| found.entry(name, from))?;
            }
        }
        found.judged()
    }

    /// A file of a package or a folder: only the kernel and modules that are loaded are looked into.
    fn entry(&mut self, name: &str, from: &mut dyn Read) -> Result<(), TrustedError> {
        let failed = |source| TrustedError::Io {
            path: self.path.join(name),
            source,
        };
        let name = name.rsplit('/').next().unwrap_or(name);
        if name == "vmlinuz" || name.starts_with("vmlinuz-") {
            if self.kernel.is_some() {
                return Ok(());
            }
            let bytes = packed::whole(from, MAX_FILE).map_err(failed)?;
            return self.kernel(&bytes);
        }
        let Some(module) = module_name(name) else {
            return Ok(());
        };
        if !self.loaded.contains_key(module.as_str()) || self.modules.contains_key(&module) {
            return Ok(());
        }
        let bytes = packed::whole(from, self.left).map_err(failed)?;
        self.module(&module, &bytes)
    }

    fn kernel(&mut self, file: &[u8]) -> Result<(), TrustedError> {
        match Baseline::of_kernel_file(self.context, file) {
            Ok(kernel) => self.kernel = Some(kernel),
            Err(other @ KernelFileError::Other(_)) => self.other_kernel = Some(other),
            Err(source) => {
                return Err(TrustedError::Kernel {
                    path: self.path.clone(),
                    source,
                });
            }
        }
        Ok(())
    }

    fn module(&mut self, name: &str, file: &[u8]) -> Result<(), TrustedError> {
        self.left = self.left.saturating_sub(file.len() as u64);
        let parsed = ModuleFile::parse(file).map_err(|source| TrustedError::Module {
            path: self.path.clone(),
            module: name.to_owned(),
            source,
        })?;
        // A file's name is what anybody calls it.
        let name = parsed.name.replace('-', "_");
        let Some(loaded) = self.loaded.get(name.as_str()) else {
            return Ok(());
        };
        match differs(self.context, loaded, &parsed) {
            None => self.modules.insert(name, parsed),
            Some(_) => self.other_modules.insert(name, parsed),
        };
        Ok(())
    }

    /// Whether it is of this guest. Where some of it is, what is not is what the check is to tell.
    fn judged(mut self) -> Result<Self, TrustedError> {
        if self.kernel.is_none()
            && let Some(source) = self.other_kernel.take()
        {
            return Err(TrustedError::Kernel {
                path: self.path,
                source,
            });
        }
        if self.kernel.is_none() && self.modules.is_empty() {
            let mut others: Vec<(&String, &ModuleFile)> = self.other_modules.iter().collect();
            others.sort_by_key(|(name, _)| *name);
            let other = others.into_iter().find_map(|(name, file)| {
                let module = self.loaded.get(name.as_str())?;
                Some((name, differs(self.context, module, file)?))
            });
            return Err(match other {
                Some((name, difference)) => TrustedError::Other {
                    what: format!("the {} of module {name}", difference.what),
                    there: difference.file,
                    guest: difference.guest,
                    path: self.path,
                },
                None => TrustedError::Nothing(self.path),
            });
        }
        let others = std::mem::take(&mut self.other_modules);
        for (name, file) in others {
            self.modules.entry(name).or_insert(file);
        }
        Ok(self)
    }
}

/// What a file of a module has otherwise than the one that is loaded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Difference {
    pub(crate) what: &'static str,
    pub(crate) file: String,
    pub(crate) guest: String,
}

/// Whether a file is not the loaded module's: by build-id, where both have one; else by the checksum of the sources, or the release
/// of the kernel that it is for.
pub(crate) fn differs(context: &Context, module: &Module, file: &ModuleFile) -> Option<Difference> {
    let release = context.kernel().release();
    let facts = [
        ("build-id", file.build_id.as_deref(), module.build_id.as_deref()),
        (
            "srcversion",
            file.srcversion.as_deref(),
            module.srcversion.as_deref(),
        ),
        ("release", file.release(), Some(release)),
    ];
    let (what, file, guest) = facts
        .into_iter()
        .find_map(|(what, file, guest)| Some((what, file?, guest?)))?;
    (file != guest).then(|| Difference {
        what,
        file: file.to_owned(),
        guest: guest.to_owned(),
    })
}

/// `8021q.ko.xz` is `8021q`; the kernel has no dashes in names.
fn module_name(file: &str) -> Option<String> {
    let forms = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];
    let name = forms.iter().find_map(|form| file.strip_suffix(form))?;
    Some(name.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_told_by_their_files_names() {
        assert_eq!(module_name("8021q.ko.xz").as_deref(), Some("8021q"));
        assert_eq!(module_name("aes-x86-64.ko").as_deref(), Some("aes_x86_64"));
        assert_eq!(module_name("ext4.ko.zst").as_deref(), Some("ext4"));
        assert_eq!(module_name("ext4.ko.sig"), None);
        assert_eq!(module_name("modules.dep"), None);
    }

    #[test]
    fn a_file_is_what_it_begins_with() {
        let folder = tempfile::tempdir().unwrap();
        let opened = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            Source::open(&path)
        };
        let mut module = b"\x7fELF\x02\x01\x01".to_vec();
        module.resize(64, 0);
        module[16] = 1;
        let kind = |source: Result<Source, TrustedError>| source.map(|source| source.kind);
        assert!(matches!(
            kind(opened("baseline", &module)),
            Ok(SourceKind::Module(_))
        ));
        let packed = zstd::encode_all(module.as_slice(), 1).unwrap();
        assert!(matches!(
            kind(opened("vmlinuz", &packed)),
            Ok(SourceKind::Module(_))
        ));
        module[16] = 2;
        assert!(matches!(kind(opened("a.ko", &module)), Ok(SourceKind::Kernel(_))));
        assert!(matches!(
            kind(opened("b.ko", b"!<arch>\n")),
            Ok(SourceKind::Package(_))
        ));
        let damaged = opened("a.deb", b"VMSBASE\x07 what is this");
        assert!(matches!(damaged, Err(TrustedError::Baseline { .. })));
        let text = opened("c.ko", b"nothing of the kind");
        assert!(matches!(text, Err(TrustedError::Foreign(_))));
        assert!(matches!(
            kind(Source::open(folder.path())),
            Ok(SourceKind::Folder)
        ));
        assert!(matches!(
            Source::open(&folder.path().join("none")),
            Err(TrustedError::Io { .. })
        ));
    }
}
