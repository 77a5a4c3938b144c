//! What is hidden in a dump whose lists were written to.

use vmsight_analysis::recover::files;
use vmsight_analysis::{Context, Evidence, Finding, Outcome, checks, run};
use vmsight_linux::Kernel;
use vmsight_linux::socket::{Socket, SocketFilter};

use crate::support::{Forgery, subject};

fn look(check: &str, kernel: Kernel) -> Outcome {
    run(&Context::new(kernel), &[checks::named(check).unwrap()], &|_| {}).remove(0)
}

/// The one thing that this check finds.
#[track_caller]
fn only(check: &str, kernel: Kernel) -> Finding {
    let mut found = look(check, kernel).findings;
    assert_eq!(found.len(), 1, "{found:#?}");
    found.remove(0)
}

#[track_caller]
fn says(finding: &Finding, text: &str) {
    let evidence: Vec<String> = finding.evidence.iter().map(Evidence::to_string).collect();
    assert!(evidence.iter().any(|e| e.contains(text)), "{text}: {evidence:?}");
}

/// A thread that was taken out of the list of its process, and runs on.
#[test]
fn a_thread_that_its_process_does_not_list_is_found() {
    let subject = subject();
    let forged = Forgery::of(&subject);
    let clean = look("hidden-threads", subject.dumped());
    assert!(clean.findings.is_empty() && clean.looked_at > 20, "{clean:?}");
    let threads = forged.kernel.threads(None).unwrap().rows;
    let thread = threads.iter().find(|t| t.tid != t.pid).unwrap();
    let node = forged.member("task_struct", "thread_node", thread.task);
    let (next, before) = (forged.pointer(node), forged.pointer(node.wrapping_add(8)));
    forged.put(before, &next.0.to_le_bytes());
    forged.put(next.wrapping_add(8), &before.0.to_le_bytes());
    let finding = only("hidden-threads", forged.forged());
    assert_eq!(finding.address, Some(thread.task));
    assert!(
        finding.subject.contains(&format!("thread {} (", thread.tid)),
        "{finding:?}"
    );
    says(&finding, "in its process's list of threads: no");
    says(&finding, "in the table of pids: yes");
}

/// A socket that listens, taken out of what tools show and out of its process's files, as a backdoor in the kernel is in neither.
#[test]
fn a_port_that_nobody_is_seen_to_use_is_found() {
    let subject = subject();
    let forged = Forgery::of(&subject);
    let kernel = &forged.kernel;
    let clean = look("hidden-sockets", subject.dumped());
    assert!(clean.findings.is_empty() && clean.looked_at > 0, "{clean:?}");
    let filter = SocketFilter {
        ports: true,
        ..SocketFilter::INET
    };
    let sockets = kernel.sockets(filter).unwrap().rows;
    let listens = |s: &&Socket| s.protocol == "tcp" && s.state == "LISTEN" && s.in_ports;
    let socket = sockets.iter().find(listens).unwrap().clone();
    let bound = sockets
        .iter()
        .filter(|s| s.protocol == "tcp" && s.state == "ESTABLISHED");
    assert!(bound.clone().count() > 0 && bound.clone().any(|s| s.in_ports));

    let node = forged.member("sock_common", "skc_nulls_node", socket.address);
    let (next, before) = (forged.pointer(node), forged.pointer(node.wrapping_add(8)));
    forged.put(before, &next.0.to_le_bytes());
    if next.0 & 1 == 0 {
        forged.put(next.wrapping_add(8), &before.0.to_le_bytes());
    }
    let finding = only("hidden-sockets", forged.forged());
    assert_eq!(finding.address, Some(socket.address));
    says(&finding, "in the table of ports in use: yes");
    says(&finding, &socket.owners[0].name);

    for owner in &socket.owners {
        let threads = forged.kernel.threads(Some(owner.pid)).unwrap().rows;
        let files = forged.pointer(forged.member("task_struct", "files", threads[0].task));
        let table = forged.pointer(forged.member("files_struct", "fdt", files));
        let slots = forged.pointer(forged.member("fdtable", "fd", table));
        forged.put(slots.wrapping_add(u64::from(owner.fd) * 8), &[0; 8]);
    }
    let finding = only("hidden-sockets", forged.forged());
    assert_eq!(finding.address, Some(socket.address));
    says(&finding, "held by: nobody");
    let port = format!(":{}", socket.local_port.unwrap());
    assert!(finding.subject.contains(&port), "{finding:?}");
}

/// A file that its filesystem's list does not have, and one that does not know its name any more.
#[test]
fn files_that_are_not_where_they_must_be_are_found() {
    const UNLISTED: &str = "/srv/data/plain.txt";
    const NAMELESS: &str = "/srv/data/mapped.bin";
    let subject = subject();
    let forged = Forgery::of(&subject);
    let clean = look("hidden-files", subject.dumped());
    assert!(clean.findings.is_empty() && clean.looked_at > 100, "{clean:?}");
    assert_eq!(clean.notes, [""; 0]);
    let rows = files::list(&forged.kernel).unwrap().rows;
    let inode = |path: &str| rows.iter().find(|f| f.path.as_deref() == Some(path)).unwrap();

    let unlisted = inode(UNLISTED);
    let node = forged.member("inode", "i_sb_list", unlisted.address);
    let (next, before) = (forged.pointer(node), forged.pointer(node.wrapping_add(8)));
    forged.put(before, &next.0.to_le_bytes());
    forged.put(next.wrapping_add(8), &before.0.to_le_bytes());
    let finding = only("hidden-files", forged.forged());
    assert_eq!(finding.subject, format!("file {UNLISTED}"));
    says(&finding, "its file in the filesystem's list: no");
    says(&finding, "in the table of names: yes");
    says(&finding, "open or mapped: yes");
    says(
        &finding,
        &format!("inode {} of {} ", unlisted.inode, unlisted.fs_type),
    );

    let nameless = inode(NAMELESS);
    let forged = Forgery::of(&subject);
    forged.put(
        forged.member("inode", "i_dentry.first", nameless.address),
        &[0; 8],
    );
    let found = look("hidden-files", forged.forged()).findings;
    let [name, file] = found.as_slice() else {
        panic!("{found:#?}")
    };
    assert_eq!(name.subject, format!("file {NAMELESS}"));
    says(name, "a name that its file has: no");
    assert_eq!(file.address, Some(nameless.address));
    says(file, &format!("pages in the page cache: {}", (128 << 10) / 4096));
}
