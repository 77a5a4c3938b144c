//! A fixed workload in a guest's kernel, without hooks and with those of a monitor: a guest that measures it, and what is read of
//! what it says.
//!
//! The guest's first program is `vmsight-sim-witness`. It counts by the time-stamp counter, which in Bochs counts instructions,
//! those of the hypervisor included, and turns of the emulator's loop while the processor is halted: a processor that has always
//! something to do is never. Before and after each part of the workload it has the hypervisor say how things are, so that exits
//! and hooks are those of the part alone.

use serde_json::Value;
use vmsight_sim_abi::{Handler, Hook, Policy};

use crate::bochs::Run;
use crate::trial::Way;
use crate::{Error, Image, Program};

/// The kernel's command line. Without random places of programs' memory, rounds differ less.
const COMMAND_LINE: &str = "console=ttyS0 quiet norandmaps -- workload";
/// What begins what a machine said.
const HEAD: &str = "workload: ";
/// What a round of the witness begins with, and its last line.
const ROUND: &str = "witness: round ";
const DONE: &str = "witness: done";

/// A monitor that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// Counts system calls. Its workload is 400 files that are opened, written, read and closed.
    Calls,
    /// Tells processes and programs. Its workload is 16 processes that are made and waited for, of which 8 execute a program.
    Processes,
}

impl Monitor {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Calls, Self::Processes];

    /// What it watches, and what its part of the workload is called where that is said.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calls => "syscalls",
            Self::Processes => "processes",
        }
    }

    /// The witness's word for its part.
    fn part(self) -> &'static str {
        match self {
            Self::Calls => "files",
            Self::Processes => "processes",
        }
    }

    fn has(self, handler: u64) -> bool {
        let handlers: &[Handler] = match self {
            Self::Calls => &[Handler::Call, Handler::CompatCall, Handler::X32Call],
            Self::Processes => &[Handler::Process, Handler::Exec],
        };
        handlers.iter().any(|&own| own as u64 == handler)
    }
}

/// A guest that measures, with this kernel and of its policy the hooks of these monitors.
///
/// # Errors
/// [`Error::NotBuilt`]
pub fn image(kernel: Vec<u8>, policy: &Policy, monitors: &[Monitor], way: Way) -> Result<Image, Error> {
    let mut policy = policy.clone();
    for hook in &mut policy.hooks {
        if !monitors.iter().any(|monitor| monitor.has(hook.handler)) {
            *hook = Hook::default();
        }
    }
    let witness = Program::Witness.bytes()?;
    let options = match way {
        Way::Gate => "account",
        Way::Call => "account exits",
    };
    Ok(Image::new(kernel, COMMAND_LINE)
        .initrd(archive(&[("init", &witness), ("program", &witness)]))
        .monitor(Program::Monitor.bytes()?)
        .policy(policy.to_bytes().to_vec(), options))
}

