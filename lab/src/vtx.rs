//! Guests under a KVM with VT-x, on any machine: Bochs emulates a processor that has it whole, debug registers and the intercept of
//! INT3 included, which QEMU's emulation of SVM ([`crate::nested`]) lacks. A stock Debian kernel is the KVM host there, and the stock
//! QEMU of this machine runs a stock Debian guest.
//!
//! Bochs executes some fifty million instructions in a second, and counts them for the time: whatever can be left out is. The guest
//! has no program but the workload's, and says nothing of itself but what it is ordered to. What the host says goes over its
//! serial port.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::kernel::Kernel;
use crate::{host, initramfs};

/// MiB of memory that the host needs: what is in its root, and the guest.
pub const MEMORY: u32 = 1024;

/// The host's kernel command line. Bochs counts an instruction as a cycle, and fifty million cycles a second: the kernel is told, for
/// what it would measure it against is no better. The rest is time that is not spent: mitigations for what Bochs does not have
/// (that of L1TF reads 64 KiB at each entry of a guest), memory that is cleared when it is allocated, tests of ciphers.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 tsc_early_khz=50000 tsc=reliable mitigations=off init_on_alloc=0 \
     audit=0 apparmor=0 cryptomgr.notests";

/// What the host says when the script has ended, before its exit code.
pub const ENDED: &str = "@@VMSIGHT-VTX-ENDED ";
/// What a kernel says that gives up.
pub const PANIC: &str = "Kernel panic";

const MODULES: &[(&str, &str)] = &[("kvm_intel", "")];

/// The first program of the KVM host. The script can start the guest with `guest NAME QEMU-ARGUMENT…`, which becomes
/// `$LAUNCH qemu-system-x86_64 …`; when it is up it says so in `/out/NAME.truth`, and takes orders at `/run/orders`. Its QEMU has a
/// QMP socket at `/run/qmp`.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t debugfs debug /sys/kernel/debug
mkdir -p /dev/shm /tmp /run /out
mount -t tmpfs tmp /dev/shm; mount -t tmpfs tmp /tmp
while read -r module parameters; do insmod "$module" $parameters; done </lib/modules/order
guest() {
    name=$1
    shift
    exec $LAUNCH /usr/bin/qemu-system-x86_64 -name "$name" -no-user-config -nodefaults -display none -vga none -no-reboot \
        -accel kvm -cpu host -m 192 -serial "file:/out/$name.console" -serial "file:/out/$name.truth" \
        -chardev socket,id=orders,path=/run/orders,server=on,wait=off -serial chardev:orders \
        -qmp unix:/run/qmp,server=on,wait=off -kernel /guest/vmlinuz -initrd /guest/initramfs \
        -append "console=ttyS0 quiet panic=-1 vmsight.lab vmsight.idle vmsight.silent vmsight.orders" \
        "$@" >"/out/$name.qemu" 2>&1
}
(. /script)
code=$?
[ $code = 0 ] || for file in /out/*.console /out/*.truth /out/*.qemu; do echo "--- $file"; cat "$file"; done
echo "@@VMSIGHT-VTX-ENDED $code"
# The serial port's driver needs a moment for it.
sleep 5
poweroff -f
"#;

/// What a boot loader is given.
#[derive(Debug)]
pub struct Host {
    /// The kernel, a bzImage.
    pub kernel: Vec<u8>,
    /// Its first root.
    pub initrd: Vec<u8>,
}

/// A KVM host that runs `script` (of a POSIX shell). It and the guest that the script may start have the same kernel. `programs` go
/// along into `/bin`, with the libraries they need.
///
/// # Errors
/// Where a part is missing, or cannot be read.
pub fn host(kernel: Kernel, programs: &[&Path], script: &str) -> Result<Host> {
    let fetched = kernel.fetch()?;
    let mut archive = host::root(&fetched, MODULES, INIT, programs, script)?;
    let path = fetched.vmlinuz();
    let image = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    archive.file("guest/vmlinuz", 0o644, &image);
    archive.file("guest/initramfs", 0o644, &initramfs::bare()?);
    Ok(Host {
        kernel: image,
        initrd: compress(&archive.finish())?,
    })
}

/// What Bochs has through soonest: zstd packs closer, and takes fifteen seconds more to unpack there.
fn compress(bytes: &[u8]) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let [plain, packed] = ["root", "root.lz4"].map(|name| folder.path().join(name));
    fs::write(&plain, bytes).with_context(|| format!("write {}", plain.display()))?;
    // Kernels know the old form only (lib/decompress_unlz4.c).
    let output = Command::new("lz4")
        .args(["-q", "-l", "-9"])
        .args([&plain, &packed])
        .stdin(Stdio::null())
        .output()
        .context("run lz4 (see script/packages.txt)")?;
    if !output.status.success() {
        bail!("lz4: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    fs::read(&packed).with_context(|| format!("read {}", packed.display()))
}

/// The exit code of the script, once the host has said it.
pub fn code(console: &str) -> Option<i32> {
    let (_, rest) = console.rsplit_once(ENDED)?;
    let (code, _) = rest.split_once('\n')?;
    code.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_what_the_host_says() {
        assert!(INIT.contains(ENDED));
        assert_eq!(code(&format!("boot\r\n{ENDED}101\r\n")), Some(101));
        assert_eq!(code(&format!("boot\r\n{ENDED}10")), None, "not all of it came");
        assert_eq!(code(PANIC), None);
    }
}
