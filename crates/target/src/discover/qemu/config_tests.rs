//! Command lines as people, libvirt and Proxmox write them.

use super::*;

const GIB: u64 = 1 << 30;

fn parse(line: &str) -> QemuConfig {
    let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    QemuConfig::parse(&args, &|_| None)
}

#[test]
fn by_hand() {
    let c = parse(
        "qemu-system-x86_64 -name guest=web,,1,debug-threads=on -M q35,accel=kvm:tcg -m 4G -smp 2,sockets=2 \
         -qmp unix:/tmp/a,,b,server=on,wait=off -monitor stdio -s -pidfile /run/p disk.img -append -S",
    );
    assert_eq!(c.name.as_deref(), Some("web,1"));
    assert_eq!(c.machine.as_deref(), Some("q35"));
    assert_eq!(c.accelerators, ["kvm", "tcg"]);
    assert_eq!((c.memory, c.vcpus), (Some(4 * GIB), Some(2)));
    assert_eq!(
        c.monitors,
        [
            Monitor {
                mode: MonitorMode::Qmp,
                endpoint: Endpoint::Unix {
                    path: "/tmp/a,b".into(),
                    server: true
                }
            },
            Monitor {
                mode: MonitorMode::Human,
                endpoint: Endpoint::Other("stdio".into())
            },
        ]
    );
    assert_eq!(
        c.gdb,
        [Endpoint::Tcp {
            host: String::new(),
            port: "1234".into(),
            server: false
        }]
    );
    assert_eq!(c.pid_file.as_deref(), Some("/run/p"));
}

#[test]
fn memory_and_cpu_forms() {
    assert_eq!(parse("q -m 512").memory, Some(512 << 20));
    assert_eq!(parse("q -m size=1G,slots=2,maxmem=8G").memory, Some(GIB));
    assert_eq!(parse("q -m 2048,maxmem=8G,slots=4").memory, Some(2 * GIB));
    assert_eq!(parse("q -m 1G -m maxmem=4G,slots=1").memory, Some(GIB));
    assert_eq!(parse("q").memory, None);
    assert_eq!(parse("q -m lots").memory, None);
    assert_eq!(parse("q -smp cpus=3,maxcpus=8").vcpus, Some(3));
    assert_eq!(parse("q -smp sockets=2,cores=4,threads=2").vcpus, Some(16));
    assert_eq!(parse("q -smp maxcpus=8").vcpus, Some(8));
    assert_eq!(parse("q -smp cores=4294967295,threads=9").vcpus, None);
    assert_eq!(parse("q").vcpus, None);
    assert_eq!(
        parse("q -enable-kvm -accel tcg,thread=multi").accelerators,
        ["kvm", "tcg"]
    );
}

#[test]
fn several_backends() {
    let c = parse(
        "q -m 3G,maxmem=9G,slots=2 -numa node,nodeid=1,memdev=n1 -numa node,nodeid=0,memdev=n0 -numa dist,src=0,dst=1,val=20 \
         -object memory-backend-memfd,id=n0,size=1G,hugetlb=on -object memory-backend-file,id=n1,size=2G,mem-path=/dev/hugepages,share=on \
         -object memory-backend-ram,id=d,size=256M -device pc-dimm,id=dimm,memdev=d",
    );
    assert_eq!(c.numa_backends, ["n0", "n1"]);
    assert_eq!(c.dimms, ["d"]);
    let shares: Vec<_> = c
        .backends
        .iter()
        .map(|b| (b.id.as_str(), b.kind.as_str(), b.share))
        .collect();
    assert_eq!(
        shares,
        [("n0", "memfd", true), ("n1", "file", true), ("d", "ram", false)]
    );
    assert_eq!(c.backends[1].mem_path.as_deref(), Some("/dev/hugepages"));
    assert_eq!(c.backends[2].size, Some(256 << 20));
}

#[test]
fn libvirt() {
    // The form libvirt 9 writes: JSON objects, the monitor's listening socket passed as a descriptor.
    let args: Vec<String> = [
        "/usr/bin/qemu-system-x86_64",
        "-name",
        "guest=debian12,debug-threads=on",
        "-S",
        "-object",
        r#"{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-debian12/master-key.aes"}"#,
        "-machine",
        "pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram",
        "-accel",
        "kvm",
        "-cpu",
        "host,migratable=on",
        "-m",
        "size=2097152k",
        "-object",
        r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":2147483648}"#,
        "-overcommit",
        "mem-lock=off",
        "-smp",
        "2,sockets=2,cores=1,threads=1",
        "-uuid",
        "5c0ad1a4-6e4c-4dd3-9b6e-1a9a4a9f4a11",
        "-no-user-config",
        "-nodefaults",
        "-chardev",
        "socket,id=charmonitor,fd=33,server=on,wait=off",
        "-mon",
        "chardev=charmonitor,id=monitor,mode=control",
        "-chardev",
        "socket,id=charchannel0,fd=31,server=on,wait=off",
    ]
    .map(str::to_owned)
    .to_vec();
    let c = QemuConfig::parse(&args, &|_| None);
    assert_eq!(c.name.as_deref(), Some("debian12"));
    assert_eq!(c.memory, Some(2 * GIB));
    assert_eq!(c.ram_backend.as_deref(), Some("pc.ram"));
    assert_eq!(c.backends.len(), 1);
    assert_eq!(c.backends[0].size, Some(2 * GIB));
    assert_eq!(c.uuid.as_deref(), Some("5c0ad1a4-6e4c-4dd3-9b6e-1a9a4a9f4a11"));
    assert_eq!(
        c.monitors,
        [Monitor {
            mode: MonitorMode::Qmp,
            endpoint: Endpoint::Fd { fd: 33, server: true }
        }]
    );
    assert_eq!(c.accelerators, ["kvm"]);
}

