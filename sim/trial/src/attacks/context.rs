//! What a call brings along: stack, flags, segments, tables, breakpoints, interrupts.

use super::*;

/// Single step and breakpoints on what the gate does.
pub(super) fn debugging(trial: &mut Trial, site: u64) {
    let own = at(addr_of_mut!(CODE));
    prepare();
    // push TF; popfq; vmfunc, up to the gate.
    put(4096 - 9, &[0x68, 0x02, 0x01, 0, 0, 0x9d, 0x0f, 0x01, 0xd4]);
    {
        let _first = map(STUB, own);
        let _second = map(GATE, own + 0x1000);
        let jumping = registers(GATE - 9, WINDOW, site);
        trial.attack(
            "single step into the gate",
            EXCEPTION,
            INVALID_OPCODE,
            0,
            jump,
            at(&jumping),
        );
    }
    const EXECUTED: u64 = 1;
    const WRITTEN: u64 = 1 | 1 << 16 | 3 << 18;
    for (name, address, condition, end) in [
        ("breakpoint on the gate", GATE, EXECUTED, INVALID_OPCODE),
        ("breakpoint after the arming", LIST + 16, WRITTEN, INVALID_OPCODE),
        (
            "breakpoint on the monitor's entry",
            MONITOR_ENTRY,
            EXECUTED,
            RETURNS,
        ),
    ] {
        // SAFETY: the trial itself executes and writes none of these.
        unsafe {
            set_dr0(address);
            set_dr7(0x400 | condition);
        }
        trial.attack(name, EXCEPTION, end, 0, hook, 0);
        // SAFETY: none.
        unsafe { set_dr7(0x400) };
        trial.attack(
            "the monitor is unarmed then",
            VMFUNC,
            INVALID_OPCODE,
            0,
            function_and_index,
            2,
        );
    }
}

/// A handler that ends in the middle, where it has used the registers for itself: a breakpoint on what it reads.
pub(super) fn ended_handler(trial: &mut Trial) {
    const READ: u64 = 1 | 3 << 16 | 2 << 18;
    static mut LOST: u64 = u64::MAX;
    unsafe extern "C" fn called(argument: u64) {
        // SAFETY: the stub is there; one processor.
        unsafe { addr_of_mut!(LOST).write(kept_call(ENTRY, argument)) };
    }
    // The members' offsets are all 0 without a policy: what is taken for a task is read from its first word on.
    let task = at(addr_of_mut!(CODE));
    // SAFETY: the trial itself does not read there.
    unsafe {
        set_dr0(WINDOW + task);
        set_dr7(0x400 | READ);
    }
    trial.attack(
        "breakpoint on what a handler reads",
        EXCEPTION,
        RETURNS,
        1,
        called,
        task,
    );
    // SAFETY: none; one processor.
    let lost = unsafe {
        set_dr7(0x400);
        addr_of_mut!(LOST).read()
    };
    trial.check(
        "registers after a handler that ended",
        lost == 0,
        format_args!("as they were"),
    );
}

