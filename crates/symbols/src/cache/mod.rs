//! Profiles kept on disk, so that the second look at a kernel build costs next to nothing.
//!
//! The guest is hostile, and its build-id is only a claim. So a file never stands for a build-id: it holds, byte for byte, the
//! pieces of the guest's image that the profile was made from (kallsyms or exports, BTF, banner, build-id) and where they lay. A
//! hit demands that this guest has the same bytes at the same places. So what one guest makes us keep is given to no other
//! guest whose tables differ: one that forges its tables gets a file of its own and harms only itself.
//!
//! What was derived from these bytes (symbol table, index of types) is believed, not derived again. A checksum guards it
//! against damage: files that are half-written, cut or changed by accident are refused. It does not guard it against
//! whoever can write the file and the checksum with it; that is the user alone, by the rights of directory and files, which are
//! checked: links and others' files are refused. So the cache is worth as much trust as that user's other files.

mod directory;
mod format;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmsight_arch::Gpa;
use vmsight_memory::GuestMemory;

use crate::kernel::{ImageBytes, KernelImage, Known};
use crate::profile::{Made, Profile, ProfileSource, link_time_text, no_types, types_in};
use crate::{SymbolTable, Types};

use format::Entry;

/// How many profiles are kept. A file has about 15 MB.
const MAX_FILES: usize = 64;

/// How many profiles are kept under one build-id: more than one means that somebody forges.
const MAX_PER_BUILD: usize = 4;

/// The profile cache of this user.
#[derive(Debug, Default)]
pub struct Cache {
    place: Option<Place>,
}

#[derive(Debug)]
struct Place {
    path: PathBuf,
    directory: OwnedFd,
}

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Neither XDG_CACHE_HOME nor HOME says where it is.
    #[error("no profile cache: neither XDG_CACHE_HOME nor HOME is an absolute path")]
    NoHome,
    /// An operation on it failed.
    #[error("profile cache {path}: cannot {what}: {source}")]
    Io {
        /// Directory of the cache.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// It is not ours alone.
    #[error("profile cache {path} is not used: {why}")]
    Unsafe {
        /// Directory of the cache.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl Cache {
    /// A cache that finds and keeps nothing.
    pub fn disabled() -> Self {
        Self::default()
    }

    /// The cache in its usual place: `$XDG_CACHE_HOME/vmsight/profiles`, or `~/.cache/vmsight/profiles`.
    ///
    /// # Errors
    /// If there is no such place, it cannot be made, or it is not the user's own.
    pub fn open_default() -> Result<Self, CacheError> {
        let absolute = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        Self::open(&base.ok_or(CacheError::NoHome)?.join("vmsight").join("profiles"))
    }

    /// The cache in the directory `path`, which is made (mode 0700) if it is not there.
    ///
    /// # Errors
    /// If it cannot be made, belongs to somebody else, is a link, or others may write in it.
    pub fn open(path: &Path) -> Result<Self, CacheError> {
        let directory = directory::open(path)?;
        Ok(Self {
            place: Some(Place {
                path: path.to_owned(),
                directory,
            }),
        })
    }

    /// Where builds that are in the cache keep their banner and build-id.
    pub(crate) fn known(&self) -> Vec<Known> {
        let Some(place) = &self.place else {
            return Vec::new();
        };
        let mut known: Vec<Known> = Vec::new();
        for name in directory::newest(&place.directory) {
            if let Some(k) = format::known(&name).filter(|k| !known.contains(k)) {
                known.push(k);
            }
        }
        known
    }

    /// The profile of the kernel `image` in `memory`, if it is here and this guest has the very bytes that it was made from.
    pub fn load(&self, memory: &GuestMemory, image: &KernelImage) -> Option<Profile> {
        let place = self.place.as_ref()?;
        let prefix = format::prefix(image.build_id.as_deref()?);
        let names = directory::newest(&place.directory);
        names
            .iter()
            .filter(|n| n.starts_with(&prefix))
            .take(MAX_PER_BUILD)
            .find_map(|name| match load(place, name, memory, image) {
                Ok(profile) => {
                    directory::touch(&place.directory, name);
                    Some(profile)
                }
                Err(why) => {
                    tracing::debug!(name, why, "cached profile not used");
                    None
                }
            })
    }

    /// Keeps a profile that was read from `memory`. It is written a little later and behind, so as not to slow down what the
    /// profile is wanted for; dropping the result has it done at once and waits.
    ///
    /// Damaged profiles are not kept: what was damaged once may be whole the next time. What a kernel lacks by its configuration it
    /// will always lack, so the profile is kept with the warning that says so.
    pub(crate) fn store(&self, memory: &GuestMemory, image: &KernelImage, made: Made) -> Option<Saving> {
        let place = self.place.as_ref()?;
        if made.damaged || !made.has_kallsyms() || made.profile.build_id.is_none() {
            return None;
        }
        let directory = place.directory.try_clone().ok()?;
        let path = place.path.clone();
        let (memory, image) = (memory.clone(), image.clone());
        let (now, wait) = mpsc::channel();
        let save = move || {
            let _ = wait.recv_timeout(DELAY);
            let bytes = ImageBytes::of(&memory, &image);
            let Some(file) = format::encode(&made, &bytes) else {
                return;
            };
            if let Err(source) = directory::write(&directory, &file.name, file.parts()) {
                let error = CacheError::Io {
                    path,
                    what: "keep a profile",
                    source,
                };
                tracing::warn!("{error}");
            }
            directory::evict(&directory, MAX_FILES, MAX_PER_BUILD);
        };
        let thread = std::thread::Builder::new()
            .name("profile-cache".to_owned())
            .spawn(save)
            .ok()?;
        Some(Saving {
            now: Some(now),
            thread: Some(thread),
        })
    }
}

/// How long a profile that was just read is left alone before it is written.
const DELAY: Duration = Duration::from_millis(500);

/// A profile being written to the cache. Dropping it waits until it is there.
#[derive(Debug)]
pub struct Saving {
    /// Ends the delay when dropped.
    now: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.now = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported already, and costs only the file.
            let _ = thread.join();
        }
    }
}

