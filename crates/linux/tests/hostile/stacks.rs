//! Kernel stacks and tables for unwinding that lie.

use vmsight_linux::stack::How;
use vmsight_linux::{Kernel, Listing, StackFrame};

use crate::synthetic::{Guest, offset};

const STACK: u64 = 16 << 10;
const REGS: u64 = 168;
/// Frames of one thread at most, and what guessing may add to none of them.
const MAX_FRAMES: usize = 512;

/// Kinds of entries as kernels since 6.4 number them, in the upper eight of the last 16 bits; registers in the lower.
const END: u16 = 1 << 8;
const CALL: u16 = 2 << 8;
const REGISTERS: u16 = 3 << 8 | 8 << 8;
const SP: u16 = 5;
const BP: u16 = 4;
/// The frame pointer was saved, at an offset from where the frame ends.
const SAVED_BP: u16 = 1 << 4;

/// Functions of 256 bytes each, all of them CALLs and nothing else, with an entry of the table for each.
struct Forged {
    guest: Guest,
    text: u64,
    addresses: u64,
    entries: u64,
    task: u64,
    stack: u64,
}

/// What the tests call the functions, and their entries: offset of the frame's end, of the frame pointer, registers and kind.
const FUNCTIONS: &[(&str, i16, i16, u16)] = &[
    ("schedule", 8, 0, SP | CALL),
    ("ret_from_fork_asm", 0, 0, END),
    ("sleeps", 24, 0, SP | CALL),
    ("frames", 16, -16, BP | SAVED_BP | CALL),
    ("entry", 0, 0, SP | REGISTERS),
    ("nobody_unwinds", 0, 0, 0),
    ("return_to_handler", 0, 0, 0),
    ("arch_rethook_trampoline", 0, 0, 0),
];

impl Forged {
    fn new() -> Self {
        let mut guest = Guest::new(4);
        let count = FUNCTIONS.len() as u64;
        let text = guest.space(256 * count, 4096);
        for at in (text..text + 256 * count).step_by(8) {
            // CALL to somewhere, so that behind each of them is a return address, at multiples of 8.
            guest.put_bytes(at, &[0x90, 0x90, 0x90, 0xe8, 0, 0, 0, 0]);
        }
        let (addresses, entries) = (guest.space(4 * count, 8), guest.space(6 * count, 8));
        for (number, (name, ..)) in (0u64..).zip(FUNCTIONS) {
            guest.symbol(name, text + 256 * number);
        }
        for (name, at) in [
            ("_stext", text),
            ("_etext", text + 256 * count),
            ("__start_orc_unwind_ip", addresses),
            ("__stop_orc_unwind_ip", addresses + 4 * count),
            ("__start_orc_unwind", entries),
            ("__stop_orc_unwind", entries + 6 * count),
        ] {
            guest.symbol(name, at);
        }
        let stack = guest.space(STACK, STACK);
        let init = guest.init;
        let task = guest.process(7, "sleeper", init);
        guest.set(task, "task_struct", "stack", stack);
        guest.set(task, "task_struct", "nvcsw", 40);
        guest.set(task, "task_struct", "nivcsw", 2);
        let mut forged = Self {
            guest,
            text,
            addresses,
            entries,
            task,
            stack,
        };
        forged.tables();
        forged
    }

    /// The tables as they ought to be.
    fn tables(&mut self) {
        for (number, (_, sp, bp, rest)) in (0u64..).zip(FUNCTIONS) {
            let slot = self.addresses + 4 * number;
            let distance = (self.text + 256 * number).wrapping_sub(slot) as u32;
            self.guest.put_bytes(slot, &distance.to_le_bytes());
            let entry = [sp.to_le_bytes(), bp.to_le_bytes(), rest.to_le_bytes()].concat();
            self.guest.put_bytes(self.entries + 6 * number, &entry);
        }
    }

    /// Behind a CALL in a function.
    fn inside(&self, name: &str) -> u64 {
        let number = FUNCTIONS.iter().position(|f| f.0 == name).unwrap();
        self.text + 256 * number as u64 + 0x40
    }

