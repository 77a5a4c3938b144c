//! What a guest's netfilter tracks, held against its own /proc/net/nf_conntrack.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_analysis::recover::conntrack::{Connection, connections};
use vmsight_lab::orders::Ended;
use vmsight_lab::{Format, Guest, Kernel as Version, Spec, Work};
use vmsight_linux::Kernel;
use vmsight_memory::dump;
use vmsight_target::TargetSpec;

use crate::support::{Forgery, attach};

fn run(guest: &Guest, argv: &[&str]) -> Option<Ended> {
    let work = Work::Exec {
        path: "/bin/busybox".into(),
        argv: argv.iter().map(|arg| (*arg).into()).collect(),
        envp: vec!["PATH=/bin".into()],
    };
    guest.order(work).unwrap().ended
}

/// A guest that has sent something by each protocol; nothing of that is forgotten while the test runs.
fn tracking(version: Version) -> Guest {
    let guest = Guest::boot(&Spec::new(version).idle().orders()).unwrap_or_else(|e| panic!("{e:?}"));
    let modules = version
        .fetch()
        .unwrap()
        .modules(&[("nf_conntrack", "enable_hooks=1")])
        .unwrap();
    for module in modules {
        let work = Work::Load {
            name: module.name.clone(),
            parameters: module.parameters,
            from_memory: false,
        };
        let returned = guest.order(work).unwrap().returned;
        // What others need, too, is there already: EEXIST.
        assert!(matches!(returned, Some(0 | -17)), "{}: {returned:?}", module.name);
    }
    for name in [
        "udp_timeout",
        "udp_timeout_stream",
        "icmp_timeout",
        "tcp_timeout_close",
        "tcp_timeout_time_wait",
        "icmpv6_timeout",
    ] {
        let work = Work::WriteFile {
            path: format!("/proc/sys/net/netfilter/nf_conntrack_{name}")
                .as_str()
                .into(),
            bytes: "100000".into(),
        };
        assert_eq!(guest.order(work).unwrap().returned, Some(6), "{name}");
    }
    assert_eq!(
        run(&guest, &["ping", "-c", "1", "127.0.0.1"]),
        Some(Ended::Exited(0))
    );
    // Questions by UDP that nobody answers, of both families.
    for server in ["127.0.0.1", "::1"] {
        run(&guest, &["nslookup", "name", server]);
    }
    // A connection that both sides close. While nobody listens yet, each try is refused and forgotten.
    let line = "busybox nc -l -p 7777 </dev/null >/dev/null 2>&1 &
        until busybox nc 127.0.0.1 7777 </dev/null >/dev/null 2>&1; do busybox usleep 50000; done";
    assert_eq!(run(&guest, &["sh", "-c", line]), Some(Ended::Exited(0)));
    guest
}

/// The lines of the guest's own table, as what vmsight sees is written below.
fn told(guest: &Guest) -> BTreeSet<String> {
    let work = Work::ReadFile {
        path: "/proc/net/nf_conntrack".into(),
        limit: 60000,
    };
    let text = guest.order(work).unwrap().bytes.lossy();
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            // Of each direction one; the second is the answers'.
            let mut values: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
            for (name, value) in words.iter().filter_map(|word| word.split_once('=')) {
                values.entry(name).or_default().push(value);
            }
            let end = |ip: &str, port: &str, nth: usize| {
                let ip: std::net::IpAddr = values[ip][nth].parse().unwrap();
                match values.get(port) {
                    Some(ports) => std::net::SocketAddr::new(ip, ports[nth].parse().unwrap()).to_string(),
                    None => ip.to_string(),
                }
            };
            let state = (words[2] == "tcp").then(|| words[5].to_owned());
            let (replied, assured) = (!line.contains("[UNREPLIED]"), line.contains("[ASSURED]"));
            format!(
                "{} {state:?} {} {} {} {} replied {replied} assured {assured} mark {}",
                words[2],
                end("src", "sport", 0),
                end("dst", "dport", 0),
                end("src", "sport", 1),
                end("dst", "dport", 1),
                values["mark"][0]
            )
        })
        .collect()
}

fn seen(row: &Connection) -> String {
    format!(
        "{} {:?} {} {} {} {} replied {} assured {} mark {}",
        row.protocol,
        row.state.map(str::to_owned),
        row.source,
        row.destination,
        row.reply_source,
        row.reply_destination,
        row.status.contains(&"seen-reply"),
        row.status.contains(&"assured"),
        row.mark.unwrap()
    )
}

fn agree(how: &str, kernel: &Kernel, told: &BTreeSet<String>) {
    let listing = connections(kernel).unwrap();
    assert_eq!(listing.warnings, [""; 0], "{how}");
    let all: BTreeSet<String> = listing.rows.iter().map(seen).collect();
    assert_eq!(&all, told, "{how}");
    assert_eq!(all.len(), listing.rows.len(), "{how}");
    assert!(listing.rows.iter().all(|row| row.namespace.is_some()), "{how}");
}

#[test]
fn connections_of_6_1_are_those_that_the_guest_tells_of() {
    check(Version::V6_1);
}

#[test]
fn connections_of_6_12_are_those_that_the_guest_tells_of() {
    check(Version::V6_12);
}

fn check(version: Version) {
    let guest = tracking(version);
    let told = told(&guest);
    for protocol in ["icmp ", "tcp ", "udp "] {
        assert!(told.iter().any(|line| line.starts_with(protocol)), "{told:?}");
    }
    assert!(told.iter().any(|line| line.contains("[::1]:53 ")), "{told:?}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    guest.dump(Format::Raw, &path).unwrap_or_else(|e| panic!("{e:?}"));
    let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let target = vmsight_target::attach(&spec, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
    agree("running", &attach(target.memory), &told);
    let dumped = attach(dump::open(&path, None).unwrap().memory);
    agree("dumped", &dumped, &told);

    // A chain that comes back to itself, and a connection that claims to be the other direction.
    let address = connections(&dumped).unwrap().rows[0].address;
    let types = dumped.module_types("nf_conntrack").unwrap();
    let id = types.find_struct("nf_conn").unwrap();
    let node = address.wrapping_add(types.member_of(id, "tuplehash").unwrap().offset);
    let forged = Forgery::of_file(&path, dumped);
    forged.put(node, &node.0.to_le_bytes());
    let listing = connections(&forged.forged()).unwrap();
    let warned = listing
        .warnings
        .iter()
        .any(|w| w.starts_with("a chain of connections"));
    assert!(warned, "{:?}", listing.warnings);
}
