//! Guests under a real KVM, on any machine: QEMU emulates a processor with SVM, a stock Debian kernel makes a KVM host
//! of it, and the stock QEMU of this machine runs stock Debian guests there.
//!
//! The host has no disk: its root is an initramfs with busybox, QEMU and the libraries it needs, what the test brings
//! along, and two guests' images. What the test's script leaves in `/out` comes back as a folder.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache::Lock;
use crate::guest::{BOOTING, console};
use crate::kernel::Kernel;
use crate::truth::{Truth, frame};
use crate::{folder, host, initramfs};

/// How long the whole may take; on an idle machine it is about one minute. A guest there is of another kernel than
/// Debian's for clouds, which did not come up under QEMU's emulation of SVM, twice of twice.
const TIMEOUT: Duration = Duration::from_secs(600);
/// How often a host is started that dies, or whose guests do, before the script has run: QEMU's emulation of SVM now and
/// then loses one of them while the guests start (with two processors in four of nine runs, in the kernel's entry code). That is not what is tested.
const ATTEMPTS: u32 = 4;
/// The host's kernel command line: without what only takes time here. Mitigations are for what QEMU does not have, and are in the way
/// at each entry of a guest.
const COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 mitigations=off init_on_alloc=0 audit=0 apparmor=0 cryptomgr.notests";
/// Room for what comes back.
const OUT_BYTES: u64 = 256 << 20;
/// What the host's kernel needs: KVM on AMD, and a disk to write the result to.
const MODULES: &[(&str, &str)] = &[("kvm_amd", ""), ("virtio_pci", ""), ("virtio_blk", "")];

/// The first program of the KVM host. `$PLAIN` is the pid of a QEMU that nobody prepared and whose guest has the lab's
/// workload, `$ASKED` that of one which has a QMP socket at `/run/qmp`, and whose guest stands idle.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/shm /tmp /run /out
mount -t tmpfs tmp /dev/shm; mount -t tmpfs tmp /tmp
while read -r module parameters; do insmod "$module" $parameters; done </lib/modules/order
guest() {
    name=$1 words=$2
    shift 2
    exec $LAUNCH /usr/bin/qemu-system-x86_64 -name "$name" -no-user-config -nodefaults -display none -no-reboot \
        -accel kvm -cpu host -m 512 -serial "file:/out/$name.console" -serial "file:/out/$name.truth" \
        -kernel /guest/vmlinuz -initrd /guest/initramfs \
        -append "console=ttyS0 quiet panic=-1 vmsight.lab vmsight.nested $words" "$@" >"/out/$name.qemu" 2>&1
}
# Where the script does everything itself.
if [ -e /alone ]; then
    (. /script) >/out/script.out 2>&1
    echo $? >/out/script.code
    tar -c -C /out . >/dev/vda
    sync
    poweroff -f
fi
guest plain "" &
PLAIN=$!
guest asked vmsight.idle -qmp unix:/run/qmp,server=on,wait=off &
ASKED=$!
export PLAIN ASKED
for guest in "plain $PLAIN" "asked $ASKED"; do
    for _ in $(seq 600); do
        grep -qE '@@VMSIGHT-(READY|FAILED)' "/out/${guest% *}.truth" 2>/dev/null && break
        kill -0 "${guest#* }" || break
        sleep 1
    done
done
# A script that ran has an exit code, whatever becomes of the guests later; without both guests there is nothing to run it on.
if grep -q '@@VMSIGHT-READY' /out/plain.truth && grep -q '@@VMSIGHT-READY' /out/asked.truth; then
    sh /script >/out/script.out 2>&1
    echo $? >/out/script.code
fi
tar -c -C /out . >/dev/vda
sync
poweroff -f
"#;

/// What came back from a KVM host.
#[derive(Debug)]
pub struct Report {
    /// What the guest with the workload said of itself.
    pub truth: Truth,
    /// The exit code of the script.
    pub code: i32,
    /// What was in `/out`, with `script.out`, the script's own output.
    pub folder: tempfile::TempDir,
}

impl Report {
    /// A file that the script left.
    pub fn file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.folder.path().join(name);
        fs::read(&path).with_context(|| format!("the script left no {name}; it said:\n{}", self.said()))
    }

    /// What the script printed.
    pub fn said(&self) -> String {
        let said = fs::read(self.folder.path().join("script.out")).unwrap_or_default();
        String::from_utf8_lossy(&said).into_owned()
    }
}

/// Runs `script` (of a POSIX shell) on a KVM host that runs two guests with `kernel`. `programs` go along into `/bin`,
/// with the libraries they need.
pub fn run(kernel: Kernel, programs: &[&Path], script: &str) -> Result<Report> {
    host(Some(kernel), false, programs, script, report)
}