    /// Saves a context `used` bytes below the top, in the function `sleeps` with this frame pointer; what is above it is `words`.
    fn sleep(&mut self, used: u64, ip: u64, bp: u64, words: &[u64]) -> u64 {
        let sp = self.stack + STACK - used;
        self.guest.set(self.task, "task_struct", "thread.sp", sp);
        self.guest.put(sp + offset("inactive_task_frame", "bp"), bp);
        self.guest.put(sp + offset("inactive_task_frame", "ret_addr"), ip);
        for (at, word) in (sp + 56..).step_by(8).zip(words) {
            self.guest.put(at, *word);
        }
        sp
    }

    /// What entering the kernel saves, at the top.
    fn user(&mut self) {
        let regs = self.stack + STACK - REGS;
        self.guest.put(regs + offset("pt_regs", "cs"), 0x33);
        self.guest.put(regs + offset("pt_regs", "ip"), 0x40_1000);
    }

    fn frames(&self) -> Vec<StackFrame> {
        listed(&self.guest.kernel()).rows
    }
}

fn listed(kernel: &Kernel) -> Listing<StackFrame> {
    let threads = kernel.threads(None).unwrap();
    kernel.stacks(&threads.rows, &|_| None).unwrap()
}

fn shown(frames: &[StackFrame]) -> Vec<(How, String)> {
    let name = |row: &StackFrame| {
        let symbol = row.symbol.as_deref().unwrap_or("-");
        symbol.split('+').next().unwrap().to_owned()
    };
    frames.iter().map(|row| (row.how, name(row))).collect()
}

fn expected(frames: &[(How, &str)]) -> Vec<(How, String)> {
    frames
        .iter()
        .map(|(how, name)| (*how, (*name).to_owned()))
        .collect()
}

#[test]
fn an_honest_stack_is_unwound_to_its_bottom() {
    let mut forged = Forged::new();
    let (sleeps, frames, entry) = (
        forged.inside("sleeps"),
        forged.inside("frames"),
        forged.inside("entry"),
    );
    forged.user();
    // 56 of the context; 24 of `sleeps`; of `frames` up to its frame pointer and the return address behind it.
    let used = REGS + 56 + 24 + 32;
    let bp = forged.stack + STACK - REGS - 16;
    forged.sleep(used, sleeps, bp, &[1, 2, frames, 3, 4, 0xb9, entry]);
    let listing = listed(&forged.guest.kernel());
    assert_eq!(
        shown(&listing.rows),
        expected(&[(How::Saved, "sleeps"), (How::Orc, "frames"), (How::Orc, "entry")])
    );
    let first = &listing.rows[0];
    assert_eq!(first.symbol.as_deref(), Some("sleeps+0x40/0x100"));
    assert_eq!((first.tid, first.switches, first.depth), (7, Some(42), 0));
    assert!(
        listing.rows.iter().all(|row| row.problems.is_empty()),
        "{:?}",
        listing.rows
    );
    // Nothing but the modules, which this guest has no list of.
    assert_eq!(listing.warnings.len(), 1, "{:?}", listing.warnings);
}

#[test]
fn a_thread_of_the_kernel_ends_where_it_began_and_a_stack_that_ends_early_says_so() {
    let mut forged = Forged::new();
    let (sleeps, begin) = (forged.inside("sleeps"), forged.inside("ret_from_fork_asm"));
    forged.sleep(REGS + 56 + 24, sleeps, 0, &[1, 2, begin]);
    let frames = forged.frames();
    assert_eq!(
        shown(&frames),
        expected(&[(How::Saved, "sleeps"), (How::Orc, "ret_from_fork_asm")])
    );
    assert!(frames.iter().all(|row| row.problems.is_empty()), "{frames:?}");
    // The same with more above it, which was to be hidden by it.
    let mut forged = Forged::new();
    let hidden = forged.inside("frames");
    forged.sleep(REGS + 56 + 24 + 32, sleeps, 0, &[1, 2, begin, 3, hidden]);
    let frames = forged.frames();
    assert_eq!(
        shown(&frames),
        expected(&[
            (How::Saved, "sleeps"),
            (How::Orc, "ret_from_fork_asm"),
            (How::Guess, "frames")
        ])
    );
    assert!(
        frames[1].problems[0].reason.contains("before its top"),
        "{frames:?}"
    );
    assert!(!frames[2].how.is_sure());
}

