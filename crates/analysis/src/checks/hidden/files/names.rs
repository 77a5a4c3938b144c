//! Names of files in memory: dentries (include/linux/dcache.h), the table by which a lookup finds them, what their directories
//! have, and what their files say of them.

use std::cell::Cell;

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;
use vmsight_linux::structures::{End, Walk, hlist, list};
use vmsight_linux::{Kernel, LinuxError};
use vmsight_memory::ReadError;

use crate::Findings;
use crate::recover::member::{Member, Structure, read_many};

/// Names that are looked at: some 700 MiB of dentries.
const MAX_NAMES: usize = 4 << 20;
/// Elements of lists that are looked at in all: bounds of each list are none of lists of lists.
const MAX_STEPS: usize = 16 << 20;
/// Chains of the largest table that is believed in: the kernel has one for each 8 KiB of memory.
const MAX_CHAINS: u64 = 1 << 28;
/// Chains whose heads are read at once.
const BATCH: usize = 1 << 10;
/// The bit by which a chain is locked (include/linux/list_bl.h).
const LOCKED: u64 = 1;

/// What one dentry says, and in which views it was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    /// The directory's dentry; its own where it is in none.
    pub(super) parent: Gva,
    /// Its file; null where there is no file of this name.
    pub(super) inode: Gva,
    /// Its `struct super_block`.
    pub(super) block: Gva,
    /// Which chain of the table it belongs to.
    hash: u32,
    next_in_table: Gva,
    /// Counts changes. Odd: it is being changed.
    sequence: u32,
    /// Nobody can take hold of it any more.
    dying: bool,
    pub(super) in_table: bool,
    pub(super) in_directory: bool,
    pub(super) of_inode: bool,
}

impl Name {
    /// Whether it is a file's, in a directory.
    pub(super) fn is_in_use(&self, at: Gva) -> bool {
        !self.inode.is_null() && !self.dying && self.parent != at && !self.parent.is_null()
    }

    /// Whether it was being changed when it was read.
    pub(super) fn is_changing(&self) -> bool {
        self.sequence & 1 == 1
    }

    /// Whether nothing happened to it between two looks.
    pub(super) fn is_same(&self, before: &Name) -> bool {
        let all = |name: &Name| (name.parent, name.inode, name.block, name.hash, name.sequence);
        all(self) == all(before) && !self.dying
    }
}

/// How a directory's dentry leads to those in it.
enum Children {
    /// Up to 6.7, a list.
    List { head: Member, node: Member },
    /// Since 6.8, a chain.
    Chain { first: Member, node: Member },
}

/// The table of names (`dentry_hashtable`, fs/dcache.c).
struct Table {
    chains: Gva,
    /// Bits of a hash that do not choose the chain.
    shift: u32,
}

impl Table {
    fn of(kernel: &Kernel) -> Result<Self, LinuxError> {
        let space = kernel.space();
        let (chains, shift) = (kernel.symbol("dentry_hashtable")?, kernel.symbol("d_hash_shift")?);
        let failed = |at, source| LinuxError::Read {
            what: "the table of names".to_owned(),
            at,
            source,
        };
        Ok(Self {
            chains: space
                .read_u64(chains)
                .map(Gva)
                .map_err(|error| failed(chains, error))?,
            shift: space.read_u32(shift).map_err(|error| failed(shift, error))?,
        })
    }
}

/// Reads names, and keeps those of the table.
pub(super) struct Names<'k> {
    kernel: &'k Kernel,
    table: Table,
    /// Bytes of a dentry.
    size: usize,
    hash: Member,
    next: Member,
    parent: Member,
    inode: Member,
    block: Member,
    count: Member,
    sequence: Member,
    alias: Member,
    children: Children,
    aliases: Member,
    known: FxHashMap<Gva, Name>,
    /// Elements of lists that may still be looked at.
    left: Cell<usize>,
}

