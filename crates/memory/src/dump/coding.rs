//! How the pages of a compressed dump are packed.

use std::cell::RefCell;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// A way to pack pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Coding {
    /// DEFLATE in zlib's wrapping.
    Zlib,
    /// LZO1X.
    Lzo,
    /// Snappy, without frames.
    Snappy,
    /// Zstandard.
    Zstd,
}

impl Coding {
    /// Its name, as it stands in the names of formats.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Lzo => "lzo",
            Self::Snappy => "snappy",
            Self::Zstd => "zstd",
        }
    }

    /// Fills `out` from `packed`, which must unpack to just that many bytes.
    pub(super) fn unpack(self, packed: &[u8], out: &mut [u8]) -> Result<(), String> {
        let len = match self {
            Self::Zlib => {
                let mut inflate = Decompress::new(true);
                match inflate.decompress(packed, out, FlushDecompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(inflate.total_out()).unwrap_or(usize::MAX),
                    Ok(_) => return Err(self.broken("it does not end where the page does")),
                    Err(error) => return Err(self.broken(&error.to_string())),
                }
            }
            Self::Lzo => lzokay::decompress::decompress(packed, out)
                .map_err(|error| self.broken(&error.to_string()))?,
            Self::Snappy => {
                // The length comes first: what would not fit is refused before it is unpacked.
                let len =
                    snap::raw::decompress_len(packed).map_err(|error| self.broken(&error.to_string()))?;
                if len != out.len() {
                    return Err(self.broken(&format!("{len} bytes instead of {}", out.len())));
                }
                snap::raw::Decoder::new()
                    .decompress(packed, out)
                    .map_err(|error| self.broken(&error.to_string()))?
            }
            Self::Zstd => unzstd(packed, out).map_err(|error| self.broken(&error))?,
        };
        if len == out.len() {
            Ok(())
        } else {
            Err(self.broken(&format!("{len} bytes instead of {}", out.len())))
        }
    }

    fn broken(self, why: &str) -> String {
        format!("the {self} data is broken: {why}")
    }
}

impl fmt::Display for Coding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

thread_local! {
    /// A context for each thread: to make one takes longer than to unpack a page.
    static UNZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

fn unzstd(packed: &[u8], out: &mut [u8]) -> Result<usize, String> {
    UNZSTD.with_borrow_mut(|kept| {
        let mut context = match kept.take() {
            Some(context) => context,
            None => zstd::bulk::Decompressor::new().map_err(|error| error.to_string())?,
        };
        let len = context
            .decompress_to_buffer(packed, out)
            .map_err(|error| error.to_string())?;
        *kept = Some(context);
        Ok(len)
    })
}

/// Packs pages, with what it takes to pack one kept for the next.
pub(super) enum Packer {
    Zlib(Compress),
    Lzo,
    Snappy(Box<snap::raw::Encoder>),
    Zstd(zstd::bulk::Compressor<'static>),
    /// Its context could not be made: pages stay as they are.
    Broken,
}

impl Packer {
    /// At a low level of each: memory packs well, and the guest may stand still meanwhile. Zstandard's −1 takes two thirds of the
    /// time of its 1 for pages of a guest, and makes a tenth more of them.
    pub(super) fn new(coding: Coding) -> Self {
        match coding {
            Coding::Zlib => Self::Zlib(Compress::new(Compression::fast(), true)),
            Coding::Lzo => Self::Lzo,
            Coding::Snappy => Self::Snappy(Box::new(snap::raw::Encoder::new())),
            Coding::Zstd => zstd::bulk::Compressor::new(-1).map_or(Self::Broken, Self::Zstd),
        }
    }

    /// The page packed; `None` where that would not make it smaller.
    pub(super) fn pack(&mut self, page: &[u8]) -> Option<Vec<u8>> {
        let packed = match self {
            Self::Zlib(deflate) => {
                deflate.reset();
                let mut out = Vec::with_capacity(page.len());
                let status = deflate.compress_vec(page, &mut out, FlushCompress::Finish).ok()?;
                (status == Status::StreamEnd).then_some(out)?
            }
            Self::Lzo => lzokay::compress::compress(page).ok()?,
            Self::Snappy(encoder) => encoder.compress_vec(page).ok()?,
            Self::Zstd(context) => context.compress(page).ok()?,
            Self::Broken => return None,
        };
        (packed.len() < page.len()).then_some(packed)
    }
}

/// Packers for as many threads as ask for one at once. Making one costs more than packing some pages with it.
pub(super) struct Packers {
    coding: Coding,
    free: Mutex<Vec<Packer>>,
}

impl Packers {
    pub(super) fn new(coding: Coding) -> Self {
        Self {
            coding,
            free: Mutex::default(),
        }
    }

    /// One for this thread, until it is dropped.
    pub(super) fn lend(&self) -> Lent<'_> {
        let free = self.free().pop();
        Lent {
            packer: free.unwrap_or_else(|| Packer::new(self.coding)),
            owner: self,
        }
    }

    fn free(&self) -> MutexGuard<'_, Vec<Packer>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A packer that goes back to where it came from.
pub(super) struct Lent<'p> {
    packer: Packer,
    owner: &'p Packers,
}

impl Lent<'_> {
    pub(super) fn pack(&mut self, page: &[u8]) -> Option<Vec<u8>> {
        self.packer.pack(page)
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let packer = std::mem::replace(&mut self.packer, Packer::Broken);
        self.owner.free().push(packer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Coding; 4] = [Coding::Zlib, Coding::Lzo, Coding::Snappy, Coding::Zstd];

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(seed in prop::collection::vec(any::<u8>(), 1..64), coding in prop::sample::select(&ALL[..])) {
            let page: Vec<u8> = seed.iter().copied().cycle().take(4096).collect();
            let packed = Packer::new(coding).pack(&page).expect("a page that repeats itself gets smaller");
            let mut out = vec![0; 4096];
            prop_assert_eq!(coding.unpack(&packed, &mut out), Ok(()));
            prop_assert_eq!(&out, &page);
            // Into a page of another size it does not fit.
            prop_assert!(coding.unpack(&packed, &mut vec![0; 4095]).is_err());
            prop_assert!(coding.unpack(&packed, &mut vec![0; 4097]).is_err());
            prop_assert!(coding.unpack(&packed[..packed.len() - 1], &mut out).is_err());
        }

        #[test]
        fn anything_else_is_refused_or_a_page(bytes in prop::collection::vec(any::<u8>(), 0..200), coding in prop::sample::select(&ALL[..])) {
            let _ = coding.unpack(&bytes, &mut vec![0; 4096]);
        }
    }

    #[test]
    fn what_does_not_get_smaller_stays() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        for coding in ALL {
            assert!(Packer::new(coding).pack(&noise).is_none(), "{coding}");
        }
    }
}