#[test]
fn code_that_is_nobodys_is_told_and_what_called_it_guessed() {
    let mut forged = Forged::new();
    let (sleeps, schedule) = (forged.inside("sleeps"), forged.inside("schedule"));
    let nowhere = forged.text + 0x20_0000;
    forged.user();
    forged.sleep(
        REGS + 56 + 24 + 16,
        sleeps,
        0,
        &[1, 2, nowhere, schedule + 1, schedule],
    );
    let frames = forged.frames();
    assert_eq!(
        shown(&frames),
        expected(&[(How::Saved, "sleeps"), (How::Orc, "-"), (How::Guess, "schedule")])
    );
    let fields: Vec<_> = frames[1].problems.iter().map(|p| p.field).collect();
    assert_eq!(fields, ["depth", "address"], "{frames:?}");
    // Who knows whose it is, is asked.
    let kernel = forged.guest.kernel();
    let threads = kernel.threads(None).unwrap().rows;
    let known = |at: vmsight_arch::Gva| (at.0 == nowhere).then(|| "BPF code x".to_owned());
    let frames = kernel.stacks(&threads, &known).unwrap().rows;
    assert_eq!(frames[1].symbol.as_deref(), Some("BPF code x"));
    assert!(frames[1].problems.iter().all(|p| p.field == "depth"));
}

#[test]
fn traced_functions_return_where_the_kernel_noted() {
    let mut forged = Forged::new();
    let (sleeps, entry) = (forged.inside("sleeps"), forged.inside("entry"));
    let names = ["return_to_handler", "arch_rethook_trampoline"];
    for (name, other) in [(names[0], names[1]), (names[1], names[0])] {
        let trampoline = forged.inside(name) - 0x40;
        forged.user();
        let sp = forged.sleep(REGS + 56 + 24, sleeps, 0, &[1, 2, trampoline]);
        let lost = forged.frames();
        assert_eq!(
            shown(&lost),
            expected(&[(How::Saved, "sleeps"), (How::Traced, name)])
        );
        assert!(lost[1].problems[0].reason.contains("tracing"), "{lost:?}");
        let slot = sp + 56 + 16;
        if name == "return_to_handler" {
            let shadow = forged.guest.space(4096, 4096);
            forged.guest.set(forged.task, "task_struct", "ret_stack", shadow);
            for (number, (address, at)) in (0u64..).zip([(1, 2), (entry, slot), (3, 4)]) {
                forged.guest.put(shadow + number * 40, address);
                forged.guest.put(shadow + number * 40 + 24, at);
            }
        } else {
            // A list of its own behind it, and the node of another frame before.
            let nodes = forged.guest.space(128, 64);
            let list = offset("rethook_node", "llist");
            forged
                .guest
                .set(forged.task, "task_struct", "rethooks.first", nodes + list);
            for (number, (address, at)) in (0u64..).zip([(trampoline, slot), (entry, slot)]) {
                let node = nodes + number * 64;
                forged.guest.put(node + list, nodes + 64 + list);
                forged
                    .guest
                    .put(node + offset("rethook_node", "ret_addr"), address);
                forged.guest.put(node + offset("rethook_node", "frame"), at);
            }
        }
        let found = forged.frames();
        assert_eq!(
            shown(&found),
            expected(&[(How::Saved, "sleeps"), (How::Traced, "entry")]),
            "{other}"
        );
        assert!(found.iter().all(|row| row.problems.is_empty()), "{found:?}");
        forged.guest.set(forged.task, "task_struct", "ret_stack", 0);
    }
}

#[test]
fn frame_pointers_that_lead_back_end() {
    let mut forged = Forged::new();
    let frames = forged.inside("frames");
    // The frame pointer leads to a frame whose own leads to the same, and to one below.
    for back in [0, 16, 8, u64::MAX - 7, 0x8000_0000_0000_0000] {
        let sp = forged.stack + STACK - 1024;
        let bp = sp + 512;
        forged.sleep(1024, frames, bp, &[]);
        forged.guest.put(bp, bp.wrapping_sub(back));
        forged.guest.put(bp + 8, frames);
        let rows = forged.frames();
        assert!(rows.len() <= 4, "{rows:?}");
        let end = rows.iter().find_map(|row| row.problems.first()).unwrap();
        assert!(end.reason.contains("guessed"), "{rows:?}");
    }
}

