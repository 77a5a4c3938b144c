//! Keys of encrypted disks: volumes of dm-crypt (drivers/md/dm-crypt.c), what LUKS's are made of.
//!
//! A volume keeps its key beside its table, unless it got it from a keyring: then it wipes it (since 4.20), and only the schedules
//! in the crypto API's transforms have it. Either way the schedules prove what is told here.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::structures::list;
use vmsight_linux::{Kernel, LinuxError, Listing};
use vmsight_symbols::Types;

use super::Owned;
use super::material::Material;
use crate::Object;
use crate::frames::Owner;

/// Block devices that are looked at.
const MAX_DEVICES: usize = 1 << 16;
/// Targets of one device's table.
const MAX_TARGETS: u64 = 1 << 12;
/// The longest key of a volume: two of AES-256, and one to authenticate (dm-crypt with integrity).
const MAX_KEY: u64 = 256;
/// How many pointers away from a volume's transform the one lies that does its work: `simd` and `cryptd` are between them where
/// the processor's instructions are used.
const MAX_STEPS: u32 = 3;
/// Bytes at the beginning of a transform's context that have the pointer to the transform it hands its work to: `struct
/// simd_skcipher_ctx` (crypto/simd.c) has nothing else, `struct cryptd_skcipher_ctx` (crypto/cryptd.c) a counter before it. What
/// lies behind is another's.
const LINKS: usize = 16;

/// The key of one volume.
#[derive(Clone)]
pub struct VolumeKey {
    /// The volume's name, as in `/dev/mapper`.
    pub name: String,
    /// Cipher, mode and initial vector as the table has them: `aes-xts-plain64`.
    pub cipher: String,
    /// What the table calls the key where it came from a keyring: `logon:cryptsetup:…`.
    pub from: Option<String>,
    /// Bytes of the key.
    pub bytes: u64,
    /// Its `struct crypt_config`.
    pub address: Gva,
    /// The key, where it is proven: both halves of one for XTS.
    pub key: Option<Vec<u8>>,
    /// The schedules that prove it, as they lie in physical memory, in the order of the key's parts.
    pub schedules: Vec<Gpa>,
    /// Why there is no key.
    pub problems: Vec<String>,
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VolumeKey")
            .field("name", &self.name)
            .field("cipher", &self.cipher)
            .field("bytes", &self.bytes)
            .field("proven", &self.key.is_some())
            .field("problems", &self.problems)
            .finish_non_exhaustive()
    }
}

/// The keys of all volumes, proven by the schedules among `found`. There are none where dm-crypt is not loaded.
///
/// # Errors
/// If the kernel's block devices cannot be listed, or it keeps no types of its modules (before 5.11) to read dm-crypt's by.
pub fn volume_keys(kernel: &Kernel, found: &[Owned]) -> Result<Listing<VolumeKey>, LinuxError> {
    let mut warnings = Vec::new();
    let mut rows = Vec::new();
    let disks = disks(kernel, &mut warnings)?;
    if disks.is_empty() {
        return Ok(Listing::new(rows, warnings));
    }
    let Ok(crypt) = kernel.module_types("dm_crypt") else {
        // Volumes of other kinds, or a kernel that keeps no types: the first needs no word.
        if kernel.module_types("dm_mod").is_err() {
            warnings
                .push("the kernel keeps no types of dm_mod: encrypted volumes are not told apart".to_owned());
        }
        return Ok(Listing::new(rows, warnings));
    };
    let mapper = kernel.module_types("dm_mod")?;
    let schedules = Schedules::of(found);
    for disk in disks {
        match volumes(kernel, &mapper, &crypt, disk, &schedules) {
            Ok(found) => rows.extend(found),
            Err(error) => warnings.push(format!("the device mapper's device at {disk}: {error}")),
        }
    }
    Ok(Listing::new(rows, warnings))
}

