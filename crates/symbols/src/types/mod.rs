//! Types of a kernel or a module, backed by BTF bytes.
//!
//! BTF is what kernels since 5.4 carry in their own memory; ISF and DWARF are converted into the same form by
//! [`Builder`], so there is one model whatever the source. Type records stay where they are, in the blob: opening
//! one costs a single pass that notes where each record lies, and lookups allocate nothing.
//!
//! Everything in the blob may be written by an attacker. Each offset and length is checked when it is used, chains
//! of types are followed for a bounded number of steps, and no input panics.
//!
//! The format is described in the kernel's `Documentation/bpf/btf.rst` and `include/uapi/linux/btf.h`.

mod builder;
pub(crate) mod bytes;
mod distilled;
mod enums;
mod error;
mod header;
mod index;
mod kind;
mod member;
mod name;
mod parts;
mod path;
#[cfg(test)]
pub(crate) mod random;
#[cfg(test)]
pub(crate) mod tests;
mod view;

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

pub use builder::{Builder, Def, MemberDef};
pub use bytes::Bytes;
pub use enums::{Enumerator, Enumerators};
pub use error::TypesError;
pub use kind::{Kind, Kinds};
pub use member::{Member, Members};
pub use path::Field;
pub use view::{ArrayInfo, IntInfo, Param, SectionVar, Type};

pub(crate) use name::printable;

use bytes::Words;
use header::{Header, pass};
use index::{Buckets, hash};

/// How many typedefs, qualifiers or array dimensions in a row are believed. The kernel's own limit is 32.
pub(crate) const MAX_CHAIN: usize = 64;

/// How many types of one name, or of names that share a bucket of the index, are looked at. Kernels have some tens at most, and a guest
/// that gives all its types one name shall not make every lookup a scan of them all.
const MAX_CANDIDATES: usize = 10_000;

/// The number of a type within one [`Types`]. Meaningless in any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(transparent)]
pub struct TypeId(pub u32);

impl TypeId {
    /// `void`.
    pub const VOID: Self = Self(0);
}

impl fmt::Display for TypeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// The types of a kernel, or those of a module laid over its kernel's. Cheap to clone, `Send` and `Sync`.
#[derive(Clone)]
pub struct Types(Arc<Inner>);

struct Inner {
    btf: Bytes,
    /// Type and string section, in bytes from the start of the blob.
    types: Range<usize>,
    strings: Range<usize>,
    base: Option<Types>,
    /// Id of the first type of this blob: 1, or the number of the base's types + 1.
    first_id: u32,
    /// Number of the first byte of this blob's strings: 0, or the length of the base's strings.
    first_string: u32,
    offsets: Words,
    signed_enums: bool,
    pointer_size: u8,
    names: OnceLock<Buckets>,
    enumerators: OnceLock<Buckets>,
}

impl Types {
    /// Opens the BTF of a kernel: bytes that begin with a BTF header. Bytes after the blob do no harm.
    pub fn from_btf(btf: impl Into<Bytes>) -> Result<Self, TypesError> {
        Self::open(btf.into(), None)
    }

    /// Opens the split BTF of a module over its kernel's types: ids and string offsets continue the base's.
    ///
    /// This is what a running kernel holds for each module (`struct btf.data`), also where the module file
    /// carries a distilled base: the kernel has renumbered it then.
    pub fn from_split_btf(base: &Self, btf: impl Into<Bytes>) -> Result<Self, TypesError> {
        Self::open(btf.into(), Some(base))
    }

    fn open(btf: Bytes, base: Option<&Self>) -> Result<Self, TypesError> {
        let bytes = btf.as_slice();
        let header = Header::parse(bytes)?;
        let (first_id, first_string) = Self::first_numbers(base)?;
        let pass = pass(bytes, &header, first_id)?;
        // Strings are numbered with 32 bits, base and all.
        u32::try_from(header.strings.len())
            .ok()
            .and_then(|len| len.checked_add(first_string))
            .ok_or(TypesError::TooMany)?;
        let pointer_size = match (pass.long_size, base) {
            (Some(size @ (4 | 8)), _) => size,
            (_, Some(base)) => base.pointer_size(),
            _ => 8,
        };
        Ok(Self(Arc::new(Inner {
            types: header.types,
            strings: header.strings,
            btf,
            base: base.cloned(),
            first_id,
            first_string,
            offsets: Words::from_words(&pass.offsets),
            signed_enums: pass.signed_enums || base.is_some_and(|b| b.0.signed_enums),
            pointer_size,
            names: OnceLock::new(),
            enumerators: OnceLock::new(),
        })))
    }

    /// First type id and first string number of a blob over `base`.
    fn first_numbers(base: Option<&Self>) -> Result<(u32, u32), TypesError> {
        let Some(base) = base else { return Ok((1, 0)) };
        if base.0.base.is_some() {
            return Err(TypesError::NestedSplit);
        }
        let first_id = base.end_id().ok_or(TypesError::TooMany)?;
        let first_string = u32::try_from(base.0.strings.len()).map_err(|_| TypesError::TooMany)?;
        Ok((first_id, first_string))
    }

    /// The id after the last one.
    fn end_id(&self) -> Option<u32> {
        u32::try_from(self.0.offsets.len())
            .ok()?
            .checked_add(self.0.first_id)
    }

    /// The kernel's types, where these are a module's.
    pub fn base(&self) -> Option<&Self> {
        self.0.base.as_ref()
    }

    /// The BTF blob itself, without the base.
    pub fn btf(&self) -> &Bytes {
        &self.0.btf
    }

    /// Number of types of this blob alone (not of its base), `void` not counted.
    pub fn len(&self) -> usize {
        self.0.offsets.len()
    }

