//! Formats whose memory must be looked up or unpacked, in files written here by the description of each format: whole, cut and
//! contradictory. Files of the programs themselves are read in `lab/tests/dumps.rs`; of Xen and VMware there are none there.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod files;

use std::path::PathBuf;

use files::pattern;
use vmsight_arch::Gpa;
use vmsight_memory::dump::{self, Dump, DumpError, DumpFormat};
use vmsight_memory::{MemoryError, Region};

const PAGE: usize = 4096;

struct Scratch {
    folder: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { folder }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn open(bytes: &[u8]) -> Result<Dump, DumpError> {
    let scratch = Scratch::new();
    dump::open(&scratch.file("dump", bytes), None)
}

fn region(start: u64, len: u64) -> Region {
    Region {
        start: Gpa(start),
        len,
    }
}

fn page_at(dump: &Dump, gpa: u64) -> Result<Vec<u8>, MemoryError> {
    let mut page = vec![0; PAGE];
    dump.memory.read(Gpa(gpa), &mut page)?;
    Ok(page)
}

/// A migration stream of a pc: a header, the machine's name, the RAM blocks, then these records, then the section's end.
struct Stream(Vec<u8>);

impl Stream {
    fn new(machine: &str, blocks: &[(&str, u64)]) -> Self {
        let mut out = b"QEVM\0\0\0\x03\x07".to_vec();
        out.extend((machine.len() as u32).to_be_bytes());
        out.extend(machine.as_bytes());
        // A section that begins: its number, name, instance and version.
        out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        let total: u64 = blocks.iter().map(|(_, len)| len).sum();
        out.extend((total | 4).to_be_bytes());
        for (name, len) in blocks {
            out.push(name.len() as u8);
            out.extend(name.as_bytes());
            out.extend(len.to_be_bytes());
        }
        Self(out).section_end()
    }

    fn section_end(mut self) -> Self {
        self.0.extend(0x10u64.to_be_bytes());
        self.0.extend(b"\x7e\0\0\0\x02");
        self
    }

    /// The next section: a part of the RAM (2), or its last (3).
    fn section(mut self, kind: u8) -> Self {
        self.0.push(kind);
        self.0.extend(b"\0\0\0\x02");
        self
    }

