//! The views of the gate and of the monitor: their page tables, and the extended page tables under them.
//!
//! In the view of the gate one page of tables serves as all levels, and is what every guest-physical page is but for the
//! gate and the list of EPT pointers. Whatever CR3 says, the walk begins in that page, and wherever its entries lead, it
//! goes on there: three virtual pages exist, and no attacker's table is ever read.
//!
//! Each processor has a gate, a list and the monitor's data of its own, under the same guest-physical addresses, those of
//! the first processor's: the list that the processor's VMFUNC reads leads to them, and nothing that the guest could choose.

use core::mem::offset_of;
use core::ops::Range;

use vmsight_sim_abi::{
    Handler, Header, MAGIC, Part, SITE_STRIDE, SITES, State, VERSION, WINDOW, site_offset,
};

use crate::ept::{ENTRIES, Ept, Exhausted, MemoryType, Permissions, Pool};
use crate::gate::{self, Addresses};
use crate::{LARGE, PAGE, PROCESSORS};

/// An entry of a guest's table: present, writable, accessed, dirty; for the kernel. What may be done is up to the EPT.
const PRESENT: u64 = 0x63;
const IS_LARGE: u64 = 1 << 7;

/// A monitor's text and data have no more pages than this each.
const MOST: usize = 64;
/// What the monitor lies above, so that address 0 means nothing, and below: the window.
const BASE: Range<u64> = PAGE..1 << 31;

/// Why there is no monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The image is not one, or of another version, or does not fit.
    Image,
    /// The stub's address is not that of two pages in the upper half, or its page number is of use to the tables.
    Stub,
    /// No memory for tables.
    Memory,
}

impl From<Exhausted> for Refused {
    fn from(_: Exhausted) -> Self {
        Self::Memory
    }
}

/// A monitor in its views.
#[derive(Debug)]
pub struct Views {
    /// Our CR3.
    pub cr3: u64,
    /// Virtual address of the gate's page.
    pub address: u64,
    /// What the image says.
    pub header: Header,
    /// What each processor has of its own.
    own: [Own; PROCESSORS],
    processors: usize,
    /// Pages that nobody changes after this: gates, landing, tables.
    fixed: Pages<{ 2 * MOST }>,
    /// Nor the monitor's text.
    text: Pages<MOST>,
}

/// What a processor has of its own.
#[derive(Debug, Clone)]
pub struct Own {
    /// Page of the list of EPT pointers.
    pub list: u64,
    /// The gate's EPT.
    pub gate: Ept,
    /// The monitor's EPT.
    pub sim: Ept,
    /// Pages of the monitor's data.
    data: Pages<MOST>,
}

impl Own {
    const NONE: Self = Self {
        list: 0,
        gate: Ept::NONE,
        sim: Ept::NONE,
        data: Pages::NONE,
    };
}

/// A list of pages, by their physical addresses.
#[derive(Debug, Clone)]
struct Pages<const N: usize> {
    list: [u64; N],
    used: usize,
}

impl<const N: usize> Pages<N> {
    const NONE: Self = Self {
        list: [0; N],
        used: 0,
    };

    fn add(&mut self, page: u64) -> Result<u64, Exhausted> {
        *self.list.get_mut(self.used).ok_or(Exhausted)? = page;
        self.used += 1;
        Ok(page)
    }

    fn all(&self) -> &[u64] {
        self.list.get(..self.used).unwrap_or_default()
    }
}

/// Reads and checks the head of an image.
pub fn header(image: &[u8]) -> Result<Header, Refused> {
    let mut words = [0u64; 7];
    for (word, bytes) in words.iter_mut().zip(image.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().map_err(|_| Refused::Image)?);
    }
    let [magic, version, base, text, data, entry, state] = words;
    let aligned = [base, text, data].iter().all(|n| n.is_multiple_of(PAGE));
    let some = PAGE..=MOST as u64 * PAGE;
    let fits = some.contains(&text) && some.contains(&data);
    let length = image.len() as u64;
    if magic != MAGIC || version != VERSION || !aligned || !fits || length > text || !BASE.contains(&base) {
        return Err(Refused::Image);
    }
    let (text_at, data_at) = (base..base + text, base + text..base + text + data);
    let state_fits = state.is_multiple_of(PAGE) && data_at.contains(&state);
    if data_at.end > BASE.end || !text_at.contains(&entry) || !state_fits {
        return Err(Refused::Image);
    }
    Ok(Header {
        magic,
        version,
        base,
        text,
        data,
        entry,
        state,
    })
}

