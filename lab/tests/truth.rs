//! Boots a guest of every kernel and holds what it says of itself against what its workload set out to be. What these
//! tests find here, the tests of vmsight may take for granted.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::collections::BTreeSet;

use vmsight_lab::truth::{Fd, Process, Truth};
use vmsight_lab::{Guest, Kernel, Spec};

const PAGE: usize = 4096;

fn boot(kernel: Kernel) -> Guest {
    Guest::boot(&Spec::new(kernel)).unwrap_or_else(|error| panic!("{error:?}"))
}

fn check(kernel: Kernel) {
    let guest = boot(kernel);
    let truth = guest.truth();
    eprintln!(
        "{kernel}: {} up after {:.1} s",
        truth.system.release,
        guest.boot_time().as_secs_f64()
    );
    system(truth);
    family(truth);
    identities(truth);
    states(truth);
    arguments(truth);
    containers(truth);
    files(truth);
    memory(truth);
    sockets(truth);
    modules(truth);
    mounts(truth);
    log(truth);
    symbols(truth);
    // A kernel without a feature says so; none of the matrix lacks more than PREEMPT_RT does.
    let known = if kernel == Kernel::V6_1Rt {
        vec!["transparent huge pages"]
    } else {
        vec![]
    };
    for lack in &truth.lacking {
        assert!(known.iter().any(|k| lack.contains(k)), "{kernel} lacks: {lack}");
    }
}

#[test]
fn kernel_5_10() {
    check(Kernel::V5_10);
}

#[test]
fn kernel_6_1() {
    check(Kernel::V6_1);
}

#[test]
fn kernel_6_1_cloud() {
    check(Kernel::V6_1Cloud);
}

#[test]
fn kernel_6_1_rt() {
    check(Kernel::V6_1Rt);
}

#[test]
fn kernel_6_12() {
    check(Kernel::V6_12);
}

#[test]
fn kernel_sid() {
    check(Kernel::Sid);
}

#[test]
fn five_level_paging_is_where_the_configuration_has_it() {
    for kernel in Kernel::ALL {
        let config = kernel.fetch().unwrap().config().unwrap();
        // Since 6.15 there is no choice any more: it is always there.
        let chosen = config.lines().any(|l| l == "CONFIG_X86_5LEVEL=y");
        let no_choice = !config.contains("CONFIG_X86_5LEVEL");
        let old = kernel == Kernel::V5_10;
        assert_eq!(
            kernel.has_five_levels(),
            chosen || (no_choice && !old),
            "{kernel}"
        );
    }
}

fn named<'a>(truth: &'a Truth, comm: &str) -> &'a Process {
    truth.named(comm).unwrap_or_else(|| panic!("no process '{comm}'"))
}

fn system(truth: &Truth) {
    let system = &truth.system;
    assert!(system.version.starts_with("Linux version "), "{}", system.version);
    assert!(system.version.contains(&system.release) && system.version.contains("Debian"));
    assert_eq!(
        (system.hostname.as_str(), system.domainname.as_str()),
        ("vmsight-lab", "lab.example")
    );
    assert_eq!(
        (system.cpus, system.clock_ticks, system.page_size),
        (1, 100, PAGE as u64)
    );
    assert!(!system.five_level_paging && system.build_id.len() == 40);
    let ram: u64 = system
        .iomem
        .iter()
        .filter(|r| r.name == "System RAM")
        .map(|r| r.end + 1 - r.start)
        .sum();
    assert!((500 << 20..=512 << 20).contains(&ram), "{ram} bytes of RAM");
    assert!(
        system
            .iomem
            .iter()
            .any(|r| r.name == "Kernel code" && r.depth == 1)
    );
    assert!(system.now >= system.boot_time && system.boot_time > 1_600_000_000);
    assert_eq!(system.swaps.len(), 1);
}

