//! The kinds of type that BTF knows.

use bitflags::bitflags;

/// What a type is. The discriminants are BTF's own (`include/uapi/linux/btf.h`); 0 stands for `void`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum Kind {
    /// `void`: type id 0, which has no record.
    Void = 0,
    /// An integer, a `char` or a `bool`.
    Int = 1,
    /// A pointer.
    Ptr = 2,
    /// An array with a fixed number of elements (0 for a flexible one).
    Array = 3,
    /// A structure.
    Struct = 4,
    /// A union.
    Union = 5,
    /// An enumeration with values of up to 32 bits.
    Enum = 6,
    /// A struct or union which is declared, but not defined.
    Fwd = 7,
    /// Another name for a type.
    Typedef = 8,
    /// The `volatile` qualifier.
    Volatile = 9,
    /// The `const` qualifier.
    Const = 10,
    /// The `restrict` qualifier.
    Restrict = 11,
    /// A function that the kernel defines.
    Func = 12,
    /// The type of a function: result and parameters.
    FuncProto = 13,
    /// A variable (mostly per-CPU ones in a kernel's BTF).
    Var = 14,
    /// A section and the variables in it.
    Datasec = 15,
    /// A floating-point number.
    Float = 16,
    /// An annotation of a declaration.
    DeclTag = 17,
    /// An annotation of a type, such as `__user`.
    TypeTag = 18,
    /// An enumeration with values of 64 bits.
    Enum64 = 19,
    /// A kind newer than this crate, stepped over with the help of the blob's own table of kinds.
    Unknown = 127,
}

impl Kind {
    /// The kind that BTF's number means.
    pub(crate) fn from_raw(raw: u8) -> Self {
        use Kind::*;
        const KNOWN: [Kind; 20] = [
            Void, Int, Ptr, Array, Struct, Union, Enum, Fwd, Typedef, Volatile, Const, Restrict, Func,
            FuncProto, Var, Datasec, Float, DeclTag, TypeTag, Enum64,
        ];
        KNOWN.get(usize::from(raw)).copied().unwrap_or(Unknown)
    }

    /// Bytes that follow the 12-byte record: (once, per element), where an element is counted by `vlen`.
    pub(crate) fn tail(self) -> Option<(usize, usize)> {
        Some(match self {
            Kind::Int | Kind::Var | Kind::DeclTag => (4, 0),
            Kind::Array => (12, 0),
            Kind::Struct | Kind::Union | Kind::Datasec | Kind::Enum64 => (0, 12),
            Kind::Enum | Kind::FuncProto => (0, 8),
            Kind::Ptr | Kind::Fwd | Kind::Typedef | Kind::Volatile | Kind::Const => (0, 0),
            Kind::Restrict | Kind::Func | Kind::Float | Kind::TypeTag => (0, 0),
            Kind::Void | Kind::Unknown => return None,
        })
    }

    /// Whether the third word of the record is a size in bytes.
    pub(crate) fn has_size(self) -> bool {
        use Kind::*;
        matches!(self, Int | Struct | Union | Enum | Datasec | Float | Enum64)
    }

    /// Whether the third word of the record is a type id.
    pub(crate) fn has_target(self) -> bool {
        use Kind::*;
        matches!(
            self,
            Ptr | Typedef | Volatile | Const | Restrict | Func | FuncProto | Var | DeclTag | TypeTag
        )
    }

    /// Whether the kind only qualifies or renames its target.
    pub fn is_alias(self) -> bool {
        use Kind::*;
        matches!(self, Typedef | Volatile | Const | Restrict | TypeTag)
    }

    /// Struct or union.
    pub fn is_composite(self) -> bool {
        matches!(self, Kind::Struct | Kind::Union)
    }

    /// An enumeration of either width.
    pub fn is_enum(self) -> bool {
        matches!(self, Kind::Enum | Kind::Enum64)
    }

    /// The set that holds this kind alone; empty for [`Kind::Unknown`].
    pub fn set(self) -> Kinds {
        Kinds::from_bits_truncate(1u32.checked_shl(self as u32).unwrap_or(0))
    }

    /// The word C (or BTF) has for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Void => "void",
            Kind::Int => "int",
            Kind::Ptr => "pointer",
            Kind::Array => "array",
            Kind::Struct => "struct",
            Kind::Union => "union",
            Kind::Enum | Kind::Enum64 => "enum",
            Kind::Fwd => "forward",
            Kind::Typedef => "typedef",
            Kind::Volatile => "volatile",
            Kind::Const => "const",
            Kind::Restrict => "restrict",
            Kind::Func => "function",
            Kind::FuncProto => "prototype",
            Kind::Var => "variable",
            Kind::Datasec => "section",
            Kind::Float => "float",
            Kind::DeclTag => "declaration tag",
            Kind::TypeTag => "type tag",
            Kind::Unknown => "unknown",
        }
    }
}

bitflags! {
    /// A set of kinds, to say what a name is looked up as: `pid` may be a struct and a function at once.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Kinds: u32 {
        /// [`Kind::Int`]
        const INT = 1 << 1;
        /// [`Kind::Struct`]
        const STRUCT = 1 << 4;
        /// [`Kind::Union`]
        const UNION = 1 << 5;
        /// [`Kind::Enum`]
        const ENUM32 = 1 << 6;
        /// [`Kind::Fwd`]
        const FWD = 1 << 7;
        /// [`Kind::Typedef`]
        const TYPEDEF = 1 << 8;
        /// [`Kind::Func`]
        const FUNC = 1 << 12;
        /// [`Kind::Var`]
        const VAR = 1 << 14;
        /// [`Kind::Datasec`]
        const DATASEC = 1 << 15;
        /// [`Kind::Float`]
        const FLOAT = 1 << 16;
        /// [`Kind::DeclTag`]
        const DECL_TAG = 1 << 17;
        /// [`Kind::TypeTag`]
        const TYPE_TAG = 1 << 18;
        /// [`Kind::Enum64`]
        const ENUM64 = 1 << 19;
        /// Structs and unions.
        const COMPOSITE = Self::STRUCT.bits() | Self::UNION.bits();
        /// Enumerations of either width.
        const ENUM = Self::ENUM32.bits() | Self::ENUM64.bits();
    }
}

impl Kinds {
    /// Whether a kind is in the set.
    pub fn has(self, kind: Kind) -> bool {
        let set = kind.set();
        !set.is_empty() && self.contains(set)
    }
}
