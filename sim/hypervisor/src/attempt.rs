//! Writes of the guest to pages that hold hooks.
//!
//! The guest patches its own text: static keys, tracing. It may, but for the bytes of the hooks. What a write is to change
//! is not known before it is done, so it is done to a copy: one instruction runs in extended page tables in which the page
//! is a copy of itself. Then what changed is taken over, but for the hooks' bytes. The page itself never becomes writable.

use crate::PAGE;
use crate::ept::{ENTRIES, Ept, Exhausted, Pool};

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const IS_LARGE: u64 = 1 << 7;
/// Read, write, execute; of a page also write-back.
const TABLE: u64 = 7;
const COPY: u64 = 7 | 6 << 3;
/// An instruction writes to two pages where what it writes crosses from one to the other.
const PAGES: usize = 2;
/// A root, and three more tables on the way to each page.
const TABLES: usize = 1 + 3 * PAGES;

/// The tables and the copies, which serve one write after the other.
#[derive(Debug)]
pub struct Attempt {
    tables: [u64; TABLES],
    copies: [u64; PAGES],
    used: usize,
    open: [Option<u64>; PAGES],
}

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    /// Bytes that were changed.
    pub taken: u32,
    /// Bytes that would have been and are a hook's.
    pub refused: u32,
}

impl Attempt {
    /// Allocates what all attempts need.
    pub fn new(pool: &mut Pool<'_>) -> Result<Self, Exhausted> {
        let mut attempt = Self {
            tables: [0; TABLES],
            copies: [0; PAGES],
            used: 0,
            open: [None; PAGES],
        };
        for page in attempt.tables.iter_mut().chain(&mut attempt.copies) {
            *page = pool.allocate()?;
        }
        Ok(attempt)
    }

    /// The pages of which there are copies now.
    pub fn open(&self) -> impl Iterator<Item = u64> {
        self.open.iter().flatten().copied()
    }

    /// Makes a copy of the page at `gpa`, a 4 KiB page of `guest` that holds `content`. Gives the EPT pointer under which it
    /// is in the page's place; `None` where two pages have copies already.
    pub fn begin(
        &mut self,
        pool: &mut Pool<'_>,
        guest: Ept,
        gpa: u64,
        content: &[u64; ENTRIES],
    ) -> Option<u64> {
        let free = self.open.iter().position(Option::is_none)?;
        let copy = *self.copies.get(free)?;
        *pool.page(copy)? = *content;
        let root = *self.tables.first()?;
        if self.open().next().is_none() {
            *pool.page(root)? = *pool.page(guest.pointer() & ADDRESS)?;
            self.used = 1;
        }
        let mut table = root;
        for shift in [39, 30, 21] {
            let at = (gpa >> shift & 511) as usize;
            let entry = *pool.page(table)?.get(at)?;
            if entry & IS_LARGE != 0 || entry == 0 {
                return None;
            }
            let mut next = entry & ADDRESS;
            if !self.tables.get(..self.used)?.contains(&next) {
                let content = *pool.page(next)?;
                next = *self.tables.get(self.used)?;
                self.used += 1;
                *pool.page(next)? = content;
                *pool.page(table)?.get_mut(at)? = next | TABLE;
            }
            table = next;
        }
        *pool.page(table)?.get_mut((gpa >> 12 & 511) as usize)? = copy | COPY;
        *self.open.get_mut(free)? = Some(gpa & !(PAGE - 1));
        Some(guest.pointer() & !ADDRESS | root)
    }

    /// Takes over what the write changed on the page at `gpa`, whose content is `page`. `is_hook` says of an offset whether
    /// a hook's byte is there.
    pub fn take(
        &self,
        pool: &mut Pool<'_>,
        gpa: u64,
        page: &mut [u64; ENTRIES],
        is_hook: impl Fn(usize) -> bool,
    ) -> Changes {
        let mut changes = Changes::default();
        let copy = self.open.iter().position(|&open| open == Some(gpa));
        let Some(copy) = copy.and_then(|n| pool.page(*self.copies.get(n)?)) else {
            return changes;
        };
        for (n, (to, &from)) in page.iter_mut().zip(copy.iter()).enumerate() {
            if *to == from {
                continue;
            }
            let mut bytes = to.to_le_bytes();
            for (m, (to, from)) in bytes.iter_mut().zip(from.to_le_bytes()).enumerate() {
                if *to == from {
                    continue;
                }
                if is_hook(n * 8 + m) {
                    changes.refused += 1;
                } else {
                    *to = from;
                    changes.taken += 1;
                }
            }
            *to = u64::from_le_bytes(bytes);
        }
        changes
    }

    /// Forgets the copies.
    pub fn end(&mut self) {
        self.open = [None; PAGES];
    }
}