/// Everybody has the parent, the threads and the pids that go together.
fn family(truth: &Truth) {
    let pids: BTreeSet<u32> = truth.processes.iter().map(|p| p.pid).collect();
    assert_eq!(pids.len(), truth.processes.len());
    for process in &truth.processes {
        let comm = &process.comm;
        assert!(
            process.ppid == 0 || pids.contains(&process.ppid),
            "{comm} has no parent {}",
            process.ppid
        );
        assert_eq!(process.ns_pids.first(), Some(&process.pid), "{comm}");
        assert_eq!(
            process.threads.first().map(|t| t.tid),
            Some(process.pid),
            "{comm}"
        );
        assert_eq!(process.kthread, process.pid == 2 || process.ppid == 2, "{comm}");
        assert_eq!(
            process.vm.is_some(),
            !process.kthread && process.state != 'Z',
            "{comm}"
        );
        assert_eq!(process.exe.is_some(), process.vm.is_some(), "{comm}");
        assert_eq!(process.maps.is_empty(), process.vm.is_none(), "{comm}");
        for pair in process.maps.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{comm}: mappings overlap");
        }
    }
    let init = truth.process(1).expect("no process 1");
    assert_eq!(
        init.exe.as_ref().map(ToString::to_string).as_deref(),
        Some("/init")
    );
    assert_eq!(init.cgroup, "/init.scope");
    assert!(
        truth.named("collector").is_none(),
        "the collector has left a trace"
    );
    let servers: Vec<&Process> = truth
        .processes
        .iter()
        .filter(|p| p.comm == "app-server")
        .collect();
    assert_eq!(servers.len(), 4);
    assert!(
        servers.windows(2).all(|pair| pair[1].ppid == pair[0].pid),
        "the chain of app-servers is broken"
    );
}

fn identities(truth: &Truth) {
    let web = named(truth, "web-frontend");
    assert_eq!((web.creds.uids, web.creds.gids), ([33; 4], [33; 4]));
    assert_eq!(web.creds.groups, [33, 1001, 1002]);
    assert_eq!((web.nice, web.sid), (5, i64::from(web.pid)));
    assert_eq!(web.cgroup, "/system.slice/web-frontend.service");
    let names: Vec<String> = web.threads.iter().map(|t| t.comm.lossy()).collect();
    assert_eq!(names, ["web-frontend", "http-0", "http-1", "http-2", "http-3"]);

    let agent = named(truth, "backup-agent");
    const CHOWN: u64 = 1;
    const READ_SEARCH: u64 = 1 << 2;
    const BIND: u64 = 1 << 10;
    assert_eq!(agent.creds.cap_effective, READ_SEARCH | BIND);
    assert_eq!(agent.creds.cap_permitted, READ_SEARCH | BIND | CHOWN);
    assert_eq!(agent.creds.cap_inheritable, READ_SEARCH | BIND);
    assert_eq!(agent.creds.cap_ambient, BIND);
    assert_eq!(agent.creds.cap_bounding & (1 << 22 | 1 << 25 | 1 << 27), 0);
    assert!(agent.no_new_privs && agent.oom_score_adj == 500);

    let (strict, filtered) = (named(truth, "strict-box"), named(truth, "bound-box"));
    assert_eq!(
        (strict.seccomp, filtered.seccomp, filtered.seccomp_filters),
        (1, 2, 2)
    );
    let realtime = named(truth, "realtime");
    assert_eq!(
        (realtime.policy, realtime.rt_priority, realtime.nice),
        (1, 10, -11)
    );
    assert_eq!(named(truth, "batch-job").policy, 3);
    assert_eq!(named(truth, "low-priority").nice, 19);
    assert_eq!(
        named(truth, "alternate-root").root.as_ref().unwrap(),
        &"/srv/jail"
    );

    let shell = named(truth, "bash");
    assert_eq!(
        (shell.sid, shell.tty_nr >> 8),
        (i64::from(shell.pid), 136),
        "bash is on no pty of its own"
    );
    assert_eq!(shell.ppid, named(truth, "terminal").pid);
}

fn states(truth: &Truth) {
    for (comm, state) in [
        ("web-frontend", 'S'),
        ("stopped", 'T'),
        ("traced", 't'),
        ("uninterruptible", 'D'),
        ("zombie-child", 'Z'),
        ("leaderless", 'Z'),
    ] {
        assert_eq!(named(truth, comm).state, state, "{comm}");
    }
    assert_eq!(named(truth, "traced").tracer, named(truth, "tracer").pid);
    let survivor = named(truth, "leaderless")
        .threads
        .iter()
        .find(|t| t.comm == "survivor");
    assert_eq!(survivor.map(|t| t.state), Some('S'));
    let pool = named(truth, "pool");
    assert_eq!(pool.threads.len(), 17);
    for odd in ["fifteen-letters", "\u{1f980} crab", "esc\x1b[1m", "a b) S 1 ("] {
        assert!(pool.threads.iter().any(|t| t.comm == odd), "no thread {odd:?}");
    }
}