fn load(place: &Place, name: &str, memory: &GuestMemory, image: &KernelImage) -> Result<Profile, String> {
    let file = directory::map(&place.directory, name)?;
    let entry = Entry::parse(&file)?;
    let bytes = ImageBytes::of(memory, image);
    // Cheap tests first.
    if entry.image_len != bytes.len() {
        return Err("the image has another size".to_owned());
    }
    let text_start = match entry.boot_params_at {
        Some(at) => link_time_text(&bytes, at).unwrap_or(image.link_time(image.text)),
        None => image.link_time(image.text),
    };
    if text_start != entry.text_start {
        return Err("the image is linked to another address".to_owned());
    }
    if let Some((at, value)) = entry.relative_base {
        let slide = image.text.0.wrapping_sub(text_start);
        let here = bytes
            .read(at, 8)
            .and_then(|b| Some(u64::from_le_bytes(b.as_ref().try_into().ok()?)));
        if here.map(|b| b.wrapping_sub(slide)) != Some(value) {
            return Err("kallsyms has another base".to_owned());
        }
    }
    if !entry.is_bound() {
        return Err("it does not hold what its profile was made from".to_owned());
    }
    // By this thread alone, as all on the way of a run that finds its profile here: threads take longer to come into being
    // than this takes, and most of all where something else has use for the processors, as the guest has.
    if !entry.is_intact() {
        return Err("the file is damaged".to_owned());
    }
    if !same_sources(&entry, memory, image) {
        return Err("the guest's symbols or types are not those of the file".to_owned());
    }
    let types = match &entry.btf {
        Some(btf) => {
            Types::from_parts(btf.clone(), entry.types_index.clone(), None).map_err(|e| e.to_string())?
        }
        // Nothing in the file says that the guest has none, and one that has some must not lose them.
        None if types_in(&bytes).is_some() => return Err("the guest has types, and the file none".to_owned()),
        None => no_types(),
    };
    let symbols = SymbolTable::from_bytes(entry.symbols.clone()).map_err(|e| e.to_string())?;
    let mut profile = Profile::new(
        Some(entry.build_id),
        entry.banner,
        symbols,
        types,
        ProfileSource::Cache,
    );
    profile.text_start = text_start;
    profile.warnings = entry.warnings;
    Ok(profile)
}

/// Whether the guest has all source bytes where the file has them from. They are compared, not their digests: nothing is
/// faster, and nothing is left to be believed.
fn same_sources(entry: &Entry, memory: &GuestMemory, image: &KernelImage) -> bool {
    let mut scratch = Vec::new();
    entry.sources.iter().all(|(at, want)| {
        let len = want.len() as u64;
        let inside = at.checked_add(len).is_some_and(|end| end <= image.len);
        inside
            && is_at(
                memory,
                image.phys.wrapping_add(*at),
                want.as_slice(),
                &mut scratch,
            )
    })
}

/// Whether `want` is at `gpa`.
fn is_at(memory: &GuestMemory, gpa: Gpa, want: &[u8], scratch: &mut Vec<u8>) -> bool {
    if let Some(here) = memory.frozen(gpa, want.len()) {
        return here == want;
    }
    // In bites that stay in the second cache level, and are long enough for a system call each not to count.
    const BITE: usize = 256 << 10;
    let most = want.len().min(BITE);
    if scratch.len() < most {
        scratch.resize(most, 0);
    }
    want.chunks(BITE).enumerate().all(|(i, want)| {
        let Some(here) = scratch.get_mut(..want.len()) else {
            return false;
        };
        memory
            .read_once(gpa.wrapping_add((i * BITE) as u64), here)
            .is_ok()
            && *here == *want
    })
}
