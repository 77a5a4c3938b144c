//! What the trial says on the console: a line for each finding, and a last one that counts them.

use vmsight_sim_hypervisor::{exit, gate};

/// The command line that has the trial measure and attack nothing.
pub const COST_ONLY: &str = "CO";
/// The same, on hardware: in microseconds.
pub const COST_ON_HARDWARE: &str = "CO hardware";

/// The command line of the trial on two processors, of which one does what it can while the other goes through the gate. It takes
/// the monitor whose handler can be had to run without an end.
pub const TWO_PROCESSORS: &str = "2P";

/// Findings that are of no attack: that all is there that an attack takes, and what the monitor costs.
const NO_ATTACKS: [&str; 4] = [
    "hypervisor",
    "register",
    "the other processor starts",
    "the monitor reads and writes guest memory",
];
const NO_ATTACKS_BEGIN: [&str; 3] = ["null handler ", "exits ", "round trip "];

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was tried.
    pub name: String,
    /// Whether it is as it must be: the attack was stopped by what is said to stop it.
    pub held: bool,
    /// The exit's reason that stopped it, where one did.
    pub reason: Option<u16>,
    /// How often the monitor's handler was called by it.
    pub handled: Option<u64>,
    /// Whether the SHA-256 over gates, tables and the monitor's text is what it was at the finding before, which is part of
    /// `held`. `None` where the monitor was still being put in, or was only measured.
    pub hash_unchanged: Option<bool>,
    /// What the trial says of it.
    pub facts: String,
}

/// All findings of a run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Findings {
    /// In the order in which they were found.
    pub all: Vec<Finding>,
    /// The last line: how many were as they must be, and how many were not; the sums where several trials are told of. `None`
    /// where none came to its end.
    pub counted: Option<(usize, usize)>,
}

impl Finding {
    /// From a line of the console.
    pub fn parse(line: &str) -> Option<Self> {
        let rest = line.trim_end().strip_prefix("trial: ")?;
        let marks = [(": ok", true), (": FAILED", false)];
        let found = marks
            .iter()
            .filter_map(|(mark, held)| Some((rest.find(mark)?, mark.len(), *held)));
        let (at, length, held) = found.min()?;
        let facts = rest.get(at + length..)?.trim();
        Some(Self {
            name: rest.get(..at)?.to_owned(),
            held,
            reason: facts.split("; ").find_map(reason),
            handled: number_after(facts, "handler called "),
            hash_unchanged: match (facts.contains("hash unchanged"), facts.contains("hash CHANGED")) {
                (true, false) => Some(true),
                (_, true) => Some(false),
                _ => None,
            },
            facts: facts.to_owned(),
        })
    }

    /// Whether it is of an attack.
    pub fn is_attack(&self) -> bool {
        !NO_ATTACKS.contains(&self.name.as_str())
            && !NO_ATTACKS_BEGIN.iter().any(|begin| self.name.starts_with(begin))
    }

    /// What stopped it: the name of the exit's reason.
    pub fn exit(&self) -> Option<&'static str> {
        self.reason.map(exit::name)
    }
}

impl Findings {
    /// From a console's output.
    pub fn parse(console: &str) -> Self {
        let counted = console.lines().filter_map(|line| {
            let (passed, failed) = line.trim_end().strip_prefix("trial: ")?.split_once(" passed, ")?;
            let failed: usize = failed.strip_suffix(" failed")?.parse().ok()?;
            Some((passed.parse::<usize>().ok()?, failed))
        });
        Self {
            all: console.lines().filter_map(Finding::parse).collect(),
            counted: counted.reduce(|all, one| (all.0 + one.0, all.1 + one.1)),
        }
    }

    /// Whether each trial came to its end, and all that they counted is here.
    pub fn is_complete(&self) -> bool {
        let held = self.all.iter().filter(|finding| finding.held).count();
        self.counted == Some((held, self.all.len() - held))
    }

