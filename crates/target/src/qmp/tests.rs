//! Sockets that behave badly. What real QEMUs answer is tested in `tests/qemu`.

use std::io::BufRead;
use std::os::unix::net::UnixListener;
use std::thread;

use super::*;

const SHORT: Duration = Duration::from_millis(200);
/// What ends in good time does so before, on the slowest machine.
const LONG: Duration = Duration::from_secs(30);

/// A server that says these lines, one for each line it is sent; the first at once.
fn server(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf, thread::JoinHandle<Vec<String>>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let handle = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut heard = Vec::new();
        let mut input = io::BufReader::new(stream.try_clone().unwrap()).lines();
        for line in lines {
            if stream.write_all(line.as_bytes()).is_err() {
                break;
            }
            match input.next() {
                Some(Ok(line)) => heard.push(line),
                _ => break,
            }
        }
        heard
    });
    (dir, path, handle)
}

const GREETING: &str = "{\"QMP\":{\"version\":{\"qemu\":{\"micro\":0,\"minor\":2,\"major\":7}}}}\n";

#[test]
fn a_socket_that_never_greets_is_an_error_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let start = Instant::now();
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    assert!(matches!(error, QmpError::Silent { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains(&format!("process {} hangs", std::process::id())),
        "{error}"
    );
    drop(listener);
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(
        error.is_exit() && error.to_string().contains("did the VM exit"),
        "{error}"
    );
}

#[test]
fn a_held_socket_names_who_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let _owner = UnixStream::connect(&path).unwrap();
    let _session = listener.accept().unwrap();
    match Qmp::connect(&path, SHORT).unwrap_err() {
        QmpError::Busy { clients, .. } => assert_eq!(clients[0].0, std::process::id()),
        other => panic!("{other}"),
    }
}

#[test]
fn a_process_that_is_being_started_does_not_hold_a_socket() {
    // What a process has of its parent's before it runs a program: this test again, with a connection that is closed here.
    const AS_CHILD: &str = "VMSIGHT_TEST_CHILD";
    if std::env::var_os(AS_CHILD).is_some() {
        io::stdin().read_exact(&mut [0]).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let old = UnixStream::connect(&path).unwrap();
    let (mut session, _) = listener.accept().unwrap();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("qmp::tests::a_process_that_is_being_started_does_not_hold_a_socket")
        .env(AS_CHILD, "")
        .stdin(OwnedFd::from(old))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let qmp = thread::scope(|scope| {
        let connecting = scope.spawn(|| Qmp::connect(&path, Duration::from_secs(60)));
        // Time to be refused, if it is.
        thread::sleep(SHORT);
        session.write_all(&[0]).unwrap();
        child.wait().unwrap();
        drop(session);
        listener.set_nonblocking(true).unwrap();
        let mut accepted = Vec::new();
        while !connecting.is_finished() {
            if let Ok((mut session, _)) = listener.accept() {
                session.write_all(GREETING.as_bytes()).unwrap();
                session.write_all(b"{\"return\":{}}\n").unwrap();
                accepted.push(session);
            }
            thread::sleep(Duration::from_millis(1));
        }
        connecting.join().unwrap()
    });
    assert_eq!(qmp.unwrap().version(), (7, 2));
}

#[test]
fn a_full_queue_does_not_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let _waits = UnixStream::connect(&path).unwrap();
    let start = Instant::now();
    let error = Qmp::connect(&path, SHORT).unwrap_err();
    assert!(start.elapsed() < LONG);
    assert!(matches!(error, QmpError::Silent { .. }), "{error}");
}

#[test]
fn answers_errors_and_events() {
    let (_dir, path, handle) = server(&[
        GREETING,
        "{\"return\":{}}\n",
        "{\"event\":\"STOP\"}\n{\"return\":{\"status\":\"paused\",\"running\":false}}\n",
        "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"no such\"}}\n",
        "{\"return\":\"a\\r\\nb\\r\\n\"}\n",
        "{\"return\":[{\"id\":\"pc.ram\"},{\"size\":1}]}\n",
    ]);
    let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
    assert_eq!(qmp.version(), (7, 2));
    assert_eq!(qmp.server_pid(), Some(std::process::id()));
    assert_eq!(
        qmp.status().unwrap(),
        Status {
            running: false,
            name: "paused".into()
        }
    );
    let error = qmp.execute("nonsense", Value::Null).unwrap_err();
    assert!(
        error.to_string().contains("nonsense") && error.to_string().contains("no such"),
        "{error}"
    );
    assert_eq!(qmp.hmp("info x").unwrap(), "a\nb\n");
    assert_eq!(qmp.memory_backends().unwrap(), ["pc.ram"]);
    drop(qmp);
    assert_eq!(handle.join().unwrap().len(), 5);
}

