//! What vmsight sees in every guest of the matrix, running and dumped, is what the guest says of itself.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::Path;

use vmsight_lab::truth::bpf::BpfProgram;
use vmsight_lab::truth::{Fd, InetSocket, KernelStack, Module, Process, Thread, Truth, UnixSocket};
use vmsight_lab::{Format, Guest, Kernel, Spec, compare, matrix_of};
use vmsight_linux::AttachOptions;
use vmsight_memory::{GuestMemory, dump};
use vmsight_target::TargetSpec;

fn attach(what: &str, memory: &GuestMemory) -> vmsight_linux::Kernel {
    vmsight_linux::Kernel::attach(memory.clone(), AttachOptions::default())
        .unwrap_or_else(|e| panic!("{what}: {e}"))
}

fn agree(what: &str, memory: &GuestMemory, guest: &Guest) {
    let differences = compare::all(&attach(what, memory), guest.truth());
    assert!(
        differences.is_empty(),
        "{what} of {}: {} differences\n{}",
        guest.spec(),
        differences.len(),
        differences.join("\n")
    );
}

/// The running guest: through its monitor where it has one, else through nothing but its process.
fn live(guest: &Guest) {
    let spec = match guest.qmp_path() {
        Some(path) => TargetSpec::Qmp(path),
        None => TargetSpec::Pid(guest.pid()),
    };
    let prove = |memory: &GuestMemory| {
        attach("the deduced layout", memory)
            .confirm_memory_end()
            .map_err(|e| e.to_string())
    };
    let options = vmsight_target::AttachOptions {
        prove: Some(&prove),
        ..Default::default()
    };
    let target = vmsight_target::attach(&spec, &options).unwrap_or_else(|e| panic!("{}: {e}", guest.spec()));
    agree("the running guest", &target.memory, guest);
}

fn dumped(guest: &Guest, format: Format, folder: &Path) {
    let file = folder.join("memory");
    guest.dump(format, &file).unwrap_or_else(|e| panic!("{e:?}"));
    agree(
        &format!("a dump ({format:?})"),
        &dump::open(&file, None).unwrap().memory,
        guest,
    );
    std::fs::remove_file(file).unwrap();
}

/// The guest of this number in the kernel's part of the matrix: running; and where it has a monitor that can dump it, dumped
/// as ELF core and, below 4 GiB, as a raw file.
fn check(kernel: Kernel, number: usize) {
    let spec = &matrix_of(kernel)[number];
    let guest = Guest::boot(spec).unwrap_or_else(|e| panic!("{e:?}"));
    live(&guest);
    if guest.qmp_path().is_some() {
        // Not in the guest's folder, which is in memory: large dumps take room.
        let folder = tempfile::tempdir().unwrap();
        dumped(&guest, Format::Elf, folder.path());
        if spec.memory_mib < 4096 {
            dumped(&guest, Format::Raw, folder.path());
        }
    }
}

/// A test for each guest of a kernel's matrix: tests run side by side, and one that fails hides no other.
macro_rules! matrix {
    ($($module:ident: $kernel:ident),+ $(,)?) => {
        $(mod $module {
            use super::{Kernel, check};
            matrix!(@guests $kernel guest_0 0, guest_1 1, guest_2 2, guest_3 3, guest_4 4, guest_5 5);
        })+
    };
    (@guests $kernel:ident $($name:ident $number:literal),+) => {
        $(#[test]
        fn $name() {
            check(Kernel::$kernel, $number);
        })+
    };
}

matrix! {
    kernel_5_10: V5_10,
    kernel_6_1: V6_1,
    kernel_6_1_cloud: V6_1Cloud,
    kernel_6_1_rt: V6_1Rt,
    kernel_6_12: V6_12,
    kernel_sid: Sid,
}

#[test]
fn the_matrix_is_all_checked() {
    for kernel in Kernel::ALL {
        assert_eq!(matrix_of(kernel).len(), 6, "{kernel}");
    }
    assert_eq!(Kernel::ALL.len(), 6);
}

/// One wrong value: the comparison that must notice it, a word of what it then says, how many differences it finds, and how the
/// guest's account is made wrong.
type Lie = (&'static str, &'static str, usize, fn(&mut Truth));