/// Executable files as the kernel's first root: cpio's form "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    const EXECUTABLE: usize = 0o100_755;
    let mut bytes = Vec::new();
    let end = ("TRAILER!!!", [].as_slice());
    for (number, (name, contents)) in files.iter().chain([&end]).enumerate() {
        // Inode, mode, owner, group, links, time, length, two devices of two numbers, the name's length, a checksum.
        let (length, name_length) = (contents.len(), name.len() + 1);
        let fields = [number, EXECUTABLE, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        bytes.extend_from_slice(b"070701");
        for field in fields {
            bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        for piece in [[name.as_bytes(), &[0]].concat().as_slice(), contents] {
            bytes.extend_from_slice(piece);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

/// What a machine said, in one text, with what it was.
pub fn said(monitors: &[Monitor], way: Way, run: &Run) -> String {
    let names: Vec<&str> = monitors.iter().map(|monitor| monitor.name()).collect();
    format!(
        "{HEAD}{} {}\n{}\n{}\n",
        names.join("+"),
        way.name(),
        run.serial,
        run.channel
    )
}

/// Why nothing was measured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unmeasured {
    /// The hypervisor put no hooks in.
    #[error("the kernel was not hooked: {0}")]
    Refused(String),
    /// The guest did not come to its end, or not all of what was said is there.
    #[error("the measurement did not come to its end: {0} rounds and {1} accounts of the hypervisor")]
    Incomplete(usize, usize),
}

/// A guest that measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// Whose hooks it had.
    pub monitors: Vec<Monitor>,
    /// How they call their handlers.
    pub way: Way,
    /// What it measured, in its order.
    pub rounds: Vec<Round>,
}

/// A part of the workload, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// Whose part it is.
    pub part: Monitor,
    /// Whether the hooks were in.
    pub hooked: bool,
    /// Instructions from its begin to its end.
    pub instructions: u64,
    /// System calls that the witness made.
    pub calls: u64,
    /// Processes that it made, and programs that they executed.
    pub processes: u64,
    /// See there.
    pub programs: u64,
    /// Threads that the kernel made meanwhile, as the monitor told.
    pub kernel_threads: u64,
    /// Hooks that were handled.
    pub handled: u64,
    /// Exits, but for those of the hypervisor's own timer.
    pub exits: u64,
    /// Of these, those by which a guest calls.
    pub calls_out: u64,
}

/// How things were, as the hypervisor has said it: all since the machine began.
#[derive(Debug, Clone, Copy)]
struct Account {
    handled: u64,
    exits: u64,
    calls_out: u64,
    kernel_threads: u64,
}

impl Account {
    fn new(line: &Value, kernel_threads: u64) -> Option<Self> {
        let exits = line["exits"].as_object()?;
        let sum = |wanted: &dyn Fn(&str) -> bool| {
            let counted = exits.iter().filter(|(name, _)| wanted(name));
            counted.filter_map(|(_, count)| count.as_u64()).sum()
        };
        Some(Self {
            handled: line["handled"].as_u64()?,
            exits: sum(&|name| name != "preemption timer"),
            calls_out: sum(&|name| matches!(name, "VMCALL" | "VMFUNC")),
            kernel_threads,
        })
    }
}

impl Boot {
    /// All that are in a text.
    ///
    /// # Errors
    /// If one of them measured nothing.
    pub fn parse(said: &str) -> Result<Vec<Self>, Unmeasured> {
        let mut boots = Vec::new();
        let mut pieces = said.split(HEAD);
        // What comes before the first is of no workload.
        pieces.next();
        for piece in pieces {
            let (head, rest) = piece.split_once('\n').unwrap_or((piece, ""));
            let (names, way) = head.trim_end().split_once(' ').unwrap_or_default();
            let mut names = names.split('+');
            let monitors = Monitor::ALL
                .into_iter()
                .filter(|monitor| names.clone().any(|name| name == monitor.name()))
                .collect::<Vec<_>>();
            let way = Way::ALL.into_iter().find(|&known| known.name() == way);
            let (Some(way), Some(_)) = (way, names.next()) else {
                return Err(Unmeasured::Incomplete(0, 0));
            };
            boots.push(Self {
                monitors,
                way,
                rounds: rounds(rest)?,
            });
        }
        Ok(boots)
    }

    /// Whether a round is as it must be: each hook was handled, and left the guest once, or not at all.
    fn holds(&self, round: &Round) -> bool {
        let calls = if self.monitors.contains(&Monitor::Calls) {
            round.calls
        } else {
            0
        };
        let processes = if self.monitors.contains(&Monitor::Processes) {
            round.processes + round.programs + round.kernel_threads
        } else {
            0
        };
        let hooks = if round.hooked { calls + processes } else { 0 };
        let left = match self.way {
            Way::Gate => 0,
            Way::Call => hooks,
        };
        round.handled == hooks && round.calls_out == left
    }

    /// Whether all rounds are as they must be.
    pub fn held(&self) -> bool {
        self.rounds.iter().all(|round| self.holds(round))
    }

    /// The round of a part that took least: what a kernel does from time to time besides is not the workload's.
    pub fn least(&self, part: Monitor, hooked: bool) -> Option<&Round> {
        let rounds = self.rounds.iter();
        let of = rounds.filter(|round| round.part == part && round.hooked == hooked);
        of.min_by_key(|round| round.instructions)
    }
}

fn rounds(said: &str) -> Result<Vec<Round>, Unmeasured> {
    let (mut rounds, mut accounts, mut kernel_threads, mut done) = (Vec::new(), Vec::new(), 0, false);
    for line in said.lines().map(str::trim_end) {
        done |= line == DONE;
        if let Some(round) = line.strip_prefix(ROUND).and_then(round) {
            rounds.push(round);
        }
        let Some(told) = line
            .starts_with('{')
            .then(|| serde_json::from_str::<Value>(line).ok())
            .flatten()
        else {
            continue;
        };
        if told["state"] == "refused" {
            let why = told["why"].as_str().unwrap_or_default();
            return Err(Unmeasured::Refused(why.to_owned()));
        }
        if told["state"] == "stats" {
            accounts.extend(Account::new(&told, kernel_threads));
        }
        kernel_threads += u64::from(told["event"] == "process" && told["kernel"] == 1);
    }
    // One before, one after each.
    let pairs = accounts.chunks_exact(2);
    if !done || rounds.is_empty() || accounts.len() != rounds.len() * 2 {
        return Err(Unmeasured::Incomplete(rounds.len(), accounts.len()));
    }
    for (round, pair) in rounds.iter_mut().zip(pairs) {
        if let [before, after] = pair {
            let since = |of: fn(&Account) -> u64| of(after).saturating_sub(of(before));
            round.handled = since(|account| account.handled);
            // The second account is asked for by an exit, which is counted in it.
            round.exits = since(|account| account.exits).saturating_sub(1);
            round.calls_out = since(|account| account.calls_out);
            round.kernel_threads = since(|account| account.kernel_threads);
        }
    }
    Ok(rounds)
}

/// `WAY PART INSTRUCTIONS CALLS PROCESSES PROGRAMS`
fn round(words: &str) -> Option<Round> {
    let mut words = words.split(' ');
    let hooked = match words.next()? {
        "none" => false,
        "hooked" => true,
        _ => return None,
    };
    let part = words.next()?;
    let mut number = || words.next()?.parse().ok();
    Some(Round {
        part: Monitor::ALL.into_iter().find(|monitor| monitor.part() == part)?,
        hooked,
        instructions: number()?,
        calls: number()?,
        processes: number()?,
        programs: number()?,
        kernel_threads: 0,
        handled: 0,
        exits: 0,
        calls_out: 0,
    })
}

/// What a monitor costs in its part of the workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    /// Which.
    pub monitor: Monitor,
    /// How its handlers are called; `None`: there are no hooks.
    pub way: Option<Way>,
    /// Instructions of the round that took least.
    pub instructions: u64,
    /// So many times those without hooks.
    pub slowdown: f64,
    /// What each hook added.
    pub each: Option<u64>,
    /// Hooks that were handled in that round, and its exits.
    pub hooks: u64,
    /// See there.
    pub exits: u64,
    /// Whether all rounds were as they must be.
    pub held: bool,
}

