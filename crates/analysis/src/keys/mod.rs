//! Cryptographic keys in a guest's memory, each proven by its own mathematics, with whose memory it is.
//!
//! [`search`] goes over physical memory once. [`owned`] then tells of each key who has it, and reads those that begin at the end
//! of one page and go on in another as their owner sees them. [`kernel_keys`] lists what the kernel keeps for its users,
//! [`volume_keys`] the keys of encrypted disks.

mod aes;
mod crypto;
mod der;
mod follow;
mod keyring;
mod material;
mod openssl;
mod private;
mod schedule;
mod search;
mod shield;
mod volume;

pub use keyring::{KernelKey, kernel_keys};
pub use material::{Curve, EcKey, Material, RsaKey, TlsSecret};
pub use private::Form;
pub use search::{Anchor, Cut, Hit, Search, find_in, search};
pub use volume::{VolumeKey, volume_keys};

use vmsight_arch::Gva;
use vmsight_linux::Kernel;
use vmsight_memory::AddressSpace;

use crate::frames::{Frames, Holder, Owner};

/// A key with those who have it.
#[derive(Clone, Debug)]
pub struct Owned {
    /// The key and its place.
    pub hit: Hit,
    /// Who has the page that it begins in, with `gva` at the key.
    pub holders: Vec<Holder>,
    /// The transform of the kernel's crypto API that it belongs to: `cbc(aes) (cbc-aes-aesni)`.
    pub transform: Option<String>,
    /// Where that transform lies.
    pub transform_at: Option<Gva>,
}

/// Tells whose the keys of a search are, and adds those that lie in pieces and those that a process keeps behind pointers: what
/// an ssh-agent has encrypted, and the secrets of OpenSSL's connections. The strings say what could not be looked at.
pub fn owned(kernel: &Kernel, search: Search) -> (Vec<Owned>, Vec<String>) {
    let places = search.hits.iter().map(|hit| hit.gpa);
    let places = places.chain(search.cuts.iter().map(|cut| cut.gpa));
    let places = places.chain(search.anchors.iter().map(|anchor| anchor.gpa));
    let frames = Frames::find(kernel, places);
    let mut notes = search.notes;
    notes.extend(frames.notes.iter().cloned());
    let pieced = search.cuts.iter().filter_map(|cut| pieces(kernel, &frames, cut));
    let mut all: Vec<Owned> = search
        .hits
        .into_iter()
        .chain(pieced)
        .map(|hit| {
            let mut holders = frames.of(hit.gpa).to_vec();
            for holder in &mut holders {
                holder.gva = holder
                    .gva
                    .map(|gva| gva.wrapping_add(hit.gpa.page_offset() as u64));
            }
            let of_kernel = holders.iter().any(|h| h.owner == Owner::Kernel);
            let schedule = matches!(hit.material, Material::Aes(_));
            let (transform, transform_at) = (of_kernel && schedule)
                .then(|| crypto::transform(kernel, hit.gpa))
                .flatten()
                .unzip();
            Owned {
                hit,
                holders,
                transform,
                transform_at,
            }
        })
        .collect();
    let followed = follow::follow(&frames, &search.anchors, &all, &mut notes);
    all.extend(followed);
    all.sort_by_key(|owned| owned.hit.gpa);
    (all, notes)
}

/// The key that begins where `cut` does, as one of its owners sees it.
fn pieces(kernel: &Kernel, frames: &Frames, cut: &Cut) -> Option<Hit> {
    frames.of(cut.gpa).iter().find_map(|holder| {
        let gva = holder.gva?.wrapping_add(cut.gpa.page_offset() as u64);
        let space = match (holder.owner, holder.pid) {
            (Owner::Process, Some(pid)) => frames.space(pid)?,
            (Owner::Kernel, _) => kernel.space(),
            _ => return None,
        };
        cut.prove(&read_up_to(space, gva, cut.wanted()))
    })
}

/// As much as can be read from `gva` on, at most `len` bytes.
fn read_up_to(space: &AddressSpace, gva: Gva, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let read = match space.read_partial(gva, &mut bytes).into_iter().next() {
        Some((range, Ok(()))) => range.end,
        _ => 0,
    };
    bytes.truncate(read);
    bytes
}