fn index(address: u64, level: u32) -> usize {
    (address >> (12 + 9 * (level - 1)) & 511) as usize
}

impl Views {
    /// Makes the views for a monitor. `guest` is the guest's own EPT, of which the monitor gets the RAM, and `ram_end` its
    /// end; `own` is the hypervisor's memory in it; `stub` is the guest-virtual address of the stub's two pages;
    /// `processors` is how many there are.
    pub fn new(
        pool: &mut Pool<'_>,
        image: &[u8],
        guest: Ept,
        ram_end: u64,
        own: Range<u64>,
        stub: u64,
        processors: usize,
    ) -> Result<Self, Refused> {
        let header = header(image)?;
        let address = stub.checked_add(PAGE).ok_or(Refused::Stub)?;
        let [at1, at2, at3, at4] = [1, 2, 3, 4].map(|level| index(address, level));
        // In the upper half neither the monitor's own addresses nor code of 32 bits can be in the way.
        let upper = stub >> 47 == 0x1_ffff && stub.is_multiple_of(PAGE);
        if !upper || [at2, at3, at4].contains(&at1) {
            return Err(Refused::Stub);
        }
        let list_at = (0..ENTRIES)
            .rev()
            .find(|n| ![at1, at2, at3, at4].contains(n))
            .ok_or(Refused::Stub)?;
        let mut fixed = Pages::NONE;
        let gate_page = fixed.add(pool.allocate()?)?;
        let list = pool.allocate()?;
        let root = fixed.add(pool.allocate()?)?;
        let landing = fixed.add(pool.allocate()?)?;

        let tables = pool.page(root).ok_or(Exhausted)?;
        for (at, to) in [
            (at4, root),
            (at3, root),
            (at2, root),
            (at1, gate_page),
            (list_at, list),
        ] {
            *tables.get_mut(at).ok_or(Exhausted)? = to | PRESENT;
        }

        let sim = guest.copy(pool, Permissions::READ_WRITE)?;
        let mut tables = Tables {
            root: fixed.add(pool.allocate()?)?,
            fixed: &mut fixed,
            sim,
        };
        // The same CR3 means the monitor's own tables in its view.
        sim.map(pool, root, tables.root, Permissions::READ, MemoryType::WriteBack)?;
        let list_address = address & !(511 * PAGE) | (list_at as u64 * PAGE);
        tables.map(pool, address, landing, Permissions::READ_EXECUTE)?;
        tables.map(pool, list_address, list, Permissions::READ_WRITE)?;
        let (mut text, mut data) = (Pages::NONE, Pages::NONE);
        for at in (0..header.text + header.data).step_by(PAGE as usize) {
            let page = pool.allocate()?;
            let permissions = if at < header.text {
                text.add(page)?;
                let bytes = image.get(at as usize..).unwrap_or_default();
                fill(pool.page(page).ok_or(Exhausted)?, bytes);
                Permissions::READ_EXECUTE
            } else {
                data.add(page)?;
                Permissions::READ_WRITE
            };
            tables.map(pool, header.base + at, page, permissions)?;
        }
        // Not the hypervisor's: its pages are in the monitor's view under the same addresses, some of them to be written.
        let whole = own.start / LARGE * LARGE..own.end.next_multiple_of(LARGE);
        for gpa in (0..ram_end)
            .step_by(LARGE as usize)
            .filter(|gpa| !whole.contains(gpa))
        {
            tables.map_large(pool, WINDOW + gpa, gpa)?;
        }

        let low = |value: u64| u32::try_from(value).map_err(|_| Refused::Memory);
        let mut addresses = Addresses {
            sim_pointer: 0,
            cr3: low(root)?,
            list: (list_address as i64 - address as i64) as i32,
            entry: header.entry,
        };
        write(pool, landing, |page| gate::landing(page, &addresses))?;
        let mut views = Self {
            cr3: root,
            address,
            header,
            own: [Own::NONE; PROCESSORS],
            processors: processors.clamp(1, PROCESSORS),
            fixed,
            text,
        };
        let first = Own {
            list,
            gate: Ept::NONE,
            sim,
            data,
        };
        for number in 0..views.processors {
            let (mut own, gate) = match number {
                0 => (first.clone(), gate_page),
                _ => (first.another(pool)?, views.fixed.add(pool.allocate()?)?),
            };
            own.gate = Ept::everywhere(pool, root, Permissions::READ)?;
            let two = [
                (gate_page, gate, Permissions::EXECUTE),
                (list, own.list, Permissions::READ_WRITE),
            ];
            own.gate.replace(pool, &two)?;
            addresses.sim_pointer = low(own.sim.pointer())?;
            write(pool, gate, |page| gate::gate(page, &addresses))?;
            let entered = views.entered(pool, &own, &first)?;
            // The monitor's view is armed by the gate alone.
            let [guests, gates, ..] = pool.page(own.list).ok_or(Exhausted)?;
            (*guests, *gates) = (guest.pointer(), entered.pointer());
            if let Some(slot) = views.own.get_mut(number) {
                *slot = own;
            }
        }
        let stack = header.base + header.text + header.data;
        for (offset, value) in [
            (offset_of!(State, stack), stack),
            (offset_of!(State, memory_end), ram_end),
            (offset_of!(State, own_start), whole.start),
            (offset_of!(State, own_end), whole.end),
            (offset_of!(State, leave), address + gate::LEAVING as u64),
            (offset_of!(State, refuse), address + gate::REFUSING as u64),
        ] {
            views.set(pool, offset, value).ok_or(Exhausted)?;
        }
        Ok(views)
    }