#[test]
fn saved_pointers_that_lie_cost_one_row() {
    let mut forged = Forged::new();
    let (stack, sleeps) = (forged.stack, forged.inside("sleeps"));
    for sp in [
        0,
        8,
        stack - 8,
        stack + 3,
        stack + STACK + 8,
        u64::MAX,
        u64::MAX - 7,
        stack + STACK,
        stack + STACK - 8,
        stack + STACK - 56,
    ] {
        forged.sleep(4096, sleeps, 0, &[]);
        forged.guest.set(forged.task, "task_struct", "thread.sp", sp);
        let rows = forged.frames();
        assert!(
            rows.len() == 1 && !rows[0].problems.is_empty(),
            "{sp:#x}: {rows:?}"
        );
    }
    for stack in [1 << 63, u64::MAX, 0x1000, u64::MAX - STACK + 1] {
        forged.guest.set(forged.task, "task_struct", "stack", stack);
        forged
            .guest
            .set(forged.task, "task_struct", "thread.sp", stack.wrapping_add(64));
        let rows = forged.frames();
        assert!(
            rows.len() == 1 && rows[0].problems.len() == 1,
            "{stack:#x}: {rows:?}"
        );
    }
    forged.guest.set(forged.task, "task_struct", "stack", 0);
    assert_eq!(shown(&forged.frames()), expected(&[(How::Ended, "-")]));
    forged.guest.set(forged.task, "task_struct", "on_cpu", 1);
    assert_eq!(shown(&forged.frames()), expected(&[(How::Running, "-")]));
}

#[test]
fn a_stack_full_of_return_addresses_is_cut() {
    let mut forged = Forged::new();
    let schedule = forged.inside("schedule");
    forged.sleep(STACK, schedule, 0, &vec![schedule; 2000]);
    let rows = forged.frames();
    assert_eq!(rows.len(), MAX_FRAMES);
    assert!(
        rows[MAX_FRAMES - 1].problems[0].reason.contains("cut after"),
        "{:?}",
        rows.last()
    );
}

#[test]
fn tables_and_stacks_of_noise_end_and_stay_on_the_stack() {
    let mut forged = Forged::new();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let count = FUNCTIONS.len() as u64;
    let mut deepest = 0;
    for round in 0..400 {
        // The first two entries tell the form; now and then they, too, are noise.
        let kept = if round % 8 == 0 { 0 } else { 2 };
        forged.tables();
        for number in kept..count {
            // Near offsets and valid kinds, for else nothing gets anywhere.
            let entry = [
                (random() % 64) as u8 & 0xf8,
                0,
                (random() % 64) as u8 & 0xf8,
                if random() % 2 == 0 { 0 } else { 0xff },
                (random() % 10) as u8 | ((random() % 6) as u8) << 4,
                [0, 1, 2, 2, 2, 2, 3, 4, 11, 12][(random() % 10) as usize],
            ];
            forged.guest.put_bytes(forged.entries + 6 * number, &entry);
            if round % 3 == 0 {
                forged
                    .guest
                    .put_bytes(forged.addresses + 4 * number, &(random() as u32).to_le_bytes());
            }
        }
        let (text, stack) = (forged.text, forged.stack);
        let words: Vec<u64> = (0..200)
            .map(|_| match random() % 4 {
                0 => random(),
                1 => stack + ((random() % STACK) & !7),
                _ => text + ((random() % (256 * count)) & !7),
            })
            .collect();
        let ip = text + ((random() % (256 * count)) & !7);
        let bp = stack + ((random() % STACK) & !7);
        forged.sleep(STACK - random() % 1024 * 8, ip, bp, &words);
        let rows = forged.frames();
        assert!(rows.len() <= MAX_FRAMES, "{}", rows.len());
        for row in rows.iter().filter_map(|row| row.slot) {
            assert!((stack..stack + STACK).contains(&row.0), "{row}");
        }
        deepest = deepest.max(rows.iter().filter(|row| row.how.is_sure()).count());
    }
    assert!(deepest >= 3, "noise got only {deepest} frames far");
}