/// Runs `script` on a KVM host that runs no guests. Programs may bring guests of their own; where `kernel` is given, the
/// script can start some with `guest NAME WORDS QEMU-ARGUMENT…`, which becomes `$LAUNCH qemu-system-x86_64 …`, with what it says in
/// `/out/NAME.truth`. The exit code, and what the script printed.
pub fn run_alone(kernel: Option<Kernel>, programs: &[&Path], script: &str) -> Result<(i32, String)> {
    host(kernel, true, programs, script, |from| {
        let folder = unpack(from)?;
        let text = |name: &str| {
            let bytes = fs::read(folder.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let code = text("script.code")
            .trim()
            .parse()
            .context("the script did not run")?;
        Ok((code, text("script.out")))
    })
}

/// Starts a KVM host and has `read` say what came of it.
fn host<T>(
    kernel: Option<Kernel>,
    alone: bool,
    programs: &[&Path],
    script: &str,
    read: impl Fn(&Path) -> Result<T>,
) -> Result<T> {
    let kvm = Kernel::V6_1Cloud.fetch()?;
    let guest = kernel.map(Kernel::fetch).transpose()?;
    let folder = folder::Folder::make(2048, false)?;
    let at = |name: &str| folder.path().join(name);

    let mut archive = host::root(&kvm, MODULES, INIT, programs, script)?;
    if alone {
        archive.file("alone", 0o644, b"");
    }
    if let Some(guest) = &guest {
        let mut put = |from: &Path, to: &str| -> Result<()> {
            let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
            archive.file(to, 0o644, &bytes);
            Ok(())
        };
        put(&guest.vmlinuz(), "guest/vmlinuz")?;
        put(&initramfs::build(guest)?, "guest/initramfs")?;
    }
    fs::write(at("root"), archive.finish())?;
    let _place = Lock::wait_for_place("boot", BOOTING)?;
    let mut attempt = 1;
    loop {
        // Empty each time: what a host left that died must not pass for what the next one says.
        File::create(at("console.log"))?;
        File::create(at("out"))?.set_len(OUT_BYTES)?;
        let finished = boot(&kvm.vmlinuz(), folder.path()).and_then(|()| read(folder.path()));
        match finished {
            // The script has run to its end: whatever came of it is the answer.
            Ok(report) => return Ok(report),
            Err(error) if attempt == ATTEMPTS => return Err(error),
            Err(error) => {
                eprintln!("the KVM host did not get to the end, attempt {attempt} of {ATTEMPTS}: {error:#}")
            }
        }
        attempt += 1;
    }
}

/// Starts the KVM host and waits until it has switched itself off.
fn boot(vmlinuz: &Path, folder: &Path) -> Result<()> {
    let at = |name: &str| folder.join(name).display().to_string();
    let mut host = Command::new("setpriv")
        .args([
            "--pdeathsig",
            "KILL",
            "--",
            "qemu-system-x86_64",
            "-name",
            "vmsight-lab-kvm-host",
        ])
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"])
        .args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "EPYC,+svm,+npt",
            "-m",
            "2560",
            "-smp",
            "1",
        ])
        .args(["-serial", &format!("file:{}", at("console.log"))])
        .args(["-drive", &format!("file={},format=raw,if=virtio", at("out"))])
        .arg("-kernel")
        .arg(vmlinuz)
        .args(["-initrd", &at("root"), "-append", COMMAND_LINE])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(folder.join("qemu.log"))?)
        .spawn()
        .context("start setpriv and qemu-system-x86_64 (see script/packages.txt)")?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(status) = host.try_wait()? {
            // A kernel that panics ends QEMU in the same way as one that switches the machine off.
            if status.success() && !console(folder).contains("Kernel panic") {
                return Ok(());
            }
            bail!("the KVM host ended with {status}: {}", console(folder));
        }
        let panicked = console(folder).contains("Kernel panic");
        if panicked || Instant::now() > deadline {
            host.kill()?;
            host.wait()?;
            bail!(
                "the KVM host did not finish; its console says:\n{}",
                console(folder)
            );
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Unpacks what the host left on its disk.
fn unpack(from: &Path) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let unpacked = Command::new("tar")
        .args(["-x", "-f"])
        .arg(from.join("out"))
        .arg("-C")
        .arg(folder.path())
        .output()
        .context("run tar")?;
    if !unpacked.status.success() {
        bail!(
            "the KVM host left nothing: {}",
            String::from_utf8_lossy(&unpacked.stderr)
        );
    }
    Ok(folder)
}

/// What the host says of its guests and of the script.
fn report(from: &Path) -> Result<Report> {
    let folder = unpack(from)?;
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap_or_default();
    let text = |name: &str| String::from_utf8_lossy(&read(name)).into_owned();
    let sent = read("plain.truth");
    let json = frame::unpack(&sent).map_err(|e| {
        anyhow::anyhow!(
            "the guest's truth came broken: {e:?}; QEMU says: {}; its console:\n{}\nthe KVM host's console:\n{}",
            text("plain.qemu"),
            text("plain.console"),
            console(from)
        )
    })?;
    Ok(Report {
        truth: serde_json::from_slice(&json).context("read the truth")?,
        code: text("script.code")
            .trim()
            .parse()
            .with_context(|| {
                format!(
                    "the script did not run; QEMU says: {}; the console of the guest with a monitor:\n{}\nthe KVM host's:\n{}",
                    text("asked.qemu"),
                    text("asked.console"),
                    console(from)
                )
            })?,
        folder,
    })
}
