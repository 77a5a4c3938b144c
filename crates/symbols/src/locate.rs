//! From a guest's memory to its kernel and profile in one step, by way of the cache.

use std::path::{Path, PathBuf};

use vmsight_arch::paging;
use vmsight_arch::{Dtb, Gva};
use vmsight_memory::GuestMemory;

use crate::cache::{Cache, Saving};
use crate::import::{self, Checked, ImportError, WrongFile};
use crate::kernel::{self, FindError, Found, Hints, KernelImage};
use crate::profile::{self, Profile, ProfileError, ProfileSource, no_types};
use crate::table::SymbolTable;

/// The kernel that runs in a guest, and its profile.
#[derive(Debug)]
pub struct Located {
    /// The kernel, with what the profile says about it put in: the exact slide, banner and build-id.
    pub image: KernelImage,
    /// All candidates, as they were found.
    pub found: Found,
    /// Its symbols and types.
    pub profile: Profile,
    /// The profile being written to the cache, if it was not there. Dropping this waits for the disk, so keep it until
    /// everything else is done.
    pub saving: Option<Saving>,
}

/// Why there is no kernel or no profile.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// No kernel.
    #[error(transparent)]
    Find(#[from] FindError),
    /// A kernel, but nothing can be read of it.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The symbol file cannot be read.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The symbol file is another kernel's.
    #[error(transparent)]
    WrongFile(#[from] WrongFile),
    /// The symbol file does not say where the image begins, and nothing else says how far KASLR has moved it.
    #[error(
        "{path} has neither _text nor _stext, and the target's own symbols do not tell where the file's lie: give a \
         complete file"
    )]
    NoText {
        /// The file.
        path: PathBuf,
    },
}

/// Finds the kernel in `memory` and its profile, out of the cache or else out of memory.
///
/// Where nothing can be read of the kernel that was chosen, all of memory is searched for others, and those are tried:
/// [`Found::why`] and [`Profile::warnings`] say so then.
///
/// # Errors
/// If no kernel can be proven, or of none of those found symbols can be read.
pub fn locate(memory: &GuestMemory, hints: &Hints, cache: &Cache) -> Result<Located, LocateError> {
    let known = cache.known();
    let found = kernel::find_known(memory, hints, hints.thorough, &known)?;
    let read = |image: &KernelImage| {
        if let Some(profile) = cache.load(memory, image) {
            return Ok((profile, None));
        }
        let made = profile::make(memory, image)?;
        let profile = made.profile.clone();
        Ok((profile, cache.store(memory, image, made)))
    };
    let before = (found.image().phys, found.why.clone());
    let (found, (mut profile, saving)) = match first_readable(found, read) {
        Ok(read) => read,
        // A shortcut may have led to what only looks like a kernel.
        Err(error) if !hints.thorough => {
            let mut found = kernel::find_known(memory, hints, true, &known)?;
            found.prefer(before);
            first_readable(found, read).map_err(|_| error)?
        }
        Err(error) => return Err(error.into()),
    };
    profile.warnings.extend(found.warnings.iter().cloned());
    let image = confirm(memory, found.image(), &profile);
    Ok(Located {
        image,
        found,
        profile,
        saving,
    })
}

/// What [`locate`] finds where a look is enough: the kernel lies where kernels lie, and its profile is in the cache. For who has to
/// wait for something else, and does not know yet whether all of the guest's memory lies as he thinks. Nothing is searched for,
/// read out or kept.
pub fn recall(memory: &GuestMemory, cache: &Cache) -> Option<Located> {
    let found = kernel::at_hand(memory, &cache.known())?;
    let mut profile = cache.load(memory, found.image())?;
    profile.warnings.extend(found.warnings.iter().cloned());
    let image = confirm(memory, found.image(), &profile);
    Some(Located {
        image,
        found,
        profile,
        saving: None,
    })
}