/// Some values that are told in more than one place are noticed in each.
const LIES: &[Lie] = &[
    ("open files", "position", 1, |t| {
        named(t, "file-holder").fds[3].pos += 1
    }),
    ("open files", "own-files", 1, |t| own_files(t).fds[3].pos += 1),
    ("open files", "cwd of thread", 1, |t| {
        own_files(t).cwd = Some("/".into())
    }),
    ("open files", "peers", 1, |t| pair(t).peer = Some(1)),
    ("open files", "endpoint", 1, |t| server(t).local_port += 1),
    ("open files", "socket", 1, |t| server(t).address += 8),
    ("mounts", "options", 1, |t| {
        t.mounts[0].mounts[0].options.push('x')
    }),
    ("modules", "size", 2, |t| module(t, "dummy").size += 1),
    ("modules", "version", 1, |t| module(t, "bridge").version.push('1')),
    ("modules", "arguments", 1, |t| {
        module(t, "loop").arguments.push('1')
    }),
    ("modules", "permanent", 1, |t| module(t, "loop").permanent = true),
    ("modules", "taint", 1, |t| module(t, "8021q").taint.clear()),
    ("modules", "parameter", 1, |t| {
        module(t, "loop").parameters.insert("max_loop".into(), "5".into());
    }),
    ("modules", "in an area", 1, |t| {
        let start = module(t, "dummy").address;
        let area = t.system.module_areas.iter_mut().find(|a| a.0 == start);
        area.unwrap().1 = start + 4096;
    }),
    ("modules", "digest", 1, |t| {
        t.kallsyms.modules.get_mut("dummy").unwrap().sha256.clear();
    }),
    ("symbols", "number", 1, |t| t.kallsyms.count += 1),
    ("symbols", "digest", 1, |t| t.kallsyms.sha256.clear()),
    ("symbols", "", 1, |t| t.kallsyms.samples[100].address += 1),
    ("symbols", "", 1, |t| t.kallsyms.samples[100].kind = '?'),
    ("kernel log", "level", 1, |t| t.kmsg[0].level ^= 1),
    ("sockets", "owner", 1, |t| server(t).uid += 1),
    ("sockets", "address", 1, |t| server(t).address += 8),
    ("sockets", "uid", 1, |t| netlink_fd(t).uid += 1),
    ("sockets", "holders", 1, |t| netlink_fd(t).fd += 100),
    ("sockets", "groups", 1, |t| t.net[0].netlink[0].groups ^= 1),
    ("sockets", "address", 1, |t| t.net[0].packet[0].address += 8),
    ("sockets", "interface", 1, |t| t.net[0].packet[0].interface += 1),
    ("sockets", "vsock sockets", 1, |t| {
        t.vsock.pop();
    }),
    ("sockets", "kind", 1, |t| t.vsock[0].kind = 2),
    ("UNIX sockets", "references", 1, |t| t.net[0].unix[0].refs += 1),
    ("UNIX sockets", "uid", 1, |t| pair(t).uid = Some(7)),
    ("UNIX sockets", "send queue", 1, |t| pair(t).tx_queue = Some(7)),
    ("UNIX sockets", "address", 1, |t| pair(t).address += 8),
    ("interfaces", "MTU", 1, |t| t.net[0].interfaces[0].mtu += 1),
    ("interfaces", "state", 1, |t| t.net[0].interfaces[0].state = 3),
    ("interfaces", "bytes sent", 1, |t| {
        t.net[0].interfaces[0].counters[3] += 1 << 40
    }),
    ("neighbours", "hardware address", 1, |t| {
        let mut known = t.net[0].neighbours.iter_mut();
        known.find(|n| n.state == 0x80).unwrap().mac.push('0');
    }),
    ("resources", "range", 1, |t| t.system.iomem[3].end += 1),
    ("slabs", "cache", 1, |t| t.system.slabs[3].size += 8),
    ("slabs", "no such cache", 1, |t| {
        t.system.slabs[4].name = "other".into()
    }),
    ("slabs", "counts", 1, |t| {
        t.system.slabs.iter_mut().step_by(2).for_each(|s| s.active += 1);
    }),
    ("BPF", "programs", 1, |t| {
        t.bpf.programs.pop_last();
    }),
    ("BPF", "tag", 1, |t| program(t).tag[0] ^= 1),
    ("BPF", "uid", 1, |t| program(t).uid += 1),
    ("BPF", "time of loading", 1, |t| program(t).load_time += 1),
    ("BPF", "machine code", 1, |t| program(t).jited_size += 1),
    ("BPF", "address", 1, |t| program(t).functions[0] += 16),
    ("BPF", "maps", 1, |t| program(t).maps.push(7)),
    ("BPF", "entries", 1, |t| {
        t.bpf.maps.values_mut().next().unwrap().max_entries += 1;
    }),
    ("BPF", "target", 1, |t| {
        let mut links = t.bpf.links.values_mut();
        *links.find_map(|link| link.target.as_mut()).unwrap() ^= 1 << 40;
    }),
    ("BPF", "owners", 1, |t| {
        let fds = &mut named(t, "watcher").fds;
        fds.iter_mut()
            .find(|fd| fd.link == "anon_inode:bpf-map")
            .unwrap()
            .fd += 100;
    }),
    ("perf events", "missing", 1, |t| t.perf[0].id = 1 << 60),
    ("perf events", "events of processes", 1, |t| {
        t.perf.pop();
    }),
    ("perf events", "frequency", 1, |t| {
        let mut sampled = t.perf.iter_mut();
        sampled.find(|event| event.is_frequency).unwrap().period += 1;
    }),
    ("perf events", "name", 1, |t| t.perf[0].event.push('x')),
    ("perf events", "owners", 1, |t| t.perf[0].owner.1 += 100),
    ("routes", "no such route", 2, |t| t.net[0].routes[0].metric += 1),
    ("processes", "start_ticks", 1, |t| {
        named(t, "mapper").start_ticks += 1
    }),
    ("processes", "start_time", 2, |t| {
        named(t, "mapper").start_ticks += 1000
    }),
    ("processes", "CPU time", 2, |t| {
        named(t, "mapper").utime_ticks += 100
    }),
    ("processes", "cpu", 1, |t| named(t, "mapper").threads[0].cpu += 1),
    ("processes", "vm_exec_kb", 1, |t| {
        named(t, "mapper").vm.as_mut().unwrap().lib += 4
    }),
    ("processes", "cgroups", 1, |t| {
        named(t, "mapper").cgroups[0] = "0::/".into()
    }),
    ("processes", "container of", 1, |t| t.containers[1].id.clear()),
    ("processes", "container_runtime", 1, |t| {
        t.containers[1].runtime.clear()
    }),
    ("processes", "container", 2, |t| {
        t.containers[0].pids.pop();
    }),
    ("processes", "argv", 2, |t| {
        named(t, "mapper").cmdline.push("x".into())
    }),
    ("processes", "argv", 2, |t| {
        named(t, "paged-out").cmdline[0] = "Paged-out".into()
    }),
    ("processes", "problems", 3, |t| {
        named(t, "paged-out").paged_out.as_mut().unwrap().0 += 4096;
    }),
    ("processes", "problems", 4, |t| {
        named(t, "paged-out").paged_out = None
    }),
    ("processes", "problems", 4, |t| {
        let vm = named(t, "long-arguments").vm.clone().unwrap();
        named(t, "long-arguments").paged_out = Some((vm.arg_start + 4096, vm.arg_start + 8192));
    }),
    ("threads", "priority", 1, |t| {
        named(t, "pool").threads[3].priority += 1
    }),
    ("threads", "policy", 1, |t| named(t, "pool").threads[3].policy = 3),
    ("threads", "cpu", 1, |t| named(t, "pool").threads[3].cpu += 1),
    ("threads", "CPU time", 2, |t| {
        named(t, "pool").threads[3].stime_ticks += 100
    }),
    ("threads", "start_time", 2, |t| {
        named(t, "pool").threads[3].start_ticks += 1000
    }),
    ("kernel stacks", "frame 0", 1, |t| {
        stack(t, "pool").frames[0].push('x')
    }),
    ("kernel stacks", "depth", 1, |t| {
        stack(t, "pool").frames.pop();
    }),
    ("kernel stacks", "frame 1", 1, |t| {
        stack(t, "kthreadd").frames[1].push_str(" [dummy]")
    }),
    ("mappings", "offset", 1, |t| {
        named(t, "mapper").maps[5].offset += 4096
    }),
    ("mappings", "path", 1, |t| {
        named(t, "mapper").maps[5].path = "/x".into()
    }),
    ("page tables", "frame", 1, |t| {
        named(t, "nginx").frames[0].frame += 1
    }),
    ("page tables", "word", 1, |t| {
        named(t, "nginx").frames[0].word += 1
    }),
    ("page tables", "size", 1, |t| {
        named(t, "nginx").frames[0].page_size = 2 << 20
    }),
    ("control groups", "cgroups", 1, |t| {
        t.cgroups.pop();
    }),
    ("control groups", "id", 1, |t| t.cgroups[1].inode += 1),
    ("control groups", "tasks", 1, |t| t.cgroups[1].threads += 1),
    ("control groups", "runtime", 1, |t| {
        t.containers[0].runtime.clear()
    }),
    ("info", "hostname", 1, |t| t.system.hostname.push('x')),
    ("info", "cpus_present", 1, |t| t.system.cpus_present += 1),
    ("info", "cpus_possible", 1, |t| t.system.cpus_possible += 1),
    ("info", "clocksource", 1, |t| t.system.clocksource.push('x')),
    ("info", "lsm", 1, |t| t.system.lsm = Some("none".into())),
    ("info", "taint", 2, |t| t.system.tainted ^= 1 << 1),
    ("info", "time", 1, |t| t.system.now += 3600),
    ("info", "vmcoreinfo", 1, |t| {
        t.system.vmcoreinfo.as_mut().unwrap().0 += 4096
    }),
    ("info", "BUILD-ID", 2, |t| t.system.build_id.push('0')),
    ("info", "text_physical", 1, |t| {
        let code = t.system.iomem.iter_mut().find(|r| r.name == "Kernel code");
        code.unwrap().start += 4096;
    }),
];