#[test]
fn commands_are_sent_at_once_and_answered_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut input = io::BufReader::new(stream.try_clone().unwrap()).lines();
        let mut say = |line: &str| stream.write_all(line.as_bytes()).unwrap();
        say(GREETING);
        input.next();
        say("{\"return\":{}}\n");
        for answers in [
            ["{\"return\":\"a\"}\n", "{\"return\":\"b\\r\\n\"}\n"],
            [
                "{\"error\":{\"class\":\"x\",\"desc\":\"no\"}}\n",
                "{\"return\":\"d\"}\n",
            ],
        ] {
            // Both are here before either is answered.
            let [first, second] = [input.next().unwrap().unwrap(), input.next().unwrap().unwrap()];
            assert!(first.contains("one") && second.contains("two"));
            answers.into_iter().for_each(&mut say);
        }
        input.next();
        say("{\"return\":\"e\"}\n");
    });
    let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
    let lines = ["one", "two"].map(str::to_owned);
    assert_eq!(qmp.hmp_all(&lines).unwrap(), ["a", "b\n"]);
    assert!(matches!(qmp.hmp_all(&lines), Err(QmpError::Command { .. })));
    // The answer behind the error is not taken for that to what follows.
    assert_eq!(qmp.hmp("three").unwrap(), "e");
    server.join().unwrap();
}

#[test]
fn an_end_midway_says_that_the_vm_exited() {
    let (_dir, path, handle) = server(&[GREETING, "{\"return\":{}}\n"]);
    let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
    let error = qmp.status().unwrap_err();
    assert!(error.is_exit(), "{error}");
    handle.join().unwrap();
}

#[test]
fn garbage_is_refused() {
    for line in ["SSH-2.0-x\n", "{}\n", "[1,2]\n"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let writer = thread::spawn(move || {
            let (mut s, _) = listener.accept().unwrap();
            s.write_all(line.as_bytes()).unwrap();
            s
        });
        let error = Qmp::connect(&path, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
        writer.join().unwrap();
    }
}

#[test]
fn long_paths_work() {
    let dir = tempfile::tempdir().unwrap();
    let mut long = dir.path().to_owned();
    for _ in 0..3 {
        long.push("d".repeat(60));
    }
    std::fs::create_dir_all(&long).unwrap();
    let short = dir.path().join("s");
    let listener = UnixListener::bind(&short).unwrap();
    std::fs::rename(&short, long.join("s")).unwrap();
    let stream = connect_unix(&long.join("s"), Instant::now() + SHORT).unwrap();
    listener.accept().unwrap();
    drop(stream);
}

#[test]
fn what_was_asked_ahead_is_answered_as_if_it_were_asked_then() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut input = io::BufReader::new(stream.try_clone().unwrap()).lines();
        let mut say = |line: &str| stream.write_all(line.as_bytes()).unwrap();
        say(GREETING);
        // All of it is here before anything is answered.
        let heard: Vec<String> = input.by_ref().take(5).map(Result::unwrap).collect();
        say("{\"return\":{}}\n{\"return\":[{\"id\":\"ram\"}]}\n{\"return\":\"1\"}\n{\"event\":\"STOP\"}\n");
        say("{\"error\":{\"class\":\"x\",\"desc\":\"no\"}}\n{\"return\":\"3\"}\n");
        input.next();
        say("{\"return\":\"4\"}\n");
        heard
    });
    let lines = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let mut qmp = Qmp::greeted(&path, Duration::from_secs(5)).unwrap();
    qmp.ask_ahead(&lines(&["one", "two", "three"])).unwrap();
    qmp.begin().unwrap();
    qmp.begin().unwrap();
    assert_eq!(qmp.memory_backends().unwrap(), ["ram"]);
    assert_eq!(qmp.hmp_all(&lines(&["one"])).unwrap(), ["1"]);
    // What nobody asks for any more, a failure too, is not taken for the answer to anything else.
    assert_eq!(qmp.hmp_all(&lines(&["three", "four"])).unwrap(), ["3", "4"]);
    let heard = server.join().unwrap();
    let names = ["qmp_capabilities", "query-memdev", "one", "two", "three"];
    assert!(
        heard.iter().zip(names).all(|(line, name)| line.contains(name)),
        "{heard:?}"
    );
}

#[test]
fn a_session_that_does_not_begin_is_an_error() {
    let (_dir, path, handle) = server(&[GREETING, "{\"error\":{\"class\":\"x\",\"desc\":\"not now\"}}\n"]);
    let mut qmp = Qmp::greeted(&path, Duration::from_secs(5)).unwrap();
    let error = qmp.memory_backends().unwrap_err();
    assert!(error.to_string().contains("not now"), "{error}");
    drop(qmp);
    handle.join().unwrap();
}
