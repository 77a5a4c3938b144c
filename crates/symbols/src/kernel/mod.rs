//! Finding the running kernel's image in guest memory, and proving it by the guest's own page tables.
//!
//! Strategies go from cheap to dear, and stop at the first that gives exactly one proven image: a page that every running
//! kernel keeps below 1 MiB; the registers, if the caller can get them; at last all of memory. What a strategy gives is only a
//! place to look at: an image counts when its page tables lie in the memory that they map (module `x86`) and a
//! `linux_banner` stands in its read-only data. Nothing is taken from VMCOREINFO, which a guest need not have.
//!
//! After a kexec or a warm reset several kernels can be in memory, all of them consistent. Then all are kept, and the
//! one that is alive is chosen by what only a running kernel has: [`Found::why`] says which.
//!
//! All that lies in memory a guest's root can forge, a whole decoy kernel with its trampoline included. What cannot be forged is
//! where the CPUs go: [`Hints::thorough`] has LSTAR, IDTR and CR3 asked for and demands that they lead to the kernel chosen.

mod alive;
mod bytes;
mod entered;
mod identity;
mod image;
mod x86;

use std::fmt;

use vmsight_arch::{Gpa, Registers};
use vmsight_memory::GuestMemory;

pub(crate) use bytes::ImageBytes;
pub use bytes::Part;
pub(crate) use identity::{BANNER_MAX, Known, banner_at, find_banner, find_build_id};
pub use image::KernelImage;
pub(crate) use image::release_of;

/// What the caller knows or can find out about the guest.
#[derive(Default)]
pub struct Hints {
    /// Asks for the registers of the vCPUs. Called at most once, and only if the cheaper ways leave a doubt: for a running VM it
    /// may mean to stop it for a moment.
    pub registers: Option<Box<dyn Fn() -> Vec<Registers> + Send + Sync>>,
    /// Use every strategy: registers are asked for whatever memory shows, and all of memory is searched, so that dead kernels are
    /// found too and a decoy shows. For whoever does not trust the guest's root; it costs a scan of memory, and for a
    /// running VM a question to its monitor.
    pub thorough: bool,
}

impl Hints {
    /// Hints with registers that are at hand, as in a dump that carries them.
    pub fn with_registers(registers: Vec<Registers>) -> Self {
        Self {
            registers: Some(Box::new(move || registers.clone())),
            thorough: false,
        }
    }
}

impl fmt::Debug for Hints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hints")
            .field("registers", &self.registers.is_some())
            .field("thorough", &self.thorough)
            .finish()
    }
}

/// The kernels found in a guest's memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// All that were proven: dead ones after a kexec or warm reset, too. Never empty.
    pub candidates: Vec<KernelImage>,
    /// Which one runs.
    pub chosen: usize,
    /// Why that one.
    pub why: String,
    /// What looked like a kernel and was not, and why.
    pub rejected: Vec<String>,
    /// Doubts about the choice, a sentence each: to be shown to whoever reads the results.
    pub warnings: Vec<String>,
}

impl Found {
    /// The kernel that runs.
    pub fn image(&self) -> &KernelImage {
        // `find` chooses among what it found.
        &self.candidates[self.chosen.min(self.candidates.len() - 1)]
    }

    /// The numbers of the candidates, the chosen one first.
    pub(crate) fn by_preference(&self) -> Vec<usize> {
        let others = (0..self.candidates.len()).filter(|&i| i != self.chosen);
        std::iter::once(self.chosen).chain(others).collect()
    }

    /// Chooses what an earlier search has chosen, by where the image lies, and why.
    pub(crate) fn prefer(&mut self, (phys, why): (Gpa, String)) {
        if let Some(i) = self.candidates.iter().position(|image| image.phys == phys) {
            (self.chosen, self.why) = (i, why);
        }
    }

