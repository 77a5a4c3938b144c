//! What a processor does: instructions, and what some of them do to it.

use vmsight_events::EventError;
use vmsight_events::linux::{SyscallRecord, SyscallTrace};
use vmsight_hooks::{
    Access, BackendKind, ControlRegister, Delivery, Detail, Field, Filter, Hook, HookKind, Register, Scope,
    StepEnd, Value, Vectors,
};
use vmsight_lab::Work;
use vmsight_lab::orders::Exception;

use crate::guest::{HELD, TOLD, Watched};

const CALLS: u64 = 5000;

/// getpid(2) on both vCPUs at once.
fn both(count: u64) -> impl FnOnce(&vmsight_lab::Guest) -> Vec<vmsight_lab::Account> + Send {
    move |guest| {
        let orders = guest.orders().unwrap();
        let both = [0, 1].map(|cpu| orders.prepare(Work::GetPid { count }.on(cpu)).unwrap());
        orders.go(both).unwrap()
    }
}

/// Each call once, told and counted, and by which vCPU.
pub(crate) fn execution_is_counted(watched: &Watched) {
    let monitor = watched.monitor();
    let hook = Hook::execute(watched.symbol("__x64_sys_getpid"));
    let told = monitor.hook(&hook.clone().delivered(TOLD)).unwrap();
    let counted = monitor.hook(&hook.delivered(Delivery::Counted)).unwrap();
    let mut seen = [0; 2];
    let accounts = watched.during(
        &monitor,
        |occurrence| {
            let event = occurrence.event();
            assert_eq!(event.hook, told.id());
            assert!(
                matches!(event.detail, Detail::Execute { rip } if rip == watched.symbol("__x64_sys_getpid"))
            );
            // Registers are not made up.
            let Err(EventError::Limit { why, .. }) = occurrence.registers() else {
                panic!("there are none");
            };
            assert!(why.contains("gdb-stub"), "{why}");
            seen[event.vcpu as usize] += 1;
        },
        both(CALLS),
    );
    assert!(accounts.iter().all(|a| (a.made, a.failed) == (CALLS, 0)));
    assert_eq!(seen, [CALLS; 2]);
    let counts = told.counts().unwrap();
    assert_eq!(
        (counts.occurred, counts.told, counts.dropped),
        (2 * CALLS, 2 * CALLS, 0)
    );
    let counts = counted.counts().unwrap();
    assert_eq!((counts.occurred, counts.told), (2 * CALLS, 0));
}

pub(crate) fn what_takes_registers_is_refused(watched: &Watched) {
    let monitor = watched.monitor();
    let at = watched.symbol("__x64_sys_getpid");
    let dtb = watched.kernel.space().dtb();
    for hook in [
        Hook::execute(at).within(Scope::Dtb(dtb)),
        Hook::execute(vmsight_arch::Gva(0x40_1000)),
        Hook::execute(at).filtered(Filter::only(&Value::register(RSI).is(0)).unwrap()),
    ] {
        let Err(EventError::Limit { why, .. }) = monitor.hook(&hook) else {
            panic!("{hook:?}");
        };
        assert!(why.contains("gdb-stub"), "{why}");
    }
    let msr = HookKind::Msr {
        index: 0xc000_0082,
        access: Access::WRITE,
    };
    assert!(matches!(
        monitor.hook(&Hook::new(msr)),
        Err(EventError::Unsupported { .. })
    ));
    // Steps, with and without a condition: the backend that has registers of every QEMU can.
    let condition = Value::register(Register::Rip).is(at.0);
    for hook in [
        Hook::new(HookKind::Step { vcpu: 0, count: 1 }),
        Hook::step_until(0, &condition, 1000).unwrap(),
    ] {
        let feature = hook.kind.features()[0];
        let refused = monitor.hook(&hook).unwrap_err();
        assert!(
            matches!(
                refused,
                EventError::Unsupported {
                    backend: BackendKind::AgentTcg,
                    feature: of,
                    can: [BackendKind::GdbStub],
                } if of == feature
            ),
            "{refused:?}"
        );
    }
    // That CR3 is written is told all the same, of every switch of processes.
    let cr3 = HookKind::ControlRegister {
        register: ControlRegister::Cr3,
        access: Access::WRITE,
    };
    let guard = monitor.hook(&Hook::new(cr3).delivered(TOLD)).unwrap();
    let mut switches = 0;
    watched.during(
        &monitor,
        |occurrence| {
            let Detail::ControlRegister {
                register: ControlRegister::Cr3,
                old: None,
                new: None,
                ..
            } = occurrence.event().detail
            else {
                panic!("{:?}", occurrence.event());
            };
            switches += 1;
        },
        both(10),
    );
    drop(guard);
    assert!(switches > 0);
}

