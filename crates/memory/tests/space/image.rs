//! A guest image with 4-level tables, written by hand, and the memories that can hold it.

use std::sync::Arc;

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa};
use vmsight_memory::{AddressSpace, GuestMemory, Mapping, MappingKind, ProcessMemory, Source};

pub(crate) const MODE: PagingMode = PagingMode::X86Level4;
pub(crate) const P: u64 = 1;
pub(crate) const LARGE: u64 = 0x81;

/// Guest-physical memory from 0, the tables from `root` on.
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
    pub(crate) root: u64,
    free: u64,
}

impl Image {
    /// `size` bytes of a pattern in which no two words are alike; tables come from its end.
    pub(crate) fn new(size: u64, tables: u64) -> Self {
        let mut bytes: Vec<u8> = (0..size / 8)
            .flat_map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes())
            .collect();
        let root = size - tables * 0x1000;
        bytes[root as usize..].fill(0);
        Self {
            bytes,
            root,
            free: root + 0x1000,
        }
    }

    pub(crate) fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes[gpa as usize..][..8].try_into().unwrap())
    }

    pub(crate) fn put(&mut self, gpa: u64, value: u64) {
        self.bytes[gpa as usize..][..8].copy_from_slice(&value.to_le_bytes());
    }

    /// Where the entry of `level` for `gva` lies; tables above it are made. `None` where a large page is in the way.
    pub(crate) fn entry(&mut self, gva: u64, level: u32) -> Option<u64> {
        let mut table = self.root;
        for l in (1..=4).rev() {
            let at = table + (gva >> (3 + 9 * l) & 511) * 8;
            if l == level {
                return Some(at);
            }
            let value = self.u64(at);
            if value & 0x80 != 0 {
                return None;
            }
            table = if value == 0 {
                let new = self.free;
                self.free += 0x1000;
                self.put(at, new | P);
                new
            } else {
                value & !0xfff
            };
        }
        None
    }

    pub(crate) fn map(&mut self, gva: u64, gpa: u64) {
        if let Some(at) = self.entry(gva, 1) {
            self.put(at, gpa | P);
        }
    }

    pub(crate) fn map_large(&mut self, gva: u64, gpa: u64) {
        let at = self.entry(gva, 2).unwrap();
        self.put(at, gpa | LARGE);
    }
}

/// An image in some kind of memory. The kinds differ in what a space may rely on.
pub(crate) struct Guest {
    pub(crate) kind: &'static str,
    pub(crate) memory: GuestMemory,
    pub(crate) root: u64,
    /// What process memory reads: ours.
    _bytes: Option<Box<[u64]>>,
}

#[derive(Debug)]
struct Asked(Vec<u8>);

impl Source for Asked {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let from = self
            .0
            .get(offset as usize..)
            .and_then(|b| b.get(..buf.len()))
            .ok_or("out of bounds")?;
        buf.copy_from_slice(from);
        Ok(())
    }
}

impl Guest {
    /// The image as a dump that is mapped, a dump that is asked, memory of a VM that is mapped (in two slots), and
    /// memory of a process (this one).
    pub(crate) fn all(image: &Image) -> Vec<Self> {
        vec![
            Self::frozen(image),
            Self::asked(image),
            Self::live(image),
            Self::process(image),
        ]
    }

    fn of(kind: &'static str, memory: GuestMemory, image: &Image) -> Self {
        Self {
            kind,
            memory,
            root: image.root,
            _bytes: None,
        }
    }

    pub(crate) fn frozen(image: &Image) -> Self {
        let memory = GuestMemory::from_bytes(vec![(Gpa(0), image.bytes.clone())]).unwrap();
        Self::of("frozen", memory, image)
    }

    pub(crate) fn asked(image: &Image) -> Self {
        let source = Arc::new(Asked(image.bytes.clone()));
        let memory = GuestMemory::builder()
            .custom(Gpa(0), image.bytes.len() as u64, source, 0)
            .build()
            .unwrap();
        Self::of("asked", memory, image)
    }

    pub(crate) fn live(image: &Image) -> Self {
        let half = image.bytes.len() / 2 / 0x1000 * 0x1000;
        let (a, b) = image.bytes.split_at(half);
        let live = |bytes| Mapping::of_bytes(bytes, MappingKind::Live { writable: true }).unwrap();
        let memory = GuestMemory::builder()
            .mapped(Gpa(0), a.len() as u64, &live(a), 0)
            .mapped(Gpa(half as u64), b.len() as u64, &live(b), 0)
            .build()
            .unwrap();
        Self::of("live", memory, image)
    }

    pub(crate) fn process(image: &Image) -> Self {
        let bytes: Box<[u64]> = (0..image.bytes.len() as u64 / 8)
            .map(|i| image.u64(i * 8))
            .collect();
        let process = Arc::new(ProcessMemory::open(std::process::id()).unwrap());
        let memory = GuestMemory::builder()
            .process(
                Gpa(0),
                image.bytes.len() as u64,
                &process,
                bytes.as_ptr().expose_provenance() as u64,
                true,
            )
            .build()
            .unwrap();
        Self {
            _bytes: Some(bytes),
            ..Self::of("process", memory, image)
        }
    }

    pub(crate) fn space(&self) -> AddressSpace {
        AddressSpace::new(self.memory.clone(), MODE, Dtb(self.root))
    }

    /// With so few slots that they are fought over.
    pub(crate) fn small_space(&self) -> AddressSpace {
        AddressSpace::with_slots(self.memory.clone(), MODE, Dtb(self.root), 1)
    }

    pub(crate) fn put(&self, gpa: u64, value: u64) {
        self.memory.write(Gpa(gpa), &value.to_le_bytes()).unwrap();
    }
}