/// The device mapper's devices (`struct mapped_device`), by the block devices of all disks.
fn disks(kernel: &Kernel, warnings: &mut Vec<String>) -> Result<BTreeSet<Gva>, LinuxError> {
    let pointer = kernel.symbol("blockdev_superblock")?;
    let block = kernel
        .space()
        .read_u64(pointer)
        .map_err(|source| LinuxError::Read {
            what: "blockdev_superblock".to_owned(),
            at: pointer,
            source,
        })?;
    let block = Object::new(kernel, "super_block", Gva(block))?;
    let in_list = kernel.offset("inode", "i_sb_list")?;
    let in_device = kernel.offset("bdev_inode", "vfs_inode")?;
    let found = list::walk(kernel.space(), block.member("s_inodes")?, MAX_DEVICES);
    warnings.extend(found.walk.end.warning("list of block devices"));
    let mut disks = BTreeSet::new();
    for node in found.walk.items {
        let device = Object::new(
            kernel,
            "bdev_inode",
            node.wrapping_sub(in_list).wrapping_sub(in_device),
        )?;
        let Ok(disk) = device.pointer("bdev.bd_disk") else {
            continue;
        };
        if disk.is_null() {
            continue;
        }
        let disk = Object::new(kernel, "gendisk", disk)?;
        if disk
            .array_text("disk_name")
            .is_ok_and(|name| name.starts_with("dm-"))
            && let Ok(private) = disk.pointer("private_data")
            && !private.is_null()
        {
            disks.insert(private);
        }
    }
    Ok(disks)
}

/// The volumes in the table of one device; tables of several pieces may have several.
fn volumes(
    kernel: &Kernel,
    mapper: &Types,
    crypt: &Types,
    device: Gva,
    schedules: &Schedules<'_>,
) -> Result<Vec<VolumeKey>, LinuxError> {
    let device = Object::of_module(kernel, mapper, "mapped_device", device)?;
    let table = device.pointer("map")?;
    if table.is_null() {
        return Ok(Vec::new());
    }
    let name = device.pointer("interface_ptr")?;
    let name = match name.is_null() {
        true => String::new(),
        false => device.of("hash_cell", name)?.text("name", 128)?,
    };
    let table = device.of("dm_table", table)?;
    let targets = table.pointer("targets")?;
    let target = device.of("dm_target", targets)?;
    let mut out = Vec::new();
    for index in 0..table.number("num_targets")?.min(MAX_TARGETS) {
        let target = target.moved(targets.wrapping_add(index.wrapping_mul(target.size())));
        let kind = target.of("target_type", target.pointer("type")?)?;
        if kind.text("name", 16)? == "crypt" {
            let config = Object::of_module(kernel, crypt, "crypt_config", target.pointer("private")?)?;
            out.push(volume(kernel, &config, &name, schedules)?);
        }
    }
    Ok(out)
}

fn volume(
    kernel: &Kernel,
    config: &Object<'_>,
    name: &str,
    schedules: &Schedules<'_>,
) -> Result<VolumeKey, LinuxError> {
    let from = config.pointer("key_string")?;
    let mut volume = VolumeKey {
        name: name.to_owned(),
        cipher: config.text("cipher_string", 128)?,
        from: match from.is_null() {
            true => None,
            false => Some(config.text("key_string", 4096)?),
        },
        bytes: config.number("key_size")?,
        address: config.address(),
        key: None,
        schedules: Vec::new(),
        problems: Vec::new(),
    };
    if !(1..=MAX_KEY).contains(&volume.bytes) {
        volume
            .problems
            .push(format!("a key of {} bytes is none", volume.bytes));
        return Ok(volume);
    }
    let at = config.member("key")?;
    let mut key = vec![0; volume.bytes as usize];
    let read = kernel.space().read(at, &mut key);
    read.map_err(|source| LinuxError::Read {
        what: "crypt_config.key".to_owned(),
        at,
        source,
    })?;
    let two = volume.cipher.contains("xts");
    let proven = match key.iter().all(|byte| *byte == 0) {
        false => schedules.prove(&key, two).map(|places| (key, places)).ok_or(
            "the key in its table has no schedules in the crypto API: it is of another cipher than AES, or computed elsewhere",
        ),
        true => {
            let first = kernel.space().read_u64(config.pointer("cipher_tfm.tfms")?);
            first
                .ok()
                .and_then(|first| schedules.behind(kernel, Gva(first), key.len(), two))
                .ok_or("it has wiped the key that a keyring gave it, and its schedules were not found")
        }
    };
    match proven {
        Ok((key, places)) => (volume.key, volume.schedules) = (Some(key), places),
        Err(why) => volume.problems.push(why.to_owned()),
    }
    Ok(volume)
}