fn arguments(truth: &Truth) {
    let web = named(truth, "web-frontend");
    let args: Vec<String> = web.cmdline.iter().map(|a| a.lossy()).collect();
    assert_eq!(
        args,
        [
            "web-frontend",
            "--listen=0.0.0.0:8080",
            "",
            "--title=Gr\u{fc}\u{df}e aus K\u{f6}ln \u{2603}",
            "-v"
        ]
    );
    assert!(
        web.environ
            .iter()
            .any(|e| *e == "APP_SECRET=correct horse battery staple")
    );
    assert!(web.environ.iter().any(|e| *e == "EMPTY="));
    let odd = named(truth, "odd-arguments");
    assert_eq!(odd.cmdline.len(), 15);
    assert_eq!(odd.cmdline[5].bytes(), b"not UTF-8: \xff\xfe\x80");
    assert_eq!(odd.cmdline[1].bytes(), b"\x1b[31mred\x1b[0m");
    let long = named(truth, "long-arguments");
    assert!(long.cmdline.iter().map(|a| a.bytes().len()).sum::<usize>() > 3 * PAGE);
    assert!(long.environ.iter().map(|e| e.bytes().len()).sum::<usize>() > 2 * PAGE);
    let retitled = named(truth, "sshd-like name");
    assert_eq!(retitled.cmdline[0], "retitled: alice@pts/0 [priv]");
    assert_eq!(retitled.exe.as_ref().unwrap(), &"/srv/bin/retitled");
    let paged_out = named(truth, "paged-out");
    let (start, end) = paged_out.paged_out.expect("nothing was paged out");
    assert!(end - start >= 2 * PAGE as u64 && paged_out.cmdline.len() == 301);
}

fn containers(truth: &Truth) {
    let init = truth.process(1).unwrap();
    let masters: Vec<&Process> = truth
        .processes
        .iter()
        .filter(|p| p.comm == "nginx" && p.ns_pids.last() == Some(&1))
        .collect();
    let [master] = masters[..] else {
        panic!("{} processes are nginx and process 1", masters.len())
    };
    assert!(master.cgroup.starts_with("/system.slice/docker-") && master.cgroup.lossy().ends_with(".scope"));
    assert_eq!(master.ppid, named(truth, "containerd-shim").pid);
    for kind in ["pid", "net", "mnt", "uts", "ipc", "cgroup"] {
        assert_ne!(master.namespaces[kind], init.namespaces[kind], "{kind}");
    }
    assert_eq!(master.namespaces["user"], init.namespaces["user"]);
    assert_eq!(
        truth
            .processes
            .iter()
            .filter(|p| p.ppid == master.pid && p.creds.uids[0] == 101)
            .count(),
        2
    );
    assert!(
        truth
            .processes
            .iter()
            .any(|p| p.ns_pids.len() == 3 && p.ns_pid() == 1)
    );
    let [docker, podman] = &truth.containers[..] else {
        panic!("{} containers", truth.containers.len())
    };
    assert_eq!((docker.runtime.as_str(), docker.pids.len()), ("docker", 5));
    assert!(docker.pids.contains(&master.pid) && docker.cgroup == master.cgroup);
    let rootless = named(truth, "rootless");
    assert_eq!(
        (podman.runtime.as_str(), &podman.pids),
        ("podman", &vec![rootless.pid])
    );
    assert_ne!(rootless.namespaces["user"], init.namespaces["user"]);
    assert_eq!(rootless.creds.uids[0], 1000);
    assert!(rootless.cgroup.lossy().contains("/libpod-"));
}