/// Each call once, on both vCPUs at the same time, with its caller and result.
pub(crate) fn system_calls_are_traced(watched: &Watched) {
    let monitor = watched.monitor();
    let mut trace = SyscallTrace::new(&watched.kernel, &["getpid".into()]).unwrap();
    trace.arm(&monitor, HELD).unwrap();
    let mut records: Vec<SyscallRecord> = Vec::new();
    let accounts = watched.during(
        &monitor,
        |occurrence| records.extend(trace.take(occurrence).unwrap()),
        both(CALLS),
    );
    for (cpu, account) in (0..).zip(&accounts) {
        assert_eq!((account.made, account.failed), (CALLS, 0));
        let own: Vec<_> = records
            .iter()
            .filter(|r| r.current.pid == account.pid as i32)
            .collect();
        assert_eq!(own.len() as u64, CALLS, "of {} in all", records.len());
        for record in own {
            let expected = (Some(account.pid.into()), cpu);
            assert_eq!((record.result, record.vcpu), expected, "{record:?}");
        }
    }
}

/// A function of a program, which several processes have mapped and execute: only the one that is meant.
pub(crate) fn programs_are_hooked_where_they_are(watched: &Watched) {
    const COUNT: u64 = 500;
    let orders = watched.guest.orders().unwrap();
    let prepared = [0, 1].map(|cpu| orders.prepare(Work::Call { count: COUNT }.on(cpu)).unwrap());
    let monitor = watched.monitor();
    let at = prepared[1].address();
    let pid = i32::try_from(prepared[1].pid()).unwrap();
    let space = watched.kernel.process_space(pid).unwrap().unwrap();
    let hook = Hook::execute(at.into())
        .within(Scope::Dtb(space.dtb()))
        .delivered(HELD);
    let guard = monitor.hook(&hook).unwrap();
    let mut arguments = Vec::new();
    let accounts = watched.during(
        &monitor,
        |occurrence| {
            let registers = occurrence.registers().unwrap();
            assert_eq!((registers.rip, registers.cpl()), (at, 3));
            assert_eq!(occurrence.event().vcpu, 1);
            arguments.push(registers.rdi());
        },
        |_| orders.go(prepared).unwrap(),
    );
    assert_eq!(accounts[1].checksum, Some((1..=COUNT).sum()));
    assert_eq!(arguments, (0..COUNT).collect::<Vec<_>>());
    assert_eq!(guard.counts().unwrap().occurred, COUNT);
}

