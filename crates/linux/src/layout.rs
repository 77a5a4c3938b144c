//! Where the members of the kernel's structures lie: resolved by name once, then plain integers.
//!
//! A listing declares the members it needs with [`layout!`](crate::layout::layout). Names that a kernel release renamed are given as
//! alternatives, members that not every release has as `Option`. What is missing is said with the kernel's release.

use std::marker::PhantomData;

use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, GvaReadOp, ReadError};
use vmsight_symbols::{TypeId, Types};

use crate::LinuxError;
use crate::task::ahead::{GROUP, Object};

/// The largest stretch of one structure that is buffered. `task_struct`, the largest of all, has about 14 KB.
const MAX_BUFFER: u64 = 64 << 10;

/// Members further apart than this are read separately. A cache line more costs less than another translation.
const MAX_GAP: u64 = 192;

/// Bytes that a processor fetches at once.
const LINE: usize = 64;

/// Integers that a [`Field`] can be read as.
pub(crate) trait Raw: Copy {
    /// Makes the integer from the bits of `value` above the lowest `unused`, up to 63.
    fn from_high(value: u64, unused: u32) -> Self;
}

macro_rules! raw {
    (unsigned $($t:ty)*) => {$(
        impl Raw for $t {
            #[inline]
            fn from_high(value: u64, unused: u32) -> Self {
                value.wrapping_shr(unused) as $t
            }
        }
    )*};
    (signed $($t:ty)*) => {$(
        impl Raw for $t {
            #[inline]
            fn from_high(value: u64, unused: u32) -> Self {
                (value as i64).wrapping_shr(unused) as $t
            }
        }
    )*};
}
raw!(unsigned u8 u16 u32 u64);
raw!(signed i8 i16 i32 i64);

impl Raw for Gva {
    #[inline]
    fn from_high(value: u64, unused: u32) -> Self {
        Gva(u64::from_high(value, unused))
    }
}

impl Raw for bool {
    #[inline]
    fn from_high(value: u64, unused: u32) -> Self {
        u64::from_high(value, unused) != 0
    }
}

/// An integer, pointer or bit-field member. The width is the kernel's; `T` is what it is widened or cut to.
#[derive(Debug)]
pub(crate) struct Field<T> {
    offset: u32,
    size: u8,
    shift: u8,
    bits: u8,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Field<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Field<T> {}

impl<T: Raw> Field<T> {
    /// Reads the member of the structure at `base`.
    #[inline]
    pub(crate) fn read(&self, space: &AddressSpace, base: Gva) -> Result<T, ReadError> {
        Ok(self.decode(read_word(space, self.at(base), self.size)?))
    }

    /// Picks the member out of a buffered structure. Zero if the buffer's [`Spans`] were made without it.
    #[inline]
    pub(crate) fn of(&self, object: &Buffer) -> T {
        self.decode(object.word(self.offset, self.size))
    }

    #[inline]
    fn decode(&self, value: u64) -> T {
        // A member has 1 to 64 bits. To the top, and from there down with or without the sign: no branch, and no mask to be made.
        let unused = u32::from(64u8.wrapping_sub(self.bits));
        T::from_high((value >> self.shift).wrapping_shl(unused), unused)
    }

    /// The address of the member in the structure at `base`.
    #[inline]
    pub(crate) fn at(&self, base: Gva) -> Gva {
        base.wrapping_add(u64::from(self.offset))
    }

    /// Where it lies in its structure, for [`Spans::covering`].
    pub(crate) fn extent(&self) -> Extent {
        Extent {
            offset: u64::from(self.offset),
            size: u64::from(self.size),
        }
    }
}

/// The little-endian integer of `size` bytes, up to 8, at `at`. What is loaded in one piece costs half of what is copied.
fn read_word(space: &AddressSpace, at: Gva, size: u8) -> Result<u64, ReadError> {
    match size {
        8 => space.read_u64(at),
        4 => space.read_u32(at).map(u64::from),
        2 => space.read_u16(at).map(u64::from),
        1 => space.read_u8(at).map(u64::from),
        _ => {
            let mut bytes = [0u8; 8];
            space.read(at, bytes.get_mut(..usize::from(size)).unwrap_or(&mut []))?;
            Ok(u64::from_le_bytes(bytes))
        }
    }
}

/// A member that is a structure or an array: only its place and size are of interest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    offset: u32,
    size: u32,
}