fn files(truth: &Truth) {
    let holder = named(truth, "file-holder");
    let link = |text: &str| {
        let found = holder.fds.iter().find(|f| f.link.lossy().starts_with(text));
        found.unwrap_or_else(|| panic!("file-holder holds no {text:?}"))
    };
    assert_eq!(link("/srv/data/plain.txt").pos, 7);
    assert_ne!(
        link("/var/log/app.log").flags & 0o2000,
        0,
        "not opened for appending"
    );
    let deleted = link("/tmp/deleted secret.bin (deleted)");
    assert_eq!((deleted.pos, deleted.size, deleted.links), (4096, 5000, 0));
    assert_ne!(link("/etc/passwd").flags & 0o10_000_000, 0, "not an O_PATH file");
    assert_eq!(link("/dev/null").rdev, (1, 3));
    for text in [
        "/memfd:lab memory (deleted)",
        "pipe:[",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        "anon_inode:[timerfd]",
        "anon_inode:[signalfd]",
        "anon_inode:inotify",
        "/run/holder.fifo",
        "/tmp/new\nline\ttab",
        "/mnt/overlay/dir/changed.txt",
        "/mnt/disk/on-disk.txt",
        "/mnt/tmp/inner/nested.txt",
        "net:[",
        "/srv",
    ] {
        link(text);
    }
    let split = named(truth, "split-files");
    let own = split.threads.iter().find(|t| t.comm == "own-files").unwrap();
    assert_eq!(own.cwd.as_ref().unwrap(), &"/var/log");
    let opens = |fds: &[Fd], link: &str| fds.iter().any(|f| f.link == link);
    assert!(opens(&own.fds, "/etc/hostname") && !opens(&own.fds, "/srv/data/plain.txt"));
    assert!(opens(&split.fds, "/srv/data/plain.txt") && !opens(&split.fds, "/etc/hostname"));
    let bottom = holder
        .fds
        .iter()
        .find(|f| f.link.lossy().ends_with("/bottom"))
        .expect("no deep file");
    assert!(bottom.link.bytes().len() > 3000);
    for process in &truth.processes {
        assert!(
            process.fds.windows(2).all(|pair| pair[0].fd < pair[1].fd),
            "{}",
            process.comm
        );
    }
}

fn memory(truth: &Truth) {
    let mapper = named(truth, "mapper");
    let any = |what: &str, test: &dyn Fn(&vmsight_lab::truth::Map) -> bool| {
        assert!(mapper.maps.iter().any(test), "mapper has mapped no {what}");
    };
    any("shared file", &|m| {
        m.path == "/srv/data/mapped.bin" && m.perms == "rw-s" && m.offset == 0x4000
    });
    any("private file", &|m| {
        m.path == "/srv/data/mapped.bin" && m.perms == "r-xp" && m.offset == 0
    });
    any("deleted file", &|m| {
        m.path == "/srv/data/mapped and gone.bin (deleted)"
    });
    any("memfd", &|m| m.path == "/memfd:mapped memory (deleted)");
    any("shared anonymous memory", &|m| {
        m.path == "/dev/zero (deleted)" && m.end - m.start == 1 << 20
    });
    any("forbidden gigabyte", &|m| {
        m.perms == "---p" && m.end - m.start >= 1 << 30
    });
    any("writable code", &|m| m.perms == "rwxp" && m.path.is_empty());
    any("huge pages", &|m| {
        m.path.starts_with("/anon_hugepage") && m.end - m.start == 2 << 20
    });
    any("stack", &|m| m.path == "[stack]");
    any("vdso", &|m| m.path == "[vdso]");
    assert!(mapper.maps.len() > 600);
    // Three pages as everybody, 16 more, and 6 MiB in huge pages where there are such.
    let few = truth.lacking.iter().any(|l| l.contains("transparent huge pages"));
    let locked = mapper.vm.as_ref().unwrap().locked;
    assert_eq!(locked, 12 + 64 + if few { 0 } else { 6144 });
    let sizes: BTreeSet<u64> = mapper.frames.iter().map(|f| f.page_size).collect();
    assert!(sizes.contains(&4096) && sizes.contains(&(2 << 20)), "{sizes:?}");
    let everybody = truth.processes.iter().filter(|p| p.frames.len() >= 3);
    assert!(everybody.count() > 30);
}