fn named<'a>(truth: &'a mut Truth, comm: &str) -> &'a mut Process {
    truth.processes.iter_mut().find(|p| p.comm == comm).unwrap()
}

/// The program that uses maps.
fn program(truth: &mut Truth) -> &mut BpfProgram {
    let mut programs = truth.bpf.programs.values_mut();
    programs.find(|program| !program.maps.is_empty()).unwrap()
}

/// The kernel stack of a process's first thread.
fn stack<'a>(truth: &'a mut Truth, comm: &str) -> &'a mut KernelStack {
    named(truth, comm).threads[0].stack.as_mut().unwrap()
}

fn own_files(truth: &mut Truth) -> &mut Thread {
    let threads = &mut named(truth, "split-files").threads;
    threads.iter_mut().find(|t| t.comm == "own-files").unwrap()
}

fn module<'a>(truth: &'a mut Truth, name: &str) -> &'a mut Module {
    truth.modules.iter_mut().find(|m| m.name == name).unwrap()
}

/// The UDP server, which one process holds.
fn server(truth: &mut Truth) -> &mut InetSocket {
    let mut sockets = truth.net[0].inet.iter_mut();
    sockets
        .find(|s| s.table == "udp" && s.local_port == 5353)
        .unwrap()
}

/// One of two UNIX sockets that are connected and have no names.
fn pair(truth: &mut Truth) -> &mut UnixSocket {
    let mut sockets = truth.net[0].unix.iter_mut();
    sockets
        .find(|s| s.kind == 5 && s.peer.is_some_and(|p| p != 0))
        .unwrap()
}

