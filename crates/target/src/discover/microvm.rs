//! The command lines of Firecracker, Cloud Hypervisor and crosvm.

use serde_json::Value;

use super::info::Vmm;
use super::qemu::Endpoint;
use super::qemu::options::{Pairs, parse_size};

const MIB: u64 = 1 << 20;

/// What such a command line says.
#[derive(Default, PartialEq, Eq, Debug)]
pub(super) struct MicroVm {
    pub(super) name: Option<String>,
    pub(super) uuid: Option<String>,
    pub(super) memory: Option<u64>,
    pub(super) vcpus: Option<u32>,
    pub(super) api_socket: Option<String>,
    pub(super) gdb: Vec<Endpoint>,
}

/// `read_file` gets a configuration file as the process means its path.
pub(super) fn parse(vmm: Vmm, args: &[String], read_file: &dyn Fn(&str) -> Option<String>) -> MicroVm {
    match vmm {
        Vmm::Firecracker => firecracker(args, read_file),
        Vmm::CloudHypervisor => cloud_hypervisor(args),
        Vmm::Crosvm => crosvm(args, read_file),
        Vmm::Qemu | Vmm::Other => MicroVm::default(),
    }
}

/// The value of `--name VALUE` or `--name=VALUE`; the last one counts.
fn option<'a>(args: &'a [String], names: &[&str]) -> Option<&'a str> {
    let mut found = None;
    for (i, arg) in args.iter().enumerate().skip(1) {
        if names.contains(&arg.as_str()) {
            found = args.get(i + 1).map(String::as_str);
        } else if let Some((name, value)) = arg.split_once('=')
            && names.contains(&name)
        {
            found = Some(value);
        }
    }
    found
}

fn firecracker(args: &[String], read_file: &dyn Fn(&str) -> Option<String>) -> MicroVm {
    let mut vm = MicroVm {
        name: option(args, &["--id"]).map(str::to_owned),
        ..MicroVm::default()
    };
    if !args.iter().any(|a| a == "--no-api") {
        // Firecracker's own default.
        vm.api_socket = Some(
            option(args, &["--api-sock"])
                .unwrap_or("/run/firecracker.socket")
                .to_owned(),
        );
    }
    if let Some(config) = option(args, &["--config-file"])
        .and_then(read_file)
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .as_ref()
        .and_then(|v| v.get("machine-config"))
    {
        vm.vcpus = config
            .get("vcpu_count")
            .and_then(Value::as_u64)
            .and_then(|n| u32::try_from(n).ok());
        vm.memory = config
            .get("mem_size_mib")
            .and_then(Value::as_u64)
            .and_then(|n| n.checked_mul(MIB));
    }
    vm
}

fn cloud_hypervisor(args: &[String]) -> MicroVm {
    let uuid =
        option(args, &["--platform"]).and_then(|p| Pairs::parse(p, None).get("uuid").map(str::to_owned));
    let api_socket = option(args, &["--api-socket"])
        .and_then(|v| Pairs::parse(v, Some("path")).get("path").map(str::to_owned));
    let gdb = option(args, &["--gdb"])
        .and_then(|v| Pairs::parse(v, None).get("path").map(str::to_owned))
        .map(|path| Endpoint::Unix { path, server: true })
        .into_iter()
        .collect();
    let mut vm = MicroVm {
        uuid,
        api_socket,
        gdb,
        ..MicroVm::default()
    };
    // With a kernel or a disk on the command line the machine is made from it, with these defaults; without,
    // everything comes through the API.
    let made_here = ["--kernel", "--firmware", "--disk", "--payload"]
        .iter()
        .any(|o| option(args, &[o]).is_some());
    if made_here || option(args, &["--memory", "--cpus"]).is_some() {
        vm.memory = ch_memory(args);
        let cpus = option(args, &["--cpus"]).map(|v| Pairs::parse(v, None));
        vm.vcpus = match cpus.as_ref().and_then(|p| p.get("boot")) {
            Some(n) => n.parse().ok(),
            None => Some(1),
        };
    }
    vm
}

/// `--memory size=` and every `--memory-zone …size=`, which may follow one option as several words.
fn ch_memory(args: &[String]) -> Option<u64> {
    let mut total = 0_u64;
    let mut in_zone = false;
    for arg in args.iter().skip(1) {
        if let Some(name) = arg.strip_prefix("--") {
            in_zone = name == "memory-zone";
        } else if in_zone {
            let size = Pairs::parse(arg, None)
                .get("size")
                .and_then(|s| parse_size(s, 1))?;
            total = total.checked_add(size)?;
        }
    }
    let main = match option(args, &["--memory"]) {
        Some(text) => parse_size(Pairs::parse(text, None).get("size").unwrap_or("512M"), 1)?,
        None => 512 * MIB,
    };
    total.checked_add(main)
}