    /// The one of this name.
    pub fn find(&self, name: &str) -> Option<&Finding> {
        self.all.iter().find(|finding| finding.name == name)
    }

    /// What a hook with an empty handler costs, by each way that was measured.
    pub fn costs(&self) -> Vec<Cost> {
        Way::ALL
            .iter()
            .filter_map(|&way| {
                let trip = self.find(&format!("round trip {}", way.words()))?;
                let exits = self.find(&format!("exits {}", way.words()))?;
                Some(Cost {
                    way,
                    instructions: number_before(&trip.facts, " instructions"),
                    microseconds: trip
                        .facts
                        .strip_suffix(" microseconds")
                        .and_then(|n| n.parse().ok()),
                    exits: number_before(&exits.facts, " in ")?,
                    calls: number_after(&exits.facts, " in ")?,
                    held: trip.held && exits.held,
                })
            })
            .collect()
    }
}

/// How often an attack reached the monitor in a build without the view of the gate, of which the trial says nothing else.
pub fn control(console: &str, attack: &str) -> Option<u64> {
    let begin = format!("trial: {attack}: reached the monitor ");
    let rest = console.lines().find_map(|line| line.strip_prefix(&begin))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// How a hook calls the monitor's handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By VMFUNC.
    Gate,
    /// By VMCALL: the same handler, in the hypervisor.
    Call,
}

impl Way {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Gate, Self::Call];

    /// As the trial calls it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Gate => "through the gate",
            Self::Call => "by VMCALL",
        }
    }

    /// Its name among results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Call => "exit",
        }
    }

    /// What was measured in 2009 of the null handler, in microseconds: the mean and its standard deviation (Sharif, Lee, Cui,
    /// Lanzi: Secure In-VM Monitoring Using Hardware Virtualization, CCS 2009).
    pub fn published(self) -> (f64, f64) {
        match self {
            Self::Gate => (0.469, 0.051),
            Self::Call => (5.055, 0.132),
        }
    }

    /// Bytes of code outside the monitor that a call runs through: stub, gate, landing, and the way back.
    pub fn bytes(self) -> Option<usize> {
        (self == Self::Gate).then(gate_bytes)
    }
}

/// What a hook with an empty handler costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    /// By which way.
    pub way: Way,
    /// From hook to return, where the machine counts them.
    pub instructions: Option<u64>,
    /// From hook to return, on hardware.
    pub microseconds: Option<f64>,
    /// Exits in all calls.
    pub exits: u64,
    /// How many calls were made.
    pub calls: u64,
    /// Whether the trial found it as it must be.
    pub held: bool,
}

fn gate_bytes() -> usize {
    // No byte of these addresses is an INT3, with which the pages are filled.
    let addresses = gate::Addresses {
        sim_pointer: 0x1000,
        cr3: 0x1000,
        list: 0x1000,
        entry: 0x1000,
    };
    let mut pages = [[0; 4096]; 4];
    let [first, second, gate, landing] = &mut pages;
    gate::stub(first, second);
    gate::gate(gate, &addresses);
    gate::landing(landing, &addresses);
    pages.iter().flatten().filter(|byte| **byte != 0xcc).count()
}

/// The reason in `exit 48: 1`, if there was such an exit.
fn reason(fact: &str) -> Option<u16> {
    let (reason, count) = fact.strip_prefix("exit ")?.split_once(": ")?;
    (count.parse::<u64>().ok()? > 0).then(|| reason.parse().ok())?
}

fn number_after(text: &str, mark: &str) -> Option<u64> {
    let rest = text.get(text.find(mark)? + mark.len()..)?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest.get(..end)?.parse().ok()
}

