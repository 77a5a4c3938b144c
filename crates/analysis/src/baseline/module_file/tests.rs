//! Modules' files of our own making, honest and not.

use vmsight_arch::Gva;

use super::*;

const TEXT: u64 = 0xffff_ffff_c000_0000;
const DATA: u64 = 0xffff_ffff_c010_0000;
const ELSEWHERE: u64 = 0xffff_ffff_8100_0040;

/// A section of an ELF file: name, type, flags, link, info, bytes.
struct Part(&'static str, u32, u64, u32, u32, Vec<u8>);

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn relocation(offset: u64, symbol: u64, kind: u32, addend: i64) -> Vec<u8> {
    words(&[offset, symbol << 32 | u64::from(kind), addend as u64])
}

fn symbol(name: u32, info: u8, section: u16, value: u64) -> Vec<u8> {
    let mut bytes = name.to_le_bytes().to_vec();
    bytes.extend([info, 0]);
    bytes.extend(section.to_le_bytes());
    bytes.extend(words(&[value, 0]));
    bytes
}

/// An ELF file for x86-64 that is to be linked: the sections begin with number 1.
fn elf(parts: &[Part]) -> Vec<u8> {
    let mut names = vec![0];
    let mut bodies: Vec<u8> = Vec::new();
    let mut headers = vec![0; 64];
    let name_table = Part(".shstrtab", 3, 0, 0, 0, Vec::new());
    for part in parts.iter().chain([&name_table]) {
        let at = names.len() as u32;
        names.extend(part.0.bytes().chain([0]));
        let is_names = part.0 == ".shstrtab";
        let body = if is_names { names.as_slice() } else { &part.5 };
        headers.extend(at.to_le_bytes());
        headers.extend(part.1.to_le_bytes());
        headers.extend(words(&[part.2, 0, 64 + bodies.len() as u64, body.len() as u64]));
        headers.extend(part.3.to_le_bytes());
        headers.extend(part.4.to_le_bytes());
        headers.extend(words(&[8, if part.1 == 4 || part.1 == 2 { 24 } else { 0 }]));
        bodies.extend(body);
    }
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([1, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(words(&[0, 0, 64 + bodies.len() as u64]));
    file.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0]);
    let count = parts.len() as u16 + 2;
    file.extend(count.to_le_bytes());
    file.extend((count - 1).to_le_bytes());
    file.extend(bodies);
    file.extend(headers);
    file
}

/// A module with one function, which refers to what there is in every way that there is.
fn module() -> Vec<u8> {
    let strings = b"\0elsewhere\0nowhere\0own\0__ksymtab_own\0__SCT__call\0maybe\0".to_vec();
    let symbols = [
        symbol(0, 0, 0, 0),
        symbol(0, 3, 1, 0),     // 1: the section .text
        symbol(0, 3, 5, 0),     // 2: .data
        symbol(1, 0x10, 0, 0),  // 3: elsewhere
        symbol(11, 0x10, 0, 0), // 4: nowhere
        symbol(19, 0x12, 1, 8), // 5: own
        symbol(23, 0, 5, 0),    // 6: __ksymtab_own
        symbol(37, 2, 1, 48),   // 7: __SCT__call
        symbol(49, 0x20, 0, 0), // 8: maybe, weak
        symbol(0, 3, 12, 0),    // 9: .bss
    ];
    let relocations = [
        relocation(0, 3, 4, -4),  // PLT32
        relocation(8, 2, 1, 16),  // 64
        relocation(16, 2, 11, 8), // 32S
        relocation(20, 4, 2, -4), // PC32 of what nobody has
        relocation(24, 3, 24, 0), // PC64
        relocation(32, 8, 1, 0),  // 64 of what need not be there
        relocation(56, 9, 1, 0),  // 64 of what has no bytes
    ];
    let alternative = [
        relocation(0, 1, 2, 16),
        relocation(4, 1, 2, 40),
        relocation(14, 1, 2, 24),
        relocation(18, 1, 2, 44),
    ];
    let mut entries = vec![0; 28];
    entries[12..14].copy_from_slice(&[5, 3]);
    entries[26..28].copy_from_slice(&[2, 0]);
    let mut note = [4u32, 4, 3]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect::<Vec<u8>>();
    note.extend(b"GNU\0\xab\xcd\xef\x01");
    elf(&[
        Part(".text", 1, 6, 0, 0, vec![0x90; 64]),
        Part(".rela.text", 4, 0x40, 9, 1, relocations.concat()),
        Part(".altinstructions", 1, 2, 0, 0, entries),
        Part(".rela.altinstructions", 4, 0x40, 9, 3, alternative.concat()),
        Part(".data", 1, 3, 0, 0, vec![0; 32]),
        Part(
            ".modinfo",
            1,
            2,
            0,
            0,
            b"license=GPL\0name=own_one\0vermagic=6.1.0 SMP\0".to_vec(),
        ),
        Part(".note.gnu.build-id", 7, 2, 0, 0, note),
        Part(".return_sites", 1, 2, 0, 0, vec![0; 4]),
        Part(".symtab", 2, 0, 10, 5, symbols.concat()),
        Part(".strtab", 3, 0, 0, 0, strings),
        Part(".rela.return_sites", 4, 0x40, 9, 8, relocation(0, 5, 2, 2)),
        Part(".bss", 8, 3, 0, 0, Vec::new()),
    ])
}

fn with<T>(file: &ModuleFile, then: impl FnOnce(Placed<'_>) -> T) -> T {
    then(file.placed(&Outside {
        sections: &[(".text", Gva(TEXT)), (".data", Gva(DATA))],
        per_cpu: None,
        symbol: &|name| (name == "elsewhere").then_some(ELSEWHERE),
    }))
}

#[test]
fn code_is_laid_out_as_the_loader_does() {
    let file = ModuleFile::parse(&module()).unwrap();
    assert_eq!(file.name, "own_one");
    assert_eq!(file.build_id.as_deref(), Some("abcdef01"));
    assert_eq!(
        (file.release(), file.srcversion.as_deref()),
        (Some("6.1.0"), None)
    );
    with(&file, |placed| {
        let code: Vec<Relocated> = placed.code().collect();
        let [text] = code.as_slice() else {
            panic!("{code:?}")
        };
        assert_eq!((text.name.as_str(), text.at), (".text", Gva(TEXT)));
        let four = |at: usize| u32::from_le_bytes(text.bytes[at..at + 4].try_into().unwrap());
        let eight = |at: usize| u64::from_le_bytes(text.bytes[at..at + 8].try_into().unwrap());
        assert_eq!(four(0), ELSEWHERE.wrapping_sub(4).wrapping_sub(TEXT) as u32);
        assert_eq!(four(4), 0x9090_9090);
        assert_eq!(eight(8), DATA + 16);
        assert_eq!(four(16), (DATA + 8) as u32);
        assert_eq!(eight(24), ELSEWHERE.wrapping_sub(TEXT + 24));
        assert_eq!(eight(32), 0);
        assert_eq!(eight(56), DATA + 32);
        assert_eq!(text.unknown, std::iter::once(20..24).collect::<Vec<_>>());
        assert_eq!(text.pointers, [8, 32, 56]);
        assert_eq!(placed.exports().collect::<Vec<_>>(), [("own", TEXT + 8)]);
        assert_eq!(placed.missing().count(), 0);
    });
}

#[test]
fn places_that_are_patched_come_from_the_files_tables() {
    let file = ModuleFile::parse(&module()).unwrap();
    let layout = AlternativeLayout {
        size: 14,
        length: 12,
        replacement_length: 13,
    };
    let alternative = |at, length, replacement, replacement_length| Site {
        at: TEXT + at,
        kind: SiteKind::Alternative {
            length,
            replacement: TEXT + replacement,
            replacement_length,
        },
    };
    let site = |at, kind| Site { at: TEXT + at, kind };
    let mut sites = with(&file, |placed| placed.sites(Some(layout)));
    sites.sort_by_key(|site| site.at);
    assert_eq!(
        sites,
        [
            site(10, SiteKind::Return),
            alternative(16, 5, 40, 3),
            alternative(24, 2, 44, 0),
            site(48, SiteKind::Trampoline),
        ]
    );
    assert_eq!(with(&file, |placed| placed.sites(None)).len(), 2);
}

#[test]
fn what_lies_nowhere_is_said() {
    let file = ModuleFile::parse(&module()).unwrap();
    let placed = file.placed(&Outside {
        sections: &[],
        per_cpu: None,
        symbol: &|_| None,
    });
    assert_eq!(placed.missing().collect::<Vec<_>>(), [".text"]);
    assert_eq!(placed.code().count(), 0);
}

/// Whatever a file says, it is an error or laid out, and never more than it has bytes.
#[test]
fn a_file_that_lies_does_no_harm() {
    let honest = module();
    let look = |file: &[u8]| {
        let Ok(parsed) = ModuleFile::parse(file) else {
            return;
        };
        with(&parsed, |placed| {
            let bytes: usize = placed.code().map(|s| s.bytes.len()).sum();
            assert!(bytes <= file.len() * 4);
            placed.sites(Some(AlternativeLayout {
                size: 14,
                length: 12,
                replacement_length: 13,
            }));
        });
    };
    for end in 0..honest.len() {
        look(&honest[..end]);
    }
    for at in (0..honest.len() - 8).step_by(4) {
        for lie in [1 << 63, u64::MAX, honest.len() as u64 - 1] {
            let mut file = honest.clone();
            file[at..at + 8].copy_from_slice(&lie.to_le_bytes());
            look(&file);
        }
    }
}

#[test]
fn relocations_that_cannot_be_are_refused() {
    let with = |relocation: Vec<u8>| {
        let file = elf(&[
            Part(".text", 1, 6, 0, 0, vec![0x90; 16]),
            Part(".rela.text", 4, 0x40, 4, 1, relocation),
            Part(".modinfo", 1, 2, 0, 0, b"name=a\0".to_vec()),
            Part(".symtab", 2, 0, 5, 1, symbol(0, 0, 0, 0)),
            Part(".strtab", 3, 0, 0, 0, vec![0]),
        ]);
        ModuleFile::parse(&file).map_err(|e| e.to_string())
    };
    assert!(with(relocation(12, 0, 2, 0)).is_ok());
    for (offset, symbol, kind, said) in [
        (13, 0, 2, "a relocation is for 0xd"),
        (9, 0, 1, "a relocation is for 0x9"),
        (u64::MAX - 1, 0, 2, "a relocation is for 0xfffffffffffffffe"),
        (0, 0, 42, "type 42"),
        (0, 77, 2, "no symbol 77"),
    ] {
        let error = with(relocation(offset, symbol, kind, 0)).unwrap_err();
        assert!(error.contains(said), "{error}");
    }
    assert!(ModuleFile::parse(b"\x7fELF").is_err());
    let mut other = module();
    other[16] = 2;
    assert!(ModuleFile::parse(&other).is_err());
    other[16] = 1;
    other[18] = 183;
    assert!(ModuleFile::parse(&other).is_err());
}
