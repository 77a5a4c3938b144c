//! The places in a module's code that its file says the kernel patches.

use rustc_hash::FxHashMap;

use super::{Placed, Section};

/// What the names of static calls' trampolines begin with (include/linux/static_call_types.h).
pub(super) const TRAMPOLINE: &str = "__SCT__";

/// Size of `struct alt_instr` of this kernel, and where it has the two lengths (arch/x86/include/asm/alternative.h).
#[derive(Clone, Copy, Debug)]
pub struct AlternativeLayout {
    /// Bytes of an entry.
    pub size: usize,
    /// Offset of the byte `instrlen`.
    pub length: usize,
    /// Offset of the byte `replacementlen`.
    pub replacement_length: usize,
}

/// A place that the kernel patches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Site {
    /// Its address.
    pub at: u64,
    /// What the kernel does there.
    pub kind: SiteKind,
}

/// What the kernel does at a place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SiteKind {
    /// A LOCK prefix, which one processor alone does not need (`.smp_locks`).
    Lock,
    /// An ENDBR64 of a function that nobody calls through a pointer (`.ibt_endbr_seal`).
    Endbr,
    /// A return (`.return_sites`).
    Return,
    /// A call or jump through a register (`.retpoline_sites`).
    Indirect,
    /// A call that may be counted (`.call_sites`).
    Call,
    /// A call of paravirtualisation, of so many bytes (`.parainstructions`).
    Paravirtual(usize),
    /// A static key: nothing, or a jump there (`__jump_table`).
    Key(u64),
    /// A call to where a static call leads now (`.static_call_sites`).
    StaticCall,
    /// A static call's trampoline.
    Trampoline,
    /// The begin of a function that may be traced (`__mcount_loc`).
    Traced,
    /// Instructions, of so many bytes, for which others are taken on some processors (`.altinstructions`).
    Alternative {
        /// Bytes.
        length: usize,
        /// Where the others lie.
        replacement: u64,
        /// Their bytes.
        replacement_length: usize,
    },
}

impl Placed<'_> {
    /// All of them. `alternatives` is the layout of their entries, where it is known.
    pub fn sites(&self, alternatives: Option<AlternativeLayout>) -> Vec<Site> {
        let mut sites = Vec::new();
        for section in &self.file.sections {
            let references = self.references(section);
            let table = Table { section, references };
            let all = |kind: SiteKind| table.all(kind);
            match section.name.as_str() {
                ".smp_locks" => sites.extend(all(SiteKind::Lock)),
                ".ibt_endbr_seal" => sites.extend(all(SiteKind::Endbr)),
                ".return_sites" => sites.extend(all(SiteKind::Return)),
                ".retpoline_sites" => sites.extend(all(SiteKind::Indirect)),
                ".call_sites" => sites.extend(all(SiteKind::Call)),
                "__mcount_loc" => sites.extend(all(SiteKind::Traced)),
                // `struct static_call_site`: where, and which.
                ".static_call_sites" => sites.extend(table.entries(8, |_, at| {
                    let at = at(0)?;
                    Some(Site {
                        at,
                        kind: SiteKind::StaticCall,
                    })
                })),
                // `struct jump_entry`: where, where to, which key.
                "__jump_table" => sites.extend(table.entries(16, |_, at| {
                    Some(Site {
                        at: at(0)?,
                        kind: SiteKind::Key(at(4)?),
                    })
                })),
                // `struct paravirt_patch_site` (up to 6.7): where, which, how long.
                ".parainstructions" => sites.extend(table.entries(16, |bytes, at| {
                    Some(Site {
                        at: at(0)?,
                        kind: SiteKind::Paravirtual(usize::from(*bytes.get(9)?)),
                    })
                })),
                ".altinstructions" => {
                    let Some(layout) = alternatives else { continue };
                    sites.extend(table.entries(layout.size, |bytes, at| {
                        let replacement_length = usize::from(*bytes.get(layout.replacement_length)?);
                        let kind = SiteKind::Alternative {
                            length: usize::from(*bytes.get(layout.length)?),
                            replacement: at(4).unwrap_or(0),
                            replacement_length,
                        };
                        Some(Site { at: at(0)?, kind })
                    }));
                }
                _ => {}
            }
        }
        sites.extend(self.named(TRAMPOLINE).map(|at| Site {
            at,
            kind: SiteKind::Trampoline,
        }));
        sites
    }
}

struct Table<'f> {
    section: &'f Section,
    references: FxHashMap<usize, u64>,
}

impl Table<'_> {
    /// A table of nothing but references.
    fn all(&self, kind: SiteKind) -> impl Iterator<Item = Site> {
        self.references.values().map(move |at| Site {
            at: *at,
            kind: kind.clone(),
        })
    }

    /// A table of entries of this size; `read` is given an entry's bytes, and what is referred to at an offset in it.
    fn entries(
        &self,
        size: usize,
        read: impl Fn(&[u8], &dyn Fn(usize) -> Option<u64>) -> Option<Site>,
    ) -> Vec<Site> {
        let size = size.max(4);
        // The last entry may not be filled up.
        let entries = self.section.bytes.chunks(size).enumerate();
        entries
            .filter_map(|(index, bytes)| {
                read(bytes, &|offset| {
                    self.references.get(&(index * size + offset)).copied()
                })
            })
            .collect()
    }
}