/// What the monitors cost that were measured alone: without hooks, and by each way there is.
pub fn costs(boots: &[Boot]) -> Vec<Cost> {
    let mut costs = Vec::new();
    for monitor in Monitor::ALL {
        let own: Vec<&Boot> = boots.iter().filter(|boot| boot.monitors == [monitor]).collect();
        let bare = own.iter().filter_map(|boot| boot.least(monitor, false));
        let Some(bare) = bare.min_by_key(|round| round.instructions) else {
            continue;
        };
        let cost = |way, round: &Round, held| {
            let added = round.instructions.saturating_sub(bare.instructions);
            Cost {
                monitor,
                way,
                instructions: round.instructions,
                slowdown: round.instructions as f64 / bare.instructions.max(1) as f64,
                each: way.and_then(|_| added.checked_div(round.handled)),
                hooks: round.handled,
                exits: round.exits,
                held,
            }
        };
        costs.push(cost(None, bare, true));
        for boot in &own {
            if let Some(round) = boot.least(monitor, true) {
                costs.push(cost(Some(boot.way), round, boot.held()));
            }
        }
    }
    costs
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Two rounds of a part without hooks and two with them, as a machine says them.
    fn text(head: &str, part: &str, counts: &str, instructions: [u64; 4], hooked: [u64; 2]) -> String {
        let [handled, left] = hooked;
        let mut text = format!("workload: {head}\nvmsight-hypervisor 0.1.0\r\n");
        let mut channel = String::from("{\"state\":\"installed\",\"hooks\":3}\n");
        let (mut marks, mut done) = (700, [0, 0]);
        let mut account = |done: [u64; 2], timer: u64| {
            marks += 1;
            let [handled, left] = done;
            format!(
                "{{\"state\":\"stats\",\"handled\":{handled},\"exits\":{{\"CPUID\":{marks},\"VMCALL\":{left},\"preemption timer\":{timer}}}}}\n"
            )
        };
        for (n, instructions) in instructions.into_iter().enumerate() {
            let way = if n < 2 { "none" } else { "hooked" };
            text.push_str(&format!(
                "witness: round {way} {part} {instructions} {counts}\r\n"
            ));
            channel.push_str(&account(done, 0));
            if n >= 2 {
                done = [done[0] + handled, done[1] + left];
            }
            channel.push_str(&account(done, 1));
        }
        format!("{text}witness: done\r\n\n{channel}\n")
    }

    fn calls(way: &str, hooked: [u64; 2]) -> String {
        let head = format!("syscalls {way}");
        text(&head, "files", "10 0 0", [1010, 1000, 1100, 1200], hooked)
    }

    #[test]
    fn rounds_have_their_own_exits_and_hooks() {
        let both = calls("gate", [10, 0]) + &calls("exit", [10, 10]);
        let boots = Boot::parse(&format!("before\n{both}")).unwrap();
        assert_eq!(boots.len(), 2);
        assert!(boots.iter().all(Boot::held));
        let costs = costs(&boots);
        let found: Vec<_> = costs
            .iter()
            .map(|c| (c.way, c.instructions, c.each, c.hooks, c.exits))
            .collect();
        assert_eq!(
            found,
            [
                (None, 1000, None, 0, 0),
                (Some(Way::Gate), 1100, Some(10), 10, 0),
                (Some(Way::Call), 1100, Some(10), 10, 10),
            ]
        );
        assert!((costs[1].slowdown - 1.1).abs() < 1e-9 && costs[0].slowdown == 1.0);
    }

    #[test]
    fn a_hook_that_was_not_handled_or_left_once_too_often_is_seen() {
        for (way, hooked) in [("gate", [9, 0]), ("gate", [10, 1]), ("exit", [10, 9])] {
            let boots = Boot::parse(&calls(way, hooked)).unwrap();
            assert!(!boots[0].held() && costs(&boots).iter().any(|c| !c.held), "{way}");
        }
    }

    #[test]
    fn threads_of_the_kernel_are_no_ones_hooks() {
        let said = text("processes gate", "processes", "80 4 2", [10, 10, 20, 20], [7, 0]);
        assert!(!Boot::parse(&said).unwrap()[0].held());
        // One in each of the rounds with hooks: before the account that ends it.
        let mut lines: Vec<String> = said.lines().map(str::to_owned).collect();
        let thread = "{\"event\":\"process\",\"kernel\":1}".to_owned();
        let ends: Vec<usize> = (0..lines.len()).filter(|&n| lines[n].contains("stats")).collect();
        lines.insert(ends[7], thread.clone());
        lines.insert(ends[5], thread);
        let boot = Boot::parse(&lines.join("\n")).unwrap().remove(0);
        assert!(boot.held(), "{boot:?}");
        assert_eq!(boot.least(Monitor::Processes, true).unwrap().kernel_threads, 1);
    }

    #[test]
    fn what_did_not_come_to_its_end_is_refused() {
        let whole = calls("gate", [10, 0]);
        let cut = whole.replace("witness: done", "");
        assert_eq!(Boot::parse(&cut), Err(Unmeasured::Incomplete(4, 8)));
        let cut = whole.replacen("\"stats\"", "\"hooked\"", 1);
        assert_eq!(Boot::parse(&cut), Err(Unmeasured::Incomplete(4, 7)));
        let refused = format!("{whole}{{\"state\":\"refused\",\"why\":\"no NOP\"}}\n");
        assert_eq!(Boot::parse(&refused), Err(Unmeasured::Refused("no NOP".into())));
        assert!(Boot::parse("workload: syscalls\n").is_err());
        assert!(Boot::parse("").unwrap().is_empty());
    }

    #[test]
    fn the_first_root_is_an_archive() {
        let bytes = archive(&[("init", b"12345")]);
        assert!(bytes.starts_with(b"070701") && bytes.len().is_multiple_of(4));
        assert_eq!(
            &bytes[110..124],
            b"init\0\0"
                .iter()
                .chain(b"12345\0\0\0")
                .copied()
                .take(14)
                .collect::<Vec<_>>()
        );
        assert!(bytes.windows(11).any(|w| w == b"TRAILER!!!\0"));
    }
}
