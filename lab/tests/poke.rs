//! Our kernel module does what it is told, inside kernels that nobody watches, and they go on.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use vmsight_arch::Gva;
use vmsight_lab::orders::{Poke, Poked, Reach, Register, checksum};
use vmsight_lab::{Guest, Kernel, Memory, Spec, Work};
use vmsight_memory::AddressSpace;
use vmsight_target::TargetSpec;

const CR0_WP: u64 = 1 << 16;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const LSTAR: Register = Register::Msr(0xc000_0082);
/// An entry of the table of system calls that no program uses: of a call that was removed.
const UNUSED_CALL: u64 = 156;
/// A vector that no processor of this century raises: coprocessor segment overrun.
const UNUSED_VECTOR: u64 = 9;

/// A guest with the module, seen from inside and from outside.
struct Both {
    guest: Guest,
    kernel: vmsight_linux::Kernel,
}

impl Both {
    fn boot(version: Kernel) -> Both {
        let spec = Spec {
            memory: Memory::Memfd,
            ..Spec::new(version).idle().orders().modules()
        };
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        let target = TargetSpec::Qmp(guest.qmp_path().unwrap());
        let memory = vmsight_target::attach(&target, &Default::default())
            .unwrap_or_else(|e| panic!("{e}"))
            .memory;
        let kernel =
            vmsight_linux::Kernel::attach(memory, Default::default()).unwrap_or_else(|e| panic!("{e}"));
        Both { guest, kernel }
    }

    fn poke(&self, poke: Poke) -> Poked {
        let account = self
            .guest
            .order(Work::Poke { poke: poke.clone() }.on(0))
            .unwrap_or_else(|e| panic!("{e:#}"));
        assert_eq!(account.returned, Some(0), "{poke:x?}: {account:?}");
        account.poked.unwrap()
    }

    fn symbol(&self, name: &str) -> u64 {
        self.kernel.symbol(name).unwrap_or_else(|e| panic!("{e}")).0
    }

    fn space(&self) -> &AddressSpace {
        self.kernel.space()
    }

