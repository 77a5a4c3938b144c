//! The way into the monitor: VMFUNC from where it is not meant to be, and with other page tables.

use super::*;

/// VMFUNC from anywhere.
pub(super) fn functions(trial: &mut Trial) {
    let mut vmfunc = |name, reason, function: u64, index: u64| {
        trial.attack(
            name,
            reason,
            INVALID_OPCODE,
            0,
            function_and_index,
            function << 32 | index,
        );
    };
    vmfunc("VMFUNC into the gate from elsewhere", TRIPLE_FAULT, 0, 1);
    vmfunc("A4: VMFUNC into the unarmed monitor", VMFUNC, 0, 2);
    vmfunc("VMFUNC with an empty entry of the list", VMFUNC, 0, 3);
    vmfunc("VMFUNC with index 512", VMFUNC, 0, 512);
    vmfunc("VMFUNC with the greatest index", VMFUNC, 0, 0xffff_ffff);
    vmfunc("VMFUNC of a function that there is not", VMFUNC, 1, 1);
}

/// A1 with all that the monitor's code needs mapped by the attacker: VMFUNC at the end of a page, the monitor's text next,
/// whose first instruction is a jump to its entry.
unsafe extern "C" fn forged_address_space(site: u64) {
    let own = at(addr_of_mut!(CODE));
    prepare();
    // mov rsp, r12; vmfunc, at the end of the first page.
    put(4096 - 6, &[0x4c, 0x89, 0xe4, 0x0f, 0x01, 0xd4]);
    map_low(MONITOR - 0x1000, own);
    map_monitor();
    // Where the hypervisor lets the guest go on in the stub: flags, RCX, and the way back.
    let stack = [2, 0, at(&raw const jump_back)];
    let mut jumping = registers(MONITOR - 6, 0, site);
    jumping[11] = at(&raw const stack);
    // SAFETY: an attack.
    unsafe { jump_with(at(&raw const jumping)) };
}

/// A3: the attacker's page at the monitor's address, VMFUNC before the monitor's entry.
unsafe extern "C" fn own_page_at_the_monitor(site: u64) {
    prepare();
    put(0x35, &[0x0f, 0x01, 0xd4]);
    map_low(MONITOR, at(addr_of_mut!(CODE)));
    let jumping = registers(MONITOR_ENTRY - 3, 0, site);
    // SAFETY: an attack.
    unsafe { jump_with(at(&raw const jumping)) };
}

/// Maps the monitor's image where the monitor has it.
fn map_monitor() {
    let image = monitor_pages(Part::Text).chain(monitor_pages(Part::Data));
    for (page, address) in image.zip((MONITOR..).step_by(0x1000)) {
        map_low(address, page);
    }
}

/// A5 with all that the monitor's view needs in page tables of the attacker's, but for the list: what the landing clears
/// would be a word of the attacker's, and the monitor stay armed. The page tables.
fn forge_the_list() -> u64 {
    let landing = monitor_pages(Part::Fixed).nth(2).unwrap_or(0);
    let forged = forge();
    map_monitor();
    code().fill(0xcc);
    // SAFETY: tables that nobody uses yet.
    unsafe {
        let last = &mut (*addr_of_mut!(FORGED))[3].0;
        last[GATE_AT] = landing | 3;
        last[(LIST >> 12 & 511) as usize] = at(addr_of_mut!(CODE)) | 3;
    }
    forged
}

/// Whether the monitor has cleared a word of the attacker's in place of its own list's.
fn list_was_forged() -> bool {
    code()[16..20] == [0; 4]
}

/// How often the handler is called by an attack.
pub(crate) fn control(name: &[u8; 2], site: u64) -> u64 {
    if name == b"A5" {
        let (forged, real) = (forge_the_list(), cr3());
        // SAFETY: an attack; the tables are back afterwards.
        unsafe {
            attempt(under, forged);
            set_cr3(real);
        }
        return u64::from(list_was_forged());
    }
    let before = handled();
    let attack = if name == b"A1" {
        forged_address_space
    } else {
        own_page_at_the_monitor
    };
    // SAFETY: an attack.
    unsafe { attempt(attack, site) };
    handled() - before
}

/// Where the gate goes on after the store that arms.
const ARMED: usize = 10;

/// Has a page of the attacker's, in page tables of his, at the gate's address: it ends in VMFUNC right before that. The
/// address of the page tables.
pub(crate) fn prepare_past_the_arming() -> u64 {
    prepare();
    put(4096 + ARMED - 3, &[0x0f, 0x01, 0xd4]);
    let forged = forge();
    // SAFETY: tables that nobody uses yet.
    unsafe { (*addr_of_mut!(FORGED))[3].0[GATE_AT] = (at(addr_of_mut!(CODE)) + 0x1000) | 3 };
    forged
}

/// Lands in the gate after the store that arms.
pub(crate) unsafe extern "C" fn past_the_arming(forged: u64) {
    let jumping = registers(GATE + ARMED as u64 - 3, WINDOW, 0);
    // SAFETY: an attack, under tables that differ from the real ones in the gate's page alone.
    unsafe {
        set_cr3(forged);
        jump_with(at(&jumping));
    }
}

/// Copies of the trial's own page tables on the way to the gate's page: the address of the first.
fn forge() -> u64 {
    // SAFETY: copies, in which only the last level is to differ.
    unsafe {
        let tables = &*addr_of_mut!(tables::TABLES);
        let forged = &mut *addr_of_mut!(FORGED);
        for (to, from) in forged.iter_mut().zip([0, 6, 7, 8]) {
            to.0 = tables[from].0;
        }
        let base = at(forged.as_ptr());
        forged[0].0[511] = (base + 0x1000) | 3;
        forged[1].0[510] = (base + 0x2000) | 3;
        forged[2].0[9] = (base + 0x3000) | 3;
        base
    }
}