fn crosvm(args: &[String], read_file: &dyn Fn(&str) -> Option<String>) -> MicroVm {
    let memory = |text: &str| parse_size(Pairs::parse(text, Some("size")).get("size")?, MIB);
    let cpus = |text: &str| {
        Pairs::parse(text, Some("num-cores"))
            .get("num-cores")?
            .parse()
            .ok()
    };
    let mut vm = MicroVm {
        name: option(args, &["--name"]).map(str::to_owned),
        api_socket: option(args, &["-s", "--socket"]).map(str::to_owned),
        gdb: option(args, &["--gdb"])
            .map(|port| Endpoint::Tcp {
                host: "127.0.0.1".into(),
                port: port.to_owned(),
                server: true,
            })
            .into_iter()
            .collect(),
        ..MicroVm::default()
    };
    let file = option(args, &["--cfg"]).map(|path| {
        read_file(path)
            .and_then(|text| serde_json::from_str::<Value>(&text).ok())
            .ok_or(())
    });
    if file == Some(Err(())) {
        return vm; // what its file says is not known, so neither are the defaults in force
    }
    let of_file = |section: &str, key: &str| {
        let value = file.as_ref()?.as_ref().ok()?.get(section)?;
        value.as_u64().or_else(|| value.get(key)?.as_u64())
    };
    vm.memory = match option(args, &["-m", "--mem"]) {
        Some(text) => memory(text),
        // crosvm's own default is 256 MiB.
        None => of_file("mem", "size").unwrap_or(256).checked_mul(MIB),
    };
    vm.vcpus = match option(args, &["-c", "--cpus"]) {
        Some(text) => cpus(text),
        None => of_file("cpus", "num-cores").map_or(Some(1), |n| u32::try_from(n).ok()),
    };
    vm
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(vmm: Vmm, line: &str, file: &str) -> MicroVm {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(vmm, &args, &|_| Some(file.to_owned()))
    }

    #[test]
    fn firecracker_lines() {
        let vm = run(
            Vmm::Firecracker,
            "/firecracker --id=web-1 --api-sock /run/fc.sock --config-file vm.json",
            r#"{"boot-source":{},"machine-config":{"vcpu_count":2,"mem_size_mib":1024}}"#,
        );
        assert_eq!(vm.name.as_deref(), Some("web-1"));
        assert_eq!((vm.memory, vm.vcpus), (Some(1 << 30), Some(2)));
        assert_eq!(vm.api_socket.as_deref(), Some("/run/fc.sock"));
        let vm = run(
            Vmm::Firecracker,
            "firecracker --no-api --config-file x",
            "{broken",
        );
        assert_eq!(vm, MicroVm::default());
        assert_eq!(
            run(Vmm::Firecracker, "firecracker", "").api_socket.as_deref(),
            Some("/run/firecracker.socket")
        );
    }

    #[test]
    fn cloud_hypervisor_lines() {
        let vm = run(
            Vmm::CloudHypervisor,
            "cloud-hypervisor --api-socket path=/run/ch.sock --kernel k --disk path=a path=b --cpus boot=4,max=8 \
             --memory size=1024M,shared=on --memory-zone id=m0,size=1G id=m1,size=512M,file=/dev/hugepages \
             --platform uuid=8d1f --gdb path=/run/gdb",
            "",
        );
        assert_eq!(vm.memory, Some((1024 + 1024 + 512) * MIB));
        assert_eq!((vm.vcpus, vm.uuid.as_deref()), (Some(4), Some("8d1f")));
        assert_eq!(vm.api_socket.as_deref(), Some("/run/ch.sock"));
        assert_eq!(
            vm.gdb,
            [Endpoint::Unix {
                path: "/run/gdb".into(),
                server: true
            }]
        );
        let vm = run(
            Vmm::CloudHypervisor,
            "cloud-hypervisor --api-socket=/run/ch.sock",
            "",
        );
        assert_eq!(
            (vm.memory, vm.vcpus, vm.api_socket.as_deref()),
            (None, None, Some("/run/ch.sock"))
        );
        assert_eq!(
            run(Vmm::CloudHypervisor, "cloud-hypervisor --kernel k", "").memory,
            Some(512 * MIB)
        );
    }

    #[test]
    fn crosvm_lines() {
        let vm = run(
            Vmm::Crosvm,
            "crosvm run --mem size=2048 --cpus num-cores=3 -s /run/c --name a vmlinux",
            "",
        );
        assert_eq!((vm.memory, vm.vcpus), (Some(2 << 30), Some(3)));
        assert_eq!(
            (vm.name.as_deref(), vm.api_socket.as_deref()),
            (Some("a"), Some("/run/c"))
        );
        assert_eq!(
            run(Vmm::Crosvm, "crosvm run -m 512 -c 2 vmlinux", "").vcpus,
            Some(2)
        );
        let vm = run(Vmm::Crosvm, "crosvm run vmlinux", "");
        assert_eq!((vm.memory, vm.vcpus), (Some(256 * MIB), Some(1)));
        let vm = run(
            Vmm::Crosvm,
            "crosvm run --cfg f.json",
            r#"{"mem":{"size":1024},"cpus":{"num-cores":4}}"#,
        );
        assert_eq!((vm.memory, vm.vcpus), (Some(1 << 30), Some(4)));
        assert_eq!(run(Vmm::Crosvm, "crosvm run --cfg f.json", "{").memory, None);
    }
}