#[test]
fn proxmox() {
    let c = parse(
        "/usr/bin/kvm -id 100 -name web01,debug-threads=on -no-shutdown \
         -chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
         -chardev socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5 -mon chardev=qmp-event,mode=control \
         -pidfile /var/run/qemu-server/100.pid -daemonize \
         -smbios type=1,uuid=1f6c5f9e-7a57-4a0c-9f55-0f9b8c3d2e10 -smp 4,sockets=1,cores=4,maxcpus=4 -nodefaults \
         -m 4096 -machine type=pc+pve0",
    );
    assert_eq!(c.name.as_deref(), Some("web01"));
    assert_eq!((c.memory, c.vcpus), (Some(4 * GIB), Some(4)));
    assert_eq!(c.machine.as_deref(), Some("pc+pve0"));
    assert_eq!(
        c.monitors[0].endpoint,
        Endpoint::Unix {
            path: "/var/run/qemu-server/100.qmp".into(),
            server: true
        }
    );
    assert_eq!(
        c.monitors[1].endpoint,
        Endpoint::Unix {
            path: "/var/run/qmeventd.sock".into(),
            server: false
        }
    );
}

#[test]
fn config_files_and_set() {
    let args: Vec<String> = [
        "q",
        "-readconfig",
        "vm.cfg",
        "-readconfig",
        "gone.cfg",
        "-set",
        "chardev.m.path=/run/new",
    ]
    .map(str::to_owned)
    .to_vec();
    let c = QemuConfig::parse(&args, &|path| {
        (path == "vm.cfg").then(|| {
            "# a comment = no\n[machine]\n type = \"q35\"\n accel = \"kvm\"\n[memory]\n size = \"1G\"\n[name]\n guest = \"x\"\n\
             [chardev \"m\"]\n backend = \"socket\"\n path = \"/run/old\"\n server = \"on\"\n[mon]\n chardev = \"m\"\n mode = \"control\"\n\
             [smp-opts]\n cpus = \"3\"\n"
                .to_owned()
        })
    });
    assert_eq!(
        (c.machine.as_deref(), c.memory, c.vcpus),
        (Some("q35"), Some(GIB), Some(3))
    );
    assert_eq!(c.name.as_deref(), Some("x"));
    assert_eq!(
        c.monitors[0].endpoint,
        Endpoint::Unix {
            path: "/run/new".into(),
            server: true
        }
    );
    assert_eq!(c.unread_files, ["gone.cfg"]);
}

#[test]
fn sockets_that_wait_for_their_first_client() {
    for (waits, line) in [
        (true, "q -qmp unix:/q,server=on"),
        (true, "q -qmp unix:/q,server"),
        (false, "q -qmp unix:/q,server=on,wait=off"),
        (false, "q -qmp unix:/q,server,nowait"),
        (false, "q -qmp unix:/q"),
        (
            true,
            "q -chardev socket,id=m,path=/q,server=on -mon m,mode=control",
        ),
        (
            false,
            "q -chardev socket,id=m,path=/q,server=on -mon m,mode=readline",
        ),
        (
            false,
            "q -chardev socket,id=m,path=/q,server=on,wait=off -mon m,mode=control",
        ),
    ] {
        assert_eq!(parse(line).waits_for_qmp, waits, "{line}");
    }
}

#[test]
fn hostile_lines_end() {
    assert_eq!(parse("").memory, None);
    assert_eq!(parse("q -m").memory, None);
    assert_eq!(
        parse("q -mon chardev=none -chardev -mon -set a.b -set a.b.c")
            .monitors
            .len(),
        1
    );
    let many: Vec<String> = (0..100_000)
        .flat_map(|_| ["-object".to_owned(), "x".to_owned()])
        .collect();
    QemuConfig::parse(&many, &|_| None);
    let commas = ["q".to_owned(), "-m".to_owned(), ",".repeat(1 << 20)];
    QemuConfig::parse(&commas, &|_| None);
}

proptest::proptest! {
    #[test]
    fn no_line_panics(args in proptest::collection::vec("[-a-z=,.:{}\"0-9é ]{0,24}", 0..24)) {
        QemuConfig::parse(&args, &|text| Some(text.to_owned()));
        for vmm in [crate::Vmm::Firecracker, crate::Vmm::CloudHypervisor, crate::Vmm::Crosvm] {
            crate::discover::microvm::parse(vmm, &args, &|text| Some(text.to_owned()));
        }
    }
}

#[test]
fn memory_of_devices_is_told_from_memory_of_the_machine() {
    let args = "kvm -id 100 -name web,debug-threads=on -device ivshmem-plain,memdev=shared \
                -device pc-dimm,memdev=d0,id=x -device virtio-mem-pci,memdev=v0 \
                -object memory-backend-memfd,id=shared,size=16M";
    let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
    let config = QemuConfig::parse(&args, &|_| None);
    assert_eq!(config.id.as_deref(), Some("100"), "Proxmox's number");
    assert_eq!(config.name.as_deref(), Some("web"));
    assert_eq!(config.dimms, ["d0", "v0"]);
    assert_eq!(config.device_backends, ["shared"]);
}
