//! Module BTF over a distilled base (Linux 6.12): module files carry the few kernel types they build on, so that they
//! fit a kernel whose types have been renumbered since.
//!
//! A running kernel renumbers such BTF when it loads the module; this does the same for BTF taken out of a file or out
//! of a section in memory. See the kernel's `tools/lib/bpf/btf_relocate.c` for the rules of matching.

use super::bytes::word;
use super::error::TypesError;
use super::{Builder, Bytes, Kind, Type, TypeId, Types};

impl Types {
    /// Opens split BTF whose base is a distilled one (section `.BTF.base`) over the kernel's own types.
    ///
    /// A distilled type that the kernel has not, or has several of, stays what the module knows of it: a name and a
    /// size. The second result names these.
    pub fn from_distilled_btf(
        kernel: &Self,
        distilled: impl Into<Bytes>,
        split: impl Into<Bytes>,
    ) -> Result<(Self, Vec<String>), TypesError> {
        let distilled = Self::from_btf(distilled)?;
        let split = Self::from_split_btf(&distilled, split)?;
        let mut builder = Builder::over(kernel)?;
        for _ in split.ids() {
            builder.reserve();
        }
        let first = kernel.end_id().ok_or(TypesError::TooMany)?;
        let mut notes = Vec::new();
        // What stands for each distilled type, by its id; 0 is void on all sides.
        let mut stands = vec![TypeId::VOID];
        for t in distilled.iter() {
            let id = match counterpart(kernel, &t) {
                Ok(id) => id,
                Err(why) => {
                    notes.push(format!(
                        "{} {}: {why}",
                        t.kind().as_str(),
                        t.name().escape_default()
                    ));
                    let copy = builder.reserve();
                    // Distilled types refer to nothing.
                    builder.raw(
                        copy,
                        t.name_bytes(),
                        t.info(),
                        t.declared_size().unwrap_or(0),
                        t.tail,
                    );
                    copy
                }
            };
            stands.push(id);
        }
        let renumber = |id: u32| match stands.get(id as usize) {
            Some(stand) => stand.0,
            // First own type of the split blob: right after the distilled ones.
            None => id.wrapping_sub(stands.len() as u32).wrapping_add(first),
        };
        for t in split.iter() {
            let tail = rewrite(&split, &t, &renumber, &mut builder);
            let word = match t.target() {
                Some(target) => renumber(target.0),
                None => t.declared_size().unwrap_or(0),
            };
            builder.raw(TypeId(renumber(t.id().0)), t.name_bytes(), t.info(), word, &tail);
        }
        Ok((builder.finish()?, notes))
    }
}

/// The bytes after a record with every id and string renumbered.
fn rewrite(split: &Types, t: &Type<'_>, renumber: &dyn Fn(u32) -> u32, builder: &mut Builder) -> Vec<u8> {
    // For each word: is it a string (s), a type (t), or data (-)?
    let pattern: &[u8] = match t.kind() {
        Kind::Array => b"tt-",
        Kind::Struct | Kind::Union => b"st-",
        Kind::Enum => b"s-",
        Kind::Enum64 => b"s--",
        Kind::FuncProto => b"st",
        Kind::Datasec => b"t--",
        _ => return t.tail.to_vec(),
    };
    let words = (0..t.tail.len() / 4).zip(pattern.iter().cycle());
    let words = words.flat_map(|(i, what)| {
        let word = word(t.tail, i * 4).unwrap_or(0);
        let word = match what {
            b's' => builder.string(split.string(word)),
            b't' => renumber(word),
            _ => word,
        };
        word.to_le_bytes()
    });
    words.collect()
}

/// The kernel's type that a distilled one stands for.
fn counterpart(kernel: &Types, t: &Type<'_>) -> Result<TypeId, &'static str> {
    let same = |k: &Type<'_>| match t.kind() {
        Kind::Int => k.int() == t.int() && k.declared_size() == t.declared_size(),
        // Only pointed to: whatever has the name will do.
        Kind::Fwd => (k.kind().is_composite() || k.kind() == Kind::Fwd) && k.is_union() == t.is_union(),
        Kind::Enum | Kind::Enum64 => k.kind().is_enum() && k.declared_size() == t.declared_size(),
        kind => k.kind() == kind && k.declared_size() == t.declared_size(),
    };
    let name = t.name();
    let mut found = kernel
        .all(name)
        .filter(|&id| kernel.get(id).is_some_and(|k| same(&k)));
    let first = found.next().ok_or("the kernel has no such type of this size")?;
    if t.kind() != Kind::Fwd && found.next().is_some() {
        return Err("the kernel has several such types of this size");
    }
    Ok(first)
}
