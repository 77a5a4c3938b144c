//! Control registers to paging mode and root, and registers to text.

use vmsight_arch::paging::{Granule, PagingMode};
use vmsight_arch::registers::{Registers, control, msr};
use vmsight_arch::{Dtb, Segment};

#[test]
fn control_registers_select_the_paging_mode() {
    use control::*;
    let mode = PagingMode::from_control;
    assert_eq!(mode(CR0_PE, CR4_PAE, EFER_LME), None, "paging is off");
    assert_eq!(mode(CR0_PG, 0, 0), Some(PagingMode::X86_32 { pse: false }));
    assert_eq!(mode(CR0_PG, CR4_PSE, 0), Some(PagingMode::X86_32 { pse: true }));
    assert_eq!(mode(CR0_PG, CR4_PAE, EFER_NXE), Some(PagingMode::X86Pae));
    assert_eq!(
        mode(CR0_PG, CR4_PAE, EFER_LME | EFER_LMA),
        Some(PagingMode::X86Level4)
    );
    assert_eq!(
        mode(CR0_PG, CR4_PAE | CR4_LA57, EFER_LMA),
        Some(PagingMode::X86Level5)
    );
}

#[test]
fn a_root_is_what_cr3_holds_without_flags_and_pcid() {
    // PCID 0x805, LAM_U57 and the no-flush bit around the root.
    assert_eq!(Dtb::from_cr3(0xa000_0001_0261_8805), Dtb(0x1_0261_8000));
    assert_eq!(PagingMode::X86Pae.dtb(0x0123_4567_89ab_cdef), Dtb(0x89ab_cde0));
    assert_eq!(
        PagingMode::X86_32 { pse: true }.dtb(0x0123_4018),
        Dtb(0x0123_4000)
    );
    let arm = |granule, lpa2| PagingMode::Arm64 {
        granule,
        va_bits: 48,
        lpa2,
    };
    assert_eq!(
        arm(Granule::K4, false).dtb(0xabcd_0000_4123_4001),
        Dtb(0x4123_4000),
        "ASID and CnP"
    );
    assert_eq!(
        arm(Granule::K64, false).dtb(0xabcd_0000_4123_4009),
        Dtb(0x0002_0000_4123_4000)
    );

    let registers = Registers {
        cr0: 1 << 31,
        cr4: 1 << 5,
        efer: 0x500,
        cr3: 0x1234_5fff,
        ..Registers::default()
    };
    assert_eq!(registers.dtb(), Some(Dtb(0x1234_5000)));
    assert_eq!(Registers::default().dtb(), None);
}

#[test]
fn flags_print_by_name_and_what_has_none_as_a_number() {
    let text = |name, value| Registers::flags(name, value).map(|f| f.to_string());
    assert_eq!(text("cr0", 0x8005_0033).as_deref(), Some("PE MP ET NE WP AM PG"));
    assert_eq!(
        text("cr4", 0x0075_0ef0).as_deref(),
        Some("PSE PAE MCE PGE OSFXSR OSXMMEXCPT UMIP FSGSBASE OSXSAVE SMEP SMAP PKE")
    );
    assert_eq!(text("efer", 0xd01).as_deref(), Some("SCE LME LMA NXE"));
    assert_eq!(text("efer", 0).as_deref(), Some("-"));
    assert_eq!(text("rflags", 0x3246).as_deref(), Some("PF ZF IF"));
    assert_eq!(text("cr0", 1 << 40 | 1).as_deref(), Some("PE 0x10000000000"));
    assert_eq!(text("rip", 1), None);
}

#[test]
fn every_register_is_found_by_the_name_it_is_printed_with() {
    let registers = Registers {
        gprs: core::array::from_fn(|i| 0x100 + i as u64),
        rip: 0xffff_ffff_8100_0000,
        cs: Segment {
            selector: 0x33,
            ..Segment::default()
        },
        lstar: Some(0xffff_ffff_81e0_0080),
        ..Registers::default()
    };
    for (name, value) in registers.rows() {
        assert_eq!(registers.by_name(name), Some(value), "{name}");
    }
    assert_eq!(registers.by_name("rsp"), Some(0x104));
    assert_eq!(registers.rsp(), 0x104);
    assert_eq!(registers.by_name("lstar"), registers.lstar);
    assert_eq!(registers.by_name("star"), None, "the source did not give it");
    assert_eq!(registers.cpl(), 3);
    let text = registers.to_string();
    assert!(text.contains("rip            0xffffffff81000000\n"), "{text}");
    assert_eq!(text.lines().count(), registers.rows().count());
}

#[test]
fn msr_names_are_sorted_and_found() {
    assert!(msr::NAMES.windows(2).all(|w| w[0].0 < w[1].0));
    assert_eq!(msr::name(msr::LSTAR), Some("LSTAR"));
    assert_eq!(msr::name(0xc000_0101), Some("GS_BASE"));
    assert_eq!(msr::name(0x1234_5678), None);
}