/// VMFUNC as the last instruction of a page before one of the attacker's choice.
pub(super) fn page_ends(trial: &mut Trial, site: u64) {
    let text = monitor_page(Part::Text);
    let own = at(addr_of_mut!(CODE));
    for (name, page, index, reason) in [
        (
            "A1: VMFUNC at the end of a page, the monitor's own page next",
            STUB - 0x3000,
            1,
            TRIPLE_FAULT,
        ),
        ("A1 into the unarmed monitor", STUB - 0x3000, 2, VMFUNC),
        (
            "A1 onto the gate's page tables",
            GATE & !(511 << 12) | 8 << 12,
            1,
            EPT_VIOLATION,
        ),
        ("A1 onto the list", LIST - 0x1000, 1, EPT_VIOLATION),
    ] {
        prepare();
        put(4096 - 3, &[0x0f, 0x01, 0xd4]);
        let _first = map(page, own);
        let _second = map(page + 0x1000, text);
        let mut jumping = registers(page + 0xffd, WINDOW, site);
        jumping[2] = index;
        trial.attack(name, reason, INVALID_OPCODE, 0, jump, at(&jumping));
    }
    trial.attack(
        "A1 with the monitor's whole address space forged",
        TRIPLE_FAULT,
        INVALID_OPCODE,
        0,
        forged_address_space,
        site,
    );
    prepare();
    put(0x35, &[0x0f, 0x01, 0xd4]);
    map_low(MONITOR, own);
    for (name, index, reason) in [
        (
            "A3: the attacker's page at the monitor's address",
            1,
            TRIPLE_FAULT,
        ),
        ("A3 into the unarmed monitor", 2, VMFUNC),
    ] {
        let mut jumping = registers(MONITOR_ENTRY - 3, WINDOW, site);
        jumping[2] = index;
        trial.attack(name, reason, INVALID_OPCODE, 0, jump, at(&jumping));
    }
}

/// The attacker's own page at the gate's address, so that VMFUNC lands on any of its bytes.
pub(super) fn every_offset(trial: &mut Trial, site: u64) {
    let own = at(addr_of_mut!(CODE));
    let _first = map(STUB, own);
    let _second = map(GATE, own + 0x1000);
    // Who lands on the gate's load of CR3 loads what VMFUNC wanted in RCX, 1: page 0 must be tables then, for the guest to
    // go on. In the gate it makes no difference.
    tables::copy_to_page_zero();
    let real = cr3();
    for (name, value) in [
        ("landing on each byte of the gate, registers zero", 0),
        (
            "landing on each byte of the gate, registers at the list",
            LIST + 16,
        ),
        (
            "landing on each byte of the gate, registers at guest memory",
            WINDOW,
        ),
        ("landing on each byte of the gate, registers all ones", u64::MAX),
    ] {
        let before = handled();
        let (mut reached, mut last) = (0, usize::MAX);
        for offset in 0..4096usize {
            prepare();
            put(4096 + offset - 3, &[0x0f, 0x01, 0xd4]);
            let mut jumping = registers(GATE + offset as u64 - 3, value, site);
            // One byte into the load of CR3 from R11 is one from RBX: nonsense there would be the guest's own end.
            jumping[1] = real;
            let calls = handled();
            // SAFETY: an attack.
            unsafe {
                attempt(jump, at(&jumping));
                set_cr3(real);
            }
            if handled() != calls {
                reached += 1;
                last = offset;
            }
        }
        let good = reached == 1 && last == 0 && handled() - before == 1;
        trial.check(
            name,
            good,
            format_args!("{reached} of 4096 reach the monitor, the last is {last:#x}"),
        );
    }
}

/// A hook under other page tables.
unsafe extern "C" fn under(cr3: u64) {
    // SAFETY: tables that map what the real ones do, where it matters.
    unsafe {
        set_cr3(cr3);
        hook_call(ENTRY);
        assert_eq!(self::cr3(), cr3 & !(1 << 63), "CR3 is kept");
    }
}

/// CR3 of the attacker's.
pub(super) fn page_tables(trial: &mut Trial) {
    let real = cr3();
    let text = monitor_page(Part::Text);
    let forged = forge();
    trial.survives("a hook under other page tables", 1, under, forged);
    // SAFETY: back to what it was.
    unsafe { set_cr3(real) };
    // SAFETY: the gate's address becomes the monitor's text: what the monitor's view would run if it used these tables.
    unsafe { (*addr_of_mut!(FORGED))[3].0[GATE_AT] = text | 3 };
    trial.attack(
        "A5: page tables of the attacker's, read-write in the monitor's view",
        EPT_VIOLATION,
        PROTECTION,
        1,
        under,
        forged,
    );
    // SAFETY: back to what it was.
    unsafe { set_cr3(real) };
    trial.attack(
        "A5 with a list of the attacker's",
        EPT_VIOLATION,
        PROTECTION,
        1,
        under,
        forge_the_list(),
    );
    trial.check(
        "A5: the list that is cleared is the monitor's",
        !list_was_forged(),
        format_args!("what the attacker has at its address is as it was"),
    );
    // SAFETY: as above; CR3 has no PCID when they are turned on and off.
    unsafe {
        set_cr3(real);
        set_cr4(cr4() | CR4_PCIDE);
    }
    trial.survives("a hook with a PCID", 1, under, real | 5);
    trial.survives("a hook with bit 63 of CR3", 1, under, real | 6 | 1 << 63);
    // SAFETY: as above.
    unsafe {
        set_cr3(real);
        set_cr4(cr4() & !CR4_PCIDE);
    }
}
