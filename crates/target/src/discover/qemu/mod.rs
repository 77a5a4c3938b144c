//! What a QEMU process's command line says of its machine.
//!
//! Options are named as in QEMU's `qemu-options.hx`; the forms are those of QEMU 2.x to 10.x, typed by hand,
//! by libvirt (JSON objects, passed descriptors) and by Proxmox (`/usr/bin/kvm -id …`).

pub(crate) mod config;
pub(crate) mod options;

pub(crate) use config::{Backend, Endpoint, MonitorMode, QemuConfig};

/// Whether an executable of this file name is a QEMU system emulator, and not one of its many tools
/// (`qemu-img`, `qemu-nbd`, `qemu-ga`, `qemu-storage-daemon`, user-mode `qemu-x86_64`, …).
pub(crate) fn is_system_emulator(file_name: &str) -> bool {
    // Nix wraps its programs as `.NAME-wrapped`.
    let name = file_name
        .strip_prefix('.')
        .map_or(file_name, |n| n.strip_suffix("-wrapped").unwrap_or(n));
    name.starts_with("qemu-system-") || matches!(name, "qemu-kvm" | "kvm" | "kvm-spice" | "qemu-kvm-spice")
}

/// The architecture an emulator of this name runs (`x86_64`), where the name says.
pub(crate) fn architecture(file_name: &str) -> Option<&str> {
    let rest = file_name.trim_start_matches('.').strip_prefix("qemu-system-")?;
    Some(rest.split('-').next().unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_no_machines() {
        for yes in [
            "qemu-system-x86_64",
            "qemu-kvm",
            "kvm",
            ".qemu-system-aarch64-wrapped",
            "qemu-system-x86_64-headless",
        ] {
            assert!(is_system_emulator(yes), "{yes}");
        }
        for no in [
            "qemu-img",
            "qemu-nbd",
            "qemu-ga",
            "qemu-io",
            "qemu-storage-daemon",
            "qemu-x86_64",
            "qemu-x86_64-static",
            "qemu-pr-helper",
            "qemu-bridge-helper",
            "virtqemud",
            "kvm-nx-lpage-re",
            "vim",
            "",
        ] {
            assert!(!is_system_emulator(no), "{no}");
        }
        assert_eq!(architecture("qemu-system-x86_64"), Some("x86_64"));
        assert_eq!(architecture(".qemu-system-aarch64-wrapped"), Some("aarch64"));
        assert_eq!(architecture("kvm"), None);
    }
}
