//! Which transform of the kernel's crypto API an AES schedule belongs to.
//!
//! A transform (`struct crypto_tfm`, include/linux/crypto.h) has its algorithm's address in it and then, in the same allocation,
//! the context that its driver keeps: there the schedules lie.

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::Kernel;

use crate::Object;

/// Bytes before a schedule in which its transform may begin: contexts have two schedules and their inverses at most.
const REACH: u64 = 1536;

/// Names of the algorithm and of the driver of the transform that what lies at `gpa` belongs to, and the transform's address:
/// the nearest before it, in memory that the kernel has in one piece, whose algorithm has AES in its name.
pub(super) fn transform(kernel: &Kernel, gpa: Gpa) -> Option<(String, Gva)> {
    let direct = kernel.image().direct_map?;
    let offset = Object::new(kernel, "crypto_tfm", Gva(0))
        .ok()?
        .member("__crt_alg")
        .ok()?
        .0;
    let first = gpa.0.saturating_sub(REACH) & !7;
    let mut bytes = vec![0; usize::try_from(gpa.0.checked_sub(first)?).ok()?];
    kernel.memory().read(Gpa(first), &mut bytes).ok()?;
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().enumerate().rev().find_map(|(index, word)| {
        let algorithm = u64::from_le_bytes(*word);
        // A structure in the kernel's half.
        if algorithm >> 47 != 0x1_ffff || algorithm & 7 != 0 {
            return None;
        }
        let algorithm = Object::new(kernel, "crypto_alg", Gva(algorithm)).ok()?;
        let (name, driver) = (
            algorithm.array_text("cra_name").ok()?,
            algorithm.array_text("cra_driver_name").ok()?,
        );
        let plain = |text: &str| text.contains("aes") && text.bytes().all(|b| b.is_ascii_graphic());
        (plain(&name) && plain(&driver)).then(|| {
            let at = first + index as u64 * 8;
            (
                format!("{name} ({driver})"),
                direct.wrapping_add(at).wrapping_sub(offset),
            )
        })
    })
}
