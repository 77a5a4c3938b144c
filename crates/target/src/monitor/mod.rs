//! The texts of QEMU's human monitor, which QMP and the gdb stub both can ask for.
//!
//! The monitor's text is no interface that QEMU promises to keep; it has not changed in these places from 5.x
//! to 10.x except by columns added at the end. The captured texts beside this file are what real QEMUs 7.2 and
//! 10.0 said.

mod mtree;
mod ramblock;
mod registers;

pub(crate) use mtree::{FlatRange, device_memory, guest_memory};
pub(crate) use ramblock::{RamBlock, parse_gpa2hva, parse_memdev, parse_ramblocks};
pub(crate) use registers::parse_registers;

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts of a real machine with pieces of them changed, as a hostile VMM would.
    fn mangle(text: &str, at: usize, len: usize, with: &str) -> String {
        let start = (0..=at.min(text.len()))
            .rev()
            .find(|i| text.is_char_boundary(*i))
            .unwrap_or(0);
        let end =
            (start.saturating_add(len).min(text.len())..=text.len()).find(|i| text.is_char_boundary(*i));
        format!("{}{with}{}", &text[..start], &text[end.unwrap_or(text.len())..])
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(at in 0_usize..6000, len in 0_usize..200, with in "[-0-9a-fx@(): \\n=é]{0,40}") {
            let mtree = mangle(include_str!("captured/qemu10.0-q35-backends.mtree"), at, len, &with);
            guest_memory(&mtree, &[]);
            device_memory(&mtree, &[]);
            parse_ramblocks(&mangle(include_str!("captured/qemu10.0-q35-backends.ramblock"), at % 1200, len, &with));
            parse_registers(&mangle(include_str!("captured/qemu7.2-linux-6.1.registers"), at % 4000, len, &with));
            parse_gpa2hva(&with);
        }
    }
}
