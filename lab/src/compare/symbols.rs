//! The kernel's own symbols.

use vmsight_linux::Kernel;

use super::Differences;
use crate::truth::{Truth, frame};

/// Compares the symbols of the profile, at the addresses they have at run time, with the lines of `/proc/kallsyms` that belong to no
/// module: how many there are, all of them by a digest, and some of them by name.
pub fn symbols(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let (table, image, said) = (&kernel.profile().symbols, kernel.image(), &truth.kallsyms);
    out.same("number of symbols", table.len() as u64, said.count);
    let lines = table
        .iter()
        .map(|s| line(image.runtime(s.address).0, char::from(s.kind), s.name));
    out.same("digest of all", digest(lines), said.sha256.as_str());
    for sample in &said.samples {
        let seen: Vec<_> = table
            .find(&sample.name)
            .map(|s| (image.runtime(s.address).0, char::from(s.kind)))
            .collect();
        let wanted = (sample.address, sample.kind);
        out.near(&sample.name, seen.contains(&wanted), &seen, wanted);
    }
    Ok(out)
}

/// A line of `/proc/kallsyms`.
pub(super) fn line(address: u64, kind: char, name: &str) -> String {
    format!("{address:016x} {kind} {name}\n")
}

/// The digest of lines in whatever order they come.
pub(super) fn digest(lines: impl Iterator<Item = String>) -> String {
    let mut lines: Vec<String> = lines.collect();
    // Without the line breaks, which sort before everything that a name is made of.
    lines.sort_unstable_by(|a, b| a.trim_end_matches('\n').cmp(b.trim_end_matches('\n')));
    frame::sha256_hex(lines.concat().as_bytes())
}