/// Whether code begins with a plain store: MOV to memory, MOVS or STOS. Nothing else is tried: an instruction that loads a
/// segment or flags, or is more than one step, could go on where nobody looks.
pub fn is_store(code: &[u8]) -> bool {
    let opcode = code
        .iter()
        .find(|byte| !matches!(byte, 0x66 | 0xf2 | 0xf3 | 0x40..=0x4f));
    matches!(
        opcode,
        Some(0x88 | 0x89 | 0xa4 | 0xa5 | 0xaa | 0xab | 0xc6 | 0xc7)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LARGE;
    use crate::ept::{MemoryType, Permissions, Table};

    const BASE: u64 = 0x800_0000;
    const TEXT: u64 = 0x20_1000;

    fn with(test: impl FnOnce(&mut Pool<'_>, Ept, Attempt)) {
        let mut tables = std::vec![Table::EMPTY; 64];
        let mut pool = Pool::new(BASE, &mut tables);
        let guest = Ept::new(&mut pool).unwrap();
        for gpa in (0..16 << 20).step_by(LARGE as usize) {
            guest
                .map_large(&mut pool, gpa, Permissions::ALL, MemoryType::WriteBack)
                .unwrap();
        }
        for gpa in [TEXT, TEXT + PAGE, 0x3f_f000, 0x40_0000, 0x60_0000] {
            let (r_x, kind) = (Permissions::READ_EXECUTE, MemoryType::WriteBack);
            guest.map(&mut pool, gpa, gpa, r_x, kind).unwrap();
        }
        let attempt = Attempt::new(&mut pool).unwrap();
        test(&mut pool, guest, attempt);
    }

    /// Where an EPT pointer's tables lead.
    fn look(pool: &mut Pool<'_>, pointer: u64, gpa: u64) -> u64 {
        let mut table = pointer & ADDRESS;
        for shift in [39, 30, 21, 12] {
            let entry = pool.page(table).unwrap()[(gpa >> shift & 511) as usize];
            if shift == 12 || entry & IS_LARGE != 0 {
                return entry;
            }
            table = entry & ADDRESS;
        }
        0
    }

    #[test]
    fn one_page_is_a_copy_and_all_others_are_themselves() {
        with(|pool, guest, mut attempt| {
            let pointer = attempt.begin(pool, guest, TEXT, &[0x90; 512]).unwrap();
            assert_ne!(pointer, guest.pointer());
            assert_eq!(pointer & 0xfff, guest.pointer() & 0xfff);
            assert_eq!(look(pool, pointer, TEXT), attempt.copies[0] | COPY);
            for gpa in [0, TEXT - PAGE, TEXT + PAGE, 0x40_0000, 0x80_0000] {
                assert_eq!(
                    look(pool, pointer, gpa),
                    look(pool, guest.pointer(), gpa),
                    "{gpa:#x}"
                );
            }
            // In the guest's own tables nothing has changed.
            let own = guest.translate(pool, TEXT);
            assert_eq!(own, Some((TEXT, Permissions::READ_EXECUTE)));
        });
    }

    #[test]
    fn two_pages_beside_each_other_are_copies() {
        // In one table, and in two.
        for (first, second) in [(TEXT, TEXT + PAGE), (0x3f_f000, 0x40_0000)] {
            with(|pool, guest, mut attempt| {
                let pointer = attempt.begin(pool, guest, first, &[1; 512]).unwrap();
                assert_eq!(attempt.begin(pool, guest, second, &[2; 512]), Some(pointer));
                for (gpa, word) in [(first, 1), (second, 2)] {
                    let copy = look(pool, pointer, gpa) & ADDRESS;
                    assert_eq!(pool.page(copy).unwrap()[0], word);
                }
                assert_eq!(attempt.begin(pool, guest, 0x60_0000, &[3; 512]), None);
                attempt.end();
                assert_eq!(attempt.open().count(), 0);
                let pointer = attempt.begin(pool, guest, 0x60_0000, &[3; 512]).unwrap();
                assert_eq!(look(pool, pointer, first), look(pool, guest.pointer(), first));
            });
        }
    }

    #[test]
    fn all_is_taken_over_but_what_is_a_hooks() {
        with(|pool, guest, mut attempt| {
            let mut page = [0u64; 512];
            attempt.begin(pool, guest, TEXT, &page).unwrap();
            let copy = attempt.copies[0];
            pool.page(copy).unwrap()[1] = 0x8877_6655_4433_2211;
            pool.page(copy).unwrap()[511] = 1;
            let changes = attempt.take(pool, TEXT, &mut page, |offset| (12..17).contains(&offset));
            assert_eq!(page[1], 0x4433_2211);
            assert_eq!(page[511], 1);
            assert_eq!(changes, Changes { taken: 5, refused: 4 });
            let none = attempt.take(pool, TEXT + PAGE, &mut page, |_| true);
            assert_eq!(none, Changes::default());
        });
    }

    #[test]
    fn plain_stores_alone_are_tried() {
        for code in [
            &[0xf3, 0xa4][..],               // rep movsb
            &[0xf3, 0x48, 0xa5],             // rep movsq
            &[0x88, 0x07],                   // mov [rdi], al
            &[0x66, 0x89, 0x07],             // mov [rdi], ax
            &[0x4c, 0x89, 0x07],             // mov [rdi], r8
            &[0x48, 0xc7, 0x07, 0, 0, 0, 0], // mov qword ptr [rdi], 0
            &[0x48, 0xab],                   // stosq
        ] {
            assert!(is_store(code), "{code:x?}");
        }
        for code in [
            &[][..],
            &[0x66],
            &[0xcd, 0x80],             // int 0x80
            &[0x8e, 0xd0],             // mov ss, eax
            &[0x9c],                   // pushfq
            &[0x48, 0xcf],             // iretq
            &[0x0f, 0x01, 0xd4],       // vmfunc
            &[0xff, 0x37],             // push [rdi]
            &[0x65, 0x48, 0x89, 0x07], // mov gs:[rdi], rax
        ] {
            assert!(!is_store(code), "{code:x?}");
        }
    }

    #[test]
    fn a_page_that_is_not_there_has_no_copy() {
        with(|pool, guest, mut attempt| {
            assert_eq!(attempt.begin(pool, guest, 0, &[0; 512]), None);
            assert_eq!(attempt.begin(pool, guest, 1 << 40, &[0; 512]), None);
        });
    }
}