    /// What VMFUNC(1) leads to: the gate. The builds that serve as controls have the monitor there: in the guest's own page
    /// tables, or under its own whatever CR3 says.
    fn entered(&self, pool: &mut Pool<'_>, own: &Own, first: &Own) -> Result<Ept, Exhausted> {
        if cfg!(feature = "two-views") {
            return Ok(own.sim);
        }
        if cfg!(feature = "two-views-apt") {
            let [_, root, _, tables, ..] = self.fixed.all() else {
                return Err(Exhausted);
            };
            let anywhere = Ept::everywhere(pool, *tables, Permissions::READ)?;
            let all = self
                .fixed()
                .chain([first.list])
                .chain(first.data.all().iter().copied());
            for page in all.filter(|page| page != root) {
                if let Some((to, permissions)) = own.sim.translate(pool, page) {
                    anywhere.replace(pool, &[(page, to, permissions)])?;
                }
            }
            return Ok(anywhere);
        }
        Ok(own.gate)
    }

    /// What a processor has of its own. Those that there are not have nothing.
    pub fn own(&self, processor: usize) -> Option<&Own> {
        self.own.get(..self.processors)?.get(processor)
    }

    /// Takes the monitor's view out of the processor's list, in case that the guest was stopped while it was in.
    pub fn disarm(&self, pool: &mut Pool<'_>, processor: usize) {
        let list = self.own(processor).and_then(|own| pool.page(own.list));
        if let Some(entry) = list.and_then(|l| l.get_mut(vmsight_sim_abi::view::SIM)) {
            *entry = 0;
        }
    }

    /// Physical addresses of the pages that nobody may change: gates, landing, tables, and last the monitor's text.
    pub fn fixed(&self) -> impl Iterator<Item = u64> {
        self.fixed.all().iter().chain(self.text.all()).copied()
    }

    /// Physical address of page `n` of a part of what the monitor consists of.
    pub fn page(&self, part: Part, n: usize) -> Option<u64> {
        let own = || self.own.iter().take(self.processors);
        match part {
            Part::Fixed => self.fixed.all().get(n).copied(),
            Part::Text => self.text.all().get(n).copied(),
            Part::Lists => own().map(|own| own.list).nth(n),
            Part::Data => own().flat_map(|own| own.data.all()).nth(n).copied(),
        }
    }

