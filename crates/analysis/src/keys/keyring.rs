//! The keys that a kernel keeps for its users (security/keys; keyrings(7)).

use std::fmt;

use vmsight_arch::Gva;
use vmsight_linux::structures::rbtree;
use vmsight_linux::{Kernel, LinuxError, Listing};

use crate::Object;

/// Keys that are listed: a user may have 200, root a million (`kernel.keys.root_maxkeys`).
const MAX_KEYS: usize = 1 << 20;
/// A payload of a user's key has at most 32,767 bytes (security/keys/user_defined.c).
const MAX_PAYLOAD: u64 = 32_767;

/// One key in the kernel's tree of keys.
#[derive(Clone)]
pub struct KernelKey {
    /// Its serial number.
    pub serial: i32,
    /// Its type: `user`, `logon`, `keyring`, `asymmetric`, …
    pub kind: String,
    /// What its owner calls it.
    pub description: String,
    /// Its owner.
    pub uid: u32,
    /// Its owner's group.
    pub gid: u32,
    /// Rights: eight bits each for possessor, user, group, others (include/linux/key.h).
    pub permissions: u32,
    /// The `struct key`.
    pub address: Gva,
    /// Where its payload lies, of types whose payload is bytes.
    pub at: Option<Gva>,
    /// Its payload, of the types `user` and `logon`.
    pub payload: Option<Vec<u8>>,
    /// What could not be read.
    pub problems: Vec<String>,
}

impl fmt::Debug for KernelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelKey")
            .field("serial", &self.serial)
            .field("kind", &self.kind)
            .field("description", &self.description)
            .finish_non_exhaustive()
    }
}

/// All keys, by serial number. Keyrings are keys too, and left out: they hold no secret.
///
/// # Errors
/// If the kernel has no keys (CONFIG_KEYS), or its types lack a member.
pub fn kernel_keys(kernel: &Kernel) -> Result<Listing<KernelKey>, LinuxError> {
    let root = kernel.symbol("key_serial_tree")?;
    let offset = kernel.offset("key", "serial_node")?;
    let walk = rbtree::walk(kernel.space(), root, MAX_KEYS);
    let mut rows = Vec::new();
    let mut warnings: Vec<String> = walk.end.warning("tree of keys").into_iter().collect();
    for node in walk.items {
        let at = node.wrapping_sub(offset);
        match key(kernel, at) {
            Ok(key) if key.kind == "keyring" => {}
            Ok(key) => rows.push(key),
            Err(error) => warnings.push(format!("the key at {at}: {error}")),
        }
    }
    Ok(Listing::new(rows, warnings))
}

fn key(kernel: &Kernel, at: Gva) -> Result<KernelKey, LinuxError> {
    let object = Object::new(kernel, "key", at)?;
    let kind = Object::new(kernel, "key_type", object.pointer("type|index_key.type")?)?;
    let mut key = KernelKey {
        serial: object.number("serial")? as u32 as i32,
        kind: kind.text("name", 64)?,
        description: object.text("description|index_key.description", 4096)?,
        uid: object.number("uid.val")? as u32,
        gid: object.number("gid.val")? as u32,
        permissions: object.number("perm")? as u32,
        address: at,
        at: None,
        payload: None,
        problems: Vec::new(),
    };
    if matches!(key.kind.as_str(), "user" | "logon") {
        match payload(kernel, &object) {
            Ok(Some((at, bytes))) => (key.at, key.payload) = (Some(at), Some(bytes)),
            Ok(None) => {}
            Err(error) => key.problems.push(format!("secret: {error}")),
        }
    }
    Ok(key)
}

/// `struct user_key_payload`; none of a key that was revoked, or is being made.
fn payload(kernel: &Kernel, key: &Object<'_>) -> Result<Option<(Gva, Vec<u8>)>, LinuxError> {
    let at = kernel.space().read_u64(key.member("payload")?);
    let at = Gva(at.map_err(|source| LinuxError::Read {
        what: "key.payload".to_owned(),
        at: key.address(),
        source,
    })?);
    if at.is_null() {
        return Ok(None);
    }
    let payload = Object::new(kernel, "user_key_payload", at)?;
    let length = payload.number("datalen")?.min(MAX_PAYLOAD);
    let at = payload.member("data")?;
    let mut bytes = vec![0; length as usize];
    let read = kernel.space().read(at, &mut bytes);
    read.map_err(|source| LinuxError::Read {
        what: "user_key_payload.data".to_owned(),
        at,
        source,
    })?;
    Ok(Some((at, bytes)))
}
