//! The memory of the monitor: touched by the guest, and by the monitor on the guest's behalf.

use super::*;

/// The monitor's pages, as they are and by another name.
pub(super) fn memory(trial: &mut Trial) {
    let exits = call(Call::Exits, EPT_VIOLATION);
    let (mut tried, mut stopped) = (0, 0);
    let parts = [Part::Fixed, Part::Text, Part::Lists, Part::Data];
    for physical in parts.into_iter().flat_map(monitor_pages) {
        let _alias = map(STUB - 0x1000, physical);
        for address in [physical, STUB - 0x1000] {
            for way in [read, write, execute] {
                tried += 1;
                // SAFETY: an attack.
                stopped += u64::from(unsafe { attempt(way, address) } == PROTECTION);
            }
        }
    }
    let exits = call(Call::Exits, EPT_VIOLATION) - exits;
    let good = tried >= 60 && stopped == tried && exits == tried;
    trial.check(
        "read, write, execute each page of the monitor, also by an alias",
        good,
        format_args!("{stopped} of {tried} stopped; exit {EPT_VIOLATION}: {exits}"),
    );
    hypervisor(trial);
}

/// The hypervisor's memory, in which the monitor's pages lie: from one of them to either side, as far as all is stopped.
fn hypervisor(trial: &mut Trial) {
    /// It has more than 4 MiB.
    const LEAST: u64 = 1024;
    let is_kept = |page: &u64| {
        [read, write, execute]
            .into_iter()
            // SAFETY: an attack. What lies beyond is memory of the guest's own, which is read and no more.
            .all(|way| unsafe { attempt(way, *page) } == PROTECTION)
    };
    let inside = monitor_page(Part::Fixed);
    let exits = call(Call::Exits, EPT_VIOLATION);
    let up = (inside..).step_by(0x1000).take_while(is_kept).count();
    let down = (0..inside).rev().step_by(0x1000).map(|last| last & !0xfff);
    let pages = up as u64 + down.take_while(is_kept).count() as u64;
    let exits = call(Call::Exits, EPT_VIOLATION) - exits;
    trial.check(
        "read, write, execute each page of the hypervisor",
        pages > LEAST && exits == 3 * pages,
        format_args!("{pages} pages; exit {EPT_VIOLATION}: {exits}"),
    );
}

/// Addresses that lead the monitor astray: into itself, nowhere, or round in a circle.
pub(super) fn pointers(trial: &mut Trial) {
    let victim = core::cell::UnsafeCell::new(0x5555_5555_5555_5555u64);
    let good = at(victim.get());
    let pages = [Part::Text, Part::Data, Part::Lists].map(monitor_page);
    let [text, state_page, list] = pages;
    let _text = map(STUB - 0x1000, text);
    let _state = map(STUB - 0x2000, state_page);
    let _list = map(STUB - 0x3000, list);
    let _nowhere = map(STUB - 0x4000, 0xf_ffff_f000);
    // Page tables as memory, which lead to themselves.
    let _circle = map(STUB - 0x5000, cr3());
    let before = handled();
    let stopping = [EXCEPTION, TRIPLE_FAULT, EPT_VIOLATION].map(|reason| call(Call::Exits, reason));
    let bad = [
        0x7000_0000_0000,
        1 << 63,
        u64::MAX,
        good + 1,
        monitor_stack(),
        LIST,
        WINDOW,
        STUB - 0x1000,
        STUB - 0x2000,
        STUB - 0x3000 + 16,
        STUB - 0x4000,
        GATE & !(511 << 12) | 7 << 12,
    ];
    for address in bad {
        // SAFETY: the handler leaves alone what it must not touch; that is what is asked.
        unsafe {
            copy_call(ENTRY, address, good);
            copy_call(ENTRY, good, address);
        }
    }
    // SAFETY: reads the trial's own tables.
    unsafe { copy_call(ENTRY, STUB - 0x5000, good + 1) };
    let handled = handled() - before;
    let same = stopping == [EXCEPTION, TRIPLE_FAULT, EPT_VIOLATION].map(|reason| call(Call::Exits, reason));
    // SAFETY: nobody else has it.
    let untouched = unsafe { victim.get().read_volatile() } == 0x5555_5555_5555_5555;
    let calls = 2 * bad.len() as u64 + 1;
    let whole = pages == [Part::Text, Part::Data, Part::Lists].map(monitor_page);
    trial.check(
        "addresses that lead astray",
        same && untouched && whole && handled == calls,
        format_args!(
            "handler called {handled} times; nothing copied: {untouched}; stopped: {}",
            !same
        ),
    );
    trial.attack(
        "the monitor is unarmed then",
        VMFUNC,
        INVALID_OPCODE,
        0,
        function_and_index,
        2,
    );
}
