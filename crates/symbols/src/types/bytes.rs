//! Bytes held by somebody else: a mapping of the profile cache, a vector read out of a guest.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A range of immutable bytes together with a share in whatever holds them. Cloning copies no bytes.
///
/// Type data is megabytes; with this it can stay where it already is, for instance in a memory-mapped cache file.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    start: usize,
    len: usize,
}

impl Bytes {
    /// All bytes of `owner`, which must always return the same slice.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self::shared(Arc::new(owner))
    }

    /// All bytes of an owner that is shared already.
    pub fn shared(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let len = owner.as_ref().as_ref().len();
        Self { owner, start: 0, len }
    }

    /// A part of these bytes; `None` where the range lies outside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        let owner = Arc::clone(&self.owner);
        Some(Self {
            owner,
            start: self.start.checked_add(range.start)?,
            len: range.end - range.start,
        })
    }

    /// The bytes. Empty if the owner has broken its promise and become shorter.
    #[inline]
    pub fn as_slice(&self) -> &[u8] {
        let all = self.owner.as_ref().as_ref();
        self.start
            .checked_add(self.len)
            .and_then(|end| all.get(self.start..end))
            .unwrap_or(&[])
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(bytes)
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({} bytes)", self.len)
    }
}

/// An array of little-endian `u32`, wherever it lies and however it is aligned.
#[derive(Clone, Debug)]
pub(crate) struct Words(Bytes);

impl Words {
    /// Takes bytes as words; a rest shorter than a word is out of reach.
    pub(crate) fn new(bytes: Bytes) -> Self {
        Self(bytes)
    }

    pub(crate) fn from_words(words: &[u32]) -> Self {
        let mut bytes = Vec::with_capacity(words.len() * 4);
        bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        Self(Bytes::from(bytes))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len() / 4
    }

    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<u32> {
        word(self.0.as_slice(), index.checked_mul(4)?)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        let whole = self.len() * 4;
        self.0.as_slice().get(..whole).unwrap_or(&[])
    }
}

/// The little-endian `u32` at byte `at`.
#[inline]
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}
