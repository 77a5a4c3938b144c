//! Keys that a process keeps in structures with pointers: what a search of physical memory can find are the structures, and what
//! they lead to is read as their process sees it.

use std::cell::Cell;
use std::collections::BTreeMap;

use rustc_hash::FxHashSet;
use vmsight_arch::{Gpa, Gva};
use vmsight_memory::AddressSpace;

use super::material::Material;
use super::private::Form;
use super::search::{Anchor, AnchorKind, Hit};
use super::{Owned, openssl, read_up_to, shield};
use crate::frames::{Frames, Holder, Owner};

/// Structures that are followed, each in the memory of everybody who has it. A guest full of made-up ones costs no more.
const MAX_FOLLOWED: usize = 1 << 16;
/// Secrets of TLS that are derived to prove others, some microseconds each.
const MAX_DERIVED: u64 = 1 << 20;
/// Keys that are kept.
const MAX_FOUND: usize = 1 << 12;

/// Notes that are made of single connections.
const MAX_NOTES: usize = 64;

/// The first address that no process has.
const USER_END: u64 = 1 << 56;
/// The lowest that one may have mapped, as distributions have it (`vm.mmap_min_addr`).
const USER_START: u64 = 0x1_0000;

/// Whether this may be a pointer to something that malloc(3) gave, or to a structure of a library's.
pub(super) fn is_user_pointer(word: u64) -> bool {
    (USER_START..USER_END).contains(&word) && word.is_multiple_of(8)
}

/// Keys of AES schedules that one process has.
pub(super) type Keys<'k> = FxHashSet<&'k [u8]>;

/// What may still be spent on deriving.
pub(super) struct Budget(Cell<u64>);

impl Default for Budget {
    fn default() -> Self {
        Self(Cell::new(MAX_DERIVED))
    }
}

impl Budget {
    /// Whether one more may be derived.
    pub(super) fn spend(&self) -> bool {
        let left = self.0.get();
        self.0.set(left.saturating_sub(1));
        left > 0
    }
}

/// Fills a buffer from a process's memory; `None` where not all of it can be read.
type ReadAt<'a> = dyn Fn(Gva, &mut [u8]) -> Option<()> + 'a;
/// As much as there is, at most so many bytes.
type ReadUpTo<'a> = dyn Fn(Gva, usize) -> Vec<u8> + 'a;

/// A process's memory.
pub(super) struct Read<'a> {
    at: &'a ReadAt<'a>,
    up_to: Option<&'a ReadUpTo<'a>>,
}

impl<'a> Read<'a> {
    /// Reads only what is there whole.
    #[cfg(test)]
    pub(super) fn of(at: &'a ReadAt<'a>) -> Self {
        Self { at, up_to: None }
    }

    pub(super) fn bytes(&self, at: Gva, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        (self.at)(at, &mut bytes)?;
        Some(bytes)
    }

    pub(super) fn words<const N: usize>(&self, at: Gva) -> Option<[u64; N]> {
        let bytes = self.bytes(at, N * 8)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Some(words)
    }

    pub(super) fn up_to(&self, at: Gva, len: usize) -> Vec<u8> {
        match self.up_to {
            Some(up_to) => up_to(at, len),
            None => self.bytes(at, len).unwrap_or_default(),
        }
    }
}

/// The keys that `anchors` lead to in the memory of those who have them. `known` are keys that were found already.
pub(super) fn follow(
    frames: &Frames,
    anchors: &[Anchor],
    known: &[Owned],
    notes: &mut Vec<String>,
) -> Vec<Owned> {
    let mut schedules: BTreeMap<i32, Keys<'_>> = BTreeMap::new();
    for owned in known {
        if let Material::Aes(key) = &owned.hit.material {
            for pid in owned.holders.iter().filter_map(|holder| holder.pid) {
                schedules.entry(pid).or_default().insert(key);
            }
        }
    }
    let (none, budget) = (Keys::default(), Budget::default());
    let mut found: Vec<Owned> = Vec::new();
    let pairs = anchors
        .iter()
        .flat_map(|anchor| frames.of(anchor.gpa).iter().map(move |holder| (anchor, holder)));
    for (count, (anchor, holder)) in pairs.enumerate() {
        if count >= MAX_FOLLOWED || found.len() >= MAX_FOUND {
            notes.push("too many structures that may lead to keys of OpenSSH and OpenSSL: the rest was not looked at".to_owned());
            break;
        }
        let (Owner::Process, Some(pid), Some(page)) = (holder.owner, holder.pid, holder.gva) else {
            continue;
        };
        let Some(space) = frames.space(pid) else { continue };
        let at = page.wrapping_add(anchor.gpa.page_offset() as u64);
        let keys = schedules.get(&pid).unwrap_or(&none);
        for reached in reach(space, anchor.kind, at, keys, &budget, notes) {
            add(&mut found, space, holder, reached);
        }
    }
    if !budget.spend() {
        notes.push(format!(
            "more than {MAX_DERIVED} secrets would have to be derived: some TLS connections were not proven"
        ));
    }
    found
}

type Reached = (Gva, usize, Form, Material);

fn reach(
    space: &AddressSpace,
    kind: AnchorKind,
    at: Gva,
    keys: &Keys<'_>,
    budget: &Budget,
    notes: &mut Vec<String>,
) -> Vec<Reached> {
    let read = Read {
        at: &|gva, to| space.read(gva, to).ok(),
        up_to: Some(&|gva, len| read_up_to(space, gva, len)),
    };
    match kind {
        AnchorKind::Shielded => shield::key(&read, at.wrapping_sub(shield::BEFORE))
            .map(|(gva, len, material)| (gva, len, Form::Shielded, material))
            .into_iter()
            .collect(),
        AnchorKind::Connection => match openssl::secrets(&read, at, keys, budget) {
            Ok(secrets) => secrets
                .into_iter()
                .map(|(gva, len, secret)| (gva, len, Form::OpenSsl, Material::Tls(secret)))
                .collect(),
            Err(note) => {
                if notes.len() < MAX_NOTES {
                    notes.push(note);
                }
                Vec::new()
            }
        },
    }
}

/// Notes a key once for each place in physical memory, with all who have that.
fn add(found: &mut Vec<Owned>, space: &AddressSpace, holder: &Holder, reached: Reached) {
    let (gva, len, form, material) = reached;
    let Ok(translation) = space.translate(gva) else {
        return;
    };
    let (gpa, holder): (Gpa, _) = (
        translation.gpa,
        Holder {
            gva: Some(gva),
            ..holder.clone()
        },
    );
    let same = found
        .iter_mut()
        .find(|owned| owned.hit.gpa == gpa && owned.hit.material == material);
    match same {
        Some(owned) if owned.holders.contains(&holder) => {}
        Some(owned) => owned.holders.push(holder),
        None => found.push(Owned {
            hit: Hit {
                gpa,
                len,
                form,
                material,
            },
            holders: vec![holder],
            transform: None,
            transform_at: None,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_ends() {
        let budget = Budget(Cell::new(2));
        assert_eq!([(); 4].map(|()| budget.spend()), [true, true, false, false]);
    }
}