impl Place {
    /// The address of the member in the structure at `base`.
    #[inline]
    pub(crate) fn at(&self, base: Gva) -> Gva {
        base.wrapping_add(u64::from(self.offset))
    }

    /// The structure whose member lies at `member`: the kernel's `container_of`.
    #[inline]
    pub(crate) fn container(&self, member: Gva) -> Gva {
        member.wrapping_sub(u64::from(self.offset))
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> u64 {
        u64::from(self.size)
    }

    /// Offset in bytes.
    pub(crate) fn offset(&self) -> u64 {
        u64::from(self.offset)
    }

    /// Its bytes in a buffered structure. Empty if the buffer's [`Spans`] were made without it.
    #[inline]
    pub(crate) fn of<'b>(&self, object: &'b Buffer) -> &'b [u8] {
        object.bytes(self.offset, self.size as usize).unwrap_or(&[])
    }

    /// Where it lies in its structure, for [`Spans::covering`].
    pub(crate) fn extent(&self) -> Extent {
        Extent {
            offset: self.offset(),
            size: self.size(),
        }
    }
}

/// What [`layout!`](crate::layout::layout) can resolve a member to.
pub(crate) trait Resolve: Sized {
    /// Finds the first of the `names` in the struct `id`.
    fn resolve(types: &Types, id: TypeId, names: &[&str]) -> Result<Self, Missing>;
}

/// A member that could not be resolved.
pub(crate) enum Missing {
    /// None of the names exists.
    Absent,
    /// It exists, but not as what was asked for.
    Unfit(String),
}

fn lookup(types: &Types, id: TypeId, names: &[&str]) -> Result<vmsight_symbols::Field, Missing> {
    names
        .iter()
        .find_map(|name| types.member_of(id, name))
        .ok_or(Missing::Absent)
}

fn offset(field: &vmsight_symbols::Field, names: &[&str]) -> Result<u32, Missing> {
    u32::try_from(field.offset)
        .ok()
        .filter(|&o| u64::from(o) < 1 << 30)
        .ok_or_else(|| {
            Missing::Unfit(format!(
                "member {} lies at offset {:#x}",
                names.join(" or "),
                field.offset
            ))
        })
}

impl<T: Raw> Resolve for Field<T> {
    fn resolve(types: &Types, id: TypeId, names: &[&str]) -> Result<Self, Missing> {
        let field = lookup(types, id, names)?;
        let unfit = || {
            Missing::Unfit(format!(
                "member {} has {} bytes, not an integer",
                names.join(" or "),
                field.size
            ))
        };
        let offset = offset(&field, names)?;
        let (start, shift, bits) = match field.bit_size {
            // The bits may straddle the declared storage unit's start: read from the byte that the first bit lies in.
            Some(bits) => (offset, u32::from(field.bit_offset), u32::from(bits)),
            None => (offset, 0, u32::try_from(field.size * 8).unwrap_or(u32::MAX)),
        };
        let (start, shift) = (start + shift / 8, shift % 8);
        if bits == 0 || shift + bits > 64 {
            return Err(unfit());
        }
        let size = (shift + bits).div_ceil(8);
        Ok(Field {
            offset: start,
            size: size as u8,
            shift: shift as u8,
            bits: bits as u8,
            kind: PhantomData,
        })
    }
}

impl Resolve for Place {
    fn resolve(types: &Types, id: TypeId, names: &[&str]) -> Result<Self, Missing> {
        let field = lookup(types, id, names)?;
        let offset = offset(&field, names)?;
        let size = u32::try_from(field.size).unwrap_or(u32::MAX);
        Ok(Place { offset, size })
    }
}

