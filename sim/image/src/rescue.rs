//! What GRUB boots: a disc with the hypervisor and its modules.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::Program;

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

/// Modules of GRUB that the configuration below needs. All of them would make loading it take longer than what it loads.
const GRUB_MODULES: &str = "--install-modules=multiboot2 normal iso9660 biosdisk serial terminal";

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
    /// hypervisor, which each hook leaves to; `fail-closed`, a kernel that the policy is not for does not go on.
    #[must_use]
    pub fn policy(mut self, policy: Vec<u8>, options: &str) -> Self {
        self.policy = Some(policy);
        options.clone_into(&mut self.policy_options);
        self
    }

    /// Writes the disc's image.
    pub fn write(&self, to: &Path) -> Result<()> {
        for line in [&self.command_line, &self.policy_options] {
            if line.contains(['\n', '\'', '"', '\\', '$', ';', '{', '}']) {
                bail!("GRUB would not take this command line as it is: {line}");
            }
        }
        let folder = tempfile::tempdir().context("make a temporary folder")?;
        let boot = folder.path().join("boot");
        fs::create_dir_all(boot.join("grub"))?;
        fs::write(boot.join("hypervisor"), self.hypervisor.bytes()?)?;
        let mut configuration = String::from(
            "serial --unit=0 --speed=115200\nterminal_output serial\nmultiboot2 /boot/hypervisor\n",
        );
        let modules = [
            ("kernel", Some(&self.kernel), self.command_line.as_str()),
            ("initrd", self.initrd.as_ref(), ""),
            ("monitor", self.monitor.as_ref(), ""),
            ("policy", self.policy.as_ref(), self.policy_options.as_str()),
        ];
        for (name, bytes, rest) in modules {
            let Some(bytes) = bytes else { continue };
            fs::write(boot.join(name), bytes)?;
            configuration.push_str(&format!("module2 /boot/{name} {name} {rest}\n"));
        }
        configuration.push_str("boot\n");
        fs::write(boot.join("grub/grub.cfg"), configuration)?;
        let output = Command::new("grub-mkrescue")
            .arg("-o")
            .arg(to)
            .args([GRUB_MODULES, "--fonts=", "--locales=", "--themes="])
            .arg(folder.path())
            .stdin(Stdio::null())
            .output()
            .context("run grub-mkrescue (see script/packages.txt)")?;
        if !output.status.success() {
            bail!(
                "grub-mkrescue failed:\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }
}
