//! The timeline and the report of a guest's dump, whose owner wants more than to be looked at; the report in a real browser.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use vmsight_arch::Gva;
use vmsight_lab::Format;
use vmsight_linux::{AttachOptions, Kernel, ProcessFields};
use vmsight_memory::dump;

use crate::support::{Dump, ends_with, prepared, rows, text, utf8, vmsight};

/// As long as a process's name can be.
const HOSTILE: &[u8; 16] = b"<script>x()</s>\0";

#[test]
fn a_timeline_and_a_page_that_a_browser_shows_and_a_guest_does_not_own() {
    let vm = prepared();
    let dump = Dump::of(&vm.guest, Format::Raw);
    let now = vm.guest.truth().system.now;
    let listed: Vec<u32> = vm.guest.truth().processes.iter().map(|p| p.pid).collect();
    drop(vm);
    forge(&dump);
    let t = dump.target();
    timeline(t, now);

    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let out = vmsight(&["report", t, "-o", "html", utf8(&page)]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(out.stdout.is_empty());
    assert_eq!(fs::metadata(&page).unwrap().permissions().mode() & 0o777, 0o600);
    let html = fs::read_to_string(&page).unwrap();
    let printed = text(&vmsight(&["report", t, "--events", "10"]).stdout);
    assert!(printed.starts_with("<!DOCTYPE html>") && printed.contains("earlier events are left out"));

    // Whole without a script: all rows stand in the page as it is written.
    assert!(html.contains("&lt;script&gt;x()&lt;/s&gt;"));
    assert_eq!(html.matches("<script>").count(), 1, "the page's own");
    for pid in listed {
        assert!(html.contains(&format!("<td>{pid}</td>")), "process {pid}");
    }

    let seen = browse(folder.path(), &page, "#sort=processes,0,down");
    assert_eq!(seen.console, [""; 0]);
    assert_eq!(seen.requests, [""; 0]);
    let table = section(&seen.dom, "processes");
    assert!(table.contains("&lt;script&gt;x()&lt;/s&gt;"), "{table}");
    assert!(table.contains(r#"aria-sort="descending"><button type="button">pid"#));
    let pids: Vec<u32> = table
        .split("<tr ")
        .skip(1)
        .filter_map(|row| row.split_once("<td>")?.1.split_once('<')?.0.parse().ok())
        .collect();
    assert!(pids.len() > 50 && pids.is_sorted_by(|a, b| a > b), "{pids:?}");
    assert_eq!(pids.len(), section(&html, "processes").matches("<tr ").count());
    let findings = section(&seen.dom, "findings");
    assert!(
        findings.contains("sys_call_table[156]") && findings.contains("0xffffffc000000000"),
        "{findings}"
    );
    assert!(section(&seen.dom, "timeline").contains("export TOKEN=s3cr3t-t0ken"));
    assert!(section(&seen.dom, "sockets").contains("web-frontend"));

    // What this would miss if it could miss anything.
    let control = folder.path().join("control.html");
    let remote = r#"<img src="http://127.0.0.1:9/x.png"><script>console.log("ran")</script>"#;
    fs::write(&control, remote).unwrap();
    let seen = browse(folder.path(), &control, "");
    assert!(
        seen.console.iter().any(|line| line.contains("ran")),
        "{:?}",
        seen.console
    );
    assert!(
        seen.requests.iter().any(|url| url.contains("x.png")),
        "{:?}",
        seen.requests
    );

    assert!(ends_with(2, &["report", t, "-o", "csv"]).contains("-o html"));
    assert!(ends_with(2, &["ps", t, "-o", "html"]).contains("vmsight report"));
}

/// Gives a process a name that wants to be a script, and leads a system call that nobody uses out of the kernel.
fn forge(dump: &Dump) {
    let memory = dump::open(&dump.path, None).unwrap().memory;
    let kernel = Kernel::attach(memory, AttachOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    let listing = kernel.processes(ProcessFields::empty()).unwrap();
    let process = listing
        .rows
        .iter()
        .find(|row| row.name == "low-priority")
        .unwrap();
    let name = process
        .task
        .wrapping_add(kernel.offset("task_struct", "comm").unwrap());
    let call = kernel.symbol("sys_call_table").unwrap().wrapping_add(156 * 8);
    let file = fs::OpenOptions::new().write(true).open(&dump.path).unwrap();
    // A raw dump lies flat: offset is address.
    let put = |at: Gva, bytes: &[u8]| {
        let offset = kernel.space().translate(at).unwrap().gpa.0;
        file.write_all_at(bytes, offset).unwrap();
    };
    put(name, HOSTILE);
    put(call, &0xffff_ffc0_0000_0000u64.to_le_bytes());
}

fn timeline(t: &str, now: u64) {
    let all = rows(&["timeline", t]);
    let times: Vec<&str> = all.iter().map(|row| row["time"].as_str().unwrap()).collect();
    assert!(times.is_sorted() && times.len() > 500, "{}", times.len());
    for kind in ["system", "process", "log", "file", "history"] {
        let row = all
            .iter()
            .find(|row| row["kind"] == kind)
            .unwrap_or_else(|| panic!("no {kind}"));
        assert!(
            row["source"].is_string() && row["uncertainty"].is_string(),
            "{row:?}"
        );
    }
    let typed = rows(&["timeline", t, "--kind", "history"]);
    assert_eq!(typed.len(), 4);
    let at = typed[0]["time"].as_str().unwrap();
    let same = rows(&["timeline", t, "--kind", "history", "--since", at, "--until", at]);
    assert!(same.iter().all(|row| row["time"] == at) && !same.is_empty());
    let late = vmsight(&["timeline", t, "--since", "2200-01-01"]);
    assert_eq!(late.status.code(), Some(1), "{}", text(&late.stderr));
    assert!(now > 0 && ends_with(2, &["timeline", t, "--since", "yesterday"]).contains("ISO 8601"));
    assert!(
        ends_with(
            2,
            &["timeline", t, "--since", "2026-01-02", "--until", "2026-01-01"]
        )
        .contains("after")
    );
    let csv = vmsight(&["timeline", t, "--kind", "history", "-o", "csv"]);
    assert!(text(&csv.stdout).starts_with("time,kind,action,pid,name,subject,source,uncertainty\n"));
}

/// One section of a page.
fn section<'p>(page: &'p str, id: &str) -> &'p str {
    let (_, rest) = page
        .split_once(&format!("<section id=\"{id}\">"))
        .unwrap_or_else(|| panic!("no section {id}"));
    rest.split_once("</section>").unwrap().0
}

/// What a browser makes of a page.
struct Seen {
    dom: String,
    /// What was said on its console: errors, what the policy forbade, and all else.
    console: Vec<String>,
    /// What the page asked of a network. The browser's own requests are not the page's.
    requests: Vec<String>,
}

fn browse(folder: &Path, page: &Path, fragment: &str) -> Seen {
    let net = folder.join("net.json");
    let out = Command::new("chromium")
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ])
        .args([
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
        ])
        .arg("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        .args(["--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000"])
        .arg(format!("--log-net-log={}", net.display()))
        .arg(format!("--user-data-dir={}", folder.join("profile").display()))
        .arg("--dump-dom")
        .arg(format!("file://{}{fragment}", page.display()))
        .output()
        .expect("chromium is installed: script/packages.txt");
    let said = text(&out.stderr);
    assert!(out.status.success() && !out.stdout.is_empty(), "{said}");
    let log: Value = serde_json::from_slice(&fs::read(&net).unwrap()).unwrap();
    let requests = log["events"].as_array().unwrap().iter().filter_map(|event| {
        let (url, initiator) = (
            event["params"]["url"].as_str()?,
            event["params"]["initiator"].as_str()?,
        );
        let own = initiator == "not an origin" || url.starts_with("file:") || url.starts_with("data:");
        (!own).then(|| url.to_owned())
    });
    Seen {
        dom: text(&out.stdout),
        console: said
            .lines()
            .filter(|line| line.contains(":CONSOLE"))
            .map(str::to_owned)
            .collect(),
        requests: requests.collect(),
    }
}
