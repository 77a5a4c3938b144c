//! gdb and lldb themselves on guests, by `vmsight debug`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmsight_lab::orders::Ended;
use vmsight_lab::{Account, Guest, Kernel, Order, Spec, Work};

use crate::support::{command, ends_with, utf8};

/// The longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);

fn signal(name: &str, child: &Child) {
    let status = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Waits for a child that must end by itself.
fn ended(child: &mut Child, what: &str) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(Instant::now() < deadline, "{what} does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// `vmsight debug`, listening. Killed when dropped.
struct Server {
    child: Child,
    listen: String,
    url: String,
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    fn start(guest: &Guest, args: &[&str]) -> Server {
        let target = format!("qmp:{}", utf8(&guest.qmp_path().unwrap()));
        let mut child = command(&[&["debug", &target, "-o", "json"], args].concat())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).expect("it says where it listens");
        Server {
            child,
            listen: said["listen"].as_str().unwrap().to_owned(),
            url: said["url"].as_str().unwrap().to_owned(),
            _stdout: stdout,
        }
    }

    fn ends(mut self) {
        assert_eq!(ended(&mut self.child, "vmsight debug"), Some(0));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A debugger that executes commands one after the other, and what it says. Killed when dropped.
struct Gdb {
    name: &'static str,
    child: Child,
    lines: Receiver<String>,
    said: String,
    errors: Option<JoinHandle<String>>,
}

impl Gdb {
    /// Connected to the server, with symbols from a file.
    fn start(server: &Server, symbols: Option<&Path>, commands: &[&str]) -> Gdb {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-nh", "--batch"]).args(symbols);
        let connect = format!("target remote {}", server.listen);
        for one in [connect.as_str(), "echo \\nconnected\\n"].iter().chain(commands) {
            gdb.args(["-ex", one]);
        }
        Gdb::run("gdb", gdb)
    }

    /// An lldb in its place.
    fn lldb(server: &Server, symbols: &Path, commands: &[&str]) -> Gdb {
        let mut lldb = Command::new("lldb-16");
        lldb.args(["--no-lldbinit", "--batch"]);
        let symbols = format!("target create --no-dependents {}", utf8(symbols));
        let connect = format!("process connect --plugin gdb-remote {}", server.url);
        for one in [symbols.as_str(), connect.as_str()].iter().chain(commands) {
            lldb.args(["-o", one]);
        }
        Gdb::run("lldb", lldb)
    }

    fn run(name: &'static str, mut debugger: Command) -> Gdb {
        let mut child = debugger
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{name} cannot be started (see script/packages.txt): {e}"));
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut stderr = child.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Gdb {
            name,
            child,
            lines,
            said: String::new(),
            errors: Some(errors),
        }
    }

    /// Waits until it says something.
    fn until(&mut self, what: &str) {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("{} does not say {what:?}: {}", self.name, self.said);
            };
            self.said.push_str(&line);
            self.said.push('\n');
            if line.contains(what) {
                return;
            }
        }
    }

    /// All that it said, when it has ended.
    fn finish(mut self) -> String {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.said.push_str(&line);
            self.said.push('\n');
        }
        ended(&mut self.child, self.name);
        let errors = self.errors.take().unwrap().join().unwrap();
        format!("{}{errors}", self.said)
    }
}

impl Drop for Gdb {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn order(guest: &Guest, order: impl Into<Order>) -> Account {
    guest.order(order).unwrap_or_else(|e| panic!("{e:#}"))
}

/// Guest and order server are well, and no breakpoint is left.
fn lives(guest: &Guest) {
    order(guest, Work::Ping);
    let account = order(guest, Work::GetPid { count: 100 });
    assert_eq!((account.made, account.failed), (100, 0));
}

/// The number behind `name` in what gdb said.
fn number(said: &str, name: &str) -> u64 {
    let line = said.lines().find_map(|line| line.trim().strip_prefix(name));
    let word = line
        .and_then(|rest| rest.split_whitespace().next())
        .unwrap_or_else(|| panic!("no {name:?} in: {said}"));
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
        None => word.parse().unwrap(),
    }
}

#[test]
fn gdb_debugs_a_guest() {
    let spec = Spec {
        vcpus: 2,
        ..Spec::new(Kernel::V6_1Cloud).idle().orders()
    };
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let folder = tempfile::tempdir().unwrap();
    let symbols = folder.path().join("kernel.elf");
    let behind_syscall = kernel(&guest, &symbols);
    of_lldb(&guest, &symbols);
    process(&guest);
    step_into_a_system_call(&guest, behind_syscall);
    interrupt_and_port(&guest);
    debugger_dies(&guest, &symbols);
    server_dies(&guest, &symbols);
    refusals(&guest);
}

