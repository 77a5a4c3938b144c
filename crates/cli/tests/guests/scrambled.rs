//! A real guest's dump in which words of its objects were replaced at random, by other pointers of the kernel, by themselves, by numbers
//! no counter has: whatever is asked of it, the program ends, within its memory, and prints nothing that a terminal acts on.
//!
//! What an attacker would think of is in `lies.rs`. This is for what nobody thought of: lists that lead into other lists, trees of
//! something else, offsets at the end of all addresses.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::{Command, Output};

use serde_json::Value;
use vmsight_arch::{Gpa, Gva};
use vmsight_lab::Format;
use vmsight_lab::chance::Dice;
use vmsight_linux::{AttachOptions, Kernel};
use vmsight_memory::dump;

use crate::support::{Dump, command, harmless, objects, prepared, text, vmsight};

/// What is asked, one of these after the other.
const LISTINGS: [&[&str]; 33] = [
    &["info"],
    &["ps"],
    &["pstree"],
    &["threads"],
    &["stacks"],
    &["maps"],
    &["lsof"],
    &["lsmod"],
    &["net"],
    &["unix"],
    &["mounts"],
    &["kmsg"],
    &["env"],
    &["cgroups"],
    &["ifaces"],
    &["iomem"],
    &["slabs"],
    &["bpf"],
    &["perf"],
    &["timeline"],
    &["recover", "arp"],
    &["recover", "commands"],
    &["recover", "conntrack"],
    &["recover", "elf"],
    &["recover", "files"],
    &["recover", "history"],
    &["recover", "input"],
    &["recover", "packets"],
    &["recover", "processes"],
    &["recover", "routes"],
    &["recover", "screen"],
    &["recover", "sockets"],
    &["recover", "tty"],
];
/// Times that the guest is scrambled.
const ROUNDS: usize = 8;
/// Of what an object is scrambled, and of what those are that it leads to, and so on, bytes.
const REACH: [u64; 3] = [1536, 512, 256];
/// What ends a program that does not end by itself, seconds: some hundred times as long as any should take.
const PATIENCE: &str = "60";
/// What it may map, KiB: the dump of 512 MiB, stacks, and what it needs.
const MEMORY: &str = "4194304";

struct Scrambled {
    dump: Dump,
    file: File,
    kernel: Kernel,
    /// Addresses of objects, by how far they are from what a listing names.
    objects: Vec<Vec<u64>>,
}

