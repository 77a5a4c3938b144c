//! Hooks in an unmodified Debian kernel, which the hypervisor puts in by itself. Here page tables of user mode are not apart:
//! where they are, as is the default, is `watched.rs`.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmsight_lab::Kernel;
use vmsight_lab::cache::Lock;
use vmsight_lab::cpio::Archive;
use vmsight_sim_abi::{Handler, Hook, Policy};
use vmsight_sim_image::bochs::{HALTED, WITH_TRAP_FLAG, WITH_VMX};
use vmsight_sim_image::{Image, Machine, Program};
use vmsight_sim_policy::{KernelImage, Wanted, policy};

/// For a machine that has others to run too.
const LIMIT: Duration = Duration::from_secs(1200);
/// `sethostname`, and EPERM.
const REFUSED: (usize, u16) = (170, 1);
/// One less than there are handlers for: Debian's kernel for clouds is built without the calls of x32.
const HOOKS: u64 = 7;
/// What the trial finds.
const FINDINGS: &[&str] = &[
    "hooks that come by themselves",
    "calls of a function that was hooked",
    "a byte beside a hook",
    "a byte of a hook",
    "the last byte of a hook",
    "eight bytes, three of them a hook's",
    "bytes by REP MOVSB up to a hook's end",
    "across the end of the page",
    "across the end, to where nothing is",
    "an exchange",
    "a push onto a hook",
    "calls after all this",
];
/// It sleeps last, for the kernel says in the midst of what it wrote that it restarts.
const INIT: &str = "\
#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /tmp /sys
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t tracefs trace /sys/kernel/tracing
busybox hostname denied 2>/tmp/error; echo \"guest: hostname $? $(busybox cat /tmp/error)\"
for n in 1 2 3; do busybox sh -c \"echo $n > /tmp/$n\"; done
echo \"guest: files $(busybox cat /tmp/1 /tmp/2 /tmp/3 | busybox tr -d '\\n')\"
cd /sys/kernel/tracing
echo 1 > events/sched/sched_wakeup_new/enable
busybox true
echo 0 > events/sched/sched_wakeup_new/enable
echo \"guest: traced $(busybox grep -c sched_wakeup_new: trace)\"
echo 1 > /proc/sys/kernel/sched_schedstats
echo \"guest: schedstats $(busybox cat /proc/sys/kernel/sched_schedstats)\"
echo \"guest: meltdown $(busybox cat /sys/devices/system/cpu/vulnerabilities/meltdown)\"
echo \"guest: serial ports $(busybox grep -c 'uart:16' /proc/tty/driver/serial)\"
echo 'guest: until unhooked'
until busybox hostname free 2>/dev/null; do :; done
echo 'guest: until hooked'
while busybox hostname free 2>/dev/null; do :; done
echo \"guest: $(busybox hostname)\"
busybox dmesg | busybox grep -E 'kernel BUG|Oops' && echo 'guest: not well'
busybox sleep 1
busybox reboot -f
";

const SHORT: &str = "\
#!/bin/busybox sh
export PATH=/bin
busybox mkdir /tmp
busybox hostname denied 2>/tmp/error; echo \"guest: hostname $? $(busybox cat /tmp/error)\"
busybox sleep 1
busybox poweroff -f
";

fn initrd(init: &str) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.folder("dev");
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").unwrap());
    archive.file("init", 0o755, init.as_bytes());
    archive.finish()
}

fn image(init: &str, options: &str) -> Image {
    let kernel = Kernel::V6_1Cloud.fetch().unwrap_or_else(|e| panic!("{e:?}"));
    let vmlinuz = fs::read(kernel.vmlinuz()).unwrap();
    let wanted = Wanted {
        refused: vec![REFUSED],
        ..Wanted::default()
    };
    let image = KernelImage::read(&vmlinuz).unwrap_or_else(|e| panic!("{e}"));
    let policy = policy(&image, &wanted).unwrap_or_else(|e| panic!("{e}"));
    // Restarted by a triple fault; `debian.rs` has the kernel's own choice.
    Image::new(vmlinuz, "console=ttyS0 quiet nopti reboot=triple")
        .initrd(initrd(init))
        .monitor(Program::Monitor.bytes().unwrap_or_else(|e| panic!("{e:?}")))
        .policy(policy.to_bytes().to_vec(), options)
}