/// Breakpoint, step, registers and memory read and written, watchpoint, detach. Gives the user's address to
/// which getpid(2) returns.
fn kernel(guest: &Guest, symbols: &Path) -> u64 {
    let server = Server::start(guest, &["--symbols-out", utf8(symbols)]);
    let mut gdb = Gdb::start(
        &server,
        Some(symbols),
        &[
            "info threads",
            "break __x64_sys_getpid",
            "continue",
            "info registers rip",
            "x/2i $pc",
            "stepi",
            "p $pc",
            "info symbol $pc",
            "x/gx &jiffies_64",
            // Of the caller's struct pt_regs.
            "printf \"user=%#lx\\n\", *(long *)($rdi + 128)",
            "printf \"cr0=%#lx\\n\", $cr0",
            // The function returns something else.
            "set $rip = *(long *)$rsp",
            "set $rsp = $rsp + 8",
            "set $rax = 4711",
            "set var {char[6]}&modprobe_path = \"/evil\"",
            "info breakpoints",
            "delete",
            "watch *(unsigned long *)&jiffies_64",
            "continue",
            "delete",
            "detach",
        ],
    );
    gdb.until("connected");
    let sent = guest
        .orders()
        .unwrap()
        .send(Work::GetPid { count: 3 }.into())
        .unwrap();
    let said = gdb.finish();
    for wanted in [
        "(vCPU 0: ",
        "(vCPU 1: ",
        "hit Breakpoint 1",
        "in __x64_sys_getpid ()",
        "<__x64_sys_getpid>",
        "breakpoint already hit 1 time\n",
        "hit Hardware watchpoint 2",
        "detached",
    ] {
        assert!(said.contains(wanted), "no {wanted:?} in: {said}");
    }
    let at = number(&said, "rip ");
    assert!(
        said.contains(&format!("=> {at:#x} <__x64_sys_getpid>:")),
        "{said}"
    );
    assert!(
        said.contains("__x64_sys_getpid + "),
        "the step is in the function still: {said}"
    );
    assert_ne!(number(&said, "cr0=") & 0x8000_0001, 0, "paging is on");
    let (old, new) = (number(&said, "Old value = "), number(&said, "New value = "));
    assert!(0 < old && old < new, "{said}");
    let account = sent.wait(PATIENCE).unwrap();
    assert_eq!(
        (account.made, account.failed),
        (3, 1),
        "one of them was told 4711"
    );
    let account = order(
        guest,
        Work::ReadFile {
            path: "/proc/sys/kernel/modprobe".into(),
            limit: 100,
        },
    );
    assert_eq!(account.bytes.lossy(), "/evil\n");
    server.ends();
    lives(guest);
    number(&said, "user=")
}

/// What lldb asks in other words than gdb: registers and threads, a breakpoint by name, who called, a step, detach.
fn of_lldb(guest: &Guest, symbols: &Path) {
    let server = Server::start(guest, &[]);
    let mut lldb = Gdb::lldb(
        &server,
        symbols,
        &[
            "thread list",
            "breakpoint set --name __x64_sys_getpid",
            "process continue",
            "register read rip cr3",
            "bt 2",
            "thread step-inst",
            "breakpoint delete --force",
            "process detach",
        ],
    );
    lldb.until("Process 1 stopped");
    let orders = guest.orders().unwrap();
    let sent = orders.send(Work::GetPid { count: 3 }.into()).unwrap();
    let said = lldb.finish();
    for wanted in [
        "thread #2",
        "stop reason = breakpoint 1.1",
        "cr3 = 0x",
        "do_syscall_64 + ",
        "stop reason = instruction step into",
        "Process 1 detached",
    ] {
        assert!(said.contains(wanted), "no {wanted:?} in: {said}");
    }
    let at = format!("->  {:#x} <+0>:", number(&said, "rip = "));
    assert!(
        said.contains(&at),
        "the function's first instruction was read at {at}: {said}"
    );
    let account = sent.wait(PATIENCE).unwrap();
    assert_eq!((account.made, account.failed), (3, 0));
    server.ends();
    lives(guest);
}

/// Two processes with the same code at the same address: only one of them is debugged.
fn process(guest: &Guest) {
    let call = || guest.prepare(Work::Call { count: 3 }).unwrap();
    let (ours, other) = (call(), call());
    assert_eq!(ours.address(), other.address());
    let server = Server::start(guest, &["--pid", &ours.pid().to_string()]);
    let mut gdb = Gdb::start(
        &server,
        None,
        &[
            "info threads",
            "info registers rip",
            &format!("break *{:#x}", ours.address()),
            "continue",
            "p $rdi",
            "continue",
            "set $rdi = 100",
            "continue",
            "p $rdi",
            "info breakpoints",
            "detach",
        ],
    );
    gdb.until("connected");
    let sent = guest.orders().unwrap().send_go([ours, other]).unwrap();
    let said = gdb.finish();
    let saved = number(&said, "rip ");
    assert!(saved >> 47 == 0 && saved != 0, "where it will return to: {said}");
    for wanted in [
        "not in user mode now",
        "$1 = 0\n",
        "$2 = 2\n",
        "breakpoint already hit 3 times\n",
    ] {
        assert!(said.contains(wanted), "no {wanted:?} in: {said}");
    }
    let accounts = sent.wait_all(PATIENCE).unwrap();
    let sums: Vec<_> = accounts.iter().map(|a| (a.made, a.checksum)).collect();
    // 1 + 2 + 3, and 1 + 101 + 3.
    assert_eq!(sums, [(3, Some(105)), (3, Some(6))]);
    server.ends();
}