impl Scrambled {
    fn new() -> Scrambled {
        let dump = Dump::of(&prepared().guest, Format::Raw);
        let kernel = Kernel::attach(
            dump::open(&dump.path, None).unwrap().memory,
            AttachOptions::default(),
        )
        .unwrap_or_else(|e| panic!("{e}"));
        let mut named = BTreeSet::new();
        for listing in LISTINGS {
            let out = vmsight(&[&asked(listing, dump.target())[..], &["-o", "json"]].concat());
            for row in objects(&out.stdout).unwrap_or_default() {
                named.extend(row.values().filter_map(address));
            }
        }
        let variables = [
            "modules",
            "init_net",
            "init_task",
            "prog_idr",
            "file_systems",
            "iomem_resource",
        ];
        named.extend(
            variables
                .iter()
                .filter_map(|name| Some(kernel.find_symbol(&[name])?.0)),
        );
        let mut known = named.clone();
        let mut found = vec![named];
        for reach in REACH {
            let last = found.last().unwrap();
            let words = last
                .iter()
                .flat_map(|at| (0..reach).step_by(8).map(move |i| at.wrapping_add(i)));
            let next: BTreeSet<u64> = words
                .filter_map(|at| kernel.space().read_u64(Gva(at)).ok())
                .filter(|&to| is_kernel(to) && kernel.space().read_u64(Gva(to)).is_ok() && known.insert(to))
                .collect();
            found.push(next);
        }
        let objects: Vec<Vec<u64>> = found.into_iter().map(|some| some.into_iter().collect()).collect();
        assert!(
            objects[0].len() > 500 && objects[1].len() > 2000,
            "hardly any objects"
        );
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&dump.path)
            .unwrap();
        Scrambled {
            dump,
            file,
            kernel,
            objects,
        }
    }

    /// A word of an object, where it lies in the dump and what it is. Rather a pointer than a number.
    fn word(&self, dice: &mut Dice) -> Option<(u64, u64)> {
        (0..40).find_map(|_| {
            let distance = dice.roll(REACH.len() as u64) as usize;
            let object = dice.one_of(&self.objects[distance]) & !7;
            let at = Gva(object.wrapping_add(dice.roll(REACH[distance]) & !7));
            // A page table may be among what was scrambled.
            let offset = self.kernel.space().translate(at).ok()?.gpa.0;
            self.kernel.memory().read_u64(Gpa(offset)).ok()?;
            let is = self.kernel.space().read_u64(at).ok()?;
            (is_kernel(is) || dice.roll(4) == 0).then_some((offset, is))
        })
    }

    /// What comes in the place of a word.
    fn other(&self, is: u64, dice: &mut Dice) -> u64 {
        const NUMBERS: [u64; 9] = [
            0,
            1,
            u64::MAX,
            1 << 63,
            i64::MAX as u64,
            0x7fff_ffff,
            0xffff_ffff,
            0x1_0000,
            0x4141_4141_4141_4141,
        ];
        let distance = dice.roll(self.objects.len() as u64) as usize;
        match dice.roll(8) {
            0..4 if is_kernel(is) => dice.one_of(&self.objects[distance]),
            4..6 if is_kernel(is) => {
                is.wrapping_add(dice.one_of(&[8, 16, 64, 4096, 1, u64::MAX - 7, u64::MAX - 63]))
            }
            6 => dice.roll(u64::MAX),
            _ => dice.one_of(&NUMBERS),
        }
    }

    /// Replaces so many words. Gives where, what was there and what is there now.
    fn scramble(&self, many: usize, dice: &mut Dice) -> Vec<(u64, u64, u64)> {
        let words = (0..many).filter_map(|_| {
            let (offset, is) = self.word(dice)?;
            let other = self.other(is, dice);
            self.put(offset, other);
            Some((offset, is, other))
        });
        words.collect()
    }

    /// A raw dump lies flat: offset is address.
    fn put(&self, offset: u64, word: u64) {
        self.file.write_all_at(&word.to_le_bytes(), offset).unwrap();
    }
}

fn is_kernel(word: u64) -> bool {
    word >> 47 == 0x1_ffff
}

fn address(value: &Value) -> Option<u64> {
    let hex = value.as_str()?.strip_prefix("0x")?;
    u64::from_str_radix(hex, 16).ok().filter(|&at| is_kernel(at))
}

fn asked<'a>(listing: &[&'a str], target: &'a str) -> Vec<&'a str> {
    [listing, &[target]].concat()
}

/// `vmsight ARGS` within limits.
fn limited(args: &[&str]) -> Output {
    let program = command(args);
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            r#"ulimit -v "$0"; exec timeout -s KILL "$@""#,
            MEMORY,
            PATIENCE,
        ])
        .arg(program.get_program())
        .args(program.get_args());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.output().unwrap()
}

#[test]
fn whatever_its_objects_hold_every_listing_ends() {
    let guest = Scrambled::new();
    let mut dice = Dice::new(0x9e37_79b9_7f4a_7c15);
    for round in 0..ROUNDS {
        let many = dice.one_of(&[5, 20, 60, 200]);
        let scrambled = guest.scramble(many, &mut dice);
        let form = if round % 2 == 0 {
            ["-o", "json"]
        } else {
            ["--columns", "all"]
        };
        for listing in LISTINGS.iter().copied().chain([&["check"][..]]) {
            let args = [&asked(listing, guest.dump.target())[..], &form].concat();
            let out = limited(&args);
            let err = text(&out.stderr);
            let fine = matches!(out.status.code(), Some(0..=2)) && !err.contains("panicked");
            assert!(fine, "{args:?}: {:?} {err}; of {scrambled:x?}", out.status);
            // Where there is nothing to be listed nothing is printed.
            if form[0] == "-o" && !out.stdout.is_empty() {
                objects(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}; of {scrambled:x?}"));
            }
            for printed in [&out.stdout, &out.stderr] {
                harmless(&format!("{args:?} of {scrambled:x?}"), printed);
            }
        }
        for (offset, was, _) in scrambled.into_iter().rev() {
            guest.put(offset, was);
        }
    }
}
