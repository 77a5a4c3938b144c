//! Members of the kernel's structures, found by name once and read many times.

use vmsight_arch::Gva;
use vmsight_linux::{Kernel, LinuxError};
use vmsight_memory::{AddressSpace, GvaReadOp, ReadError};
use vmsight_symbols::{Field, TypeId, Types};

/// Structures that are read at once.
const BATCH: usize = 1 << 9;

/// Reads structures of `size` bytes side by side, and tells of each: its bytes, or nothing where it cannot be read.
pub(crate) fn read_many(
    space: &AddressSpace,
    size: usize,
    all: &[Gva],
    mut tell: impl FnMut(Gva, Option<&[u8]>),
) {
    let size = size.max(1);
    let mut bytes = vec![0; BATCH * size];
    for some in all.chunks(BATCH) {
        let pieces = bytes.chunks_exact_mut(size).zip(some);
        let mut reads: Vec<GvaReadOp<'_>> = pieces.map(|(piece, at)| GvaReadOp::new(*at, piece)).collect();
        space.read_batch(&mut reads);
        for (at, read) in some.iter().zip(&reads) {
            tell(*at, read.result.is_ok().then_some(&*read.buf));
        }
    }
}

/// A structure whose members are looked up.
pub(crate) struct Structure<'t> {
    types: &'t Types,
    release: &'t str,
    name: &'static str,
    id: TypeId,
}

impl<'t> Structure<'t> {
    /// The kernel's structure of this name.
    pub(crate) fn of(kernel: &'t Kernel, name: &'static str) -> Result<Self, LinuxError> {
        Self::within(kernel.types(), kernel.release(), name)
    }

    /// The structure of this name in the types of a module.
    pub(crate) fn within(types: &'t Types, release: &'t str, name: &'static str) -> Result<Self, LinuxError> {
        let id = types.find_struct(name).ok_or_else(|| LinuxError::NoType {
            name: name.to_owned(),
            release: release.to_owned(),
        })?;
        Ok(Self {
            types,
            release,
            name,
            id,
        })
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.types.size_of(self.id).unwrap_or(0)
    }

    /// A member that not every kernel has. Alternatives are parted by `|`.
    pub(crate) fn find(&self, path: &str) -> Option<Member> {
        let field = path
            .split('|')
            .find_map(|path| self.types.member_of(self.id, path))?;
        Some(Member { field })
    }

    /// A member. Alternatives are parted by `|`.
    pub(crate) fn member(&self, path: &str) -> Result<Member, LinuxError> {
        self.find(path).ok_or_else(|| LinuxError::NoMember {
            structure: self.name.to_owned(),
            member: path.replace('|', " or "),
            release: self.release.to_owned(),
        })
    }
}

/// Where a member lies in its structure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    field: Field,
}

impl Member {
    /// Its address in the structure at `base`.
    pub(crate) fn at(&self, base: Gva) -> Gva {
        base.wrapping_add(self.field.offset)
    }

    /// The structure whose member lies at `member`: the kernel's `container_of`.
    pub(crate) fn container(&self, member: Gva) -> Gva {
        member.wrapping_sub(self.field.offset)
    }

    /// The integer in the structure at `base`, without sign. Of what is longer than 8 bytes, the first 8.
    pub(crate) fn number(&self, space: &AddressSpace, base: Gva) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        let size = usize::try_from(self.field.size).unwrap_or(8).min(8);
        space.read(self.at(base), bytes.get_mut(..size).unwrap_or(&mut []))?;
        Ok(self.field.extract(u64::from_le_bytes(bytes)))
    }

    /// The integer in a structure whose bytes were read, without sign. `None` where they end before it.
    pub(crate) fn of(&self, object: &[u8]) -> Option<u64> {
        let offset = usize::try_from(self.field.offset).ok()?;
        let size = usize::try_from(self.field.size).ok()?.min(8);
        let mut bytes = [0; 8];
        let from = object.get(offset..offset.checked_add(size)?)?;
        bytes.get_mut(..size)?.copy_from_slice(from);
        Some(self.field.extract(u64::from_le_bytes(bytes)))
    }

    /// The bytes of the member in a structure whose bytes were read.
    pub(crate) fn bytes<'o>(&self, object: &'o [u8]) -> Option<&'o [u8]> {
        let offset = usize::try_from(self.field.offset).ok()?;
        object.get(offset..offset.checked_add(usize::try_from(self.field.size).ok()?)?)
    }

    /// The pointer in the structure at `base`.
    pub(crate) fn pointer(&self, space: &AddressSpace, base: Gva) -> Result<Gva, ReadError> {
        self.number(space, base).map(Gva)
    }
}