    /// A page's record; without a name it is of the same block as the last.
    fn page(mut self, at: u64, flag: u64, name: Option<&str>, body: &[u8]) -> Self {
        let again = if name.is_none() { 0x20 } else { 0 };
        self.0.extend((at | flag | again).to_be_bytes());
        if let Some(name) = name {
            self.0.push(name.len() as u8);
            self.0.extend(name.as_bytes());
        }
        self.0.extend(body);
        self
    }
}

fn zlib(page: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(page).unwrap();
    let packed = encoder.finish().unwrap();
    [&(packed.len() as u32).to_be_bytes()[..], &packed].concat()
}

#[test]
fn of_a_page_that_a_stream_has_twice_the_last_counts() {
    let (old, new) = (pattern(1, PAGE), pattern(2, PAGE));
    let ram = Some("pc.ram");
    let stream = Stream::new("pc-i440fx-7.2", &[("pc.ram", 0x5000), ("pc.bios", 0x2000)])
        .section(2)
        .page(0x1000, 8, ram, &old)
        .page(0x0000, 8, None, &old)
        .page(0x1000, 8, Some("pc.bios"), &pattern(9, PAGE))
        .page(0x2000, 2, ram, &[0])
        .section_end()
        .section(3)
        .page(0x0000, 8, ram, &new)
        .page(0x2000, 2, None, &[7])
        .page(0x4000, 0x100, None, &zlib(&new))
        // XBZRLE: a flag, a length, changes.
        .page(0x1000, 0x40, None, b"\x01\0\x03abc")
        .section_end();
    let dump = open(&stream.0).unwrap();
    assert_eq!(dump.format, DumpFormat::Migration);
    assert_eq!(page_at(&dump, 0).unwrap(), new);
    assert_eq!(page_at(&dump, 0x2000).unwrap(), [7; PAGE]);
    assert_eq!(page_at(&dump, 0x4000).unwrap(), new);
    // What it was before is not what it was in the end; the fourth page never came.
    assert_eq!(
        dump.memory.missing(),
        [region(0x1000, 0x1000), region(0x3000, 0x1000)]
    );
    assert!(matches!(page_at(&dump, 0x1000), Err(MemoryError::Missing { .. })));
    assert!(
        dump.notes.iter().any(|n| n.contains("1 pages came as changes")),
        "{:?}",
        dump.notes
    );
    assert!(
        dump.notes
            .iter()
            .any(|n| n.contains("the stream lacks 0x1000-0x2000")),
        "{:?}",
        dump.notes
    );

    // Cut in the middle of a page, everywhere in its last section.
    let whole = stream.0;
    for cut in [6000, 5000, 100, 14, 6] {
        let dump = open(&whole[..whole.len() - cut]).unwrap();
        assert!(
            dump.notes[0].contains("the stream ends before"),
            "{cut}: {:?}",
            dump.notes
        );
        assert_eq!(page_at(&dump, 0x2000).unwrap()[0] & !7, 0);
    }
    let mut broken = whole.clone();
    let at = whole.len() - 5 - 8 - 14 - 6;
    broken[at - 300] ^= 0x80;
    let dump = open(&broken).unwrap();
    let error = page_at(&dump, 0x4000).unwrap_err().to_string();
    assert!(error.contains("the zlib data is broken"), "{error}");
    assert_eq!(page_at(&dump, 0).unwrap(), new, "the rest is there");
}

#[test]
fn a_stream_is_laid_out_as_its_machine_is() {
    let layout = |machine: &str, len: u64| {
        let last = len - 0x1000;
        let stream = Stream::new(machine, &[("ram", len)])
            .section(3)
            .page(0, 2, Some("ram"), &[1])
            .page(last, 2, None, &[2])
            .section_end();
        let dump = open(&[stream.0, vec![0; PAGE]].concat()).unwrap();
        let first = dump.memory.regions()[0].start.0;
        assert_eq!(page_at(&dump, first).unwrap()[0], 1);
        let last = dump.memory.regions()[1].start.0;
        assert_eq!(page_at(&dump, last).unwrap()[0], 2);
        (first, last)
    };
    const GIB: u64 = 1 << 30;
    assert_eq!(layout("pc-i440fx-7.2", 3 * GIB), (0, 3 * GIB - 0x1000));
    assert_eq!(layout("pc-i440fx-7.2", 4 * GIB), (0, 5 * GIB - 0x1000));
    assert_eq!(layout("pc-q35-10.0", 3 * GIB), (0, 5 * GIB - 0x1000));
    assert_eq!(layout("virt-7.2", 2 * GIB), (GIB, 3 * GIB - 0x1000));
}

#[test]
fn what_follows_an_unknown_section_is_not_read_and_that_is_said() {
    let page = pattern(3, PAGE);
    let mut stream = Stream::new("pc-q35-7.2", &[("pc.ram", 0x2000)])
        .section(2)
        .page(0, 8, Some("pc.ram"), &page)
        .section_end();
    stream
        .0
        .extend(b"\x01\0\0\0\x05\x05block\0\0\0\0\0\0\0\x01whatever");
    let dump = open(&stream.0).unwrap();
    assert_eq!(page_at(&dump, 0).unwrap(), page);
    assert!(dump.notes[0].contains("\"block\""), "{:?}", dump.notes);
    // Sizes that do not add up, and a version that is not known.
    let none = Stream::new("pc-q35-7.2", &[]);
    let refused = |bytes: &[u8]| open(&[bytes, &[0; PAGE]].concat()).unwrap_err().to_string();
    assert!(refused(&none.0).contains("before the guest's memory begins"));
    assert!(refused(b"QEVM\0\0\0\x02").contains("version other than 3"));
}

/// A Xen core: sections with the names' table last.
fn xen(pages: &[u8], table: (&str, Vec<u8>)) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[16] = 4;
    file[18] = 62;
    let mut names = b"\0".to_vec();
    let mut headers = vec![[0u8; 64]];
    let parts = [
        (".xen_pages", pages.to_vec()),
        (table.0, table.1),
        (".shstrtab", Vec::new()),
    ];
    for (name, bytes) in parts {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&(names.len() as u32).to_le_bytes());
        names.extend(name.as_bytes());
        names.push(0);
        let bytes = if name == ".shstrtab" { names.clone() } else { bytes };
        header[24..32].copy_from_slice(&(file.len() as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        header[56..64].copy_from_slice(&(PAGE as u64).to_le_bytes());
        file.extend(bytes);
        headers.push(header);
    }
    let at = file.len() as u64;
    file[40..48].copy_from_slice(&at.to_le_bytes());
    file[58..60].copy_from_slice(&64u16.to_le_bytes());
    file[60..62].copy_from_slice(&(headers.len() as u16).to_le_bytes());
    file[62..64].copy_from_slice(&(headers.len() as u16 - 1).to_le_bytes());
    file.extend(headers.concat());
    file
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[test]
fn pages_of_a_xen_core_are_where_its_table_says() {
    let pages: Vec<Vec<u8>> = (0..4).map(|i| pattern(i, PAGE)).collect();
    let all = pages.concat();
    for table in [
        (".xen_pfn", words(&[5, 6, u64::MAX, 1])),
        // A guest that knows the machine's frames: those are what its page tables hold.
        (".xen_p2m", words(&[0, 5, 1, 6, 9, u64::MAX, 2, 1])),
    ] {
        let dump = open(&xen(&all, table)).unwrap();
        assert_eq!(dump.format, DumpFormat::Elf);
        assert_eq!(
            dump.memory.regions(),
            [region(0x1000, 0x1000), region(0x5000, 0x2000)]
        );
        for (gpa, page) in [(0x5000, 0), (0x6000, 1), (0x1000, 3)] {
            assert_eq!(page_at(&dump, gpa).unwrap(), pages[page]);
        }
    }
    // Fewer pages than the table has.
    let dump = open(&xen(&all[..2 * PAGE], (".xen_pfn", words(&[5, 6, 7])))).unwrap();
    assert_eq!(dump.memory.missing(), [region(0x7000, 0x1000)]);
    assert!(open(&xen(&all, (".note", Vec::new()))).is_err());
}

/// A VMware state with these tags in its group of memory.
fn vmware(tags: &[u8]) -> Vec<u8> {
    let mut file = b"\xd2\xbe\xd2\xbe\x08\0\0\0\x02\0\0\0".to_vec();
    for (name, at) in [("cpu", 172u64), ("memory", 172)] {
        let mut group = [0; 80];
        group[..name.len()].copy_from_slice(name.as_bytes());
        group[64..72].copy_from_slice(&at.to_le_bytes());
        file.extend(group);
    }
    file.extend(tags);
    file.extend([0, 0]);
    file.resize(file.len().max(PAGE), 0);
    file
}

/// A tag with a number of four bytes, and an index.
fn tag(name: &str, index: Option<u32>, value: u32) -> Vec<u8> {
    let indices = u8::from(index.is_some());
    let mut tag = vec![indices << 6 | 4, name.len() as u8];
    tag.extend(name.as_bytes());
    tag.extend(index.into_iter().flat_map(u32::to_le_bytes));
    tag.extend(value.to_le_bytes());
    tag
}

fn two_regions() -> Vec<u8> {
    let mut tags = tag("regionsCount", None, 2);
    for (index, (page, frame, size)) in [(0, 0, 2), (2, 0x10_0000, 1)].into_iter().enumerate() {
        let index = Some(index as u32);
        tags.extend(tag("regionPageNum", index, page));
        tags.extend(tag("regionPPN", index, frame));
        tags.extend(tag("regionSize", index, size));
    }
    tags
}

#[test]
fn a_state_of_vmware_says_where_the_memory_beside_it_belongs() {
    let memory = pattern(8, 3 * PAGE);
    for (state, named) in [("vm.vmss", "vm.vmss"), ("vm.vmsn", "vm.vmem")] {
        let scratch = Scratch::new();
        scratch.file(state, &vmware(&two_regions()));
        scratch.file("vm.vmem", &memory);
        let dump = dump::open(&scratch.folder.path().join(named), None).unwrap();
        assert_eq!(dump.format, DumpFormat::Vmware);
        assert!(dump.notes.is_empty(), "{:?}", dump.notes);
        assert_eq!(
            dump.memory.regions(),
            [region(0, 0x2000), region(1 << 32, 0x1000)]
        );
        assert_eq!(page_at(&dump, 0x1000).unwrap(), memory[PAGE..2 * PAGE]);
        assert_eq!(page_at(&dump, 1 << 32).unwrap(), memory[2 * PAGE..]);
        // A memory file that is too short.
        scratch.file("vm.vmem", &memory[..2 * PAGE]);
        let dump = dump::open(&scratch.folder.path().join(named), None).unwrap();
        assert_eq!(dump.memory.missing(), [region(1 << 32, 0x1000)]);
    }
}

#[test]
fn a_state_of_vmware_may_have_the_memory_in_it_or_lack_it() {
    let memory = pattern(6, 2 * PAGE);
    let mut tags = vec![63, 6];
    tags.extend(b"Memory");
    tags.extend((memory.len() as u64).to_le_bytes());
    tags.extend((memory.len() as u64).to_le_bytes());
    tags.extend(b"\x03\0pad");
    tags.extend(&memory);
    let dump = open(&vmware(&tags)).unwrap();
    assert_eq!(dump.memory.regions(), [region(0, 0x2000)]);
    assert_eq!(page_at(&dump, 0x1000).unwrap(), memory[PAGE..]);

    match open(&vmware(&two_regions())) {
        Err(DumpError::Foreign { what, instead }) => {
            assert!(
                what.contains("VMware") && instead.contains(".vmem"),
                "{what} {instead}"
            );
        }
        other => panic!("{other:?}"),
    }
    // A memory file alone is a raw image, and says so where a state is asked for.
    let scratch = Scratch::new();
    let path = scratch.file("vm.vmem", &memory);
    assert!(matches!(
        dump::open(&path, None).unwrap().format,
        DumpFormat::Raw(_)
    ));
    assert!(dump::open(&path, Some(DumpFormat::Vmware)).is_err());
}

/// An AVML block of these frames: kind and body.
fn avml(first: u64, last: u64, frames: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut out = b"AVML\x02\0\0\0".to_vec();
    out.extend(first.to_le_bytes());
    out.extend(last.to_le_bytes());
    out.extend([0; 8]);
    let mut stream = b"\xff\x06\0\0sNaPpY".to_vec();
    for (kind, body) in frames {
        stream.extend((u32::from(*kind) | (body.len() as u32) << 8).to_le_bytes());
        stream.extend(body);
    }
    out.extend(&stream);
    out.extend((stream.len() as u64).to_le_bytes());
    out
}

/// A frame as snap makes it, without the start of the stream.
fn frame(bytes: &[u8]) -> (u8, Vec<u8>) {
    use std::io::Write;
    let mut encoder = snap::write::FrameEncoder::new(Vec::new());
    encoder.write_all(bytes).unwrap();
    let stream = encoder.into_inner().unwrap();
    (stream[10], stream[14..].to_vec())
}

#[test]
fn avml_blocks_are_read_by_frames_and_broken_ones_are_named() {
    let bytes = [pattern(4, 0x1_0000), vec![5; 0x3000]].concat();
    let frames = [
        frame(&bytes[..0x1_0000]),
        (0xfe, vec![0; 9]),
        frame(&bytes[0x1_0000..]),
    ];
    let block = avml(0x4000, 0x4000 + 0x1_2fff, &frames);
    let dump = open(&block).unwrap();
    assert_eq!(dump.format, DumpFormat::Avml);
    assert!(dump.notes.is_empty(), "{:?}", dump.notes);
    let mut read = vec![0; bytes.len()];
    dump.memory.read(Gpa(0x4000), &mut read).unwrap();
    assert!(read == bytes);

    // Cut in the second frame: the first is there.
    let dump = open(&block[..block.len() - 20]).unwrap();
    assert_eq!(dump.memory.missing(), [region(0x1_4000, 0x3000)]);
    assert!(dump.notes[0].contains("cut or broken"), "{:?}", dump.notes);
    assert_eq!(page_at(&dump, 0x5000).unwrap(), bytes[0x1000..0x2000]);

    // A byte that changed is noticed by the frame's checksum, and costs that frame.
    let mut changed = block.clone();
    changed[32 + 10 + 4 + 200] ^= 1;
    let dump = open(&changed).unwrap();
    let error = page_at(&dump, 0x5000).unwrap_err().to_string();
    assert!(error.contains("the snappy data is broken"), "{error}");
    assert_eq!(page_at(&dump, 0x1_4000).unwrap(), [5; PAGE]);

    // Two blocks for one address: the first counts.
    let twice = [
        avml(0, 0xfff, &[frame(&[1; PAGE])]),
        avml(0, 0xfff, &[frame(&[2; PAGE])]),
    ]
    .concat();
    let dump = open(&[twice, vec![0; PAGE]].concat()).unwrap();
    assert_eq!(page_at(&dump, 0).unwrap(), [1; PAGE]);
    assert!(
        dump.notes.iter().any(|n| n.contains("already describes")),
        "{:?}",
        dump.notes
    );
}

/// A kdump file of these pages (`None`: memory that was left out), not packed, with a note of what the header says.
fn kdump(pages: &[Option<Vec<u8>>]) -> Vec<u8> {
    let block = |fields: &[(usize, u64)]| {
        let mut block = vec![0; PAGE];
        for (at, value) in fields {
            block[*at..at + 4].copy_from_slice(&(*value as u32).to_le_bytes());
        }
        block
    };
    let head = [
        (8, 6),
        (428, PAGE as u64),
        (432, 1),
        (436, 2),
        (440, pages.len() as u64),
    ];
    let mut file = block(&head);
    file[..8].copy_from_slice(b"KDUMP   ");
    file.extend(block(&[(8, 31), (96, pages.len() as u64)]));
    let bitmap = |of: &dyn Fn(&Option<Vec<u8>>) -> bool| {
        let mut bits = vec![0; PAGE];
        for (i, page) in pages.iter().enumerate() {
            bits[i / 8] |= u8::from(of(page)) << (i % 8);
        }
        bits
    };
    file.extend(bitmap(&|_| true));
    file.extend(bitmap(&Option::is_some));
    let there: Vec<_> = pages.iter().flatten().collect();
    let mut at = file.len() + 24 * there.len();
    for page in &there {
        file.extend((at as u64).to_le_bytes());
        file.extend((page.len() as u32).to_le_bytes());
        file.extend([0; 12]);
        at += page.len();
    }
    there.iter().for_each(|page| file.extend(*page));
    file
}

#[test]
fn a_kdump_file_says_what_was_left_out_and_what_is_cut_off() {
    let pages: Vec<_> = (0..20).map(|i| (i % 5 != 3).then(|| pattern(i, PAGE))).collect();
    let whole = kdump(&pages);
    let dump = open(&whole).unwrap();
    assert_eq!(dump.format, DumpFormat::Kdump);
    assert_eq!(
        dump.notes,
        ["4 pages were left out when the dump was written (dump level 31): 0 MiB that cannot be read"]
    );
    for (i, page) in pages.iter().enumerate() {
        let read = page_at(&dump, (i * PAGE) as u64);
        match page {
            Some(page) => assert_eq!(read.as_ref(), Ok(page)),
            None => assert!(matches!(read, Err(MemoryError::Missing { .. })), "{read:?}"),
        }
    }
    let dump = open(&whole[..whole.len() - PAGE - 1]).unwrap();
    assert!(
        dump.notes[1].contains("the file lacks 0x11000-0x12000, 0x13000-0x14000"),
        "{:?}",
        dump.notes
    );
    assert_eq!(page_at(&dump, 0).as_ref(), Ok(pages[0].as_ref().unwrap()));
    // A descriptor that gives another length than a page has, and one of a packing that fails.
    let descriptors = 4 * PAGE;
    let mut odd = whole.clone();
    odd[descriptors + 8..descriptors + 12].copy_from_slice(&100u32.to_le_bytes());
    odd[descriptors + 24 + 12] = 1;
    let dump = open(&odd).unwrap();
    let error = |gpa| page_at(&dump, gpa).unwrap_err().to_string();
    assert!(error(0).contains("100 bytes for a page of 4096"), "{}", error(0));
    assert!(
        error(0x1000).contains("the zlib data is broken"),
        "{}",
        error(0x1000)
    );
    assert_eq!(page_at(&dump, 0x2000).as_ref(), Ok(pages[2].as_ref().unwrap()));
}

#[test]
fn a_flattened_kdump_file_is_the_file_it_was_made_of() {
    let pages: Vec<_> = (0..9).map(|i| (i != 4).then(|| pattern(i, PAGE))).collect();
    let whole = kdump(&pages);
    let mut flat = b"makedumpfile\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01".to_vec();
    flat.resize(PAGE, 0);
    // The later part first, in pieces that fit no page, and the header a second time.
    for range in [3000..whole.len(), 0..5000, 0..100] {
        for (i, piece) in whole[range.clone()].chunks(777).enumerate() {
            flat.extend((range.start as u64 + i as u64 * 777).to_be_bytes());
            flat.extend((piece.len() as u64).to_be_bytes());
            flat.extend(piece);
        }
    }
    let end = flat.len();
    flat.extend([0xff; 16]);
    let dump = open(&flat).unwrap();
    assert_eq!(dump.notes.len(), 1, "{:?}", dump.notes);
    for (i, page) in pages.iter().enumerate() {
        let read = page_at(&dump, (i * PAGE) as u64);
        assert_eq!(read.ok().as_ref(), page.as_ref());
    }
    let dump = open(&flat[..end]).unwrap();
    assert!(
        dump.notes[0].contains("without its last record"),
        "{:?}",
        dump.notes
    );
    assert_eq!(page_at(&dump, 0).as_ref().ok(), pages[0].as_ref());
}
