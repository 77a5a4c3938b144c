//! Sockets that are bound and not listed.

use vmsight_linux::LinuxError;
use vmsight_linux::socket::{Socket, SocketFilter};

use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const SOCKETS: Check = Check {
    name: "hidden-sockets",
    summary: "Every bound TCP and UDP socket that somebody holds is in its protocol's tables",
    compares: "the sockets that file descriptors lead to with the hash tables of TCP and UDP in all network \
               namespaces, which is what /proc/net, ss and netstat show",
    why: "A socket that is taken out of the tables is shown by no tool in the guest, and its process can hold it \
          for later.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "A socket of the kernel's own, which no process holds.",
        "A port that is left out by what shows the tables (a hooked tcp4_seq_ops): see the checks of function pointers.",
    ],
    run,
};

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let listing = context.kernel().sockets(SocketFilter::INET)?;
    for warning in listing.warnings {
        findings.note(warning);
    }
    findings.looked_at(listing.rows.len());
    for socket in listing.rows.iter().filter(|s| !s.listed && must_be_listed(s)) {
        let finding = Finding::new(
            Severity::High,
            format!("socket {}", socket.endpoint()),
            "a process holds the socket, and it is in no table of its protocol: no tool in the guest shows it",
        );
        let holders: Vec<String> = socket.owners.iter().take(8).map(holder).collect();
        findings.report(
            finding
                .at(socket.address)
                .with(Evidence::value("held by", holders.join(", ")))
                .with(Evidence::value("in its protocol's tables", "no")),
        );
    }
    Ok(())
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
