//! What GRUB boots: a disc with the hypervisor and its modules.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;
use vmsight_sim_abi::{MAGIC, Policy, VERSION};
use vmsight_sim_hypervisor::linux::{Kernel, NotBootable};

use crate::error::io;
use crate::{Error, Program, packages};

/// What goes onto the disc.
#[derive(Debug, Clone)]
pub struct Image {
    hypervisor: Program,
    kernel: Vec<u8>,
    command_line: String,
    initrd: Option<Vec<u8>>,
    monitor: Option<Vec<u8>>,
    policy: Option<Vec<u8>>,
    policy_options: String,
}

/// The firmware for which GRUB can make a disc, and GRUB's name of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// `i386-pc`
    Bios,
    /// `x86_64-efi`
    Uefi,
}

/// Where GRUB keeps what it is made of.
const GRUB: &str = "/usr/lib/grub";
/// Modules of GRUB that each configuration needs, beside the one that starts what it loads. All of them would make loading it take
/// longer than what it loads.
const MODULES: &str = "normal iso9660 serial terminal";
/// What each configuration begins with.
const SERIAL: &str = "serial --unit=0 --speed=115200\nterminal_output serial\n";
/// Where a kernel's header has the most bytes of its command line (Documentation/arch/x86/boot.rst, `cmdline_size`).
const COMMAND_LINE_SIZE: usize = 0x238;

impl Firmware {
    /// Those for which GRUB is installed here.
    pub fn installed() -> Vec<Self> {
        let mut all = vec![Self::Bios, Self::Uefi];
        all.retain(|firmware| Path::new(GRUB).join(firmware.platform()).is_dir());
        all
    }

    /// Debian's package that has GRUB for it.
    pub fn package(self) -> &'static str {
        match self {
            Self::Bios => "grub-pc-bin",
            Self::Uefi => "grub-efi-amd64-bin",
        }
    }

    fn platform(self) -> &'static str {
        match self {
            Self::Bios => "i386-pc",
            Self::Uefi => "x86_64-efi",
        }
    }
}

impl Image {
    /// The hypervisor with a kernel, by Linux's boot protocol, and its command line.
    pub fn new(kernel: Vec<u8>, command_line: &str) -> Self {
        Self {
            hypervisor: Program::Hypervisor,
            kernel,
            command_line: command_line.to_owned(),
            initrd: None,
            monitor: None,
            policy: None,
            policy_options: String::new(),
        }
    }

    /// The trial with the monitor that it attacks.
    ///
    /// # Errors
    /// [`Error::NotBuilt`]
    pub fn trial() -> Result<Self, Error> {
        Ok(Self::new(Program::Trial.bytes()?, "").monitor(Program::Monitor.bytes()?))
    }

    /// With another command line for the kernel.
    #[must_use]
    pub fn command_line(mut self, command_line: &str) -> Self {
        command_line.clone_into(&mut self.command_line);
        self
    }

    /// With another build of the hypervisor.
    #[must_use]
    pub fn hypervisor(mut self, hypervisor: Program) -> Self {
        self.hypervisor = hypervisor;
        self
    }

    /// With the kernel's first root.
    #[must_use]
    pub fn initrd(mut self, initrd: Vec<u8>) -> Self {
        self.initrd = Some(initrd);
        self
    }

    /// With a monitor.
    #[must_use]
    pub fn monitor(mut self, monitor: Vec<u8>) -> Self {
        self.monitor = Some(monitor);
        self
    }

    /// With a policy: what of the kernel is hooked. `options` are words with blanks between: `exits`, the handlers run in the
    /// hypervisor, which each hook leaves to; `fail-closed`, a kernel that the policy is not for does not go on; `account`, a program
    /// of the guest has the hypervisor say how things are, by CPUID's leaf 0x40000000.
    #[must_use]
    pub fn policy(mut self, policy: Vec<u8>, options: &str) -> Self {
        self.policy = Some(policy);
        options.clone_into(&mut self.policy_options);
        self
    }

    /// Whether GRUB takes the lines as they are.
    fn check_lines(&self) -> Result<(), Error> {
        check_line(&self.command_line)?;
        check_line(&self.policy_options)
    }