/// The AES schedules that the kernel has, by rising address.
struct Schedules<'f> {
    all: Vec<(Gpa, Option<Gva>, &'f [u8])>,
}

impl<'f> Schedules<'f> {
    fn of(found: &'f [Owned]) -> Self {
        let of_kernel = |owned: &&Owned| owned.holders.iter().any(|holder| holder.owner == Owner::Kernel);
        let mut all: Vec<_> = found
            .iter()
            .filter(of_kernel)
            .filter_map(|owned| match &owned.hit.material {
                Material::Aes(key) => Some((owned.hit.gpa, owned.transform_at, key.as_slice())),
                _ => None,
            })
            .collect();
        all.sort_unstable_by_key(|(gpa, ..)| *gpa);
        Self { all }
    }

    /// Where the schedules of a key's parts lie: of both halves for XTS, else of the key.
    fn prove(&self, key: &[u8], two: bool) -> Option<Vec<Gpa>> {
        let parts = key.len() / if two { 2 } else { 1 };
        let place = |part: &[u8]| {
            self.all
                .iter()
                .find(|(_, _, key)| *key == part)
                .map(|(gpa, ..)| *gpa)
        };
        key.chunks(parts.max(1)).map(place).collect()
    }

    /// The key whose schedules a transform has, or one that it hands its work to. The driver of the processor's instructions
    /// has that of the tweak, the key's second half, before that of the data (arch/x86/crypto/aesni-intel_glue.c).
    fn behind(
        &self,
        kernel: &Kernel,
        transform: Gva,
        bytes: usize,
        two: bool,
    ) -> Option<(Vec<u8>, Vec<Gpa>)> {
        let within = kernel.offset("crypto_skcipher", "base").ok()?;
        let context = within.wrapping_add(kernel.offset("crypto_tfm", "__crt_ctx").ok()?);
        let direct = kernel.image().direct_map?;
        let end = direct.wrapping_add(kernel.memory().end().0);
        let mut seen = BTreeSet::from([transform]);
        let mut queue = VecDeque::from([(transform, 0)]);
        while let Some((at, steps)) = queue.pop_front() {
            let own = self
                .all
                .iter()
                .filter(|(_, transform, _)| *transform == Some(at.wrapping_add(within)));
            let own: Vec<_> = own.collect();
            match own.as_slice() {
                [(gpa, _, key)] if !two && key.len() == bytes => return Some((key.to_vec(), vec![*gpa])),
                [(tweak_at, _, tweak), (data_at, _, data)] if two && (tweak.len() + data.len()) == bytes => {
                    return Some(([*data, *tweak].concat(), vec![*data_at, *tweak_at]));
                }
                _ => {}
            }
            let mut links = [0; LINKS];
            if steps == MAX_STEPS || kernel.space().read(at.wrapping_add(context), &mut links).is_err() {
                continue;
            }
            for word in links.as_chunks::<8>().0 {
                let next = Gva(u64::from_le_bytes(*word));
                if (direct..end).contains(&next) && next.0.is_multiple_of(8) && seen.insert(next) {
                    queue.push_back((next, steps + 1));
                }
            }
        }
        None
    }
}
