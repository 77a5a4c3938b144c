//! Containers, made the way the common runtimes make them: a shim that stays, a runtime that unshares and goes, a
//! service that is process 1 of its own world; one of a user without privileges; and a pid namespace within one.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root, sethostname, setsid};
use rustix::process::{DumpableBehavior, set_child_subreaper, set_dumpable_behavior};

use super::process::become_user;
use crate::machine::mount_at;
use crate::play::{Held, STAGE, busybox, join_cgroup, ready_with, stand};

/// The container's id.
pub(super) const ID: &str = "3f4e5d6c7b8a99887766554433221100ffeeddccbbaa00112233445566778899";
const ROOT: &str = "/srv/containers/web/rootfs";

/// The runtime of each container, its id, and its control group.
pub(crate) fn made() -> [(&'static str, String, String); 2] {
    let reversed: String = ID.chars().rev().collect();
    let rootless =
        format!("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{reversed}.scope");
    [
        (
            "docker",
            ID.to_owned(),
            format!("/system.slice/docker-{ID}.scope"),
        ),
        ("podman", reversed, rootless),
    ]
}

/// The shim: adopts the service once the runtime has gone.
pub(super) fn shim() -> Result<Held> {
    join_cgroup("/system.slice/containerd.service")?;
    set_child_subreaper(rustix::process::Pid::from_raw(1))?;
    let mut runc = Command::new(format!("{STAGE}/runc"))
        .args(["create", "--bundle", "/srv/containers/web", ID])
        .env_clear()
        .env("PATH", "/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = runc.stdout.take().context("no pipe")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        if line == "ready" {
            runc.wait()?;
            // The host's end of the container's network goes to the bridge; then there is somebody to talk to.
            busybox("ip link set veth0 master docker0")?;
            busybox("ip link set veth0 up")?;
            let outside = TcpStream::connect("172.17.0.2:80").context("reach the container")?;
            for name in ["veth0", "docker0"] {
                wait_until_up(name)?;
            }
            return Ok(Box::new(outside));
        }
        println!("{line}");
    }
    bail!("the container's service never got ready")
}