/// A netlink socket among the open files of a process.
fn netlink_fd(truth: &mut Truth) -> &mut Fd {
    let netlink = truth.net[0].netlink.iter().find(|s| s.port == 4242).unwrap();
    let inode = netlink.inode;
    let mut fds = named(truth, "socket-mix").fds.iter_mut();
    fds.find(|f| f.inode == inode).unwrap()
}

/// A comparison that cannot fail is none: each wrong value in the guest's account is noticed, and nothing else with it.
#[test]
fn each_comparison_notices_one_wrong_value() {
    let guest = Guest::boot(&Spec::new(Kernel::V6_1Cloud)).unwrap_or_else(|e| panic!("{e:?}"));
    let file = guest.folder().join("memory.elf");
    guest.dump(Format::Elf, &file).unwrap_or_else(|e| panic!("{e:?}"));
    let kernel = attach("a dump", &dump::open(&file, None).unwrap().memory);
    assert_eq!(compare::all(&kernel, guest.truth()), Vec::<String>::new());
    let comparison = |name: &str| compare::ALL.iter().find(|(what, ..)| *what == name).unwrap().2;
    for (number, (what, word, count, lie)) in LIES.iter().enumerate() {
        let mut truth = guest.truth().clone();
        lie(&mut truth);
        let found = comparison(what)(&kernel, &truth).unwrap().found;
        assert_eq!(found.len(), *count, "{number}, {what}, {word}: {found:#?}");
        assert!(
            found.iter().any(|d| d.contains(word)),
            "{number}, {what}, {word}: {found:#?}"
        );
    }
    for (what, ..) in compare::ALL {
        assert!(LIES.iter().any(|l| l.0 == *what), "nobody lies about {what}");
    }
}
