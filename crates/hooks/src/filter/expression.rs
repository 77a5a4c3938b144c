//! What a filter says, as its author writes it.

use vmsight_arch::{Dtb, Gva};

use crate::verdict::Register;

/// Something that a vCPU or an event holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Field {
    /// A register of the program.
    Register(Register),
    /// CR0.
    Cr0,
    /// CR2: the address of the last page fault.
    Cr2,
    /// CR3, with flags and PCID.
    Cr3,
    /// CR4.
    Cr4,
    /// EFER.
    Efer,
    /// The privilege level, 0 to 3.
    Cpl,
    /// The base of FS.
    FsBase,
    /// The base of GS, whoever's it is at the moment.
    GsBase,
    /// The base of the kernel's per-CPU data (Linux on x86-64): GS's in the kernel, in user mode what SWAPGS would
    /// bring in. Between the kernel's first instruction and its SWAPGS that is the program's own base, which it may
    /// choose: hooks there are not for filters by process.
    PerCpu,
    /// The number of the vCPU.
    Vcpu,
    /// What is written, or what a read gives.
    New,
    /// What was there before.
    Old,
    /// The virtual address of a memory access.
    Gva,
    /// The physical address of a memory access.
    Gpa,
    /// Bytes accessed, of memory or of a port.
    Length,
    /// The number of the MSR, the port or the vector.
    Index,
    /// The error code of an exception.
    ErrorCode,
}

/// Two numbers into one. All of them wrap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Arithmetic {
    /// Bits that both have.
    And,
    /// Bits that one of them has.
    Or,
    /// Bits that just one of them has.
    Xor,
    /// The sum.
    Add,
    /// The difference.
    Subtract,
    /// The first, shifted to the left; 0 for 64 bits and more.
    ShiftLeft,
    /// The first, shifted to the right; 0 for 64 bits and more.
    ShiftRight,
}

/// How two numbers are compared, without a sign.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Comparison {
    /// They are the same.
    Equal,
    /// They are not.
    Different,
    /// The first is smaller.
    Less,
    /// The first is not bigger.
    AtMost,
}

/// How much of a text has to be the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TextMatch {
    /// It begins so.
    Prefix,
    /// It is so, up to its terminating zero.
    Whole,
}

/// A number of 64 bits. Where what it is made of is not there it is unknown.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Value {
    /// This one.
    Constant(u64),
    /// What the vCPU or the event holds.
    Field(Field),
    /// A little-endian number in guest memory.
    Load {
        /// Where: a virtual address, in the vCPU's address space.
        at: Box<Value>,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
    },
    /// Two numbers into one.
    Combined(Box<Value>, Arithmetic, Box<Value>),
}

impl Value {
    /// A register.
    pub const fn register(register: Register) -> Self {
        Self::Field(Field::Register(register))
    }

    fn with(self, operation: Arithmetic, other: impl Into<Self>) -> Self {
        Self::Combined(Box::new(self), operation, Box::new(other.into()))
    }

    /// With `offset` added; wraps.
    #[must_use]
    pub fn plus(self, offset: impl Into<Self>) -> Self {
        self.with(Arithmetic::Add, offset)
    }

    /// Only the bits of `mask`.
    #[must_use]
    pub fn masked(self, mask: impl Into<Self>) -> Self {
        self.with(Arithmetic::And, mask)
    }

    /// What lies there in guest memory: a number of 1, 2, 4 or 8 bytes. `a.plus(8).load(8).plus(16).load(4)` is a
    /// chain of pointers.
    #[must_use]
    pub fn load(self, size: u8) -> Self {
        Self::Load {
            at: Box::new(self),
            size,
        }
    }

    fn compared(self, how: Comparison, other: impl Into<Self>) -> Condition {
        Condition::Compare(self, how, other.into())
    }

    /// Whether it is `other`.
    pub fn is(self, other: impl Into<Self>) -> Condition {
        self.compared(Comparison::Equal, other)
    }

    /// Whether it is another than `other`.
    pub fn is_not(self, other: impl Into<Self>) -> Condition {
        self.compared(Comparison::Different, other)
    }

    /// Whether it is smaller than `other`.
    pub fn is_below(self, other: impl Into<Self>) -> Condition {
        self.compared(Comparison::Less, other)
    }

    /// Whether it is at most `other`.
    pub fn is_at_most(self, other: impl Into<Self>) -> Condition {
        self.compared(Comparison::AtMost, other)
    }

    /// Whether it is one of these, at most 255.
    pub fn is_one_of(self, numbers: impl IntoIterator<Item = u64>) -> Condition {
        Condition::OneOf(self, numbers.into_iter().collect())
    }

    /// Whether the text that lies there in guest memory begins with `text`.
    pub fn begins_with(self, text: impl Into<Vec<u8>>) -> Condition {
        Condition::Text(self, TextMatch::Prefix, text.into())
    }

    /// Whether the text that lies there in guest memory, up to its terminating zero, is `text`.
    pub fn reads(self, text: impl Into<Vec<u8>>) -> Condition {
        Condition::Text(self, TextMatch::Whole, text.into())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Constant(number)
    }
}

impl From<Field> for Value {
    fn from(field: Field) -> Self {
        Self::Field(field)
    }
}

impl From<Register> for Value {
    fn from(register: Register) -> Self {
        Self::register(register)
    }
}

/// Whether an event is wanted. What depends on an unknown number is unknown itself, unless the rest decides (so
/// "false and unknown" is false, and "not unknown" is unknown).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Condition {
    /// A comparison of two numbers.
    Compare(Value, Comparison, Value),
    /// Whether a number is one of these: at most 255.
    OneOf(Value, Vec<u64>),
    /// A comparison of a text at a virtual address: 1 to 255 bytes.
    Text(Value, TextMatch, Vec<u8>),
    /// All of them; true where there is none.
    All(Vec<Condition>),
    /// One of them at least; false where there is none.
    Any(Vec<Condition>),
    /// The contrary.
    Not(Box<Condition>),
}

impl Condition {
    /// Whether these page tables are in CR3, in either of the two roots that a process has with page-table
    /// isolation (see [`crate::Scope::Dtb`]).
    pub fn dtb(dtb: Dtb) -> Self {
        const ROOT: u64 = 0x000f_ffff_ffff_e000;
        Value::from(Field::Cr3).masked(ROOT).is(dtb.0 & ROOT)
    }

    /// Whether the next instruction is one of those in the `len` bytes from `start` on. Its contrary (`!`) is that they were left.
    pub fn rip_within(start: Gva, len: u64) -> Self {
        let rip = Value::from(Register::Rip);
        // What lies below wraps to what is far above.
        rip.with(Arithmetic::Subtract, start.0).is_below(len)
    }

    /// This and `other`.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match self {
            Self::All(mut all) => {
                all.push(other);
                Self::All(all)
            }
            one => Self::All(vec![one, other]),
        }
    }

    /// This or `other`.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        match self {
            Self::Any(mut any) => {
                any.push(other);
                Self::Any(any)
            }
            one => Self::Any(vec![one, other]),
        }
    }
}

impl std::ops::Not for Condition {
    type Output = Self;

    fn not(self) -> Self {
        Self::Not(Box::new(self))
    }
}