/// Waits for what the kernel works out at leisure: that an interface is up once it has a carrier.
fn wait_until_up(name: &str) -> Result<()> {
    let state = format!("/sys/class/net/{name}/operstate");
    let deadline = Instant::now() + Duration::from_secs(30);
    while fs::read_to_string(&state)?.trim() != "up" {
        if Instant::now() > deadline {
            bail!("{name} does not get up");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The runtime, twice: first in the host's pid namespace, then as process 1 of the container's.
pub(super) fn runc() -> Result<Held> {
    if std::process::id() == 1 {
        return inside();
    }
    let [(_, _, scope), _] = made();
    join_cgroup(&scope)?;
    for folder in [
        "lower/usr/sbin",
        "lower/etc",
        "lower/old",
        "upper",
        "work",
        "rootfs",
    ] {
        fs::create_dir_all(format!("/srv/containers/web/{folder}"))?;
    }
    fs::copy("/proc/self/exe", "/srv/containers/web/lower/usr/sbin/nginx")?;
    fs::write(
        "/srv/containers/web/lower/etc/nginx.conf",
        "worker_processes 2;\n",
    )?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWCGROUP,
    )?;
    // As in the host's network: addresses, and the routes and neighbours that come with them, are there at once. A new
    // namespace does not have that from the host's.
    for which in ["all", "default"] {
        fs::write(format!("/proc/sys/net/ipv6/conf/{which}/accept_dad"), "0")?;
    }
    // A pair of which one end goes to the host's network. Both are named by the kernel: veth0 and veth1.
    busybox("ip link set lo up")?;
    busybox("ip link add eth0 type veth")?;
    busybox("ip link set veth0 netns 1")?;
    for line in [
        "addr add 172.17.0.2/16 dev eth0",
        "-6 addr add fd00:17::2/64 dev eth0",
        "link set eth0 up",
        "route add default via 172.17.0.1",
    ] {
        busybox(&format!("ip {line}"))?;
    }
    // Last, because the first process started after this is process 1, with whose end its namespace ends.
    unshare(CloneFlags::CLONE_NEWPID)?;
    Command::new(format!("{STAGE}/runc"))
        .arg("init")
        .env_clear()
        .stdin(Stdio::null())
        .spawn()?;
    std::process::exit(0)
}

/// Process 1 of the container: gives it a root of its own and becomes its service.
fn inside() -> Result<Held> {
    setsid()?;
    sethostname("3f4e5d6c7b8a")?;
    let none = MsFlags::empty();
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    let web = "/srv/containers/web";
    let layers = format!("lowerdir={web}/lower,upperdir={web}/upper,workdir={web}/work");
    mount_at("overlay", ROOT, "overlay", none, &layers)?;
    mount_at(
        "proc",
        &format!("{ROOT}/proc"),
        "proc",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        "",
    )?;
    mount_at(
        "tmpfs",
        &format!("{ROOT}/dev"),
        "tmpfs",
        MsFlags::MS_NOSUID,
        "size=64k,mode=755",
    )?;
    mount_at(
        "shm",
        &format!("{ROOT}/dev/shm"),
        "tmpfs",
        MsFlags::MS_NOSUID,
        "size=64k",
    )?;
    let null = format!("{ROOT}/dev/null");
    fs::write(&null, "")?;
    mount(
        Some("/dev/null"),
        null.as_str(),
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    pivot_root(ROOT, format!("{ROOT}/old").as_str())?;
    chdir("/")?;
    umount2("/old", MntFlags::MNT_DETACH)?;
    let error = Command::new("/usr/sbin/nginx")
        .arg0("nginx: master process /usr/sbin/nginx -g daemon off;")
        .env("NGINX_VERSION", "1.27.0")
        .env("PATH", "/usr/sbin")
        .exec();
    Err(error).context("become the service")
}

/// The service: listens, has workers of another user, and a pid namespace further in.
pub(super) fn service() -> Result<Held> {
    if std::env::args().nth(1).as_deref() == Some("worker") {
        become_user(101, 101, &[101])?;
        return Ok(Box::new(()));
    }
    if std::env::args().nth(1).as_deref() == Some("nested") {
        return nested();
    }
    let sockets = (
        TcpListener::bind("0.0.0.0:80")?,
        TcpListener::bind("[::]:443")?,
        UdpSocket::bind("172.17.0.2:53")?,
    );
    let log = File::create("/tmp.log")?;
    let config = File::open("/etc/nginx.conf")?;
    for kind in ["worker", "worker", "nested"] {
        let mut child = Command::new("/usr/sbin/nginx")
            .arg0(if kind == "worker" {
                "nginx: worker process"
            } else {
                "nested-runtime"
            })
            .arg(kind)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("no pipe")?;
        let said = BufReader::new(output).lines().next().transpose()?;
        if said.as_deref() != Some("ready") {
            bail!("nginx {kind} said {said:?}");
        }
    }
    Ok(Box::new((sockets, log, config)))
}

/// Unshares pids once more, and plays process 1 there.
pub(super) fn nested() -> Result<Held> {
    if std::process::id() == 1 {
        return Ok(Box::new(()));
    }
    unshare(CloneFlags::CLONE_NEWPID)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("nested-init")
        .arg("nested")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("no pipe")?;
    let said = BufReader::new(output).lines().next().transpose()?;
    if said.as_deref() != Some("ready") {
        bail!("the nested process said {said:?}");
    }
    Ok(Box::new(child))
}

/// A container of a user without privileges: everything is in a user namespace where that user is root.
pub(super) fn rootless() -> Result<Held> {
    let [_, (_, _, cgroup)] = made();
    join_cgroup(&cgroup)?;
    let null = File::options().write(true).open("/dev/null")?;
    become_user(1000, 1000, &[])?;
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .context("unshare as a user")?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", "0 1000 1")?;
    fs::write("/proc/self/gid_map", "0 1000 1")?;
    sethostname("rootless")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )?;
    mount(
        Some("home"),
        "/home",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=64k"),
    )?;
    let note = File::create("/home/note.txt")?;
    let listener = TcpListener::bind("0.0.0.0:8888")?;
    ready_with(&null)?;
    let _held = (note, listener, null);
    stand()
}
