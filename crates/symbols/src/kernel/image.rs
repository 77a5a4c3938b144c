//! What is known of a kernel image that was found.

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva};

use super::Part;
use crate::table::is_absolute;

/// A kernel image in guest memory, proven by page tables that map it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KernelImage {
    /// Where `_text` is mapped.
    pub text: Gva,
    /// The physical address of `_text`.
    pub phys: Gpa,
    /// Bytes from `_text` to the end of the mapped image, a multiple of 2 MiB on x86-64.
    pub len: u64,
    /// Run-time address minus link-time address, modulo 2^64: what KASLR added.
    pub slide: u64,
    /// The kernel's own top-level page table (`swapper_pg_dir`, `init_top_pgt`): maps the kernel, and no process.
    pub dtb: Dtb,
    /// How `dtb` is walked.
    pub mode: PagingMode,
    /// Where the kernel maps all physical memory linearly (`page_offset_base`), when that could be proven.
    pub direct_map: Option<Gva>,
    /// The image's pages by what they may be used for, ascending. Pages given back after boot are in none.
    pub parts: Vec<Part>,
    /// The kernel's `linux_banner`, "Linux version …", without the newline.
    pub banner: String,
    /// The GNU build-id note of the image.
    pub build_id: Option<Vec<u8>>,
    /// Where the evidence for all this came from, one short sentence each.
    pub evidence: Vec<String>,
}

impl KernelImage {
    /// The release in the banner: `6.1.0-56-amd64`. Empty where the banner has none.
    pub fn release(&self) -> &str {
        release_of(&self.banner)
    }

    /// The run-time address of what is linked at `address`. A value that is no address in an image
    /// ([`Symbol::is_absolute`](crate::Symbol::is_absolute)) stays what it is: KASLR moves none.
    pub fn runtime(&self, address: u64) -> Gva {
        if is_absolute(address) {
            return Gva(address);
        }
        Gva(address.wrapping_add(self.slide))
    }

    /// The link-time address of what runs at `gva`. The lower half of the address space is no kernel's, and stays what it is.
    pub fn link_time(&self, gva: Gva) -> u64 {
        if is_absolute(gva.0) {
            return gva.0;
        }
        gva.0.wrapping_sub(self.slide)
    }

    /// Whether `gva` lies in the image.
    pub fn contains(&self, gva: Gva) -> bool {
        gva.0.wrapping_sub(self.text.0) < self.len
    }
}

/// The release in a banner: the third word of "Linux version 6.1.0 …".
pub(crate) fn release_of(banner: &str) -> &str {
    banner
        .strip_prefix("Linux version ")
        .and_then(|rest| rest.split_whitespace().next())
        .unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_in_the_image_moves_with_it() {
        let image = KernelImage {
            text: Gva(0xffff_ffff_a000_0000),
            phys: Gpa(0x200_0000),
            len: 0x200_0000,
            slide: 0x1f00_0000,
            dtb: Dtb(0x1000),
            mode: PagingMode::X86Level4,
            direct_map: None,
            parts: Vec::new(),
            banner: String::new(),
            build_id: None,
            evidence: Vec::new(),
        };
        assert_eq!(image.runtime(0xffff_ffff_8100_1000), Gva(0xffff_ffff_a000_1000));
        assert_eq!(image.runtime(0x1fb80), Gva(0x1fb80));
    }

    #[test]
    fn release_is_the_third_word() {
        assert_eq!(
            release_of("Linux version 6.1.0-56-amd64 (debian-kernel@…) #1 SMP"),
            "6.1.0-56-amd64"
        );
        assert_eq!(release_of("Darwin"), "");
        assert_eq!(release_of("Linux version "), "");
    }
}
