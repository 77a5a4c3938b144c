//! An unmodified Debian kernel on two processors that is watched: what the monitor tells is what was done, on both at once.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs;
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest, Sha256};
use vmsight_lab::Kernel;
use vmsight_lab::cache::Lock;
use vmsight_lab::cpio::Archive;
use vmsight_sim_image::bochs::WITH_VMX;
use vmsight_sim_image::{Image, Machine, Program};
use vmsight_sim_policy::{KernelImage, Wanted, policy};
use vmsight_sim_witness::{
    MODULE, NAME, PROGRAM, REFUSED, SETUID, TOLD, TOLD_ARGUMENT, UNKNOWN_MODULE, UNKNOWN_ON,
};

/// For a machine that has others to run too; alone it takes a minute and a half.
const LIMIT: Duration = Duration::from_secs(900);
const EACCES: u16 = 13;

/// What the guest said of itself.
struct Witness {
    lines: Vec<Vec<String>>,
}

impl Witness {
    fn new(serial: &str) -> Self {
        let said = serial.lines().filter_map(|l| l.strip_prefix("witness: "));
        Self {
            lines: said.map(|l| l.split(' ').map(str::to_owned).collect()).collect(),
        }
    }

    /// The rest of the lines of one kind.
    fn all(&self, kind: &str) -> Vec<&[String]> {
        let lines = self.lines.iter().filter(|l| l[0] == kind);
        lines.map(|l| &l[1..]).collect()
    }

    /// What a step came to, each time that it was made.
    fn results(&self, what: &str) -> Vec<i64> {
        let made = self.all("result").into_iter().filter(|l| l[0] == what);
        made.map(|l| l[1].parse().unwrap()).collect()
    }

    /// The processes that stayed on one processor, with it.
    fn placed(&self) -> BTreeMap<u64, u64> {
        let pairs = |kind| {
            self.all(kind)
                .into_iter()
                .map(|l| [&l[0], &l[1]].map(|n| n.parse::<u64>().unwrap()))
        };
        let mut placed: BTreeMap<u64, u64> = pairs("on").map(|[processor, who]| (who, processor)).collect();
        // A grandchild is remembered before its parent is, but has a greater number.
        let mut created: Vec<_> = pairs("created").collect();
        created.sort_unstable();
        for [parent, child] in created {
            if let Some(&processor) = placed.get(&parent) {
                placed.insert(child, processor);
            }
        }
        placed
    }
}

/// What the monitor told.
struct Told {
    lines: Vec<Value>,
}

