//! Cache files of any bytes, for a guest that has whatever the file says it was made from: used, or left alone.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::GuestMemory;
use vmsight_symbols::cache::Cache;
use vmsight_symbols::kernel::KernelImage;

static FOLDER: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("vmsight-fuzz-cache-{}", std::process::id())));
static CACHE: LazyLock<Cache> = LazyLock::new(|| Cache::open(&FOLDER).expect("a cache of our own"));

/// What the seed is made for.
const IMAGE: usize = 8 << 20;
/// Sources beyond this are not there. Small, so that the guest is made quickly.
const MOST: usize = 5 << 20;
const LINK: u64 = 0xffff_ffff_8100_0000;
const DIGEST: std::ops::Range<usize> = 24..56;

fn number(data: &[u8], at: usize) -> Option<usize> {
    let bytes = data.get(at..at.checked_add(8)?)?;
    usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
}

/// The build-id, and the memory that the sources would come from; gives the file the right digest. `None` where it is cut.
fn guest(file: &mut [u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let header = number(file, 8)?;
    let derived = number(file, header.checked_sub(16)?)?.checked_add(number(file, header - 8)?)?;
    let digest = blake3::hash(file.get(DIGEST.end..header.checked_add(derived)?)?);
    let mut at = DIGEST.end + 5 * 8;
    let field = |at: &mut usize| {
        let len = number(file, *at)?;
        let start = *at + 8;
        *at = start.checked_add(len)?;
        file.get(start..*at)
    };
    let id = field(&mut at)?.to_vec();
    field(&mut at)?;
    let warnings = number(file, at)?;
    at += 8;
    for _ in 0..warnings.min(16) {
        field(&mut at)?;
    }
    let mut memory = vec![0; MOST];
    let mut from = header + derived;
    for i in 0..number(file, at)?.min(64) {
        let (to, len) = (number(file, at + 16 + i * 16)?, number(file, at + 24 + i * 16)?);
        let end = from.checked_add(len)?;
        if let (Some(bytes), Some(place)) = (
            file.get(from..end),
            to.checked_add(len).and_then(|e| memory.get_mut(to..e)),
        ) {
            place.copy_from_slice(bytes);
        }
        from = end;
    }
    // Where kallsyms' relative base lies, and its value at link time, which is that of this guest.
    let (base_at, base) = (number(file, DIGEST.end + 16)?, number(file, DIGEST.end + 24)?);
    if let Some(place) = base_at
        .checked_add(8)
        .and_then(|end| memory.get_mut(base_at..end))
    {
        place.copy_from_slice(&(base as u64).to_le_bytes());
    }
    file.get_mut(DIGEST)?.copy_from_slice(digest.as_bytes());
    Some((id, memory))
}

fuzz_target!(|data: &[u8]| {
    let mut file = data.to_vec();
    let Some((id, memory)) = guest(&mut file) else {
        return;
    };
    if !(8..=64).contains(&id.len()) {
        return;
    }
    let _ = &*CACHE;
    let hex: String = id.iter().map(|b| format!("{b:02x}")).collect();
    let path = FOLDER.join(format!("{hex}-10-20-0123456789abcdef.profile"));
    std::fs::write(&path, &file).expect("a file of our own");
    let image = KernelImage {
        text: Gva(LINK),
        phys: Gpa(0),
        len: IMAGE as u64,
        slide: 0,
        dtb: Dtb(0),
        mode: PagingMode::X86Level4,
        direct_map: None,
        parts: Vec::new(),
        banner: String::new(),
        build_id: Some(id),
        evidence: Vec::new(),
    };
    let memory = GuestMemory::from_bytes(vec![(Gpa(0), memory)]).expect("one piece");
    let profile = CACHE.load(&memory, &image);
    std::fs::remove_file(&path).expect("it was there");
    let Some(profile) = profile else { return };
    for symbol in profile.symbols.iter().take(1000) {
        let _ = profile.symbols.nearest(symbol.address);
        let _ = profile.symbols.addresses(symbol.name).count();
    }
    for t in profile.types.iter().take(200) {
        let _ = (t.size(), profile.types.find_struct(t.name()), t.members().count());
        let _ = profile.types.member(t.name(), "pid");
    }
});