impl<R: Resolve> Resolve for Option<R> {
    fn resolve(types: &Types, id: TypeId, names: &[&str]) -> Result<Self, Missing> {
        match R::resolve(types, id, names) {
            Ok(found) => Ok(Some(found)),
            Err(Missing::Absent) => Ok(None),
            Err(unfit) => Err(unfit),
        }
    }
}

/// A struct of offsets that [`layout!`](crate::layout::layout) made. [`crate::Kernel::layout`] resolves each once per kernel.
pub(crate) trait Layout: Sized + Send + Sync + 'static {
    /// Resolves all members, or names the first that is missing.
    fn resolve(types: &Types, release: &str) -> Result<Self, LinuxError>;
}

/// Tries every struct or union of the given names (a kernel has duplicates, as `struct console`) and takes the first that has all members.
pub(crate) fn resolve_struct<L>(
    types: &Types,
    release: &str,
    names: &[&str],
    resolve: impl Fn(&Types, TypeId, &str) -> Result<L, LinuxError>,
) -> Result<L, LinuxError> {
    let mut failure = None;
    for name in names {
        for id in types.structs(name) {
            match resolve(types, id, name) {
                Ok(layout) => return Ok(layout),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
    }
    Err(failure.unwrap_or_else(|| LinuxError::NoType {
        name: names.join(" or "),
        release: release.to_owned(),
    }))
}

/// One member, with the error that names it.
pub(crate) fn resolve_member<R: Resolve>(
    types: &Types,
    release: &str,
    id: TypeId,
    structure: &str,
    names: &[&str],
) -> Result<R, LinuxError> {
    R::resolve(types, id, names).map_err(|missing| match missing {
        Missing::Absent => LinuxError::NoMember {
            structure: structure.to_owned(),
            member: names.join(" or "),
            release: release.to_owned(),
        },
        Missing::Unfit(reason) => LinuxError::BadLayout {
            structure: structure.to_owned(),
            release: release.to_owned(),
            reason,
        },
    })
}

/// Declares the members of a kernel structure that a listing reads.
///
/// ```ignore
/// layout! {
///     pub(crate) struct TaskLayout = "task_struct" {
///         pid: Field<i32> = "pid",
///         state: Field<u32> = "__state" | "state",       // renamed in 5.14
///         cgroups: Option<Field<Gva>> = "cgroups",       // not in every configuration
///         tasks: Place = "tasks",
///     }
/// }
/// let task: Arc<TaskLayout> = kernel.layout()?;
/// let pid = task.pid.read(kernel.space(), address)?;
/// ```
/// The struct also gets `size`, the structure's size in bytes.
macro_rules! layout {
    ($(#[$meta:meta])* $vis:vis struct $name:ident = $first:literal $(| $other:literal)* {
        $($(#[$fmeta:meta])* $field:ident: $kind:ty = $path:literal $(| $alt:literal)*),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Debug)]
        #[allow(dead_code)]
        $vis struct $name {
            /// Size of the structure in bytes.
            $vis size: u64,
            $($(#[$fmeta])* $vis $field: $kind,)*
        }

        impl $crate::layout::Layout for $name {
            fn resolve(types: &::vmsight_symbols::Types, release: &str) -> Result<Self, $crate::LinuxError> {
                $crate::layout::resolve_struct(types, release, &[$first $(, $other)*], |types, id, structure| {
                    let _ = structure;
                    Ok($name {
                        size: types.size_of(id).unwrap_or(0),
                        $($field: $crate::layout::resolve_member(types, release, id, structure, &[$path $(, $alt)*])?,)*
                    })
                })
            }
        }
    };
}
pub(crate) use layout;

/// A stretch of a structure: offset and size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Offset from the structure's start.
    pub(crate) offset: u64,
    /// Length.
    pub(crate) size: u64,
}

/// Which stretches of a structure a listing reads: its fields, near ones joined, far ones apart.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spans {
    pieces: Vec<Extent>,
    /// Offsets of bytes that are in each of the pieces' cache lines, wherever in a line the structure begins.
    lines: Vec<u32>,
    start: u64,
    len: usize,
}

impl Spans {
    /// The fewest sensible reads that cover `extents`. `structure` and `release` are for the error where they lie impossibly far apart.
    pub(crate) fn covering(
        structure: &str,
        release: &str,
        extents: impl IntoIterator<Item = Extent>,
    ) -> Result<Self, LinuxError> {
        let mut all: Vec<Extent> = extents.into_iter().filter(|e| e.size > 0).collect();
        all.sort_by_key(|e| (e.offset, e.size));
        let mut pieces: Vec<Extent> = Vec::new();
        for extent in all {
            match pieces.last_mut() {
                Some(last) if extent.offset <= last.offset + last.size + MAX_GAP => {
                    let end = (last.offset + last.size).max(extent.offset + extent.size);
                    last.size = end - last.offset;
                }
                _ => pieces.push(extent),
            }
        }
        let start = pieces.first().map_or(0, |p| p.offset);
        let len = pieces.last().map_or(0, |p| p.offset + p.size) - start;
        if len > MAX_BUFFER {
            return Err(LinuxError::BadLayout {
                structure: structure.to_owned(),
                release: release.to_owned(),
                reason: format!("the members to read are spread over {len} bytes"),
            });
        }
        // Members begin below 2^30: see `offset`.
        let lines = |piece: &Extent| {
            let last = (piece.offset + piece.size - 1) as u32;
            (piece.offset as u32..last).step_by(LINE).chain([last])
        };
        Ok(Self {
            lines: pieces.iter().flat_map(lines).collect(),
            pieces,
            start,
            len: len as usize,
        })
    }

    /// A buffer that [`Spans::read`] can fill again and again.
    pub(crate) fn buffer(&self) -> Buffer {
        Buffer {
            start: self.start,
            bytes: vec![0; self.len + Buffer::PAD],
        }
    }

    /// Reads the stretches of many structures: in one batch where memory must be asked for. Where it is mapped, a batch costs more
    /// instructions than it saves waiting, for the kernel's own structures lie in few large pages.
    pub(crate) fn read_all<'b>(
        &self,
        space: &AddressSpace,
        objects: impl Iterator<Item = (Gva, &'b mut Object)>,
    ) {
        if space.memory().is_all_mapped() {
            objects.for_each(|(base, object)| {
                object.error = self.read(space, base, &mut object.buffer).err();
            });
            return;
        }
        let mut ops = Vec::with_capacity(GROUP * self.pieces.len());
        let mut errors = Vec::with_capacity(GROUP);
        for (base, object) in objects {
            let mut rest = object.buffer.bytes.as_mut_slice();
            let mut at = self.start;
            for piece in &self.pieces {
                let gap = (piece.offset - at) as usize;
                let parts = std::mem::take(&mut rest)
                    .get_mut(gap..)
                    .and_then(|from| from.split_at_mut_checked(piece.size as usize));
                let Some((bytes, after)) = parts else { break };
                ops.push(GvaReadOp::new(base.wrapping_add(piece.offset), bytes));
                (rest, at) = (after, piece.offset + piece.size);
            }
            object.error = None;
            errors.push((ops.len(), &mut object.error));
        }
        space.read_batch(&mut ops);
        let mut ops = ops.into_iter().enumerate().peekable();
        for (end, error) in errors {
            while let Some((_, op)) = ops.next_if(|(index, _)| *index < end) {
                if error.is_none() {
                    *error = op.result.err();
                }
            }
        }
    }

    /// Sends for the stretches of the structure at `base`: see [`AddressSpace::prefetch`].
    #[inline]
    pub(crate) fn prefetch(&self, space: &AddressSpace, base: Gva) {
        space.prefetch(base, &self.lines);
    }

    /// Reads the stretches of the structure at `base`. After an error the buffer holds a mixture: do not use it.
    #[inline]
    pub(crate) fn read(&self, space: &AddressSpace, base: Gva, buffer: &mut Buffer) -> Result<(), ReadError> {
        for piece in &self.pieces {
            let from = (piece.offset - self.start) as usize;
            if let Some(to) = buffer.bytes.get_mut(from..from + piece.size as usize) {
                space.read(base.wrapping_add(piece.offset), to)?;
            }
        }
        Ok(())
    }
}

/// The stretches of one structure, read into memory of ours.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffer {
    start: u64,
    bytes: Vec<u8>,
}

impl Buffer {
    /// Bytes behind those of the structure, so that each of these is the first of eight.
    const PAD: usize = 7;

    #[inline]
    fn index(&self, offset: u32) -> Option<usize> {
        usize::try_from(u64::from(offset).checked_sub(self.start)?).ok()
    }

    #[inline]
    fn bytes(&self, offset: u32, size: usize) -> Option<&[u8]> {
        let held = self.bytes.len().saturating_sub(Self::PAD);
        let from = self.index(offset)?;
        self.bytes.get(..held)?.get(from..from.checked_add(size)?)
    }

    /// The little-endian integer at `offset`, of which the lowest `size` bytes (up to 8) are of the structure; zero where those are not
    /// all here. Always eight bytes are loaded: a copy of fewer would have to be waited for before it can be loaded as an integer.
    #[inline]
    fn word(&self, offset: u32, size: u8) -> u64 {
        let word = || {
            let from = self.index(offset)?;
            let end = from.checked_add(usize::from(size) + Self::PAD)?;
            let word = self.bytes.get(from..end)?.first_chunk::<8>()?;
            Some(u64::from_le_bytes(*word))
        };
        word().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field<T: Raw>(offset: u32, size: u8, shift: u8, bits: u8) -> Field<T> {
        Field {
            offset,
            size,
            shift,
            bits,
            kind: PhantomData,
        }
    }

    /// A buffer from offset 16 on, with what must not be seen behind it.
    fn buffer(bytes: &[u8]) -> Buffer {
        Buffer {
            start: 16,
            bytes: [bytes, &[0x55; Buffer::PAD]].concat(),
        }
    }

    #[test]
    fn integers_are_widened_by_their_sign() {
        let object = buffer(&[0xfe, 0xff, 0xff, 0xff, 0, 0, 0, 0x80]);
        assert_eq!(field::<i64>(16, 4, 0, 32).of(&object), -2);
        assert_eq!(field::<u64>(16, 4, 0, 32).of(&object), 0xffff_fffe);
        assert_eq!(field::<i32>(16, 1, 0, 8).of(&object), -2);
        assert_eq!(field::<u64>(16, 8, 0, 64).of(&object), 0x8000_0000_ffff_fffe);
        assert_eq!(field::<u8>(16, 1, 3, 2).of(&object), 3);
        assert_eq!(
            field::<i64>(16, 8, 0, 64).of(&object),
            0x8000_0000_ffff_fffe_u64 as i64
        );
        assert!(field::<bool>(23, 1, 7, 1).of(&object));
    }

    #[test]
    fn a_field_outside_the_buffer_is_zero() {
        let object = buffer(&[0xff; 8]);
        assert_eq!(field::<u64>(8, 8, 0, 64).of(&object), 0);
        assert_eq!(field::<u64>(17, 8, 0, 64).of(&object), 0);
        assert_eq!(field::<u64>(24, 1, 0, 8).of(&object), 0);
        assert_eq!(field::<u64>(20, 8, 0, 64).of(&object), 0);
        assert_eq!(field::<u64>(u32::MAX, 8, 0, 64).of(&object), 0);
    }

    #[test]
    fn near_extents_are_joined_and_far_ones_kept_apart() {
        let extent = |offset, size| Extent { offset, size };
        let spans = Spans::covering(
            "s",
            "r",
            [extent(2000, 8), extent(16, 4), extent(100, 8), extent(20, 4)],
        )
        .expect("plausible extents");
        assert_eq!(spans.pieces, vec![extent(16, 92), extent(2000, 8)]);
        assert_eq!(spans.buffer().bytes.len(), 2008 - 16 + Buffer::PAD);
        assert!(Spans::covering("s", "r", [extent(0, 8), extent(1 << 29, 8)]).is_err());
        assert!(Spans::covering("s", "r", [extent(0, u64::from(u32::MAX))]).is_err());
        assert!(
            Spans::covering("s", "r", [])
                .expect("nothing to read")
                .pieces
                .is_empty()
        );
    }
}
