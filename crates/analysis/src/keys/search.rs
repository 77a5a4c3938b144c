//! The pass over all of memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmsight_arch::Gpa;
use vmsight_memory::{GuestMemory, ScanOptions};

use super::aes::{self, SCHEDULES, Schedule};
use super::material::Material;
use super::private::{Finders, Form, LONGEST, Lead};
use super::{openssl, shield};

const PAGE: usize = 4096;
/// Keys that one search keeps. A guest full of made-up keys costs no more than this.
const MAX_HITS: u64 = 1 << 16;
/// Keys that may go on in another page.
const MAX_CUTS: u64 = 1 << 16;
/// Structures of processes that may lead to keys.
const MAX_ANCHORS: u64 = 1 << 16;
/// Proofs that cost a multiplication on a curve, some tenths of a millisecond each.
const MAX_PROOFS: u64 = 1 << 16;

/// A key that lies in physical memory in one piece.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hit {
    /// Its first byte.
    pub gpa: Gpa,
    /// Bytes it takes.
    pub len: usize,
    /// In what form it lies there.
    pub form: Form,
    /// The key.
    pub material: Material,
}

/// What may be a key that begins at the end of a page and goes on in another one that is not the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Its first byte.
    pub gpa: Gpa,
    kind: CutKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum CutKind {
    Schedule(Schedule),
    Private(Lead),
}

impl Cut {
    /// Bytes to read from its first one on.
    pub(super) fn wanted(&self) -> usize {
        match self.kind {
            CutKind::Schedule(schedule) => schedule.len(),
            CutKind::Private(_) => LONGEST,
        }
    }

    /// The key, read as its owner sees it.
    pub(super) fn prove(&self, bytes: &[u8]) -> Option<Hit> {
        match self.kind {
            CutKind::Schedule(schedule) => schedule_at(schedule, self.gpa, bytes),
            CutKind::Private(lead) => lead.prove(bytes, &[]).map(|proven| Hit {
                gpa: self.gpa,
                len: proven.len,
                form: proven.form,
                material: proven.material,
            }),
        }
    }
}

/// What may be a structure of a process's that leads to keys by pointers: only that process's page tables tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Anchor {
    /// The word by which it was found.
    pub gpa: Gpa,
    pub(super) kind: AnchorKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AnchorKind {
    /// A key that OpenSSH has encrypted: the last of four words.
    Shielded,
    /// A TLS connection of OpenSSL's: its first word.
    Connection,
}

/// What a search has found.
#[derive(Debug, Default)]
pub struct Search {
    /// Keys, by rising address.
    pub hits: Vec<Hit>,
    /// What may be keys in pieces.
    pub cuts: Vec<Cut>,
    /// What may lead to keys.
    pub anchors: Vec<Anchor>,
    /// Bytes that were looked at.
    pub looked_at: u64,
    /// What was not looked at, and why.
    pub notes: Vec<String>,
    /// Whether it was stopped, or the guest ended.
    pub stopped: bool,
}

/// Searches all of a guest's memory. `progress` is told of bytes as they are done, from any thread.
pub fn search(memory: &GuestMemory, stop: &AtomicBool, progress: &(dyn Fn(u64) + Sync)) -> Search {
    let options = ScanOptions {
        overlap: LONGEST,
        ..ScanOptions::default()
    };
    let looker = Looker::new();
    let looked_at = AtomicU64::new(0);
    let scan = memory.scan(&options, stop, |chunk, bytes| {
        let mut found = Vec::new();
        looker.look(bytes, chunk.own, chunk.gpa, &mut found);
        looked_at.fetch_add(chunk.own as u64, Ordering::Relaxed);
        progress(chunk.own as u64);
        found
    });
    let mut out = Search {
        looked_at: looked_at.into_inner(),
        stopped: scan.stopped,
        ..Search::default()
    };
    for found in scan.found {
        match found {
            Found::Hit(hit) => out.hits.push(hit),
            Found::Cut(cut) => out.cuts.push(cut),
            Found::Anchor(anchor) => out.anchors.push(anchor),
        }
    }
    out.hits.sort_by_key(|hit| hit.gpa);
    // What lies inside of a longer form is that form's.
    out.hits
        .dedup_by(|a, b| a.gpa == b.gpa && a.material == b.material);
    if scan.problem_count > 0 {
        let first = scan.problems.first().map(ToString::to_string).unwrap_or_default();
        out.notes.push(format!(
            "{} pieces of memory could not be read, the first: {first}",
            scan.problem_count
        ));
    }
    out.notes.extend(looker.notes());
    out
}

