//! Policies for the kernels of the lab.

#![allow(clippy::unwrap_used)]

use std::fs;

use vmsight_lab::Kernel;
use vmsight_sim_abi::{Handler, Malformed, Member, Policy};
use vmsight_sim_policy::{KernelImage, PolicyError, Wanted, policy};

fn image(kernel: Kernel) -> KernelImage {
    let fetched = kernel.fetch().unwrap_or_else(|e| panic!("{e:?}"));
    KernelImage::read(&fs::read(fetched.vmlinuz()).unwrap()).unwrap_or_else(|e| panic!("{e:?}"))
}

#[test]
fn debian_has_all_that_is_looked_at() {
    let kernel = image(Kernel::V6_1);
    let made = policy(&kernel, &Wanted::default()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(made.hooks().count(), 8);
    for (_, hook) in made.hooks() {
        let (symbol, distance) = kernel.symbols.nearest(hook.address).unwrap();
        assert_eq!(distance, 0, "{} {:#x}", symbol.name, hook.address);
        assert_eq!((hook.may_refuse, hook.refusal), (0, 0));
    }
    let handler = made.hook(Handler::Process).unwrap();
    assert_eq!(kernel.symbols.address("wake_up_new_task"), Some(handler.address));
    // What the kernel's headers have fixed.
    for (member, offset) in [
        (Member::RegsDi, 0x70),
        (Member::RegsR9, 0x40),
        (Member::InodeMode, 0),
    ] {
        assert_eq!(made.member(member), Some(offset), "{member:?}");
    }
    assert_eq!(
        made.entry & 0xfff,
        kernel.symbols.address("entry_SYSCALL_64").unwrap() & 0xfff
    );
    assert_eq!(Policy::from_bytes(&made.to_bytes()), Ok(made));
    for (name, number) in [("read", 0), ("getpid", 39), ("execve", 59), ("openat", 257)] {
        assert_eq!(kernel.call_number(name), Some(number), "{name}");
    }
    assert_eq!(kernel.call_number("no_such_call"), None);
}

#[test]
fn what_is_wanted_is_in_the_policy() {
    let kernel = image(Kernel::V6_1);
    let wanted = Wanted {
        told: vec![59, 41],
        refused: vec![(41, 13)],
        refuse_other_calls: true,
        modules: Some(vec![[7; 32]]),
        refuse_root: true,
    };
    let made = policy(&kernel, &wanted).unwrap();
    assert!(made.call(41).told && made.call(41).errno == 13 && made.call(59).errno == 0);
    let may = |handler| made.hook(handler).unwrap().may_refuse == 1;
    assert!(
        may(Handler::Call)
            && may(Handler::CompatCall)
            && may(Handler::ModuleFile)
            && may(Handler::Credentials)
    );
    assert!(!may(Handler::Process) && !may(Handler::Exec));
    assert_eq!(made.modules(), [[7; 32]]);
    let refused = |wanted| policy(&kernel, &wanted).unwrap_err();
    let told = vec![512];
    assert_eq!(
        refused(Wanted {
            told,
            ..Wanted::default()
        }),
        PolicyError::Call(512)
    );
    for rule in [(1, 0), (1, 5000)] {
        let refused_calls = vec![rule];
        let wanted = Wanted {
            refused: refused_calls,
            ..Wanted::default()
        };
        assert_eq!(refused(wanted), PolicyError::Call(1));
    }
    let modules = Some(vec![[0; 32]; 129]);
    assert_eq!(
        refused(Wanted {
            modules,
            ..Wanted::default()
        }),
        PolicyError::Modules(129)
    );
}

#[test]
fn what_a_kernel_lacks_is_named() {
    let whole = image(Kernel::V6_1);
    let without = |name: &str, moved: i64| {
        let symbols = whole
            .symbols
            .iter()
            .filter(|s| s.name != name || moved != 0)
            .map(|s| {
                let address = if s.name == name {
                    s.address.wrapping_add_signed(moved)
                } else {
                    s.address
                };
                (s.name, address, s.kind)
            })
            .collect();
        let kernel = whole.with_symbols(symbols);
        policy(&kernel, &Wanted::default()).unwrap_err()
    };
    assert_eq!(
        without("begin_new_exec", 0),
        PolicyError::Symbol("begin_new_exec")
    );
    assert_eq!(
        without("current_task", 0).to_string(),
        "this kernel has no current_task"
    );
    let found = without("begin_new_exec", 5).to_string();
    assert!(
        found.starts_with("begin_new_exec of this kernel does not begin with what tracing reserves")
            && found.ends_with("with 41 57 41 56 41"),
        "{found}"
    );
    assert_eq!(
        without("_etext", -0x100_0000),
        PolicyError::Malformed(Malformed::Text)
    );
}

/// Those for which there is a policy today. The oldest has no function that is called for each system call; the newest does
/// not let it be traced.
#[test]
fn kernels_have_a_policy_or_lack_something_that_is_named() {
    for kernel in Kernel::ALL {
        let made = policy(&image(kernel), &Wanted::default());
        match kernel {
            Kernel::V5_10 | Kernel::Sid => {
                let why = made.map_or_else(|e| e.to_string(), |_| "x64_sys_call".to_owned());
                assert!(why.contains("x64_sys_call"), "{kernel}: {why}");
            }
            // The cloud's has no calls of x32.
            _ => assert!(made.unwrap_or_else(|e| panic!("{kernel}: {e}")).hooks().count() >= 7),
        }
    }
}