/// To a process a system call is one step.
fn step_into_a_system_call(guest: &Guest, behind: u64) {
    let ours = guest.prepare(Work::GetPid { count: 2 }).unwrap();
    let pid = ours.pid();
    let server = Server::start(guest, &["--pid", &pid.to_string()]);
    let mut gdb = Gdb::start(
        &server,
        None,
        &[
            &format!("tbreak *{:#x}", behind - 2),
            "continue",
            "stepi",
            "printf \"then=%#lx\\n\", $pc",
            "printf \"rax=%#lx\\n\", $rax",
            "kill",
        ],
    );
    gdb.until("connected");
    let sent = ours.send_go().unwrap();
    let said = gdb.finish();
    assert_eq!(number(&said, "then="), behind, "{said}");
    assert_eq!(number(&said, "rax="), u64::from(pid), "{said}");
    // What gdb takes for killing lets it go.
    let accounts = sent.wait_all(PATIENCE).unwrap();
    let account = accounts.first().unwrap();
    assert_eq!((account.made, account.failed), (2, 0));
    assert_eq!(account.ended, Some(Ended::Exited(0)));
    server.ends();
}

/// Who is no debugger is not served, and not taken for the one that is waited for.
fn stranger(server: &Server) {
    let mut browser = TcpStream::connect(&server.listen).unwrap();
    browser.write_all(b"POST / HTTP/1.1\r\n\r\n$k#6b").unwrap();
    let mut answer = Vec::new();
    let _ = browser.read_to_end(&mut answer);
    assert_eq!(answer, b"");
}

fn interrupt_and_port(guest: &Guest) {
    let server = Server::start(guest, &["--listen", "127.0.0.1:0", "--multi"]);
    assert!(server.listen.starts_with("127.0.0.1:"));
    stranger(&server);
    for _ in 0..2 {
        // An idle vCPU sleeps, as the second one nearly always does here: its step is over when it has woken.
        let commands = [
            "continue",
            "info registers rip",
            "thread 2",
            "stepi",
            "printf \"second=%#lx\\n\", $pc",
            "echo interrupted\\n",
            "detach",
        ];
        let mut gdb = Gdb::start(&server, None, &commands);
        gdb.until("connected");
        // It can answer when it runs again.
        order(guest, Work::Ping);
        signal("-INT", &gdb.child);
        let said = gdb.finish();
        assert!(said.contains("SIGINT") && said.contains("interrupted"), "{said}");
        assert_ne!(number(&said, "rip "), 0);
        assert_ne!(number(&said, "second="), 0);
    }
    lives(guest);
    signal("-TERM", &server.child);
    server.ends();
}

/// Stopped at a breakpoint, on which the debugger stays until it is killed.
fn stuck(guest: &Guest, symbols: &Path, server: &Server) -> (Gdb, vmsight_lab::orders::Sent) {
    let commands = [
        "break __x64_sys_getpid",
        "continue",
        "echo stopped\\n",
        "python import time; time.sleep(600)",
    ];
    let mut gdb = Gdb::start(server, Some(symbols), &commands);
    gdb.until("connected");
    let sent = guest
        .orders()
        .unwrap()
        .send(Work::GetPid { count: 3 }.into())
        .unwrap();
    gdb.until("stopped");
    (gdb, sent)
}

fn debugger_dies(guest: &Guest, symbols: &Path) {
    let server = Server::start(guest, &["--listen", "127.0.0.1:0"]);
    stranger(&server);
    let (gdb, sent) = stuck(guest, symbols, &server);
    drop(gdb);
    let account = sent.wait(PATIENCE).unwrap();
    assert_eq!((account.made, account.failed), (3, 0));
    server.ends();
    lives(guest);
}

fn server_dies(guest: &Guest, symbols: &Path) {
    let mut server = Server::start(guest, &[]);
    let (_gdb, sent) = stuck(guest, symbols, &server);
    signal("-KILL", &server.child);
    ended(&mut server.child, "vmsight debug");
    let account = sent.wait(PATIENCE).unwrap();
    assert_eq!((account.made, account.failed), (3, 0));
    lives(guest);
}

fn refusals(guest: &Guest) {
    let target = format!("qmp:{}", utf8(&guest.qmp_path().unwrap()));
    let err = ends_with(2, &["debug", &target, "--listen", "0.0.0.0:1234"]);
    assert!(err.contains("loopback"), "{err}");
    // kthreadd has no memory of its own.
    let err = ends_with(1, &["debug", &target, "--pid", "2"]);
    assert!(err.contains("no user memory"), "{err}");
    let err = ends_with(1, &["debug", &target, "--pid", "4000000"]);
    assert!(err.contains("no process 4000000"), "{err}");
    lives(guest);
}