    /// The word at `offset` bytes from the begin of the monitor's state on a processor.
    pub fn state<'a>(&self, pool: &'a mut Pool<'_>, processor: usize, offset: usize) -> Option<&'a mut u64> {
        let offset = self.header.state - self.header.base - self.header.text + offset as u64;
        let page = *self.own(processor)?.data.all().get((offset / PAGE) as usize)?;
        pool.page(page)?.get_mut((offset % PAGE / 8) as usize)
    }

    /// Writes bytes into the monitor's state on all processors, wherever they begin.
    pub fn write_state(&self, pool: &mut Pool<'_>, offset: usize, bytes: &[u8]) -> Option<()> {
        for number in 0..self.processors {
            for (at, byte) in (offset..).zip(bytes) {
                let word = self.state(pool, number, at / 8 * 8)?;
                let shift = at % 8 * 8;
                *word = *word & !(0xff << shift) | u64::from(*byte) << shift;
            }
        }
        Some(())
    }

    /// The entry of the checker's table at a place: the site and the number of what it calls.
    fn site(&self, pool: &mut Pool<'_>, at: usize) -> Option<(u64, u8)> {
        let offset = offset_of!(State, sites) + at;
        // Nine bytes: in two words, wherever they begin.
        let low = *self.state(pool, 0, offset / 8 * 8)?;
        let high = *self.state(pool, 0, offset / 8 * 8 + 8)?;
        let both = (u128::from(high) << 64 | u128::from(low)) >> (offset % 8 * 8);
        Some((both as u64, (both >> 64) as u8))
    }

    /// Enters a hook into the checker's table, or changes what it calls; `Ok(false)` if another is too near.
    pub fn register(&self, pool: &mut Pool<'_>, site: u64, handler: Handler) -> Result<bool, Exhausted> {
        let mut entry = [0u8; 9];
        let [numbers @ .., called] = &mut entry;
        numbers.copy_from_slice(&site.to_le_bytes());
        *called = handler as u8;
        let at = site_offset(site);
        let near = at.saturating_sub(SITE_STRIDE - 1)..(at + SITE_STRIDE).min(SITES - 8);
        for other in near {
            let (there, _) = self.site(pool, other).ok_or(Exhausted)?;
            // Where no entry begins, these are parts of one, which do not say that one begins there.
            if there != 0 && there != site && site_offset(there) == other {
                return Ok(false);
            }
        }
        self.write_state(pool, offset_of!(State, sites) + at, &entry)
            .ok_or(Exhausted)?;
        Ok(true)
    }

    /// What a registered hook calls.
    pub fn handler(&self, pool: &mut Pool<'_>, site: u64) -> Option<Handler> {
        let (there, handler) = self.site(pool, site_offset(site))?;
        let registered = there == site && site != 0;
        Handler::from_number(handler.into()).filter(|_| registered)
    }

    /// Sets that word on all processors.
    pub fn set(&self, pool: &mut Pool<'_>, offset: usize, value: u64) -> Option<()> {
        (0..self.processors).try_for_each(|n| self.state(pool, n, offset).map(|word| *word = value))
    }

    /// The sum of that word over all processors.
    pub fn sum(&self, pool: &mut Pool<'_>, offset: usize) -> Option<u64> {
        (0..self.processors).try_fold(0u64, |sum, n| {
            Some(sum.wrapping_add(*self.state(pool, n, offset)?))
        })
    }
}

impl Own {
    /// Another processor's: where the first one's list and data are, its view has its own.
    fn another(&self, pool: &mut Pool<'_>) -> Result<Self, Exhausted> {
        let list = pool.allocate()?;
        let mut data = Pages::NONE;
        let mut pages = [(self.list, list, Permissions::READ_WRITE); MOST + 1];
        for (&page, slot) in self.data.all().iter().zip(pages.iter_mut().skip(1)) {
            *slot = (page, data.add(pool.allocate()?)?, Permissions::READ_WRITE);
        }
        let pages = pages.get(..=data.used).ok_or(Exhausted)?;
        Ok(Self {
            list,
            gate: Ept::NONE,
            sim: self.sim.variant(pool, pages)?,
            data,
        })
    }
}