    /// Chooses another, since nothing could be read of the chosen one.
    pub(crate) fn choose_instead(&mut self, other: usize, because: &str) {
        let Some(instead) = self.candidates.get(other) else {
            return;
        };
        let doubt = format!(
            "kernel {} at {} was to be looked into ({}), but {because}; instead {} at {} is shown, which may not be running",
            self.image().release(),
            self.image().text,
            self.why,
            instead.release(),
            instead.text,
        );
        self.why.clone_from(&doubt);
        self.warnings.push(doubt);
        self.chosen = other;
    }
}

/// No kernel.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FindError {
    /// No image could be proven.
    #[error("no running Linux kernel could be proven in guest memory; tried {tried}")]
    NotFound {
        /// Each strategy and how it failed.
        tried: String,
    },
}

/// Finds the kernel that runs in `memory`. See the module's description.
///
/// # Errors
/// If no image can be proven, with what was tried and what contradicted.
pub fn find(memory: &GuestMemory, hints: &Hints) -> Result<Found, FindError> {
    find_known(memory, hints, hints.thorough, &[])
}

/// The kernel that the page below 1 MiB leads to, if it is the only one there: [`find`] without what costs more than a look.
pub(crate) fn at_hand(memory: &GuestMemory, known: &[Known]) -> Option<Found> {
    let mut search = Search::new(memory, known);
    let (trampoline, _) = search.run_trampoline();
    (search.proven.len() == 1).then(|| search.choose(&trampoline, &[], &[]))
}

/// [`find`], as thorough as said here, sparing the search for banner and build-id where a kernel is one of `known`.
pub(crate) fn find_known(
    memory: &GuestMemory,
    hints: &Hints,
    thorough: bool,
    known: &[Known],
) -> Result<Found, FindError> {
    let mut search = Search::new(memory, known);
    let (trampoline, mut tried) = search.run_trampoline();
    if search.proven.len() == 1 && !thorough {
        return Ok(search.choose(&trampoline, &[], &[]));
    }
    let registers = hints.registers.as_ref().map(|ask| ask()).unwrap_or_default();
    let by_registers = x86::anchors::by_registers(memory, &registers);
    if registers.is_empty() {
        tried.push_str("; no registers");
    } else {
        let note = search.run("CR3", &by_registers);
        tried = format!("{tried}; {note}");
    }
    if search.proven.is_empty() || thorough {
        let note = search.run(
            "all of memory for a kernel's page tables",
            &x86::anchors::by_scan(memory),
        );
        tried = format!("{tried}; {note}");
    }
    if search.proven.is_empty() {
        for rejected in search.rejected.iter().take(8) {
            tried = format!("{tried}; {rejected}");
        }
        for (gpa, banner) in identity::banners_anywhere(memory) {
            tried =
                format!("{tried}; a banner \"{banner}\" is at {gpa}, but no page tables of its own map it");
        }
        return Err(FindError::NotFound { tried });
    }
    Ok(search.choose(&trampoline, &by_registers, &registers))
}

struct Search<'a> {
    memory: &'a GuestMemory,
    known: &'a [Known],
    /// What has been looked at.
    anchors: Vec<Gpa>,
    /// Images, each with its `level3_kernel_pgt`.
    proven: Vec<(Gpa, KernelImage)>,
    rejected: Vec<String>,
}

/// More candidates than any real guest has are somebody's attempt to keep us busy.
const MAX_ANCHORS: usize = 64;

impl<'a> Search<'a> {
    fn new(memory: &'a GuestMemory, known: &'a [Known]) -> Self {
        Self {
            memory,
            known,
            anchors: Vec::new(),
            proven: Vec::new(),
            rejected: Vec::new(),
        }
    }

    /// The cheapest strategy: what it leads to, and what came of it.
    fn run_trampoline(&mut self) -> (Vec<Gpa>, String) {
        let trampoline = x86::anchors::by_trampoline(self.memory);
        let tried = self.run("the trampoline page below 1 MiB", &trampoline);
        (trampoline, tried)
    }