/// Stack, flags, segments and tables of the attacker's choice.
pub(super) fn context(trial: &mut Trial, site: u64) {
    let own = at(addr_of_mut!(CODE));
    for (name, rsp) in [
        ("stack pointer zero", 0),
        ("stack pointer in the monitor's stack", monitor_stack()),
        ("stack pointer not canonical", 1 << 62),
        ("stack pointer in the list", LIST + 24),
    ] {
        prepare();
        // mov rsp, r12; vmfunc
        put(4096 - 6, &[0x4c, 0x89, 0xe4, 0x0f, 0x01, 0xd4]);
        let _first = map(STUB, own);
        let _second = map(GATE, own + 0x1000);
        let mut jumping = registers(GATE - 6, WINDOW, site);
        jumping[11] = rsp;
        trial.survives(name, 1, jump, at(&jumping));
    }
    unsafe extern "C" fn flagged(flags: u64) {
        // SAFETY: the stub is there.
        let after = unsafe { flags_call(ENTRY, flags) };
        assert_eq!(after & 0x4_7ed5, flags & 0x4_7ed5, "flags are kept");
    }
    // Carry to overflow, direction, nested task, alignment check, I/O privilege.
    for flags in [0x0402, 0x4402, 0x4_0002, 0x4_7cd7] {
        trial.survives("flags", 1, flagged, flags);
    }
    unsafe extern "C" fn with_segment(register_and_base: u64) {
        // SAFETY: the address of a pair.
        let (register, base) = unsafe { *(register_and_base as *const (u32, u64)) };
        wrmsr(register, base);
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
        assert_eq!(rdmsr(register), base, "the segment's base is kept");
        wrmsr(register, 0);
    }
    const FS_BASE: u32 = 0xc000_0100;
    const GS_BASE: u32 = 0xc000_0101;
    for (name, register, base) in [
        ("FS at the monitor's state", FS_BASE, MONITOR + 0x1000),
        ("FS at the list", FS_BASE, LIST),
        ("GS at the monitor's state", GS_BASE, MONITOR + 0x1000),
        ("GS at the list", GS_BASE, LIST),
    ] {
        let pair = (register, base);
        trial.survives(name, 1, with_segment, at(&raw const pair));
    }
    trial.survives("a call from what is no registered hook", 0, stranger, 0);
}

/// Descriptor tables and a task state segment of the attacker's, once while all can still be changed, and once after the
/// lockdown: `names` are those of the six findings.
pub(super) fn descriptors(trial: &mut Trial, names: [&str; 6]) {
    let [idt_list, idt, gdt, task, task_state, stacks] = names;
    unsafe extern "C" fn with_idt(base: u64) {
        tables::load_idt(base, 0xfff);
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
        let now = tables::idt();
        tables::load_idt(tables::own_idt(), 4095);
        assert_eq!(now, (base, 0xfff), "IDTR is kept");
    }
    trial.survives(idt_list, 1, with_idt, LIST);
    trial.survives(idt, 1, with_idt, WINDOW);
    unsafe extern "C" fn with_gdt(base: u64) {
        tables::load_gdt(Some(base));
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
        tables::load_gdt(None);
    }
    trial.survives(gdt, 1, with_gdt, WINDOW);
    unsafe extern "C" fn with_task(base: u64) {
        tables::load_task(Some(base));
        let loaded = tables::task();
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
        tables::load_task(None);
        assert_eq!(loaded, Some(base), "TR was loaded");
    }
    trial.survives(task, 1, with_task, WINDOW);
    trial.survives(task_state, 1, with_task, MONITOR + 0x1000);
    // An exception in the monitor, whose stack would be the monitor's own if it were delivered.
    // SAFETY: the trial itself executes nothing there.
    unsafe {
        set_dr0(MONITOR_ENTRY);
        set_dr7(0x401);
    }
    let forged = tables::forged_task(monitor_stack());
    trial.attack(stacks, EXCEPTION, RETURNS, 0, with_task, forged);
    // SAFETY: none.
    unsafe { set_dr7(0x400) };
}

/// Interrupts all the time.
pub(super) fn timer(trial: &mut Trial) {
    const TURNS: u64 = 20_000;
    // The interrupt controllers: vectors from 32 on, only the timer's line; the timer: every 200 of its periods.
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 32),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0xa1, 0xff),
    ] {
        outb(port, value);
    }
    for (port, value) in [(0x43, 0x34), (0x40, 200), (0x40, 0)] {
        outb(port, value);
    }
    let before = handled();
    // SAFETY: the timer's interrupt has a handler.
    unsafe { core::arch::asm!("sti", options(nostack)) };
    for _ in 0..TURNS {
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
    }
    // SAFETY: masked again.
    unsafe { core::arch::asm!("cli", options(nostack)) };
    outb(0x21, 0xff);
    // SAFETY: no interrupt changes it any more.
    let ticks = unsafe { (&raw const timer_ticks).read_volatile() };
    let handled = handled() - before;
    let good = handled == TURNS && ticks > 20;
    trial.check(
        "hooks while the timer interrupts",
        good,
        format_args!("{handled} of {TURNS} handled; {ticks} interrupts"),
    );
}