/// Waits until the guest has said something, or has ended.
fn wait_for(machine: &Machine, text: &str) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let serial = machine.serial().unwrap();
        if serial.contains(text) {
            return;
        }
        let over = serial.contains("Kernel panic") || Instant::now() > deadline;
        assert!(!over, "{serial}\n{}", machine.channel().text());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The lines that have come to their end.
fn whole(channel: &str) -> &str {
    channel.rsplit_once('\n').map_or("", |(whole, _)| whole)
}

fn lines(channel: &str) -> Vec<Value> {
    channel
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}\n{channel}")))
        .collect()
}

fn state<'a>(lines: &'a [Value], name: &str) -> &'a Value {
    let found = lines.iter().find(|line| line["state"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {lines:?}"))
}

#[test]
fn an_unmodified_debian_is_hooked() {
    let _lock = Lock::wait("bochs").unwrap();
    let machine = Machine::start(&image(INIT, ""), WITH_VMX).unwrap_or_else(|e| panic!("{e:?}"));
    wait_for(&machine, "guest: until unhooked");
    assert!(machine.channel().order("unhook").unwrap());
    wait_for(&machine, "guest: until hooked");
    assert!(machine.channel().order("hook").unwrap());
    // It restarts the machine, and is hooked again; nothing is left of the first time, and the second need not end.
    let times = |channel: &str| whole(channel).matches("\"state\":\"installed\"").count();
    let mut channel = Vec::new();
    let run = machine
        .watch(LIMIT, |news| {
            channel.extend_from_slice(&news.channel);
            times(&String::from_utf8_lossy(&channel)) < 2
        })
        .unwrap();
    let serial = run.serial.replace('\r', "");
    println!("{serial}\n{}", run.channel);
    assert!(!run.off && times(&run.channel) == 2);
    assert_eq!(serial.matches("vmsight-hypervisor: kernel at").count(), 2);
    for line in [
        "guest: hostname 1 hostname: sethostname: Operation not permitted",
        "guest: files 123",
        "guest: schedstats 1",
        "guest: meltdown Vulnerable",
        "guest: serial ports 1",
        "guest: free",
    ] {
        assert!(serial.contains(line), "not found: {line}");
    }
    let traced = serial.lines().find_map(|l| l.strip_prefix("guest: traced "));
    assert!(traced.unwrap().parse::<u32>().unwrap() > 0);
    assert!(!serial.contains("guest: not well"));
    let mut lines = lines(whole(&run.channel));
    let last = lines.iter().position(|l| l["state"] == "off").unwrap();
    let again = lines.split_off(last + 1);
    assert_eq!(state(&again, "installed")["hooks"], HOOKS);
    for once in ["installed", "unhooked", "hooked", "off"] {
        assert_eq!(lines.iter().filter(|l| l["state"] == once).count(), 1, "{once}");
    }
    // Nothing is handled where the hooks are out, and something where they are in again.
    let handled = |name: &str| state(&lines, name)["handled"].as_u64().unwrap();
    assert_eq!(handled("unhooked"), handled("hooked"));
    assert!(handled("off") > handled("hooked"));
    // The guest's own patches: each is a write to a hooked page and a step.
    let off = &state(&lines, "off")["exits"];
    assert!(off["EPT violation"].as_u64().unwrap() > 0, "{off}");
    assert_eq!(off["EPT violation"], off["exception or NMI"], "{off}");
    let refused = lines.iter().filter(|l| l["event"] == "call");
    let refused: Vec<_> = refused.map(|l| (&l["number"], &l["errno"])).collect();
    assert!(refused.len() >= 2 && refused.iter().all(|r| *r == (&Value::from(170), &Value::from(1))));
    assert_eq!(state(&lines, "installed")["hooks"], HOOKS);
    let off = state(&lines, "off");
    assert!(off["handled"].as_u64().unwrap() > 100);
    assert_eq!(
        (&off["lost"], &off["tampered"]),
        (&Value::from(0), &Value::from(0))
    );
    // Neither a hook nor what the handlers tell is an exit: fewer events than the ring holds, which is emptied at others.
    for reason in ["VMFUNC", "VMCALL"] {
        assert!(off["exits"].get(reason).is_none(), "{off}");
    }
}

/// The baseline: each hook leaves the guest, and the handlers do the same.
#[test]
fn the_same_handlers_run_outside_of_the_guest() {
    let _lock = Lock::wait("bochs").unwrap();
    let machine = Machine::start(&image(SHORT, "exits"), WITH_VMX).unwrap_or_else(|e| panic!("{e:?}"));
    let run = machine.wait(LIMIT).unwrap();
    println!("{}\n{}", run.serial, run.channel);
    let refused = "guest: hostname 1 hostname: sethostname: Operation not permitted";
    assert!(run.off && run.serial.contains(refused));
    let lines = lines(&run.channel);
    assert_eq!(state(&lines, "installed")["hooks"], HOOKS);
    let off = state(&lines, "off");
    assert!(off["handled"].as_u64().unwrap() > 50);
    assert_eq!(off["exits"]["VMCALL"], off["handled"]);
    for event in ["process", "exec", "call"] {
        assert!(lines.iter().any(|l| l["event"] == event), "no {event}");
    }
}

/// The trial as a kernel that is hooked: what it may write to a page with hooks, and what comes of the rest. With the trap
/// flag, and with the monitor trap flag.
#[test]
fn hooks_withstand_writes_to_their_page() {
    const TEXT: u64 = 0xffff_ffff_8124_0000;
    let mut policy = Policy::new([TEXT, TEXT + 0x1000], TEXT + 0x200);
    policy.hooks[0] = Hook {
        address: TEXT + 0x100,
        handler: Handler::Null as u64,
        ..Hook::default()
    };
    for processor in [WITH_VMX, WITH_TRAP_FLAG] {
        let kernel = Program::Trial.bytes().unwrap_or_else(|e| panic!("{e:?}"));
        let monitor = Program::Monitor.bytes().unwrap_or_else(|e| panic!("{e:?}"));
        let image = Image::new(kernel, "HK")
            .monitor(monitor)
            .policy(policy.to_bytes().to_vec(), "");
        let _lock = Lock::wait("bochs").unwrap();
        let machine = Machine::start(&image, processor).unwrap_or_else(|e| panic!("{e:?}"));
        let run = machine.wait(LIMIT).unwrap();
        let facts = format!("{processor}\n{}\n{}", run.serial, run.channel);
        println!("{facts}");
        for finding in FINDINGS {
            assert!(
                run.serial.contains(&format!("trial: {finding}: ok")),
                "{finding}\n{facts}"
            );
        }
        assert!(
            run.off && run.serial.contains(" 0 failed") && !run.serial.contains("FAILED"),
            "{facts}"
        );
        assert!(run.channel.contains("\"state\":\"tampered\""), "{facts}");
    }
}

#[test]
fn a_policy_that_does_not_fit_can_end_it() {
    let kernel = Program::Trial.bytes().unwrap_or_else(|e| panic!("{e:?}"));
    let image = Image::new(kernel, "").policy(vec![0; 4096], "fail-closed");
    let _lock = Lock::wait("bochs").unwrap();
    let machine = Machine::start(&image, WITH_VMX).unwrap_or_else(|e| panic!("{e:?}"));
    let run = machine.wait(LIMIT).unwrap();
    assert!(
        run.serial.contains("the module is no policy: Length") && run.serial.contains(HALTED),
        "{}",
        run.serial
    );
    assert!(!run.serial.contains("trial: "), "{}", run.serial);
}
