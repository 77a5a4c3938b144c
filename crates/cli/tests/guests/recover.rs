//! `vmsight recover`: the listings' keys, what is written where, and how it ends.

use std::fs;

use crate::support::{ends_with, objects, prepared, rows, text, utf8, vmsight};

#[test]
fn files_are_listed_shown_as_a_tree_and_written_to_a_new_folder() {
    let vm = prepared();
    let t = vm.target.as_str();
    let files = rows(&["recover", "files", t]);
    let plain = files
        .iter()
        .find(|row| row["path"] == "/srv/data/plain.txt")
        .unwrap();
    assert_eq!((&plain["size"], &plain["cached"]), (&17.into(), &17.into()));
    assert!(plain.values().filter(|v| v.is_null()).count() <= 1, "{plain:?}"); // it is no link
    let deleted = rows(&["recover", "files", t, "--deleted", "--under", "/tmp"]);
    assert!(deleted.iter().any(|row| row["path"] == "/tmp/deleted secret.bin"));
    assert!(deleted.iter().all(|row| row["deleted"] == true));
    let tree = vmsight(&["recover", "files", t, "--tree", "--under", "/srv/data/upper"]);
    let tree = text(&tree.stdout);
    assert!(tree.contains("  /srv/data/upper/\n"), "{tree}");
    assert!(tree.contains("      changed.txt\n"), "{tree}");

    let folder = tempfile::tempdir().unwrap();
    let into = folder.path().join("new");
    let into = utf8(&into);
    let write = ["recover", "files", t, "--into", into, "--extract"];
    let missing = ends_with(1, &[&write[..], &["/not/there"]].concat());
    assert!(missing.contains("/not/there"), "{missing}");
    let written = rows(&[&write[..], &["/srv/data/plain.txt"]].concat());
    let output = folder
        .path()
        .join("new")
        .join(written[0]["output"].as_str().unwrap());
    assert_eq!(fs::read(output).unwrap(), b"0123456789abcdef\n");
    let again = ends_with(2, &[&write[..], &["/srv/data/plain.txt"]].concat());
    assert!(again.contains("not empty"), "{again}");
}

#[test]
fn what_was_typed_and_who_has_ended() {
    let vm = prepared();
    let t = vm.target.as_str();
    let typed = rows(&["recover", "history", t]);
    let token = typed
        .iter()
        .find(|row| row["command"] == "export TOKEN=s3cr3t-t0ken")
        .unwrap();
    assert_eq!((&token["name"], &token["number"]), (&"bash".into(), &3.into()));
    assert_eq!(
        (&token["form"], &token["ended"]),
        (&"readline".into(), &serde_json::Value::Null)
    );
    assert!(token["time"].is_string() && token["address"].is_string());
    let init = vmsight(&["recover", "history", t, "--pid", "1"]);
    assert_eq!(init.status.code(), Some(1));
    let executed = rows(&["recover", "commands", t]);
    assert_eq!(executed.len(), 1, "{executed:?}");
    assert_eq!(
        (
            &executed[0]["command"],
            &executed[0]["path"],
            &executed[0]["uses"]
        ),
        (&"ls".into(), &"/bin/ls".into(), &1.into())
    );
    assert_eq!(executed[0]["pid"], token["pid"]);
    // Others may have got the places of those that ended: then there is nothing, and the exit code is 1.
    let ended = vmsight(&["recover", "processes", t, "--no-threads", "-o", "json"]);
    let ended = objects(&ended.stdout).unwrap();
    for row in &ended {
        assert!(
            row["task"].is_string() && row["start_time"].is_string(),
            "{row:?}"
        );
        assert_eq!(row["state"], "ended", "{row:?}");
    }
    assert!(ended.iter().all(|row| row["pid"] == row["tgid"]));
}

#[test]
fn sockets_that_were_closed_and_with_all_those_that_are_open() {
    let vm = prepared();
    let t = vm.target.as_str();
    let all = rows(&["recover", "sockets", t, "--all"]);
    let open = |row: &&serde_json::Map<String, serde_json::Value>| row["status"] == "open";
    let listens = all
        .iter()
        .filter(open)
        .find(|row| row["local_port"] == 8080)
        .unwrap();
    assert_eq!(
        (&listens["protocol"], &listens["state"], &listens["uid"]),
        (&"tcp".into(), &"LISTEN".into(), &0.into())
    );
    assert!(listens["address"].is_string() && listens["sent_bytes"].is_null());
    // Others may have got the places of those that were closed: then there is nothing, and the exit code is 1.
    let closed = vmsight(&["recover", "sockets", t, "-o", "json"]);
    for row in objects(&closed.stdout).unwrap() {
        assert_eq!(
            (&row["status"], &row["state"]),
            (&"closed".into(), &serde_json::Value::Null)
        );
    }
}