/// All keys that lie in these bytes, with their offsets: the parsers, as a search calls them.
pub fn find_in(bytes: &[u8]) -> Vec<(usize, Form, Material)> {
    let mut found = Vec::new();
    Looker::new().look(bytes, bytes.len(), Gpa(0), &mut found);
    let hit = |found| match found {
        Found::Hit(hit) => Some((usize::try_from(hit.gpa.0).ok()?, hit.form, hit.material)),
        Found::Cut(_) | Found::Anchor(_) => None,
    };
    found.into_iter().filter_map(hit).collect()
}

enum Found {
    Hit(Hit),
    Cut(Cut),
    Anchor(Anchor),
}

struct Looker {
    finders: Finders,
    hits: AtomicU64,
    cuts: AtomicU64,
    anchors: AtomicU64,
    proofs: AtomicU64,
}

impl Looker {
    fn new() -> Self {
        Self {
            finders: Finders::new(),
            hits: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            anchors: AtomicU64::new(0),
            proofs: AtomicU64::new(0),
        }
    }

    fn notes(&self) -> Vec<String> {
        [
            (&self.hits, MAX_HITS, "keys"),
            (&self.cuts, MAX_CUTS, "beginnings of keys at the end of a page"),
            (
                &self.anchors,
                MAX_ANCHORS,
                "structures that may lead to keys of OpenSSH and OpenSSL",
            ),
            (&self.proofs, MAX_PROOFS, "candidates for keys of elliptic curves"),
        ]
        .into_iter()
        .filter(|(count, limit, _)| count.load(Ordering::Relaxed) > *limit)
        .map(|(_, limit, what)| format!("more than {limit} {what}: the rest was not looked at"))
        .collect()
    }

    /// Looks at `bytes`, which lie at `gpa`, for what begins in the first `own` of them.
    fn look(&self, bytes: &[u8], own: usize, gpa: Gpa, found: &mut Vec<Found>) {
        for (start, end) in runs(bytes) {
            let run = bytes.get(start..end).unwrap_or_default();
            aes::candidates(run, &mut |at, key_words| {
                if start + at < own {
                    self.schedule(bytes, start + at, key_words, gpa, found);
                }
            });
            self.finders.leads(run, &mut |at, lead| {
                if start + at < own {
                    self.private(bytes, start + at, lead, gpa, found);
                }
            });
            anchors(run, &mut |at, kind| {
                if start + at < own {
                    self.anchor(gpa.wrapping_add((start + at) as u64), kind, found);
                }
            });
        }
    }

    #[cold]
    fn schedule(&self, bytes: &[u8], at: usize, key_words: usize, gpa: Gpa, found: &mut Vec<Found>) {
        let rest = bytes.get(at..).unwrap_or_default();
        for schedule in SCHEDULES.into_iter().filter(|s| s.key_words == key_words) {
            let here = gpa.wrapping_add(at as u64);
            if let Some(hit) = schedule_at(schedule, here, rest) {
                self.hit(hit, found);
            } else if schedule.begins(up_to_page(rest, here)) {
                self.cut(here, CutKind::Schedule(schedule), found);
            }
        }
    }