fn sockets(truth: &Truth) {
    let host = truth.init_net().expect("no network namespace of process 1");
    assert!(truth.net.len() >= 3);
    for state in [
        "LISTEN",
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE_WAIT",
        "LAST_ACK",
        "CLOSING",
    ] {
        assert!(
            host.inet.iter().any(|s| s.table == "tcp" && s.state == state),
            "no TCP socket in {state}"
        );
    }
    for state in ["LISTEN", "ESTABLISHED", "FIN_WAIT2", "TIME_WAIT", "CLOSE_WAIT"] {
        assert!(
            host.inet.iter().any(|s| s.table == "tcp6" && s.state == state),
            "no TCPv6 socket in {state}"
        );
    }
    for table in ["udp", "udp6"] {
        for state in ["CLOSE", "ESTABLISHED"] {
            assert!(
                host.inet.iter().any(|s| s.table == table && s.state == state),
                "no {table} in {state}"
            );
        }
    }
    for table in ["raw", "raw6", "icmp", "icmp6"] {
        assert!(host.inet.iter().any(|s| s.table == table), "no {table} socket");
    }
    let queued = host
        .inet
        .iter()
        .find(|s| s.table == "udp" && s.local_port == 5353)
        .expect("no UDP server");
    assert!(queued.rx_queue > 0);
    let web = named(truth, "web-frontend");
    let listening = host
        .inet
        .iter()
        .find(|s| s.table == "tcp" && s.local_port == 8080)
        .expect("no web server");
    assert_eq!((listening.state.as_str(), listening.uid), ("LISTEN", 0));
    assert!(
        web.fds
            .iter()
            .any(|f| f.link == format!("socket:[{}]", listening.inode).as_str())
    );

    let container = truth
        .net
        .iter()
        .find(|n| n.inode == named(truth, "nginx").namespaces["net"])
        .unwrap();
    assert!(
        container
            .inet
            .iter()
            .any(|s| s.local_port == 80 && s.state == "ESTABLISHED")
    );
    assert!(
        container
            .interfaces
            .iter()
            .any(|i| i.name == "eth0" && i.kind == "veth")
    );

    for name in [
        "/run/app.sock",
        "\0vmsight\0abstract\u{fffd}",
        "/run/log sock",
        "/run/seq.sock",
        "/run/removed.sock",
    ] {
        assert!(
            host.unix.iter().any(|u| u.path.lossy() == name),
            "no UNIX socket {name:?}"
        );
    }
    let connected: Vec<_> = host
        .unix
        .iter()
        .filter(|u| u.kind == 1 && u.peer.is_some_and(|p| p != 0))
        .collect();
    assert!(connected.len() >= 6);
    for socket in connected {
        let peer = host
            .unix
            .iter()
            .find(|u| Some(u.inode) == socket.peer)
            .expect("a peer that is not there");
        assert_eq!(peer.peer, Some(socket.inode));
    }
    assert!(host.unix.iter().all(|u| u.uid.is_some() || u.inode == 0));
    assert!(host.inet.iter().all(|s| s.address != 0));
    assert_eq!(host.packet.len(), 2);
    assert!(host.netlink.iter().any(|n| n.protocol == 16 && n.port == 4242));
    assert!(truth.vsock.iter().any(|v| v.state == 10 && v.port == 1024));
    assert!(truth.vsock.iter().any(|v| v.state == 1 && v.peer_port == 1024));

    let dummy = host
        .interfaces
        .iter()
        .find(|i| i.name == "dummy0")
        .expect("no dummy0");
    let addresses: Vec<String> = dummy.addresses.iter().map(|(a, p)| format!("{a}/{p}")).collect();
    for address in ["10.9.8.7/24", "10.9.8.8/32", "fd00:9::7/64"] {
        assert!(
            addresses.iter().any(|a| a == address),
            "{address} is not among {addresses:?}"
        );
    }
    assert!(
        host.interfaces
            .iter()
            .any(|i| i.name == "dummy1" && i.mtu == 9000)
    );
    assert!(
        host.interfaces
            .iter()
            .any(|i| i.kind == "vlan" && i.link == dummy.index)
    );
    assert!(host.interfaces.iter().any(|i| i.kind == "veth" && i.master != 0));
}