/// CPUID, OUT, and writes of CR3.
pub(crate) fn instructions_are_told_with_their_values(watched: &Watched) {
    const COUNT: u64 = 100;
    let monitor = watched.monitor();
    let write = Access::WRITE;
    let kinds = [
        HookKind::Cpuid,
        HookKind::Port {
            first: 0x80,
            last: 0x80,
            access: write,
        },
        HookKind::ControlRegister {
            register: ControlRegister::Cr3,
            access: write,
        },
    ];
    let [cpuid, port, cr3] = kinds.map(|kind| monitor.hook(&Hook::new(kind).delivered(TOLD)).unwrap());
    let (mut leaves, mut bytes, mut roots) = (0, 0, Vec::new());
    let orders = watched.guest.orders().unwrap();
    let works = [
        Work::CpuId {
            leaf: 0x4000_1234,
            subleaf: 7,
            count: COUNT,
        },
        Work::Port {
            port: 0x80,
            value: 0xa5,
            count: COUNT,
        },
    ];
    let prepared = works.map(|work| orders.prepare(work.on(1)).unwrap());
    let dtbs = [0, 1].map(|i: usize| {
        let pid = i32::try_from(prepared[i].pid()).unwrap();
        watched.kernel.process_space(pid).unwrap().unwrap().dtb()
    });
    watched.during(
        &monitor,
        |occurrence| {
            let event = occurrence.event();
            match event.detail {
                Detail::Cpuid { leaf, subleaf } => {
                    assert_eq!(event.hook, cpuid.id());
                    leaves += u64::from((leaf, subleaf) == (0x4000_1234, 7));
                }
                Detail::Port {
                    port: at, len, value, ..
                } => {
                    assert_eq!((event.hook, at, len), (port.id(), 0x80, 1));
                    bytes += u64::from(value == Some(0xa5));
                }
                Detail::ControlRegister { old, new, .. } => {
                    assert_eq!(event.hook, cr3.id());
                    assert_eq!(old, Some(event.cr3));
                    roots.extend(new);
                }
                other => panic!("{other:?}"),
            }
        },
        |_| orders.go(prepared).unwrap(),
    );
    assert_eq!((leaves, bytes), (COUNT, COUNT));
    for dtb in dtbs {
        assert!(
            roots.iter().any(|r| Scope::Dtb(dtb).covers(*r)),
            "{dtb} was switched to"
        );
    }
}

/// Page faults and other exceptions of one process, each once, with what the processor says of it.
pub(crate) fn exceptions_are_told(watched: &Watched) {
    const PAGES: u64 = 200;
    let orders = watched.guest.orders().unwrap();
    let monitor = watched.monitor();
    let run = |work: Work, vector: u8| {
        let prepared = orders.prepare(work.on(1)).unwrap();
        let address = prepared.address();
        let pid = i32::try_from(prepared.pid()).unwrap();
        let space = watched.kernel.process_space(pid).unwrap().unwrap();
        let kind = HookKind::Interrupt {
            vectors: Vectors {
                first: vector,
                last: vector,
            },
        };
        let hook = Hook::new(kind).within(Scope::Dtb(space.dtb())).delivered(TOLD);
        let guard = monitor.hook(&hook).unwrap();
        let mut seen = Vec::new();
        watched.during(
            &monitor,
            |occurrence| {
                let registers = occurrence.registers().unwrap();
                assert_eq!(registers.cpl(), 0, "at the handler");
                let Detail::Interrupt {
                    vector: v,
                    error_code,
                    cr2,
                    rip,
                } = occurrence.event().detail
                else {
                    panic!("{:?}", occurrence.event());
                };
                assert_eq!(v, vector);
                if rip.0 >> 63 == 0 {
                    seen.push((error_code, cr2));
                }
            },
            |_| prepared.go().unwrap(),
        );
        drop(guard);
        (address, seen)
    };
    let (address, faults) = run(Work::Touch { pages: PAGES }, 14);
    let own = address..address + PAGES * 4096;
    let touched: Vec<_> = faults
        .iter()
        .filter(|(_, cr2)| cr2.is_some_and(|at| own.contains(&at)))
        .collect();
    assert_eq!(touched.len() as u64, PAGES, "of {}", faults.len());
    for (n, (code, at)) in (0..).zip(&touched) {
        let at = at.unwrap();
        assert_eq!(at & !0xfff, address + n * 4096);
        // From user mode (SDM vol. 3A 4.7), where nothing was mapped.
        assert_eq!(code.unwrap() & 0b101, 0b100);
    }
    // The last one twice: Rust's own handler of SIGSEGV steps aside at the first and has the instruction
    // executed again.
    for (exception, vector, code, count) in [
        (Exception::Divide, 0, None, 1),
        (Exception::InvalidOpcode, 6, None, 1),
        (Exception::Protection, 13, Some(0), 2),
    ] {
        let (_, seen) = run(Work::Raise { exception }, vector);
        assert_eq!(seen, vec![(code, None); count], "vector {vector}");
    }
}