/// The first kernel, by preference, of which something can be read; the reason why the chosen one cannot where there is none.
fn first_readable<T>(
    mut found: Found,
    read: impl Fn(&KernelImage) -> Result<T, ProfileError>,
) -> Result<(Found, T), ProfileError> {
    let mut first = None;
    for i in found.by_preference() {
        let Some(image) = found.candidates.get(i) else {
            continue;
        };
        match read(image) {
            Ok(read) => {
                if let Some(error) = first {
                    let error: ProfileError = error;
                    found.choose_instead(i, &error.to_string());
                }
                return Ok((found, read));
            }
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or(ProfileError::NoData {
        release: found.image().release().to_owned(),
        text: found.image().text,
    }))
}

/// Finds the kernel in `memory`, and takes symbols, types or both from the file at `path`; what the file lacks comes out of
/// memory. The cache is not used: a file is given where memory is not trusted, or lacks something.
///
/// # Errors
/// If the file cannot be read or is for another kernel, no kernel can be proven, or there are no symbols in either; if the file's
/// symbols cannot be tied to where the kernel lies ([`LocateError::NoText`]).
pub fn locate_with_file(memory: &GuestMemory, hints: &Hints, path: &Path) -> Result<Located, LocateError> {
    let imported = import::open(path)?;
    let found = kernel::find(memory, hints)?;
    let image = found.image();
    let tied = imported
        .symbols
        .as_ref()
        .is_none_or(|s| import::text_of(s).is_some());
    // Whether memory says where the kernel was linked to.
    let (linked, mut profile) = match profile::make(memory, image) {
        Ok(made) => (made.has_kallsyms(), made.profile),
        // Without symbols in memory those of the file will do.
        Err(error) if imported.symbols.is_some() => {
            let mut profile = Profile::new(
                image.build_id.clone(),
                image.banner.clone(),
                SymbolTable::empty(),
                profile::types_of(memory, image).unwrap_or_else(no_types),
                ProfileSource::Memory,
            );
            profile
                .warnings
                .push(format!("the guest's own symbols could not be read: {error}"));
            (false, profile)
        }
        Err(error) => return Err(error.into()),
    };
    let checked = imported.apply(&mut profile)?;
    if !tied && (!linked || checked == Checked::Unchecked) {
        return Err(LocateError::NoText {
            path: path.to_owned(),
        });
    }
    profile.warnings.extend(found.warnings.iter().cloned());
    let image = confirm(memory, image, &profile);
    Ok(Located {
        image,
        found,
        profile,
        saving: None,
    })
}

/// What the profile knows better than the page tables.
fn confirm(memory: &GuestMemory, image: &KernelImage, profile: &Profile) -> KernelImage {
    let mut image = image.clone();
    image.slide = image.text.0.wrapping_sub(profile.text_start);
    image.banner.clone_from(&profile.banner);
    image.build_id.clone_from(&profile.build_id);
    let top = profile
        .symbols
        .address("init_top_pgt")
        .or_else(|| profile.symbols.address("swapper_pg_dir"));
    let Some(top) = top
        .map(|a| a.wrapping_sub(profile.text_start))
        .filter(|&offset| offset < image.len)
    else {
        return image;
    };
    let by_symbol = Dtb(image.phys.0.wrapping_add(top));
    if by_symbol == image.dtb {
        image.evidence.push("the symbol init_top_pgt agrees".to_owned());
    } else if paging::walk(image.mode, memory, by_symbol, image.text).is_ok_and(|t| t.gpa == image.phys) {
        image.evidence.push(format!(
            "the symbol init_top_pgt says {by_symbol}, not {}, and it maps the kernel",
            image.dtb
        ));
        image.dtb = by_symbol;
    } else {
        let at = Gva(image.text.0.wrapping_add(top));
        image.evidence.push(format!(
            "the symbol init_top_pgt at {at} disagrees, but leads nowhere"
        ));
    }
    image
}
