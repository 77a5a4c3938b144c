//! One type, read from its record.

use super::bytes::word;
use super::header::{raw_kind, vlen};
use super::{Kind, TypeId, Types};

/// A type within its [`Types`]. Cheap to copy: it points into the blob.
#[derive(Clone, Copy)]
pub struct Type<'a> {
    pub(super) types: &'a Types,
    id: TypeId,
    name: u32,
    info: u32,
    word: u32,
    /// What follows the record and belongs to it.
    pub(super) tail: &'a [u8],
}

/// What is to know about an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntInfo {
    /// Width in bits; less than the size says only for old-style bitfields.
    pub bits: u8,
    /// Where its bits begin within the bytes of its size; 0 but for old-style bitfields.
    pub bit_offset: u8,
    /// Signed.
    pub signed: bool,
    /// Meant as a character. Kernel BTF does not set it for `char`.
    pub is_char: bool,
    /// A `bool`.
    pub is_bool: bool,
}

/// What is to know about an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArrayInfo {
    /// Type of an element.
    pub element: TypeId,
    /// Type of an index; of no use.
    pub index: TypeId,
    /// Number of elements; 0 for a flexible array.
    pub count: u32,
}

/// A parameter of a function. A last one without name and type stands for `...`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param<'a> {
    /// Name; empty where the prototype gives none.
    pub name: &'a str,
    /// Type.
    pub type_id: TypeId,
}

/// A variable's place in a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionVar {
    /// The variable, a type of kind [`Kind::Var`].
    pub variable: TypeId,
    /// Offset from the start of the section; for `.data..percpu`, what to add to a CPU's area.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
}

impl<'a> Type<'a> {
    pub(super) fn void(types: &'a Types) -> Self {
        Self {
            types,
            id: TypeId::VOID,
            name: 0,
            info: 0,
            word: 0,
            tail: &[],
        }
    }

    /// Reads the record at the start of `bytes`; `None` where it is cut.
    pub(super) fn parse(types: &'a Types, id: TypeId, bytes: &'a [u8]) -> Option<Self> {
        let record = bytes.get(..12)?;
        let info = word(record, 4)?;
        let (once, each) = Kind::from_raw(raw_kind(info)).tail().unwrap_or((0, 0));
        let len = each.checked_mul(vlen(info) as usize)?.checked_add(once)?;
        let tail = bytes.get(12..12usize.checked_add(len)?)?;
        Some(Self {
            types,
            id,
            name: word(record, 0)?,
            info,
            word: word(record, 8)?,
            tail,
        })
    }

    /// The same type, with ids looked up in `types`, which has this type's own blob as its base.
    pub(super) fn seen_from(self, types: &'a Types) -> Self {
        Self { types, ..self }
    }

    /// Its id.
    pub fn id(&self) -> TypeId {
        self.id
    }

    /// What it is.
    #[inline]
    pub fn kind(&self) -> Kind {
        match raw_kind(self.info) {
            0 if self.id != TypeId::VOID => Kind::Unknown,
            raw => Kind::from_raw(raw),
        }
    }

    /// Its name; empty for an anonymous type, and for a name that is not UTF-8, which no compiler makes.
    pub fn name(&self) -> &'a str {
        std::str::from_utf8(self.name_bytes()).unwrap_or("")
    }

    /// Its name as the guest has it.
    pub fn name_bytes(&self) -> &'a [u8] {
        self.types.string(self.name)
    }

    /// The size which its record states, in bytes; `None` for kinds that have none (see [`Types::size_of`]).
    pub fn declared_size(&self) -> Option<u32> {
        self.kind().has_size().then_some(self.word)
    }

    /// The size of a value of this type in bytes: [`Types::size_of`].
    pub fn size(&self) -> Option<u64> {
        self.types.size_of(self.id)
    }

    /// What it points to, renames, qualifies or (a function prototype) returns.
    pub fn target(&self) -> Option<TypeId> {
        self.kind().has_target().then_some(TypeId(self.word))
    }

    /// The kind-dependent flag of the record.
    pub(crate) fn flag(&self) -> bool {
        self.info >> 31 == 1
    }

    /// The second word of the record, which holds kind, flag and number of elements.
    pub(super) fn info(&self) -> u32 {
        self.info
    }

    /// Number of members, enumerators, parameters or variables; the linkage of a function.
    pub fn vlen(&self) -> u32 {
        vlen(self.info)
    }

    /// Whether it is a union; a forward declaration can be one too.
    pub fn is_union(&self) -> bool {
        match self.kind() {
            Kind::Union => true,
            Kind::Fwd => self.flag(),
            _ => false,
        }
    }

    /// Details of an integer.
    pub fn int(&self) -> Option<IntInfo> {
        if self.kind() != Kind::Int {
            return None;
        }
        let data = word(self.tail, 0)?;
        let encoding = data >> 24 & 0xf;
        Some(IntInfo {
            bits: data as u8,
            bit_offset: (data >> 16) as u8,
            signed: encoding & 1 != 0,
            is_char: encoding & 2 != 0,
            is_bool: encoding & 4 != 0,
        })
    }

    /// Details of an array.
    pub fn array(&self) -> Option<ArrayInfo> {
        if self.kind() != Kind::Array {
            return None;
        }
        let (element, index) = (word(self.tail, 0)?, word(self.tail, 4)?);
        Some(ArrayInfo {
            element: TypeId(element),
            index: TypeId(index),
            count: word(self.tail, 8)?,
        })
    }

    /// The parameters of a function prototype; nothing for other kinds.
    pub fn params(&self) -> impl ExactSizeIterator<Item = Param<'a>> + use<'a> {
        let types = self.types;
        self.elements(self.kind() == Kind::FuncProto, 8)
            .map(move |e| Param {
                name: std::str::from_utf8(types.string(word(e, 0).unwrap_or(0))).unwrap_or(""),
                type_id: TypeId(word(e, 4).unwrap_or(0)),
            })
    }

    /// The variables of a section; nothing for other kinds.
    pub fn section_vars(&self) -> impl ExactSizeIterator<Item = SectionVar> + use<'a> {
        self.elements(self.kind() == Kind::Datasec, 12)
            .map(|e| SectionVar {
                variable: TypeId(word(e, 0).unwrap_or(0)),
                offset: word(e, 4).unwrap_or(0),
                size: word(e, 8).unwrap_or(0),
            })
    }

    /// The component a declaration tag speaks of: a member or parameter by number, -1 for the whole.
    pub fn component(&self) -> Option<i32> {
        if self.kind() != Kind::DeclTag {
            return None;
        }
        Some(word(self.tail, 0)? as i32)
    }

    /// The records after the type, each `size` bytes long, if they are of that kind.
    pub(super) fn elements(&self, of_kind: bool, size: usize) -> std::slice::ChunksExact<'a, u8> {
        let tail: &'a [u8] = if of_kind { self.tail } else { &[] };
        tail.chunks_exact(size)
    }
}

impl std::fmt::Debug for Type<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?}", self.id, self.kind().as_str(), self.name())
    }
}