/// One event after so many instructions, at another place.
pub(crate) fn steps_are_counted(watched: &Watched) {
    let monitor = watched.monitor();
    let hook = Hook::new(HookKind::Step { vcpu: 1, count: 1000 }).delivered(HELD);
    let guard = monitor.hook(&hook).unwrap();
    let mut seen = 0;
    watched.during(
        &monitor,
        |occurrence| {
            let registers = occurrence.registers().unwrap();
            assert!(matches!(occurrence.event().detail, Detail::Step { rip, made: 1000, .. } if rip.0 == registers.rip));
            assert_eq!(occurrence.event().vcpu, 1);
            seen += 1;
        },
        |guest| guest.order(Work::Compute { rounds: 100_000 }.on(1)).unwrap(),
    );
    assert_eq!(seen, 1);
    drop(guard);
    // Until a program runs, which is told once; and where that never is, as many as are allowed.
    let user = Value::from(Field::Cpl).is(3);
    for (condition, most, end) in [
        (user, 1 << 40, StepEnd::Condition),
        (Value::from(Field::Cpl).is(1), 5000, StepEnd::Count),
    ] {
        let hook = Hook::step_until(1, &condition, most).unwrap().delivered(HELD);
        let guard = monitor.hook(&hook).unwrap();
        let mut seen = Vec::new();
        watched.during(
            &monitor,
            |occurrence| seen.push((occurrence.event().detail, occurrence.registers().unwrap())),
            |guest| guest.order(Work::Compute { rounds: 100_000 }.on(1)).unwrap(),
        );
        let [(Detail::Step { rip, made, end: why }, registers)] = seen[..] else {
            panic!("{seen:?}");
        };
        assert_eq!((why, rip.0), (end, registers.rip));
        match end {
            StepEnd::Condition => assert_eq!(registers.cpl(), 3),
            _ => assert_eq!(made, most),
        }
        let counts = guard.counts().unwrap();
        assert_eq!((counts.occurred, counts.told), (made, 1));
    }
}

/// RSI, as hooks count registers.
const RSI: Register = Register::Gpr(6);

/// What a filter puts away is counted in the VMM, and never comes out of it.
pub(crate) fn filters_are_evaluated_at_the_hook(watched: &Watched) {
    let monitor = watched.monitor();
    // do_sys_openat2(int dfd, const char __user *filename, …) since 5.6 (Linux, fs/open.c).
    let at = watched.symbol("do_sys_openat2");
    let wanted = Filter::only(&Value::register(RSI).begins_with("/srv/wanted-")).unwrap();
    let guard = monitor
        .hook(&Hook::execute(at).filtered(wanted).delivered(HELD))
        .unwrap();
    let open = |path: &str| Work::Open {
        path: path.into(),
        flags: 0,
        count: 25,
    };
    let mut told = 0;
    watched.during(
        &monitor,
        |_| told += 1,
        |guest| {
            for path in ["/srv/other", "/srv/wanted-one", "/srv/wanted", "/srv/wanted-two"] {
                guest.order(open(path)).unwrap();
            }
        },
    );
    let counts = guard.counts().unwrap();
    assert_eq!((told, counts.told, counts.undecided), (50, 50, 0));
    assert!(
        counts.filtered >= 50 && counts.occurred == counts.filtered + 50,
        "{counts:?}"
    );
}