    /// Whether the blob has no type of its own.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size of a pointer in bytes: 4 or 8. Deduced from `unsigned long`; 8 where there is none.
    pub fn pointer_size(&self) -> u8 {
        self.0.pointer_size
    }

    /// Ids of this blob's own types in ascending order; a module's do not include its kernel's.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = TypeId> + ExactSizeIterator + use<> {
        let first = self.0.first_id;
        // A usize-to-u32 cast loses nothing: the constructor checked that the ids fit.
        (0..self.0.offsets.len()).map(move |i| TypeId(first.wrapping_add(i as u32)))
    }

    /// This blob's own types in ascending order of their ids.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Type<'_>> {
        self.ids().filter_map(|id| self.get(id))
    }

    /// The type with this id, `void` included; `None` where the id means nothing.
    pub fn get(&self, id: TypeId) -> Option<Type<'_>> {
        let inner = &*self.0;
        if id == TypeId::VOID {
            return Some(Type::void(self));
        }
        let Some(index) = id.0.checked_sub(inner.first_id) else {
            return inner.base.as_ref()?.get(id).map(|t| t.seen_from(self));
        };
        let at = inner.offsets.get(index as usize)? as usize;
        let section = inner.btf.as_slice().get(inner.types.clone())?;
        Type::parse(self, id, section.get(at..)?)
    }

    /// The string with this number; empty where there is none.
    fn string(&self, number: u32) -> &[u8] {
        let inner = &*self.0;
        match (number.checked_sub(inner.first_string), &inner.base) {
            (Some(own), _) => header::string(
                inner.btf.as_slice().get(inner.strings.clone()).unwrap_or(&[]),
                own,
            ),
            (None, Some(base)) => base.string(number),
            (None, None) => &[],
        }
    }

    /// The first type with this name and one of these kinds: the blob's own first, then its base's.
    ///
    /// Names are not unique, not even within a kind (a kernel has several `struct console`): see [`Types::all`].
    pub fn find(&self, name: &str, kinds: Kinds) -> Option<TypeId> {
        self.all(name)
            .find(|&id| self.get(id).is_some_and(|t| kinds.has(t.kind())))
    }

    /// The first struct or union of this name; else the one that a typedef of this name stands for (`atomic_t`).
    pub fn find_struct(&self, name: &str) -> Option<TypeId> {
        self.structs(name).next()
    }

    /// Every struct and union of this name, then those which typedefs of this name stand for.
    pub fn structs<'a>(&'a self, name: &'a str) -> impl Iterator<Item = TypeId> + 'a {
        let direct = self
            .all(name)
            .filter(|&id| self.get(id).is_some_and(|t| t.kind().is_composite()));
        let named = self
            .all(name)
            .filter(|&id| self.get(id).is_some_and(|t| t.kind() == Kind::Typedef));
        let named = named.map(|id| self.resolve(id));
        direct.chain(named.filter(|&id| self.get(id).is_some_and(|t| t.kind().is_composite())))
    }

    /// The first enumeration of this name.
    pub fn find_enum(&self, name: &str) -> Option<TypeId> {
        self.find(name, Kinds::ENUM)
    }

    /// Every type of this name, of any kind: the blob's own in ascending order, then its base's.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = TypeId> + 'a {
        let base = self.0.base.as_ref().map(|base| base.own(name));
        self.own(name).chain(base.into_iter().flatten())
    }

    fn own<'a>(&'a self, name: &'a str) -> impl Iterator<Item = TypeId> + 'a {
        // Anonymous types are not in the table, so an empty name finds nothing.
        let candidates = self.names().candidates(hash(name.as_bytes()));
        let candidates = candidates.take(MAX_CANDIDATES).map(TypeId);
        candidates.filter(move |&id| self.get(id).is_some_and(|t| t.name_bytes() == name.as_bytes()))
    }

    fn names(&self) -> &Buckets {
        self.0.names.get_or_init(|| {
            let named = self.iter().filter_map(|t| {
                let name = t.name_bytes();
                (!name.is_empty()).then(|| (hash(name), t.id().0))
            });
            Buckets::build(&named.collect::<Vec<_>>())
        })
    }

    /// Size of a value of this type in bytes; `None` for `void`, functions, incomplete types and nonsense.
    pub fn size_of(&self, id: TypeId) -> Option<u64> {
        let mut elements = 1u64;
        let mut id = id;
        for _ in 0..MAX_CHAIN {
            let t = self.get(id)?;
            match t.kind() {
                Kind::Ptr => return elements.checked_mul(u64::from(self.pointer_size())),
                Kind::Array => {
                    let array = t.array()?;
                    elements = elements.checked_mul(u64::from(array.count))?;
                    id = array.element;
                }
                Kind::Var => id = t.target()?,
                kind if kind.is_alias() => id = t.target()?,
                _ => return elements.checked_mul(u64::from(t.declared_size()?)),
            }
        }
        None
    }

    /// Strips typedefs and qualifiers. `void` where a hostile chain of them does not end.
    pub fn resolve(&self, id: TypeId) -> TypeId {
        let mut id = id;
        for _ in 0..MAX_CHAIN {
            match self.get(id) {
                Some(t) if t.kind().is_alias() => id = t.target().unwrap_or_default(),
                _ => return id,
            }
        }
        TypeId::VOID
    }

    /// The per-CPU (or other) variable of this name that has a type: its type and size.
    pub fn variable(&self, name: &str) -> Option<TypeId> {
        self.get(self.find(name, Kinds::VAR)?)?.target()
    }
}

impl fmt::Debug for Types {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Types({} types", self.len())?;
        if let Some(base) = &self.0.base {
            write!(f, " over {}", base.len())?;
        }
        f.write_str(")")
    }
}
