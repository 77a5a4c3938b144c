//! Sockets and ports that are in use and not listed.

use vmsight_linux::LinuxError;
use vmsight_linux::socket::{Socket, SocketFilter};

use crate::recover::sockets::Living;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const SOCKETS: Check = Check {
    name: "hidden-sockets",
    summary: "Every TCP and UDP socket that somebody holds, that has a port of TCP, or that lives, is in its protocol's tables",
    compares: "the sockets that file descriptors lead to, those in TCP's table of ports in use, and those that live in the memory \
               that sockets of TCP and UDP are made in, with the hash tables of TCP and UDP in all network namespaces, which is \
               what /proc/net, ss and netstat show",
    why: "A socket that is taken out of the tables is shown by no tool in the guest, and its process can hold it \
          for later.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "A socket that is not where the kernel makes sockets, and that no process holds and no table has.",
        "A port that is left out by what shows the tables (a hooked tcp4_seq_ops): see the checks of function pointers.",
    ],
    run,
};

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    // Before the tables: what lives now and still does when they were read must be in them.
    let living = findings.or_note("the memory of sockets", Living::find(context.kernel()));
    let listing = context.kernel().sockets(SocketFilter {
        ports: true,
        ..SocketFilter::INET
    })?;
    for warning in listing.warnings {
        findings.note(warning);
    }
    findings.looked_at(listing.rows.len());
    if let Some(living) = living {
        for warning in &living.warnings {
            findings.note(warning.clone());
        }
        findings.looked_at(living.len());
        let known = listing.rows.iter().map(|socket| socket.address).collect();
        let others = findings.or_note("the memory of sockets", living.others(&known));
        for socket in others.unwrap_or_default().iter().filter(|s| must_be_listed(s)) {
            unseen(findings, socket);
        }
    }
    for socket in listing.rows.iter().filter(|s| !s.listed && must_be_listed(s)) {
        let explanation = match socket.owners.is_empty() {
            false => {
                "a process holds the socket, and it is in no table of its protocol: no tool in the guest shows it"
            }
            true => {
                "a port is in use by a socket that no process holds and that is in no table of its protocol"
            }
        };
        let finding = Finding::new(
            Severity::High,
            format!("socket {}", socket.endpoint()),
            explanation,
        );
        let holders: Vec<String> = socket.owners.iter().take(8).map(holder).collect();
        let held = match holders.is_empty() {
            false => holders.join(", "),
            true => "nobody".to_owned(),
        };
        let mut finding = finding
            .at(socket.address)
            .with(Evidence::value("held by", held))
            .with(Evidence::value("in its protocol's tables", "no"));
        if socket.protocol == "tcp" {
            let in_ports = if socket.in_ports { "yes" } else { "no" };
            finding = finding.with(Evidence::value("in the table of ports in use", in_ports));
        }
        findings.report(finding);
    }
    Ok(())
}

/// A socket that only the memory of its protocol's sockets has.
fn unseen(findings: &mut Findings, socket: &Socket) {
    // A connection comes to its table a moment after it is made.
    if socket.state == "SYN_RECV" {
        return;
    }
    let finding = Finding::new(
        Severity::High,
        format!("socket {}", socket.endpoint()),
        "a socket lives that no process holds and that is in no table of its protocol: no tool in the guest shows it",
    );
    findings.report(
        finding
            .at(socket.address)
            .with(Evidence::value("in the memory of its protocol's sockets", "yes"))
            .with(Evidence::value("held by", "nobody"))
            .with(Evidence::value("in its protocol's tables", "no")),
    );
}

fn holder(owner: &vmsight_linux::file::Owner) -> String {
    format!("{} ({}) descriptor {}", owner.pid, owner.name, owner.fd)
}

/// Whether the kernel keeps a socket of this kind and state in a table. A socket is not, or not yet, before it is bound.
fn must_be_listed(socket: &Socket) -> bool {
    if !socket.problems.is_empty() {
        return false;
    }
    match socket.protocol.as_str() {
        "tcp" => socket.state != "CLOSE" && socket.local_port.is_some_and(|port| port != 0),
        "udp" => socket.local_port.is_some_and(|port| port != 0),
        _ => false,
    }
}
