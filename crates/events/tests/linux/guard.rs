//! What a guard forbids does not happen, and without it does; the guest goes on in both cases.

use vmsight_arch::Gva;
use vmsight_events::linux::{Guard, Judgement, Rule};
use vmsight_hooks::Verdict;
use vmsight_lab::orders::{Poke, Poked, Reach, Register, WITNESS, checksum};
use vmsight_lab::{Account, Guest, Kernel, Work};

use crate::support::{HELD, Watched};

const CR0_WP: u64 = 1 << 16;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;

fn load() -> Work {
    Work::Load {
        name: "vmsight_poke".into(),
        parameters: String::new(),
        from_memory: false,
    }
}

fn witness() -> Work {
    Work::Exec {
        path: WITNESS.into(),
        argv: vec!["wit".into()],
        envp: Vec::new(),
    }
}

fn poke(guest: &Guest, poke: Poke) -> Poked {
    let account = guest.order(Work::Poke { poke }.on(0)).unwrap();
    assert_eq!(account.returned, Some(0), "{account:?}");
    account.poked.unwrap()
}

/// Clears bits of a register, and sets them again.
fn clear(guest: &Guest, register: Register, mask: u64) -> Poked {
    poke(
        guest,
        Poke::Set {
            register,
            mask,
            value: 0,
            count: 1,
            restore: true,
        },
    )
}

/// Flips a byte with CR0.WP cleared, and puts it back.
fn flip(watched: &Watched, at: Gva) -> Poked {
    let old = watched.kernel.space().read_u8(at).unwrap();
    poke(
        &watched.guest,
        Poke::Write {
            at: at.0,
            reach: Reach::Wp,
            width: 1,
            first: u64::from(old ^ 0xff),
            step: 0,
            count: 1,
            restore: true,
        },
    )
}

/// Does something under these rules. Gives the rules that were broken, as the guard has told it.
fn guarded<T: Send>(
    watched: &Watched,
    rules: &[Rule],
    work: impl FnOnce(&Guest) -> T + Send,
) -> (T, Vec<(Rule, Option<i32>)>) {
    let monitor = watched.monitor();
    let mut guard = Guard::arm(&watched.kernel, &monitor, rules, HELD).unwrap();
    let mut told = Vec::new();
    let done = watched.during(
        &monitor,
        |occurrence| match guard.judge(&monitor, occurrence).unwrap() {
            Judgement::Allowed => Verdict::Continue,
            Judgement::Denied(incident, verdict) => {
                told.push((incident.rule, incident.current.map(|c| c.pid)));
                verdict
            }
        },
        work,
    );
    (done, told)
}

fn pid(account: &Account) -> Option<i32> {
    Some(account.pid as i32)
}

fn check(version: Kernel) {
    let watched = Watched::boot(version, true);
    programs(&watched);
    modules(&watched);
    registers(&watched);
    memory(&watched);
    let account = watched.order(Work::Compute { rounds: 1000 });
    assert_eq!(account.checksum, Some(checksum(1000)), "the guest is well");
}

fn programs(watched: &Watched) {
    let rule = Rule::Exec(WITNESS.to_owned());
    let ((denied, other), told) = guarded(watched, std::slice::from_ref(&rule), |guest| {
        let other = Work::Exec {
            path: "/bin/busybox".into(),
            argv: vec!["true".into()],
            envp: Vec::new(),
        };
        (guest.order(witness()).unwrap(), guest.order(other).unwrap())
    });
    assert_eq!(denied.returned, Some(-13), "EACCES");
    assert_eq!(other.returned, None, "another program is executed: {other:?}");
    assert_eq!(told, [(rule, pid(&denied))]);
    assert_eq!(
        watched.order(witness()).returned,
        None,
        "executed without a guard"
    );
}

fn modules(watched: &Watched) {
    let ((file, bytes), told) = guarded(watched, &[Rule::Modules], |guest| {
        let from_memory = Work::Load {
            name: "vmsight_poke".into(),
            parameters: String::new(),
            from_memory: true,
        };
        (guest.order(load()).unwrap(), guest.order(from_memory).unwrap())
    });
    assert_eq!((file.returned, bytes.returned), (Some(-1), Some(-1)), "EPERM");
    assert_eq!(told, [(Rule::Modules, pid(&file)), (Rule::Modules, pid(&bytes))]);
}

/// Bits that protect the kernel stay set; the module comes only after the guard, which must find its code.
fn registers(watched: &Watched) {
    let rules = [Rule::Cr0Wp, Rule::Cr4Smep, Rule::Cr4Smap];
    let bits = [
        (Register::Cr0, CR0_WP, Rule::Cr0Wp),
        (Register::Cr4, CR4_SMEP, Rule::Cr4Smep),
        (Register::Cr4, CR4_SMAP, Rule::Cr4Smap),
    ];
    let (seen, told) = guarded(watched, &rules, |guest| {
        assert_eq!(guest.order(load()).unwrap().returned, Some(0));
        bits.clone()
            .map(|(register, mask, _)| clear(guest, register, mask))
    });
    for (poked, (register, mask, _)) in seen.iter().zip(&bits) {
        assert_eq!(poked.seen & mask, *mask, "{register:?} {mask:#x} stays set");
    }
    let told: Vec<_> = told.into_iter().map(|(rule, _)| rule).collect();
    assert_eq!(told, rules);
    for (register, mask, _) in bits {
        let poked = clear(&watched.guest, register, mask);
        assert_eq!(
            poked.seen & mask,
            0,
            "{register:?} {mask:#x} is cleared without a guard"
        );
    }
}

/// Memory that is read-only keeps what it holds.
fn memory(watched: &Watched) {
    let places = [
        (Rule::KernelText, watched.symbol("machine_halt")),
        (Rule::Rodata, watched.symbol("linux_banner")),
        (
            Rule::SyscallTable,
            watched.symbol("sys_call_table").wrapping_add(8 * 156),
        ),
        (Rule::Idt, watched.symbol("idt_table").wrapping_add(16 * 9)),
    ];
    for (rule, at) in places {
        let old = watched.kernel.space().read_u8(at).unwrap();
        let (poked, told) = guarded(watched, std::slice::from_ref(&rule), |_| flip(watched, at));
        assert_eq!(poked.seen, u64::from(old), "{rule}: the old byte is still there");
        assert!(told.iter().all(|(r, _)| *r == rule), "{told:?}");
        assert!(!told.is_empty(), "{rule} was not told");
        let poked = flip(watched, at);
        assert_eq!(
            poked.seen,
            u64::from(old ^ 0xff),
            "{rule}: written without a guard"
        );
    }
}

#[test]
fn kernel_6_1() {
    check(Kernel::V6_1);
}

#[test]
fn kernel_6_12() {
    check(Kernel::V6_12);
}