    #[cold]
    fn private(&self, bytes: &[u8], at: usize, lead: Lead, gpa: Gpa, found: &mut Vec<Found>) {
        let costly = matches!(lead, Lead::Ec | Lead::Ed25519 | Lead::OpenSsh | Lead::Pem);
        if costly && self.proofs.fetch_add(1, Ordering::Relaxed) >= MAX_PROOFS {
            return;
        }
        let here = gpa.wrapping_add(at as u64);
        let (before, rest) = bytes.split_at_checked(at).unwrap_or_default();
        if let Some(proven) = lead.prove(
            rest,
            before.get(before.len().saturating_sub(32)..).unwrap_or_default(),
        ) {
            let hit = Hit {
                gpa: here,
                len: proven.len,
                form: proven.form,
                material: proven.material,
            };
            return self.hit(hit, found);
        }
        if lead.may_go_on(up_to_page(rest, here)) {
            self.cut(here, CutKind::Private(lead), found);
        }
    }

    fn hit(&self, hit: Hit, found: &mut Vec<Found>) {
        if self.hits.fetch_add(1, Ordering::Relaxed) < MAX_HITS {
            found.push(Found::Hit(hit));
        }
    }

    #[cold]
    fn anchor(&self, gpa: Gpa, kind: AnchorKind, found: &mut Vec<Found>) {
        if self.anchors.fetch_add(1, Ordering::Relaxed) < MAX_ANCHORS {
            found.push(Found::Anchor(Anchor { gpa, kind }));
        }
    }

    fn cut(&self, gpa: Gpa, kind: CutKind, found: &mut Vec<Found>) {
        if self.cuts.fetch_add(1, Ordering::Relaxed) < MAX_CUTS {
            found.push(Found::Cut(Cut { gpa, kind }));
        }
    }
}

fn schedule_at(schedule: Schedule, gpa: Gpa, bytes: &[u8]) -> Option<Hit> {
    let key = schedule.key(bytes)?;
    Some(Hit {
        gpa,
        len: schedule.len(),
        form: match schedule.reversed {
            false => Form::Schedule,
            true => Form::ReversedSchedule,
        },
        material: Material::Aes(key),
    })
}

/// Offsets of what may lead to keys, in bytes that begin with a page. What lies in another page is nobody's yet, and not looked at.
fn anchors(bytes: &[u8], found: &mut dyn FnMut(usize, AnchorKind)) {
    /// Words looked at together.
    const BLOCK: usize = 64;
    let [older, newer] = openssl::VERSIONS;
    // Whether one of a block's words is one of these: a compiler makes vector instructions of it.
    let may_hold = |block: &[[u8; 8]]| {
        block.iter().fold(false, |any, word| {
            let word = u64::from_le_bytes(*word);
            any | (word == older) | (word == newer) | (word == shield::PREKEY)
        })
    };
    for (number, page) in bytes.chunks(PAGE).enumerate() {
        let (words, _) = page.as_chunks::<8>();
        for (block, first) in words.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
            if !may_hold(block) {
                continue;
            }
            let word = |at: usize| words.get(at).map(|word| u64::from_le_bytes(*word));
            for at in first..first + block.len() {
                let kind = match word(at) {
                    Some(shield::PREKEY) => {
                        let before = [at.checked_sub(3), at.checked_sub(2), at.checked_sub(1)];
                        // Where the page begins in between, the structure is taken for one until its process is asked.
                        let known = before.map(|at| at.and_then(word));
                        let [Some(private), Some(length), Some(prekey)] = known else {
                            found(number * PAGE + at * 8, AnchorKind::Shielded);
                            continue;
                        };
                        shield::may_be([private, length, prekey]).then_some(AnchorKind::Shielded)
                    }
                    Some(version) if version == older || version == newer => {
                        let after: Vec<u64> = (at + 1..at + 4).map_while(word).collect();
                        openssl::may_be(&after).then_some(AnchorKind::Connection)
                    }
                    _ => None,
                };
                if let Some(kind) = kind {
                    found(number * PAGE + at * 8, kind);
                }
            }
        }
    }
}