fn number_before(text: &str, mark: &str) -> Option<u64> {
    text.get(..text.find(mark)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const CONSOLE: &str = "\
        vmsight-hypervisor 0.1.0\r\n\
        trial: exits through the gate: ok 0 in 1000 calls\r\n\
        trial: round trip through the gate: ok 58 instructions\r\n\
        trial: exits by VMCALL: ok 1000 in 1000 calls\r\n\
        trial: round trip by VMCALL: ok 255 instructions\r\n\
        trial: A4: VMFUNC into the unarmed monitor: ok exit 59: 1; end 7; handler called 0 times; hash unchanged\r\n\
        trial: a hook after all this: FAILED end 0; handler called 2 times; stopped: false\r\n\
        trial: 5 passed, 1 failed\r\n";

    #[test]
    fn findings_are_read() {
        let findings = Findings::parse(CONSOLE);
        assert!(findings.is_complete());
        let attacks: Vec<_> = findings.all.iter().filter(|f| f.is_attack()).collect();
        assert_eq!(attacks.len(), 2);
        assert_eq!(attacks[0].name, "A4: VMFUNC into the unarmed monitor");
        assert_eq!((attacks[0].reason, attacks[0].exit()), (Some(59), Some("VMFUNC")));
        assert_eq!(
            (attacks[0].handled, attacks[0].hash_unchanged),
            (Some(0), Some(true))
        );
        assert_eq!((attacks[1].held, attacks[1].handled), (false, Some(2)));
        assert_eq!((attacks[1].reason, attacks[1].hash_unchanged), (None, None));
        let changed = Finding::parse("trial: a write: FAILED exit 48: 1; hash CHANGED").unwrap();
        assert_eq!(changed.hash_unchanged, Some(false));
    }

    #[test]
    fn the_reason_is_that_of_an_exit_that_occurred() {
        let of = |line| Finding::parse(line).unwrap().reason;
        assert_eq!(of("trial: it starts: ok exit 3: 0; exit 4: 1"), Some(4));
        assert_eq!(of("trial: each page: ok 60 of 60 stopped; exit 48: 60"), Some(48));
        assert_eq!(of("trial: none: ok exit 3: 0"), None);
    }

    #[test]
    fn several_trials_are_summed() {
        let both = format!("{CONSOLE}trial: the race to re-arm: ok 0 times\r\n");
        assert!(!Findings::parse(&both).is_complete());
        let both = format!("{both}trial: 1 passed, 0 failed\r\n");
        assert_eq!(Findings::parse(&both).counted, Some((6, 1)));
        assert!(Findings::parse(&both).is_complete());
    }

    #[test]
    fn a_trial_that_did_not_come_to_its_end_is_not_complete() {
        let cut = &CONSOLE[..CONSOLE.len() - 30];
        assert!(!Findings::parse(cut).is_complete());
        let lost = CONSOLE.replace("trial: a hook", "tri@l: a hook");
        assert!(!Findings::parse(&lost).is_complete());
    }

    #[test]
    fn costs_are_read() {
        let costs = Findings::parse(CONSOLE).costs();
        assert_eq!(costs.len(), 2);
        assert_eq!((costs[0].way, costs[0].instructions), (Way::Gate, Some(58)));
        assert_eq!((costs[0].exits, costs[0].calls), (0, 1000));
        assert_eq!((costs[1].instructions, costs[1].exits), (Some(255), 1000));
        let timed = CONSOLE.replace("58 instructions", "0.512 microseconds");
        let costs = Findings::parse(&timed).costs();
        assert_eq!(
            (costs[0].instructions, costs[0].microseconds),
            (None, Some(0.512))
        );
    }

    #[test]
    fn controls_are_read() {
        assert_eq!(
            control("trial: A1: reached the monitor 1 times\r\n", "A1"),
            Some(1)
        );
        assert_eq!(control(CONSOLE, "A1"), None);
    }

    /// The stub, the guest's ways back and out of a refused function, the gate and its way back, landing and leaving, and the
    /// monitor's address.
    #[test]
    fn the_gates_bytes_are_counted() {
        assert_eq!(gate_bytes(), 17 + 3 + 4 + 31 + 9 + 16 + 10 + 8);
    }
}
