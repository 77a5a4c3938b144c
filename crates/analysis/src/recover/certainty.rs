//! How far remains in memory can be believed.

use serde::Serialize;

/// How sure it is that what a row tells of was there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Certainty {
    /// In a slab of such objects, and all of it agrees.
    Certain,
    /// In a slab of such objects, and part of it was overwritten; or elsewhere, and all of it agrees.
    Likely,
    /// In a slab of such objects, and little of it agrees.
    Doubtful,
}
