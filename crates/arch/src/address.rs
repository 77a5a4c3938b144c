//! Newtypes for every kind of address, so that a physical address is never taken for a virtual one.

use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` where that passes 2^64.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(v) => Some(Self(v)),
                    None => None,
                }
            }

            /// The address `bytes` further on, modulo 2^64: what the guest's own arithmetic would give.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The address `bytes` before, modulo 2^64 (`container_of` on a hostile pointer must not panic).
            #[inline]
            pub const fn wrapping_sub(self, bytes: u64) -> Self {
                Self(self.0.wrapping_sub(bytes))
            }

            /// Offset inside its 4 KiB page.
            #[inline]
            pub const fn page_offset(self) -> usize {
                (self.0 & 0xfff) as usize
            }

            /// Start of its 4 KiB page.
            #[inline]
            pub const fn page_start(self) -> Self {
                Self(self.0 & !0xfff)
            }

            /// Whether this is address zero, which kernels use for "none".
            #[inline]
            pub const fn is_null(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl From<u64> for $name {
            fn from(v: u64) -> Self {
                Self(v)
            }
        }
    };
}

address! {
    /// A guest-physical address in bytes.
    Gpa
}
address! {
    /// A guest-virtual address in bytes. Says nothing about the address space it belongs to.
    Gva
}
address! {
    /// The guest-physical address of a page-table root: CR3 without its flag and PCID bits, or TTBR without its ASID.
    Dtb
}

/// A guest frame number: a guest-physical address in units of 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Gfn(pub u64);

impl Gpa {
    /// The frame this address lies in.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> 12)
    }
}

impl Gfn {
    /// The first byte of the frame; wraps for frame numbers no machine has (above 2^52).
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << 12)
    }
}