impl Told {
    fn new(channel: &str) -> Self {
        let lines = channel.lines().filter(|l| !l.trim().is_empty());
        Self {
            lines: lines
                .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}")))
                .collect(),
        }
    }

    fn all<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.lines.iter().filter(move |l| l["event"] == kind)
    }

    fn state(&self, state: &str) -> &Value {
        let found = self.lines.iter().find(|l| l["state"] == state);
        found.unwrap_or_else(|| panic!("nothing of {state}: {:#?}", self.lines))
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn texts<const N: usize>(words: [&dyn ToString; N]) -> Vec<String> {
    words.iter().map(|w| w.to_string()).collect()
}

/// A file's name in the archive that the guest's root is made of.
fn path(name: &'static CStr) -> &'static str {
    name.to_str().unwrap().trim_start_matches('/')
}

#[test]
fn the_monitor_tells_what_the_guest_did() {
    let kernel = Kernel::V6_12.fetch().unwrap_or_else(|e| panic!("{e:?}"));
    let vmlinuz = fs::read(kernel.vmlinuz()).unwrap();
    let module = kernel
        .modules(&[("dummy", "")])
        .unwrap()
        .pop()
        .unwrap()
        .read()
        .unwrap();
    let listed: [u8; 32] = Sha256::digest(&module).into();
    let unknown = [module.as_slice(), &[0]].concat();

    let witness = Program::Witness.bytes().unwrap_or_else(|e| panic!("{e:?}"));
    let mut archive = Archive::new();
    archive.file("init", 0o755, &witness);
    archive.file(path(PROGRAM), 0o755, &witness);
    archive.file(path(SETUID), 0o4755, &witness);
    archive.file(path(MODULE), 0o644, &module);
    for name in [UNKNOWN_MODULE].into_iter().chain(UNKNOWN_ON) {
        archive.file(path(name), 0o644, &unknown);
    }

    let wanted = Wanted {
        told: vec![TOLD],
        refused: vec![(REFUSED, EACCES)],
        modules: Some(vec![listed]),
        refuse_root: true,
        ..Wanted::default()
    };
    let image = KernelImage::read(&vmlinuz).unwrap();
    let policy = policy(&image, &wanted).unwrap();
    let image = Image::new(vmlinuz, "console=ttyS0 quiet")
        .initrd(archive.finish())
        .monitor(Program::Monitor.bytes().unwrap_or_else(|e| panic!("{e:?}")))
        .policy(policy.to_bytes().to_vec(), "");
    let _lock = Lock::wait("bochs").unwrap();
    let machine = Machine::with_processors(&image, WITH_VMX, 2).unwrap_or_else(|e| panic!("{e:?}"));
    let run = machine.wait(LIMIT).unwrap();
    let serial = run.serial.replace('\r', "");
    assert!(
        run.off && serial.contains("witness: done"),
        "{serial}\n{}",
        run.channel
    );
    println!("{serial}\n{}", run.channel);
    let (witness, told) = (Witness::new(&serial), Told::new(&run.channel));

    assert_eq!(number(&told.state("installed")["hooks"]), 8);
    let end = told.state("off");
    assert_eq!(number(&end["lost"]), 0);
    every_call_is_counted(&witness, end);
    every_process_is_told(&witness, &told);
    each_processor_tells_its_own(&witness, &told);
    what_is_against_the_rules_is_refused(&witness, &told, &listed);
    // More than a thousand hooks were hit: none of them left the guest, and there is less to tell than a ring holds.
    let calls: u64 = end["calls"].as_object().unwrap().values().map(number).sum();
    assert!(number(&end["handled"]) > calls, "{end}");
    assert!(calls > 1500, "{calls} calls; {end}");
    for reason in ["VMCALL", "VMFUNC"] {
        assert!(end["exits"].get(reason).is_none(), "{end}");
    }
}

fn every_call_is_counted(witness: &Witness, end: &Value) {
    let made: BTreeMap<String, u64> = witness
        .all("calls")
        .into_iter()
        .map(|l| (l[0].clone(), l[1].parse().unwrap()))
        .collect();
    let counted: BTreeMap<String, u64> = end["calls"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(number, times)| (number.clone(), self::number(times)))
        .collect();
    assert_eq!(counted, made);
}

fn every_process_is_told(witness: &Witness, told: &Told) {
    let name = NAME.to_str().unwrap();
    // The kernel's own threads are told, too, and nobody speaks for them.
    let (mut processes, mut threads) = (Vec::new(), Vec::new());
    for event in told.all("process").filter(|e| e["kernel"] == 0) {
        assert_eq!(event["name"], name, "{event}");
        let line = texts([&event["pid"], &event["child"], &name]);
        if event["child_tgid"] == event["child"] {
            assert_eq!(event["parent"], event["pid"], "{event}");
            processes.push(line);
        } else {
            // Whose parent is that of its process: of the first, the idle thread.
            assert_eq!(
                (&event["child_tgid"], &event["parent"]),
                (&event["tgid"], &Value::from(0)),
                "{event}"
            );
            threads.push(line);
        }
    }
    let mut created = witness.all("created");
    // A grandchild is remembered before its parent is.
    created.sort_unstable();
    processes.sort_unstable();
    assert_eq!(processes, created);
    assert_eq!(threads, witness.all("thread"));
    let mut executed: Vec<Vec<String>> = told
        .all("exec")
        .map(|e| texts([&e["pid"], &e["path"].as_str().unwrap_or_default()]))
        .collect();
    executed.sort_unstable();
    let mut said = witness.all("executed");
    said.sort_unstable();
    assert_eq!(executed, said);
    assert!(created.len() >= 28 && threads.len() == 1 && said.len() == 7);
    for event in told.all("exec") {
        let setuid = event["path"] == SETUID.to_str().unwrap();
        assert_eq!(event["setuid"], u64::from(setuid), "{event}");
    }
}

/// What was done at the same time on each, and by whom that stayed there, is told by it, each event once.
fn each_processor_tells_its_own(witness: &Witness, told: &Told) {
    let placed = witness.placed();
    for processor in [0, 1] {
        let events = || told.lines.iter().filter(|l| l["processor"] == processor);
        let numbers: Vec<u64> = events().map(|e| number(&e["sequence"])).collect();
        assert!(numbers.iter().copied().eq(0..numbers.len() as u64), "{numbers:?}");
        let mut kinds: BTreeMap<&str, u32> = BTreeMap::new();
        for event in events().filter(|e| placed.contains_key(&number(&e["pid"]))) {
            assert_eq!(placed[&number(&event["pid"])], processor, "{event}");
            *kinds.entry(event["event"].as_str().unwrap()).or_default() += 1;
        }
        let expected = [
            ("call", 2),
            ("credentials", 2),
            ("exec", 2),
            ("module", 1),
            ("process", 9),
        ];
        assert_eq!(kinds, expected.into());
    }
}

fn what_is_against_the_rules_is_refused(witness: &Witness, told: &Told, listed: &[u8; 32]) {
    // Thrice: before there was work on two processors, and on each of them.
    let calls = |number: usize| told.all("call").filter(move |e| e["number"] == number);
    assert_eq!(told.all("call").count(), 6);
    assert_eq!((calls(TOLD).count(), calls(REFUSED).count()), (3, 3));
    for asked in calls(TOLD) {
        assert_eq!(asked["errno"], 0, "{asked}");
        assert_eq!(asked["arguments"][0], format!("{TOLD_ARGUMENT:#x}"));
    }
    for refused in calls(REFUSED) {
        assert_eq!(
            (&refused["errno"], &refused["arguments"][1]),
            (&EACCES.into(), &"0x1ed".into())
        );
    }
    assert_eq!(witness.results("mkdir"), [-i64::from(EACCES); 3]);

    // From a file and from memory; one that is listed and one that is not.
    let placed = witness.placed();
    let (beside, modules): (Vec<_>, Vec<_>) = told
        .all("module")
        .partition(|e| placed.contains_key(&number(&e["pid"])));
    let facts = |e: &Value| {
        (
            number(&e["errno"]),
            number(&e["listed"]),
            e["file"].as_str().unwrap().to_owned(),
        )
    };
    let [file, unknown] = [MODULE, UNKNOWN_MODULE].map(path);
    let modules_told: Vec<_> = modules.iter().map(|e| facts(e)).collect();
    let expected = [(0, 1, file), (0, 1, ""), (1, 0, unknown), (1, 0, "")];
    assert_eq!(
        modules_told,
        expected.map(|(errno, listed, name)| (errno, listed, name.to_owned()))
    );
    let hex = |hash: &[u8]| hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(modules.iter().take(2).all(|e| e["sha256"] == hex(listed)));
    // Each processor has hashed it whole while the other did.
    for event in beside {
        let name = path(UNKNOWN_ON[number(&event["processor"]) as usize]);
        assert_eq!(facts(event), (1, 0, name.to_owned()));
        assert_eq!(event["sha256"], modules[2]["sha256"]);
    }
    for (what, values) in [
        ("finit_module", &[0][..]),
        ("delete_module", &[0]),
        ("init_module", &[0]),
        ("unknown_module", &[-1; 3]),
        ("unknown_bytes", &[-1]),
    ] {
        assert_eq!(witness.results(what), values, "{what}");
    }

    // Who executes a setuid file becomes root; who kept a capability does not.
    let mut roots: Vec<[u64; 5]> = told
        .all("credentials")
        .map(|e| ["uid", "new_uid", "new_euid", "setuid", "errno"].map(|key| number(&e[key])))
        .collect();
    roots.sort_unstable();
    let [refused, allowed] = [[1000, 0, 0, 0, 1], [1000, 1000, 0, 1, 0]];
    assert_eq!(roots, [refused, refused, refused, allowed, allowed, allowed]);
    assert_eq!(witness.results("setuid"), [-1; 3]);
}