fn modules(truth: &Truth) {
    for name in [
        "dummy",
        "veth",
        "bridge",
        "8021q",
        "overlay",
        "loop",
        "zram",
        "vsock_loopback",
        "unix_diag",
    ] {
        let module = truth.module(name).unwrap_or_else(|| panic!("no module {name}"));
        assert_eq!(module.state, "Live");
        assert!(module.address > 0xffff_ffff_0000_0000 && module.size >= PAGE as u64);
        assert!(
            module.sections.contains_key(".text") || module.sections.contains_key(".data"),
            "{name}"
        );
        assert_eq!(module.build_id.len(), 40, "{name}");
    }
    let parameters = &truth.module("loop").unwrap().parameters;
    assert_eq!(parameters["max_loop"], "4");
    assert_eq!(truth.module("loop").unwrap().arguments, "max_loop=4 max_part=2");
    assert!(truth.modules.iter().any(|m| !m.version.is_empty()));
    assert!(truth.system.module_areas.len() >= 10);
    // One is loaded by force: that is a reason by itself, and its signature is not looked at then.
    for module in &truth.modules {
        let taint = if module.name == "8021q" { "FE" } else { "" };
        assert_eq!(module.taint, taint, "{}", module.name);
    }
    assert_eq!(truth.system.tainted, 1 << 1 | 1 << 13);
    assert!(truth.module("llc").unwrap().used_by.iter().any(|m| m == "bridge"));
}

fn mounts(truth: &Truth) {
    let init = truth.process(1).unwrap().namespaces["mnt"];
    let host = truth
        .mounts
        .iter()
        .find(|m| m.inode == init)
        .expect("no mount namespace of process 1");
    let at = |point: &str| {
        let found = host.mounts.iter().find(|m| m.mount_point == point);
        found.unwrap_or_else(|| panic!("nothing is mounted at {point:?}"))
    };
    assert_eq!(at("/").fstype, "tmpfs");
    assert_eq!(at("/mnt/overlay").fstype, "overlay");
    assert_eq!(at("/mnt/disk").fstype, "ext4");
    assert_eq!(at("/mnt/bind").root, "/srv/data");
    assert!(at("/mnt/bind").options.starts_with("ro"));
    assert_eq!(at("/mnt/tmp/inner").parent, at("/mnt/tmp").id);
    assert!(!at("/mnt/shared").propagation.is_empty());
    at("/mnt/sp ace\nline\\back");
    assert!(truth.mounts.len() >= 3);
    assert!(
        truth
            .cgroups
            .iter()
            .any(|c| c.path == "/system.slice/web-frontend.service")
    );
}

fn log(truth: &Truth) {
    assert!(truth.kmsg.len() > 100);
    assert!(truth.kmsg.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    assert!(truth.kmsg[0].text.lossy().starts_with("Linux version "));
    let find = |text: &[u8]| {
        let found = truth.kmsg.iter().find(|r| r.text.bytes().starts_with(text));
        found.unwrap_or_else(|| panic!("no log record {:?}", String::from_utf8_lossy(text)))
    };
    assert_eq!(
        find(b"vmsight-lab: escapes \x1b[31mred\x1b[0m, tab\tand").level,
        4
    );
    find(b"vmsight-lab: not UTF-8 \xff\xfe");
    find(b"vmsight-lab: first\nsecond line");
    let daemon = find(b"vmsight-lab: from a daemon");
    assert_eq!((daemon.level, daemon.facility), (3, 3));
}

fn symbols(truth: &Truth) {
    let kallsyms = &truth.kallsyms;
    assert!(kallsyms.count > 80_000 && kallsyms.samples.len() > 250);
    assert_eq!(kallsyms.sha256.len(), 64);
    let address = |name: &str| {
        kallsyms
            .samples
            .iter()
            .find(|s| s.name == name)
            .map(|s| s.address)
    };
    let text = address("_text").expect("no _text");
    assert!(
        text != 0xffff_ffff_8100_0000 && text % (2 << 20) == 0,
        "KASLR is off: {text:#x}"
    );
    for module in &truth.modules {
        assert!(
            kallsyms.modules.contains_key(&module.name),
            "no symbols of {}",
            module.name
        );
    }
}
