//! The guest around the workload: file systems, kernel settings, network interfaces, swap.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use vmsight_workload::logins;

use crate::play::busybox;

/// Mounts a file system, making the mount point.
pub(crate) fn mount_at(source: &str, target: &str, fstype: &str, flags: MsFlags, data: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| target.to_owned())?;
    let data = (!data.is_empty()).then_some(data);
    mount(Some(source), target, Some(fstype), flags, data)
        .with_context(|| format!("mount {fstype} at {target}"))
}

/// The kernel's own file systems.
pub(crate) fn kernel_mounts() -> Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_at("proc", "/proc", "proc", quiet, "")?;
    mount_at("sysfs", "/sys", "sysfs", quiet, "")?;
    mount_at("udev", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755")?;
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "gid=5,mode=620",
    )?;
    mount_at(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        quiet | MsFlags::MS_RELATIME,
        "",
    )?;
    Ok(())
}

/// More mounts, of every sort. Gives what this kernel lacks.
pub(crate) fn more_mounts() -> Result<Vec<String>> {
    let none = MsFlags::empty();
    let mut lacking = Vec::new();
    for (source, target, fstype, data) in [
        ("tmpfs", "/run", "tmpfs", "mode=0755,size=16m"),
        ("shm", "/dev/shm", "tmpfs", "size=32m"),
        ("mqueue", "/dev/mqueue", "mqueue", ""),
        ("debugfs", "/sys/kernel/debug", "debugfs", ""),
        ("securityfs", "/sys/kernel/security", "securityfs", ""),
        ("hugetlbfs", "/dev/hugepages", "hugetlbfs", "pagesize=2M"),
        ("bpf", "/sys/fs/bpf", "bpf", "mode=0700"),
        ("lab-data", "/mnt/tmp", "tmpfs", "size=1m"),
        ("lab inner", "/mnt/tmp/inner", "tmpfs", "size=64k"),
        ("ram", "/mnt/ram", "ramfs", ""),
        ("odd", "/mnt/sp ace\nline\\back", "tmpfs", "size=64k"),
    ] {
        if let Err(error) = mount_at(source, target, fstype, none, data) {
            lacking.push(format!("mounts: {error:#}"));
        }
    }
    fs::create_dir_all("/srv/data/lower/dir")?;
    for folder in ["/srv/data/upper", "/srv/data/work", "/mnt/bind", "/mnt/shared"] {
        fs::create_dir_all(folder)?;
    }
    fs::write("/srv/data/lower/below.txt", "from the lower layer\n")?;
    fs::write("/srv/data/lower/dir/changed.txt", "before\n")?;
    let layers = "lowerdir=/srv/data/lower,upperdir=/srv/data/upper,workdir=/srv/data/work";
    mount_at("overlay", "/mnt/overlay", "overlay", none, layers)?;
    fs::write("/mnt/overlay/dir/changed.txt", "after\n")?;
    let bind = |flags| mount(Some("/srv/data"), "/mnt/bind", None::<&str>, flags, None::<&str>);
    bind(MsFlags::MS_BIND)?;
    bind(MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
    mount_at("shared", "/mnt/shared", "tmpfs", none, "size=64k")?;
    mount(
        None::<&str>,
        "/mnt/shared",
        None::<&str>,
        MsFlags::MS_SHARED,
        None::<&str>,
    )?;
    Ok(lacking)
}

/// Settings that let the guest speak openly, and that keep its lists as they are once it is quiet.
pub(crate) fn settings() {
    for (name, value) in [
        // Real addresses for root, also where 0 would mean hashed ones.
        ("kernel/kptr_restrict", "1"),
        ("kernel/perf_event_paranoid", "1"),
        ("kernel/printk", "4 4 1 7"),
        ("kernel/hung_task_timeout_secs", "0"),
        ("kernel/unprivileged_userns_clone", "1"),
        ("kernel/pid_max", "4194304"),
        ("kernel/threads-max", "200000"),
        ("kernel/domainname", "lab.example"),
        ("vm/swappiness", "100"),
        ("vm/max_map_count", "262144"),
        // Locked memory stays where it is.
        ("vm/compact_unevictable_allowed", "0"),
        ("net/ipv4/ping_group_range", "0 2147483647"),
        // Connections to nowhere stay as they are for hours.
        ("net/ipv4/tcp_syn_retries", "127"),
        ("net/ipv4/tcp_synack_retries", "255"),
        ("net/ipv4/tcp_retries2", "255"),
        ("net/ipv4/tcp_orphan_retries", "255"),
        // No duplicate address detection and no router solicitation: addresses are final at once.
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/default/router_solicitations", "0"),
    ] {
        // Not every kernel has every one.
        let _ = fs::write(format!("/proc/sys/{name}"), value);
    }
    // No small pages are gathered into a huge one behind anybody's back: the next round is in weeks.
    let _ = fs::write(
        "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs",
        "4000000000",
    );
}

/// Interfaces with addresses of both families, one of them a VLAN, one a bridge; neighbours and routes.
pub(crate) fn interfaces() -> Result<()> {
    for line in [
        "ip link set lo up",
        "ip link set dummy0 up",
        "ip addr add 10.9.8.7/24 dev dummy0",
        "ip addr add 10.9.8.8/32 dev dummy0",
        "ip -6 addr add fd00:9::7/64 dev dummy0",
        "ip link add link dummy0 name dummy0.42 type vlan id 42",
        "ip addr add 10.42.0.1/24 dev dummy0.42",
        "ip link set dummy0.42 up",
        "ip link set dummy1 mtu 9000",
        "ip link add docker0 type bridge",
        "ip addr add 172.17.0.1/16 dev docker0",
        "ip -6 addr add fd00:17::1/64 dev docker0",
        "ip link set docker0 up",
        // A neighbour that was written down; routes by a router, by another table, to nowhere.
        "arp -i dummy0.42 -s 10.42.0.99 02:00:00:00:00:63",
        "ip route add 10.200.1.0/24 via 10.9.8.1 dev dummy0 metric 50",
        "ip route add 10.200.3.0/24 dev dummy0 table 100",
        "ip route add blackhole 10.200.2.0/24",
        "ip rule add from 10.9.8.8 table 100",
        "ip -6 route add fd00:200:1::/48 via fd00:9::1 dev dummy0 metric 70",
    ] {
        busybox(line)?;
    }
    Ok(())
}

/// Swap on one compressed memory disk, a file system on another. Gives what this kernel lacks.
pub(crate) fn disks() -> Vec<String> {
    let mut lacking = Vec::new();
    let swap = || -> Result<()> {
        fs::write("/sys/block/zram0/disksize", "32M")?;
        busybox("mkswap /dev/zram0")?;
        busybox("swapon /dev/zram0")
    };
    if let Err(error) = swap() {
        lacking.push(format!("swap: {error:#}"));
    }
    let disk = || -> Result<()> {
        fs::write("/sys/block/zram1/disksize", "8M")?;
        busybox("mke2fs -F -b 4096 /dev/zram1")?;
        // Else a kernel thread (ext4lazyinit) finishes making the file system, and since 5.13 reads its bitmaps ahead, and ends
        // at some moment of its own choosing.
        let mount = |options: &str| mount_at("/dev/zram1", "/mnt/disk", "ext4", MsFlags::MS_NOATIME, options);
        mount("noinit_itable,no_prefetch_block_bitmaps").or_else(|_| mount("noinit_itable"))?;
        fs::write("/mnt/disk/on-disk.txt", "on a block device\n")?;
        Ok(())
    };
    if let Err(error) = disk() {
        lacking.push(format!("disk: {error:#}"));
    }
    lacking
}

/// Files for the workload to hold on to.
pub(crate) fn files() -> Result<()> {
    for folder in [
        "/tmp",
        "/root",
        "/etc",
        "/var/log",
        "/srv/data",
        "/srv/jail/etc",
        "/srv/jail/dev",
        "/home/alice",
        "/run/systemd/sessions",
    ] {
        fs::create_dir_all(folder)?;
    }
    fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777))?;
    fs::write("/etc/hostname", "vmsight-lab\n")?;
    fs::write(
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n",
    )?;
    fs::write("/srv/jail/etc/inside", "within\n")?;
    fs::write("/srv/data/plain.txt", "0123456789abcdef\n")?;
    fs::write("/srv/data/mapped.bin", vec![0x5a; 128 << 10])?;
    fs::write("/var/log/app.log", "started\n")?;
    fs::write("/run/utmp", logins::utmp())?;
    fs::write("/var/log/wtmp", logins::wtmp())?;
    fs::write("/var/log/btmp", logins::btmp())?;
    fs::write("/run/systemd/sessions/3", logins::SESSION)?;
    Ok(())
}