impl<'k> Names<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let dentry = Structure::of(kernel, "dentry")?;
        let children = match dentry.find("d_sib") {
            Some(node) => Children::Chain {
                first: dentry.member("d_children")?,
                node,
            },
            None => Children::List {
                head: dentry.member("d_subdirs")?,
                node: dentry.member("d_child")?,
            },
        };
        Ok(Self {
            kernel,
            table: Table::of(kernel)?,
            size: usize::try_from(dentry.size()).unwrap_or(0).min(4096),
            hash: dentry.member("d_name.hash")?,
            next: dentry.member("d_hash.next")?,
            parent: dentry.member("d_parent")?,
            inode: dentry.member("d_inode")?,
            block: dentry.member("d_sb")?,
            count: dentry.member("d_lockref.count")?,
            sequence: dentry.member("d_seq.seqcount.sequence|d_seq.sequence")?,
            alias: dentry.member("d_u.d_alias|d_alias")?,
            children,
            aliases: Structure::of(kernel, "inode")?.member("i_dentry.first")?,
            known: FxHashMap::default(),
            left: Cell::new(MAX_STEPS),
        })
    }

    /// The names that are known so far.
    pub(super) fn known(&self) -> impl Iterator<Item = (Gva, &Name)> {
        self.known.iter().map(|(at, name)| (*at, name))
    }

    /// Whether no list more is gone through.
    pub(super) fn is_exhausted(&self) -> bool {
        self.left.get() == 0
    }

    /// Goes through the whole table.
    pub(super) fn read_table(&mut self, findings: &mut Findings) -> Result<(), LinuxError> {
        let chains = 1u64
            .checked_shl(32u32.saturating_sub(self.table.shift))
            .unwrap_or(0);
        if !(2..=MAX_CHAINS).contains(&chains) || chains * 8 > self.kernel.memory().size() {
            return Err(LinuxError::Implausible {
                what: "the table of names".to_owned(),
                reason: format!("it would have {chains} chains"),
            });
        }
        let mut level = self.heads(chains, findings);
        let (mut unreadable, mut again) = (0usize, 0usize);
        // All chains' first names, then all second ones: reads of different chains need not wait for each other.
        while !level.is_empty() {
            let mut next = Vec::new();
            let mut full = false;
            self.read_many(&level, |known, at, name| match name {
                None => unreadable += 1,
                Some(_) if known.contains_key(&at) => again += 1,
                Some(_) if known.len() >= MAX_NAMES => full = true,
                Some(name) => {
                    if !name.next_in_table.is_null() {
                        next.push(name.next_in_table);
                    }
                    known.insert(
                        at,
                        Name {
                            in_table: true,
                            ..name
                        },
                    );
                }
            });
            if full {
                findings.note(format!(
                    "the table of names: no more looked at after {MAX_NAMES} names"
                ));
                break;
            }
            level = next.into_iter().map(|node| self.of_chain(node)).collect();
        }
        if unreadable + again > 0 {
            findings.note(format!(
                "the table of names: {unreadable} names cannot be read, {again} are in it more than once"
            ));
        }
        Ok(())
    }

    /// The first name of each chain.
    fn heads(&self, chains: u64, findings: &mut Findings) -> Vec<Gva> {
        let mut found = Vec::new();
        let mut bytes = vec![0; BATCH * 8];
        let mut chain = 0;
        while chain < chains {
            let many = (chains - chain).min(BATCH as u64);
            let at = self.table.chains.wrapping_add(chain * 8);
            let part = bytes.get_mut(..many as usize * 8).unwrap_or_default();
            match self.kernel.space().read(at, part) {
                Ok(()) => found.extend(
                    part.as_chunks::<8>()
                        .0
                        .iter()
                        .map(|head| Gva(u64::from_le_bytes(*head) & !LOCKED))
                        .filter(|first| !first.is_null())
                        .map(|first| self.of_chain(first)),
                ),
                Err(error) => findings.note(format!("the table of names at {at}: {error}")),
            }
            chain += many;
        }
        found
    }

    /// The dentry whose link in a chain of the table lies at `node`.
    fn of_chain(&self, node: Gva) -> Gva {
        self.next.container(node)
    }

    /// Reads dentries side by side, and tells of each.
    fn read_many(&mut self, all: &[Gva], mut tell: impl FnMut(&mut FxHashMap<Gva, Name>, Gva, Option<Name>)) {
        let mut known = std::mem::take(&mut self.known);
        read_many(self.kernel.space(), self.size, all, |at, bytes| {
            tell(&mut known, at, bytes.and_then(|bytes| self.of(bytes)));
        });
        self.known = known;
    }

    /// What the bytes of a dentry say.
    fn of(&self, dentry: &[u8]) -> Option<Name> {
        Some(Name {
            parent: Gva(self.parent.of(dentry)?),
            inode: Gva(self.inode.of(dentry)?),
            block: Gva(self.block.of(dentry)?),
            hash: self.hash.of(dentry)? as u32,
            next_in_table: Gva(self.next.of(dentry)?),
            sequence: self.sequence.of(dentry)? as u32,
            dying: (self.count.of(dentry)? as i32) < 0,
            in_table: false,
            in_directory: false,
            of_inode: false,
        })
    }

    /// What the dentry at `at` says now. The views it is in are not known.
    pub(super) fn read(&self, at: Gva) -> Option<Name> {
        let mut bytes = vec![0; self.size];
        self.kernel.space().read(at, &mut bytes).ok()?;
        self.of(&bytes)
    }

    /// The name that is known of a dentry; else what it says now, which is kept.
    pub(super) fn get(&mut self, at: Gva) -> Option<&mut Name> {
        if !self.known.contains_key(&at) {
            if self.known.len() >= MAX_NAMES {
                return None;
            }
            let name = self.read(at)?;
            self.known.insert(at, name);
        }
        self.known.get_mut(&at)
    }

    /// Marks those that the directories of all known names have.
    pub(super) fn read_directories(&mut self, findings: &mut Findings) {
        let used = self.known.iter().filter(|(at, name)| name.is_in_use(**at));
        let directories: FxHashSet<Gva> = used.map(|(_, name)| name.parent).collect();
        for directory in directories {
            let found = self.children(directory);
            findings.end("names in a directory", &found.end);
            for child in found.items {
                let known = self.known.get_mut(&child);
                if let Some(name) = known.filter(|name| name.parent == directory) {
                    name.in_directory = true;
                }
            }
        }
    }

    /// The dentries that a directory's dentry has.
    fn children(&self, directory: Gva) -> Walk {
        let (space, limit) = (self.kernel.space(), self.left.get().min(MAX_NAMES));
        let (mut walk, node) = match &self.children {
            Children::List { head, node } => (list::walk(space, head.at(directory), limit).walk, node),
            Children::Chain { first, node } => match first.pointer(space, directory) {
                Ok(first) => (hlist::walk_next(space, first, 0, limit), node),
                Err(error) => return unreadable(directory, error),
            },
        };
        self.took(walk.items.len());
        for item in &mut walk.items {
            *item = node.container(*item);
        }
        walk
    }

    /// The dentries that a file says are its names.
    pub(super) fn of_inode(&self, inode: Gva) -> Walk {
        let space = self.kernel.space();
        match self.aliases.pointer(space, inode) {
            Ok(first) => self.aliases_from(first),
            Err(error) => unreadable(inode, error),
        }
    }

    /// The same, where the first link was read.
    pub(super) fn aliases_from(&self, first: Gva) -> Walk {
        let limit = self.left.get().min(MAX_NAMES);
        let mut walk = hlist::walk_next(self.kernel.space(), first, 0, limit);
        self.took(walk.items.len());
        for item in &mut walk.items {
            *item = self.alias.container(*item);
        }
        walk
    }

    fn took(&self, steps: usize) {
        self.left.set(self.left.get().saturating_sub(steps + 1));
    }

    /// Whether a lookup of the name finds this dentry. `None` where that cannot be told.
    pub(super) fn is_in_table(&self, at: Gva, name: &Name) -> Option<bool> {
        let space = self.kernel.space();
        let chain = u64::from(name.hash.checked_shr(self.table.shift).unwrap_or(0));
        let first = space.read_u64(self.table.chains.wrapping_add(chain * 8)).ok()? & !LOCKED;
        let limit = self.left.get().min(MAX_NAMES);
        let walk = hlist::walk_next(space, Gva(first), 0, limit);
        self.took(walk.items.len());
        self.answer(walk, self.next.at(at))
    }

    /// Whether its directory has it.
    pub(super) fn is_in_directory(&self, at: Gva, name: &Name) -> Option<bool> {
        self.answer(self.children(name.parent), at)
    }

    /// Whether its file says that this is a name of it.
    pub(super) fn is_of_inode(&self, at: Gva, name: &Name) -> Option<bool> {
        self.answer(self.of_inode(name.inode), at)
    }

    /// What is not found in a list that ends somewhere else may be behind.
    fn answer(&self, walk: Walk, what: Gva) -> Option<bool> {
        let found = walk.items.contains(&what);
        (found || walk.end.is_complete()).then_some(found)
    }
}

/// A list of which not even the head can be read.
fn unreadable(at: Gva, error: ReadError) -> Walk {
    Walk {
        items: Vec::new(),
        end: End::Unreadable { at, error },
    }
}