    /// Whether the hypervisor could start this, as far as that can be told before.
    ///
    /// # Errors
    /// [`Error::Kernel`], [`Error::CommandLine`], [`Error::Policy`], [`Error::Monitor`]
    pub fn check(&self) -> Result<(), Error> {
        Kernel::parse(&self.kernel).map_err(Error::Kernel)?;
        let most = self.kernel.get(COMMAND_LINE_SIZE..COMMAND_LINE_SIZE + 4);
        let most = most
            .and_then(|bytes| bytes.try_into().ok())
            .map(u32::from_le_bytes);
        let most = most.ok_or(Error::Kernel(NotBootable::CutShort))? as usize;
        if self.command_line.len() > most {
            return Err(Error::Kernel(NotBootable::CommandLine(most)));
        }
        self.check_lines()?;
        if let Some(policy) = &self.policy {
            Policy::from_bytes(policy).map_err(Error::Policy)?;
        }
        let Some(monitor) = &self.monitor else {
            return Ok(());
        };
        let word = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(monitor.get(at..at + 8)?.try_into().ok()?))
        };
        match (word(0), word(8)) {
            (Some(MAGIC), Some(VERSION)) => Ok(()),
            (Some(MAGIC), _) => Err(Error::Monitor("it is of another version than the hypervisor")),
            _ => Err(Error::Monitor("it does not begin as one")),
        }
    }

    /// Writes the disc's image.
    ///
    /// # Errors
    /// [`Error::CommandLine`], [`Error::NotInstalled`] where GRUB or what it needs is missing, and what GRUB says.
    pub fn write(&self, to: &Path) -> Result<(), Error> {
        // The rest is for whoever asks: the hypervisor looks at what it is given itself.
        self.check_lines()?;
        let hypervisor = self.hypervisor.bytes()?;
        let mut disc = Disc::new("multiboot2")?;
        disc.put("hypervisor", &hypervisor)?;
        disc.say("multiboot2 /boot/hypervisor");
        let modules = [
            ("kernel", Some(&self.kernel), self.command_line.as_str()),
            ("initrd", self.initrd.as_ref(), ""),
            ("monitor", self.monitor.as_ref(), ""),
            ("policy", self.policy.as_ref(), self.policy_options.as_str()),
        ];
        for (name, bytes, rest) in modules {
            let Some(bytes) = bytes else { continue };
            disc.put(name, bytes)?;
            disc.say(&format!("module2 /boot/{name} {name} {rest}"));
        }
        disc.write(to)
    }
}

/// Writes the image of a disc from which GRUB starts a kernel without the hypervisor.
///
/// # Errors
/// As [`Image::write`].
pub fn write_plain(kernel: &[u8], command_line: &str, initrd: &[u8], to: &Path) -> Result<(), Error> {
    check_line(command_line)?;
    let mut disc = Disc::new("linux")?;
    disc.put("kernel", kernel)?;
    disc.put("initrd", initrd)?;
    // No mode of the screen is looked for.
    disc.say("set gfxpayload=text");
    disc.say(&format!("linux /boot/kernel {command_line}"));
    disc.say("initrd /boot/initrd");
    disc.write(to)
}

/// Whether GRUB takes a line as it is.
fn check_line(line: &str) -> Result<(), Error> {
    match line.contains(['\n', '\'', '"', '\\', '$', ';', '{', '}']) {
        true => Err(Error::CommandLine(line.to_owned())),
        false => Ok(()),
    }
}

/// A disc that is being made.
struct Disc {
    folder: TempDir,
    /// GRUB's module that starts what is loaded.
    starter: &'static str,
    configuration: String,
}

impl Disc {
    fn new(starter: &'static str) -> Result<Self, Error> {
        installed()?;
        let folder = tempfile::tempdir().map_err(io("make a temporary folder in", std::env::temp_dir()))?;
        let grub = folder.path().join("boot/grub");
        fs::create_dir_all(&grub).map_err(io("make", grub))?;
        Ok(Self {
            folder,
            starter,
            configuration: SERIAL.to_owned(),
        })
    }

    /// Adds a file, which is `/boot/NAME` for GRUB.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.folder.path().join("boot").join(name);
        fs::write(&path, bytes).map_err(io("write", path))
    }

    /// Adds a line to GRUB's configuration.
    fn say(&mut self, line: &str) {
        self.configuration.push_str(line);
        self.configuration.push('\n');
    }

    fn write(mut self, to: &Path) -> Result<(), Error> {
        self.say("boot");
        self.put("grub/grub.cfg", self.configuration.as_bytes())?;
        let output = Command::new("grub-mkrescue")
            .arg("-o")
            .arg(to)
            .arg(format!("--install-modules={} {MODULES}", self.starter))
            .args(["--fonts=", "--locales=", "--themes="])
            .arg(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .map_err(io("run", "grub-mkrescue"))?;
        if !output.status.success() {
            return Err(Error::Failed {
                program: "grub-mkrescue",
                output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        Ok(())
    }
}

/// Whether all is there that makes a disc.
fn installed() -> Result<(), Error> {
    for (program, packages) in [
        ("grub-mkrescue", "grub-common"),
        ("xorriso", "xorriso"),
        ("mformat", "mtools"),
    ] {
        if packages::find(program).is_none() {
            return Err(Error::NotInstalled { program, packages });
        }
    }
    match Firmware::installed().is_empty() {
        true => Err(Error::NotInstalled {
            program: "GRUB for a BIOS",
            packages: Firmware::Bios.package(),
        }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn refused(image: &Image) -> String {
        image.check().unwrap_err().to_string()
    }

    #[test]
    fn what_the_hypervisor_would_not_start_is_refused_before() {
        let trial = Image::trial().unwrap();
        trial.check().unwrap();
        assert!(refused(&Image::new(b"MZ".to_vec(), "")).contains("no bzImage"));
        assert!(refused(&trial.clone().command_line(&"x".repeat(2048))).contains("2047 bytes"));
        assert!(refused(&trial.clone().command_line("a;b")).contains("a;b"));
        assert!(refused(&trial.clone().monitor(vec![0; 64])).contains("does not begin as one"));
        assert!(refused(&trial.clone().policy(vec![0; 64], "")).contains("no policy: Length"));
        let mut other = Program::Monitor.bytes().unwrap();
        other[8] = 0xff;
        assert!(refused(&trial.monitor(other)).contains("another version"));
    }
}