/// Fills a page with bytes, and zeros where there are no more.
fn fill(page: &mut [u64; ENTRIES], bytes: &[u8]) {
    for (word, eight) in page.iter_mut().zip(bytes.chunks(8)) {
        let mut value = [0; 8];
        for (to, from) in value.iter_mut().zip(eight) {
            *to = *from;
        }
        *word = u64::from_le_bytes(value);
    }
}

fn write(pool: &mut Pool<'_>, at: u64, make: impl FnOnce(&mut gate::Page)) -> Result<(), Exhausted> {
    let mut bytes = [0; 4096];
    make(&mut bytes);
    fill(pool.page(at).ok_or(Exhausted)?, &bytes);
    Ok(())
}

/// The monitor's own page tables.
struct Tables<'a> {
    root: u64,
    fixed: &'a mut Pages<{ 2 * MOST }>,
    sim: Ept,
}

impl Tables<'_> {
    fn table(&mut self, pool: &mut Pool<'_>, address: u64, to: u32) -> Result<u64, Exhausted> {
        let mut table = self.root;
        for level in (to + 1..=4).rev() {
            let entry = *entry(pool, table, index(address, level))?;
            table = if entry == 0 {
                let next = self.fixed.add(pool.allocate()?)?;
                self.sim
                    .map(pool, next, next, Permissions::READ, MemoryType::WriteBack)?;
                *self::entry(pool, table, index(address, level))? = next | PRESENT;
                next
            } else {
                entry & !0xfff
            };
        }
        Ok(table)
    }

    fn map(
        &mut self,
        pool: &mut Pool<'_>,
        address: u64,
        page: u64,
        permissions: Permissions,
    ) -> Result<(), Exhausted> {
        let table = self.table(pool, address, 1)?;
        *entry(pool, table, index(address, 1))? = page | PRESENT;
        self.sim.map(pool, page, page, permissions, MemoryType::WriteBack)
    }

    fn map_large(&mut self, pool: &mut Pool<'_>, address: u64, gpa: u64) -> Result<(), Exhausted> {
        let table = self.table(pool, address, 2)?;
        *entry(pool, table, index(address, 2))? = gpa | PRESENT | IS_LARGE;
        Ok(())
    }
}