    /// Tries to prove each anchor that is new. Says what came of it.
    fn run(&mut self, strategy: &str, anchors: &[Gpa]) -> String {
        let before = self.proven.len();
        for &anchor in anchors {
            if self.anchors.contains(&anchor) {
                continue;
            }
            if self.anchors.len() >= MAX_ANCHORS {
                self.rejected
                    .push(format!("{} more places: too many", anchors.len()));
                break;
            }
            self.anchors.push(anchor);
            match self.prove(anchor, strategy) {
                Ok(image) => self.proven.push((anchor, image)),
                Err(why) => {
                    tracing::debug!(%anchor, why, "not a kernel");
                    self.rejected.push(format!("{anchor}: {why}"));
                }
            }
        }
        format!(
            "{strategy} ({} places, {} proven)",
            anchors.len(),
            self.proven.len() - before
        )
    }

    fn prove(&self, level3: Gpa, strategy: &str) -> Result<KernelImage, String> {
        let proven = x86::prove(self.memory, level3)?;
        let bytes = ImageBytes::new(self.memory, proven.phys, proven.len, &proven.segments);
        let identity = identity::of(&bytes, self.known)?;
        let mut evidence = vec![format!("found by {strategy}")];
        evidence.extend(proven.evidence);
        evidence.push(identity.evidence);
        Ok(KernelImage {
            text: proven.text,
            phys: proven.phys,
            len: proven.len,
            slide: proven.text.0.wrapping_sub(x86::DEFAULT_TEXT),
            dtb: proven.dtb,
            mode: proven.mode,
            direct_map: Some(proven.direct_map),
            parts: bytes.parts(),
            banner: identity.banner,
            build_id: identity.build_id,
            evidence,
        })
    }

    /// Which of the proven images runs. There is at least one.
    fn choose(self, trampoline: &[Gpa], by_registers: &[Gpa], registers: &[Registers]) -> Found {
        let position = |anchors: &[Gpa]| {
            anchors
                .iter()
                .find_map(|a| self.proven.iter().position(|(level3, _)| level3 == a))
        };
        let images = || self.proven.iter().map(|(_, image)| image);
        let all: Vec<&KernelImage> = images().collect();
        let entered = entered::by_cpus(self.memory, registers, &all);
        let mut warnings = Vec::new();
        let (chosen, why) = if let Some(first) = entered.first() {
            let others = entered.iter().filter(|e| e.image != first.image);
            warnings.extend(others.map(|e| format!("{}, which is not the kernel shown", e.how)));
            (first.image, first.how.clone())
        } else if self.proven.len() == 1 {
            let why = "the only kernel that could be proven";
            if position(by_registers).is_some() {
                (0, format!("{why}, and CR3 leads to it"))
            } else {
                if registers.iter().any(entered::in_long_mode) {
                    warnings.push(
                        "no CPU's CR3, LSTAR or IDTR leads to the kernel found: another may be running, and this one be \
                         left over or a decoy"
                            .to_owned(),
                    );
                }
                (0, why.to_owned())
            }
        } else if let Some(i) = position(by_registers) {
            (
                i,
                format!(
                    "CR3 leads to it, and to none of the other {}",
                    self.proven.len() - 1
                ),
            )
        } else if let Some(found) = alive::by_clock(self.memory, images()) {
            found
        } else if let Some(i) = position(trampoline) {
            (
                i,
                "the trampoline page below 1 MiB, which a running kernel keeps, is its own".to_owned(),
            )
        } else {
            (0, "nothing tells which of them runs: the first".to_owned())
        };
        let by_cpu = !entered.is_empty() || position(by_registers).is_some();
        if let Some(image) = all.get(chosen).filter(|_| all.len() > 1 && !by_cpu) {
            warnings.push(format!(
                "{} kernels are in memory, and no CPU's registers tell which of them runs; {} at {} is shown: {why}",
                all.len(),
                image.release(),
                image.text,
            ));
        }
        let candidates = self.proven.into_iter().map(|(_, image)| image).collect();
        Found {
            candidates,
            chosen,
            why,
            rejected: self.rejected,
            warnings,
        }
    }
}