    /// What is there, seen from outside.
    fn seen(&self, at: u64, width: u64) -> u64 {
        let mut bytes = [0; 8];
        self.space()
            .read(Gva(at), &mut bytes[..width.try_into().unwrap()])
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Writes a value, which is seen inside and outside, and then writes the old one again.
    fn changes(&self, at: u64, address: u64, reach: Reach, width: u64) {
        let write = |first, restore| {
            self.poke(Poke::Write {
                at: address,
                reach,
                width,
                first,
                step: 0,
                count: 1,
                restore,
            })
        };
        let old = self.seen(at, width);
        let new = old ^ (u64::MAX >> (64 - 8 * width));
        let done = |old, seen| Poked {
            old,
            seen,
            made: 1,
            faults: 0,
        };
        assert_eq!(write(new, true), done(old, new), "{at:#x} {reach:?}");
        assert_eq!(self.seen(at, width), old, "{at:#x} {reach:?}: restored");
        assert_eq!(write(new, false), done(old, new), "{at:#x} {reach:?}");
        assert_eq!(self.seen(at, width), new, "{at:#x} {reach:?}: seen from outside");
        assert_eq!(write(old, false), done(new, old), "{at:#x} {reach:?}");
        assert_eq!(self.seen(at, width), old, "{at:#x} {reach:?}: as before");
    }

    fn get(&self, register: Register) -> u64 {
        let Poked {
            old, made, faults, ..
        } = self.poke(Poke::Get { register });
        assert_eq!((made, faults), (1, 0), "{register:?}");
        old
    }

    /// Sets bits of a register for a moment.
    fn set(&self, register: Register, mask: u64, value: u64) -> Poked {
        self.poke(Poke::Set {
            register,
            mask,
            value,
            count: 1,
            restore: true,
        })
    }
}

fn check(version: Kernel) {
    let both = Both::boot(version);
    let refused = both
        .guest
        .order(Work::Poke {
            poke: Poke::Get { register: LSTAR },
        })
        .unwrap_err();
    assert!(
        refused.to_string().contains("is vmsight_poke loaded"),
        "{refused:#}"
    );
    let load = Work::Load {
        name: "vmsight_poke".into(),
        parameters: String::new(),
        from_memory: false,
    };
    assert_eq!(
        both.guest.order(load).unwrap().returned,
        Some(0),
        "{}",
        both.guest.console()
    );

    memory(&both);
    tables(&both);
    registers(&both);

    // A function of the kernel's: 3 to the power of 4.
    let called = both.poke(Poke::Call {
        at: both.symbol("int_pow"),
        arguments: vec![3, 4],
        count: 100,
    });
    assert_eq!((called.seen, called.made), (81, 100));

    // The guest has come to no harm.
    let account = both.guest.order(Work::Compute { rounds: 1000 }).unwrap();
    assert_eq!(account.checksum, Some(checksum(1000)));
    let name = "vmsight_poke".into();
    assert_eq!(both.guest.order(Work::Unload { name }).unwrap().returned, Some(0));
    let log = Work::Exec {
        path: "/bin/busybox".into(),
        argv: vec!["dmesg".into()],
        envp: Vec::new(),
    };
    let log = both.guest.order(log).unwrap().output.lossy();
    assert!(log.contains("vmsight_poke: loading out-of-tree module"), "{log}");
    for word in ["BUG", "Oops", "WARNING", "Call Trace", "pinned"] {
        assert!(!log.contains(word), "{log}");
    }
}

fn memory(both: &Both) {
    // Text that is executed when the machine is switched off, and a string that is not written to.
    let (text, read_only) = (both.symbol("machine_halt"), both.symbol("linux_banner"));
    for at in [text, read_only] {
        both.changes(at, at, Reach::Wp, 1);
        both.changes(at, at, Reach::Alias, 1);
        let gpa = both.space().translate(Gva(at)).unwrap().gpa.0;
        both.changes(at, gpa, Reach::Physical, 1);
        let old = both.seen(at, 1);
        let denied = both.poke(Poke::Write {
            at,
            reach: Reach::Direct,
            width: 1,
            first: old ^ 1,
            step: 0,
            count: 3,
            restore: false,
        });
        let expected = Poked {
            old,
            seen: old,
            made: 0,
            faults: 3,
        };
        assert_eq!(denied, expected, "the kernel's own protection holds");
    }
    // A sequence into the kernel's data; `restore` puts back what was there.
    let data = both.symbol("linux_banner") & !7;
    let old = both.seen(data, 8);
    let written = both.poke(Poke::Write {
        at: data,
        reach: Reach::Alias,
        width: 8,
        first: 10,
        step: 7,
        count: 1000,
        restore: true,
    });
    assert_eq!(
        (written.old, written.seen, written.made),
        (old, 10 + 999 * 7, 1000)
    );
    let read = both.poke(Poke::Read {
        at: data,
        reach: Reach::Direct,
        width: 8,
        count: 1000,
    });
    let expected = Poked {
        old,
        seen: old.wrapping_mul(1000),
        made: 1000,
        faults: 0,
    };
    assert_eq!(read, expected);
    // Nothing is mapped there, in no kernel.
    let nowhere = both.poke(Poke::Read {
        at: 0xffff_ffff_ffff_f000,
        reach: Reach::Direct,
        width: 8,
        count: 2,
    });
    assert_eq!((nowhere.made, nowhere.faults), (0, 2));
}

fn tables(both: &Both) {
    let entry = both.symbol("sys_call_table") + 8 * UNUSED_CALL;
    both.changes(entry, entry, Reach::Wp, 8);
    both.changes(entry, entry, Reach::Alias, 8);

    // The register holds a read-only alias of the kernel's table.
    let (base, table) = (both.get(Register::Idtr), both.symbol("idt_table"));
    assert_eq!(
        both.space().translate(Gva(base)).unwrap().gpa,
        both.space().translate(Gva(table)).unwrap().gpa
    );
    for half in [0, 8] {
        let offset = 16 * UNUSED_VECTOR + half;
        both.changes(table + offset, base + offset, Reach::Wp, 8);
    }
}

fn registers(both: &Both) {
    for (register, mask) in [
        (Register::Cr0, CR0_WP),
        (Register::Cr4, CR4_SMEP),
        (Register::Cr4, CR4_SMAP),
        (Register::Cr4, CR4_SMEP | CR4_SMAP),
    ] {
        let set = both.set(register, mask, 0);
        assert_eq!(set.old & mask, mask, "{register:?}: the kernel has set {mask:#x}");
        assert_eq!(
            (set.seen, set.made, set.faults),
            (set.old & !mask, 1, 0),
            "{register:?}"
        );
        assert_eq!(both.get(register) & mask, mask, "{register:?}: restored");
    }

    let entry = both.symbol("entry_SYSCALL_64");
    assert_eq!(both.get(LSTAR), entry);
    let set = both.set(LSTAR, u64::MAX, entry + 16);
    assert_eq!((set.old, set.seen), (entry, entry + 16));
    assert_eq!(both.get(LSTAR), entry, "restored");
    let set = both.poke(Poke::Set {
        register: LSTAR,
        mask: 0,
        value: 0,
        count: 10,
        restore: false,
    });
    assert_eq!(
        (set.old, set.seen, set.made),
        (entry, entry, 10),
        "the same value"
    );

    let set = both.set(Register::Dr(0), u64::MAX, 0x1234);
    assert_eq!((set.seen, set.made), (0x1234, 1));
    let set = both.set(Register::Idtr, u64::MAX, both.get(Register::Idtr));
    assert_eq!((set.old, set.made), (set.seen, 1));
    // x87 state cannot be switched off.
    let set = both.set(Register::Xcr0, 1, 0);
    assert_eq!(
        (set.old & 1, set.seen, set.made, set.faults),
        (1, set.old, 0, 1),
        "a #GP is caught"
    );
}

#[test]
fn kernel_6_1_is_poked() {
    check(Kernel::V6_1);
}

#[test]
fn kernel_6_12_is_poked() {
    check(Kernel::V6_12);
}