fn entry<'a>(pool: &'a mut Pool<'_>, table: u64, at: usize) -> Result<&'a mut u64, Exhausted> {
    pool.page(table).and_then(|t| t.get_mut(at)).ok_or(Exhausted)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use vmsight_arch::paging::{self, PagingMode, TableMemory};
    use vmsight_arch::{Dtb, Gpa, Gva};
    use vmsight_sim_abi::view;

    use super::*;
    use crate::ept::Table;

    const POOL: u64 = 0x820_0000;
    const OWN: Range<u64> = 0x100_0000..0x110_0000;
    const STUB: u64 = 0xffff_ffff_8122_f000;
    const GATE: u64 = STUB + PAGE;

    fn image() -> Vec<u8> {
        let header: [u64; 7] = [
            MAGIC,
            VERSION,
            0x1000_0000,
            PAGE,
            32 * PAGE,
            0x1000_0040,
            0x1000_1000,
        ];
        let mut image: Vec<u8> = header.iter().flat_map(|w| w.to_le_bytes()).collect();
        image.extend([0x90; 64]);
        image
    }

    /// On each of two processors.
    fn with(test: impl Fn(&mut Pool<'_>, &Views, &Own)) {
        let mut tables = std::vec![Table::EMPTY; 512];
        let mut pool = Pool::new(POOL, &mut tables);
        let guest = Ept::new(&mut pool).unwrap();
        for gpa in (0..64 << 20).step_by(LARGE as usize) {
            guest
                .map_large(&mut pool, gpa, Permissions::ALL, MemoryType::WriteBack)
                .unwrap();
        }
        let views = Views::new(&mut pool, &image(), guest, 64 << 20, OWN, STUB, 2).unwrap();
        for own in &views.own[..2] {
            test(&mut pool, &views, own);
        }
        assert!(views.own(2).is_none());
    }

    /// Memory as a view shows it to a page walk.
    struct Seen<'a, 'b>(core::cell::RefCell<&'a mut Pool<'b>>, Ept);

    impl TableMemory for Seen<'_, '_> {
        fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
            let pool = &mut **self.0.borrow_mut();
            let (hpa, permissions) = self.1.translate(pool, gpa.0)?;
            if permissions == Permissions::EXECUTE {
                return None;
            }
            pool.page(hpa & !0xfff)?.get((hpa % PAGE / 8) as usize).copied()
        }

        fn entry_u32(&self, _: Gpa) -> Option<u32> {
            None
        }
    }

    fn walk(pool: &mut Pool<'_>, ept: Ept, cr3: u64, address: u64) -> Option<u64> {
        let seen = Seen(core::cell::RefCell::new(pool), ept);
        let found = paging::walk(PagingMode::X86Level4, &seen, Dtb(cr3), Gva(address)).ok()?;
        Some(found.gpa.0)
    }

    #[test]
    fn in_the_gate_every_cr3_gives_one_translation() {
        with(|pool, views, own| {
            let gate_page = views.fixed.all()[0];
            // Guest memory, other memory of ours, beyond all memory; PCIDs.
            for cr3 in [
                0,
                0x1000,
                0x100_0003,
                POOL + 0x1f_f000,
                views.cr3,
                views.cr3 | 0xfff,
                1 << 39,
                (1 << 48) - PAGE,
            ] {
                assert_eq!(walk(pool, own.gate, cr3, GATE), Some(gate_page), "{cr3:#x}");
            }
            // What is not the tables cannot be taken for them: the gate cannot be read, the list has nothing there.
            assert_eq!(walk(pool, own.gate, gate_page, GATE), None);
            assert_eq!(walk(pool, own.gate, views.own[0].list, GATE), None);
        });
    }

    #[test]
    fn the_gate_sees_three_pages() {
        with(|pool, views, own| {
            let mut seen = Vec::new();
            for at in 0..512u64 {
                let address = GATE & !(511 * PAGE) | at << 12;
                seen.extend(walk(pool, own.gate, 0, address));
            }
            seen.sort_unstable();
            seen.dedup();
            let mut three = [views.fixed.all()[0], views.own[0].list, views.cr3];
            three.sort_unstable();
            assert_eq!(seen, three);
            assert_eq!(walk(pool, own.gate, 0, 0x1000), None);
            // What is behind the gate and the list is the processor's own.
            let (list, _) = own.gate.translate(pool, views.own[0].list).unwrap();
            assert_eq!(list, own.list);
            let (page, gate) = own.gate.translate(pool, views.fixed.all()[0]).unwrap();
            assert_eq!(pool.page(page).unwrap()[0] >> 48, own.sim.pointer() & 0xffff);
            let (_, tables) = own.gate.translate(pool, views.cr3).unwrap();
            assert_eq!((gate, tables), (Permissions::EXECUTE, Permissions::READ));
        });
    }

    #[test]
    fn the_monitor_sees_itself_and_the_guest() {
        with(|pool, views, own| {
            let landing = views.fixed.all()[2];
            assert_eq!(walk(pool, own.sim, views.cr3, GATE), Some(landing));
            assert_eq!(
                own.sim.translate(pool, landing),
                Some((landing, Permissions::READ_EXECUTE))
            );
            assert_eq!(
                walk(pool, own.sim, views.cr3, WINDOW + 0x12_3456),
                Some(0x12_3456)
            );
            assert_eq!(
                own.sim.translate(pool, 0x12_3456),
                Some((0x12_3456, Permissions::READ_WRITE))
            );
            // Not what is the hypervisor's, though it is below the end of RAM.
            for (gpa, there) in [
                (OWN.start - 1, true),
                (OWN.start, false),
                (OWN.end, false),
                (0x120_0000, true),
            ] {
                assert_eq!(
                    walk(pool, own.sim, views.cr3, WINDOW + gpa).is_some(),
                    there,
                    "{gpa:#x}"
                );
            }
            let text = walk(pool, own.sim, views.cr3, 0x1000_0000).unwrap();
            assert_eq!(
                own.sim.translate(pool, text),
                Some((text, Permissions::READ_EXECUTE))
            );
            assert_eq!(pool.page(text).unwrap()[0], MAGIC);
            let data = walk(pool, own.sim, views.cr3, 0x1000_1000).unwrap();
            let (data, permissions) = own.sim.translate(pool, data).unwrap();
            assert_eq!(permissions, Permissions::READ_WRITE);
            assert_eq!(data, own.data.all()[0]);
            views.set(pool, 8, 5).unwrap();
            let number = usize::from(own.list != views.own[0].list);
            *views.state(pool, number, 8).unwrap() = 7;
            assert_eq!(pool.page(data).unwrap()[1], 7);
            assert_eq!(views.sum(pool, 8), Some(12));
            // Not the other's, at whatever address.
            let other = &views.own[1 - number];
            let theirs: Vec<u64> = other.data.all().iter().copied().chain([other.list]).collect();
            for gpa in (POOL..POOL + (2 << 20)).step_by(PAGE as usize) {
                let seen = own.sim.translate(pool, gpa).map(|(hpa, _)| hpa);
                assert!(seen.is_none_or(|hpa| !theirs.contains(&hpa)), "{gpa:#x}");
            }
            // Only text, landing and gate can be executed, each in its view alone.
            assert_eq!(own.sim.translate(pool, views.fixed.all()[0]), None);
        });
    }

    #[test]
    fn the_list_holds_the_monitors_view_only_while_armed() {
        with(|pool, views, own| {
            let list = *pool.page(own.list).unwrap();
            assert_eq!(list[view::GATE], own.gate.pointer());
            assert!(list[view::SIM..].iter().all(|&e| e == 0));
            let number = usize::from(own.list != views.own[0].list);
            for armed in &views.own[..2] {
                pool.page(armed.list).unwrap()[view::SIM] = armed.sim.pointer();
            }
            views.disarm(pool, number);
            assert_eq!(pool.page(own.list).unwrap()[view::SIM], 0);
            let other = &views.own[1 - number];
            assert_eq!(pool.page(other.list).unwrap()[view::SIM], other.sim.pointer());
            pool.page(other.list).unwrap()[view::SIM] = 0;
        });
    }

    #[test]
    fn hooks_are_found_by_their_last_two_bytes() {
        with(|pool, views, own| {
            // Hooks are the same on all processors: one will do.
            if own.list != views.own[0].list {
                return;
            }
            let sites = [
                0xffff_ffff_8100_3325,
                0xffff_ffff_810d_3bc5,
                0xffff_ffff_8149_0005,
                0xffff_ffff_8101_fff5,
            ];
            for (site, handler) in
                sites
                    .into_iter()
                    .zip([Handler::Null, Handler::Call, Handler::Exec, Handler::Copy])
            {
                assert_eq!(views.handler(pool, site), None);
                assert_eq!(views.register(pool, site, handler), Ok(true));
                assert_eq!(views.handler(pool, site), Some(handler));
            }
            // Again is a change; too near is refused, on both sides, and changes nothing.
            assert_eq!(views.register(pool, sites[0], Handler::Process), Ok(true));
            for near in [0xffff_ffff_8200_3325, sites[0] + 15, sites[0] - 15] {
                assert_eq!(views.register(pool, near, Handler::Null), Ok(false));
                assert_eq!(views.handler(pool, near), None);
            }
            assert_eq!(views.register(pool, sites[0] + 16, Handler::Null), Ok(true));
            assert_eq!(views.handler(pool, sites[0]), Some(Handler::Process));
            assert_eq!(views.handler(pool, 0), None);
        });
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut tables = std::vec![Table::EMPTY; 64];
        let mut pool = Pool::new(POOL, &mut tables);
        let guest = Ept::new(&mut pool).unwrap();
        let mut refused =
            |image: &[u8], stub| Views::new(&mut pool, image, guest, 0, OWN, stub, 1).unwrap_err();
        assert_eq!(refused(&image()[..32], STUB), Refused::Image);
        let mut other = image();
        other[8] += 1;
        assert_eq!(refused(&other, STUB), Refused::Image);
        let mut outside = image();
        outside[40..48].copy_from_slice(&0x1000_1000u64.to_le_bytes());
        assert_eq!(refused(&outside, STUB), Refused::Image);
        // The lower half, and a page number that the upper levels have too.
        assert_eq!(refused(&image(), 0x40_0000), Refused::Stub);
        assert_eq!(refused(&image(), 0xffff_ffff_803f_e000), Refused::Stub);
    }
}