#[test]
fn terminals_and_consoles() {
    let vm = prepared();
    let t = vm.target.as_str();
    let waiting = rows(&["recover", "tty", t, "--waiting", "--tty", "pts/1"]);
    let typed = waiting.iter().find(|row| row["buffer"] == "line").unwrap();
    assert_eq!(typed["text"], "typed and never read\nnot yet \u{1b}[31mcomplete");
    assert!(typed["address"].is_string() && typed["pids"].is_array());
    let table = text(&vmsight(&["recover", "tty", t, "--waiting", "--tty", "pts/1"]).stdout);
    assert!(
        table.contains("never read") && !table.contains('\u{1b}'),
        "{table}"
    );
    let none = vmsight(&["recover", "tty", t, "--tty", "pts/999"]);
    assert_eq!(none.status.code(), Some(1));

    let screen = vmsight(&["recover", "screen", t, "--tty", "tty2"]);
    assert_eq!(
        text(&screen.stdout),
        "== tty2: 80x25\non the second console\n\n  and red, further down\n"
    );
    let second = &rows(&["recover", "screen", t, "--tty", "tty2"])[0];
    assert_eq!(
        (&second["foreground"], &second["cursor"]),
        (&false.into(), &vec![0, 3].into())
    );
}

#[test]
fn a_guest_without_a_graphics_card_has_no_pictures_and_nobody_who_reads_its_keyboard() {
    let vm = prepared();
    let t = vm.target.as_str();
    let folder = tempfile::tempdir().unwrap();
    let into = folder.path().join("new");
    for how in [&["--pictures"][..], &["--into", utf8(&into)]] {
        let none = vmsight(&[&["recover", "screen", t, "-o", "json"], how].concat());
        assert_eq!(none.status.code(), Some(1), "{none:?}");
        assert_eq!(objects(&none.stdout).unwrap(), [], "{none:?}");
    }
    assert!(!into.exists());
    let wrong = ends_with(2, &["recover", "screen", t, "--pictures", "--tty", "tty1"]);
    assert!(wrong.contains("cannot be used with"), "{wrong}");
    let nobody = ends_with(1, &["recover", "input", t]);
    assert!(nobody.contains("evdev"), "{nobody}");
}

#[test]
fn programs_are_listed_and_written_to_a_new_folder() {
    let vm = prepared();
    let t = vm.target.as_str();
    let modules = rows(&["recover", "elf", t, "--module", "dummy"]);
    assert_eq!(
        (&modules[0]["kind"], &modules[0]["path"]),
        (&"module".into(), &serde_json::Value::Null)
    );
    let folder = tempfile::tempdir().unwrap();
    let into = folder.path().join("new");
    let write = ["recover", "elf", t, "--module", "dummy", "--into", utf8(&into)];
    let written = rows(&write);
    let file = fs::read(into.join(written[0]["output"].as_str().unwrap())).unwrap();
    assert!(file.starts_with(b"\x7fELF"));
    assert!(ends_with(2, &write).contains("not empty"));
    let missing = ends_with(1, &["recover", "elf", t, "--module", "nowhere"]);
    assert!(missing.contains("nowhere"), "{missing}");
}

#[test]
fn neighbours_and_routes() {
    let vm = prepared();
    let t = vm.target.as_str();
    let known = rows(&["recover", "arp", t, "--interface", "dummy0.42"]);
    let known = known.iter().find(|row| row["ip"] == "10.42.0.99").unwrap();
    assert_eq!(
        (&known["mac"], &known["state"]),
        (&"02:00:00:00:00:63".into(), &"PERMANENT".into())
    );
    assert!(known["address"].is_string() && known["namespace"].is_number());
    let own = rows(&["recover", "routes", t, "--table", "100"]);
    assert_eq!(own.len(), 1);
    // This guest tracks no connections.
    let none = ends_with(1, &["recover", "conntrack", t]);
    assert!(none.contains("nf_conntrack"), "{none}");
    assert_eq!(
        (&own[0]["destination"], &own[0]["interface"], &own[0]["type"]),
        (&"10.200.3.0/24".into(), &"dummy0".into(), &"unicast".into())
    );
}

#[test]
fn packets_are_listed_and_written_as_a_capture() {
    let vm = prepared();
    let t = vm.target.as_str();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("web.pcap");
    let found = rows(&["recover", "packets", t, "--queued", "--pcap", utf8(&file)]);
    let unread = found
        .iter()
        .find(|row| row["destination"] == "127.0.0.1:5353")
        .unwrap();
    assert_eq!(
        (&unread["length"], &unread["protocol"]),
        (&92.into(), &"udp".into())
    );
    let capture = fs::read(&file).unwrap();
    let lengths: u64 = found.iter().map(|row| row["length"].as_u64().unwrap()).sum();
    assert_eq!(capture.len() as u64, 24 + 16 * found.len() as u64 + lengths);
}