/// The bytes up to the end of the page that they begin in.
fn up_to_page(bytes: &[u8], gpa: Gpa) -> &[u8] {
    bytes
        .get(..bytes.len().min(PAGE - gpa.page_offset()))
        .unwrap_or_default()
}

/// Runs of pages that are not all zero: most of a guest's memory is.
fn runs(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut at = 0;
    for page in bytes.chunks(PAGE) {
        let end = at + page.len();
        if !is_zero(page) {
            match runs.last_mut() {
                Some(last) if last.1 == at => last.1 = end,
                _ => runs.push((at, end)),
            }
        }
        at = end;
    }
    runs
}

fn is_zero(page: &[u8]) -> bool {
    let (lines, rest) = page.as_chunks::<64>();
    // A line at a time: pages that are not zero nearly always show it in the first.
    lines
        .iter()
        .all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::super::aes::tests::expand;
    use super::*;

    fn all(memory: Vec<u8>) -> Search {
        let memory = GuestMemory::from_bytes(vec![(Gpa(0), memory)]).expect("one part");
        search(&memory, &AtomicBool::new(false), &|_| {})
    }

    fn pem() -> Vec<u8> {
        include_bytes!("../../tests/keys/rsa-pkcs1.pem").to_vec()
    }

    #[test]
    fn a_key_is_found_once_wherever_it_lies_in_the_chunks() {
        let key: Vec<u8> = (0..32).collect();
        // Chunks are 1 MiB: in the middle, across a border, right behind it, at the very end.
        for at in [4096, (1 << 20) - 100, 1 << 20, (2 << 20) - 240] {
            let mut memory = vec![0; 2 << 20];
            memory[at..at + 240].copy_from_slice(&expand(&key, false));
            let found = all(memory);
            assert_eq!(found.looked_at, 2 << 20);
            let [hit] = found.hits.as_slice() else {
                panic!("{at}: {found:?}")
            };
            assert_eq!((hit.gpa, hit.len), (Gpa(at as u64), 240));
            assert_eq!(hit.material, Material::Aes(key.clone()));
        }
        for at in [5000, (1 << 20) - 1000, (1 << 20) - 3] {
            let mut memory = vec![0; 2 << 20];
            memory[at..at + pem().len()].copy_from_slice(&pem());
            let found = all(memory);
            assert_eq!(found.hits.len(), 1, "{at}");
            assert_eq!(found.hits[0].gpa, Gpa(at as u64));
        }
    }

    #[test]
    fn what_goes_on_in_another_page_is_kept_for_its_owner_to_prove() {
        let schedule = expand(&[7; 24], true);
        let texts: [(&[u8], usize); 3] = [(&schedule, 64), (&pem(), 700), (b"CLIENT_RANDOM 5f5f", 18)];
        for (bytes, first) in texts {
            // The second half lies in a page of its own that is not the next one.
            let mut memory = vec![0xcc; 0x5000];
            memory[0x2000 - first..0x2000].copy_from_slice(&bytes[..first]);
            memory[0x4000..0x4000 + bytes.len() - first].copy_from_slice(&bytes[first..]);
            let found = all(memory);
            assert!(found.hits.is_empty(), "{found:?}");
            let [cut] = found.cuts.as_slice() else {
                panic!("{:?}", found.cuts)
            };
            assert_eq!(cut.gpa, Gpa((0x2000 - first) as u64));
            assert_eq!(cut.prove(bytes).is_some(), !bytes.starts_with(b"CLIENT"));
            assert!(cut.prove(&bytes[..first]).is_none());
        }
    }

    #[test]
    fn made_up_keys_without_end_cost_no_more_than_the_limit() {
        // Seeds with a public key that is not theirs, as many as fit.
        let fake = [
            &b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..],
            &[9; 32],
            &[0, 0, 0, 64],
            &[8; 32],
            &[9; 32],
        ]
        .concat();
        let memory: Vec<u8> = fake
            .iter()
            .copied()
            .cycle()
            .take(MAX_PROOFS as usize * 123 / 8)
            .collect();
        assert!(all(memory).hits.is_empty());
    }
}
