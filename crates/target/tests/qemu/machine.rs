//! Starting and stopping a QEMU.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A QEMU of our own; killed and its folder removed when dropped.
pub(crate) struct Machine {
    child: Child,
    dir: tempfile::TempDir,
}

impl Machine {
    /// Starts one with a QMP socket, a serial port nowhere, no display and no network, halted (`-S`).
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut all = vec!["-S"];
        all.extend_from_slice(args);
        Self::start_running(&all)
    }

    /// The same without `-S`.
    pub(crate) fn start_running(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a folder for the machine's sockets");
        let qmp = format!("unix:{},server=on,wait=off", dir.path().join("qmp").display());
        let args: Vec<String> = args
            .iter()
            .map(|a| a.replace("DIR", dir.path().to_str().expect("tempdir is UTF-8")))
            .collect();
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-qmp", &qmp])
            .args(args)
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("stderr")).expect("a file for its messages"))
            .spawn()
            .unwrap_or_else(|e| {
                panic!("qemu-system-x86_64: {e}; install the Debian package qemu-system-x86")
            });
        let mut machine = Self { child, dir };
        let until = Instant::now() + Duration::from_secs(30);
        // The file is there a moment before it is listened on.
        while UnixStream::connect(machine.qmp()).is_err() {
            if let Some(status) = machine.child.try_wait().expect("wait for our child") {
                panic!("QEMU ended at once, {status}: {}", machine.messages());
            }
            assert!(
                Instant::now() < until,
                "QEMU opened no QMP socket in 30 s: {}",
                machine.messages()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        // The socket is there before the machine is made; an answer means that all is.
        machine.command("{\"execute\":\"query-status\"}");
        machine
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// One QMP command through a connection of its own; the answer's line. Panics after 30 s.
    pub(crate) fn command(&self, json: &str) -> String {
        let mut stream = UnixStream::connect(self.qmp()).expect("the QMP socket");
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a timeout");
        let mut lines = BufReader::new(stream.try_clone().expect("a second handle")).lines();
        let mut answer = || loop {
            let line = lines.next().expect("QMP ended").expect("QMP answers in time");
            if !line.contains("\"event\"") {
                return line;
            }
        };
        answer();
        for line in ["{\"execute\":\"qmp_capabilities\"}", json] {
            stream.write_all(line.as_bytes()).expect("QMP takes commands");
            let answer = answer();
            assert!(answer.contains("\"return\""), "{line}: {answer}");
            if line == json {
                return answer;
            }
        }
        unreachable!("the loop returns at its last line")
    }

    /// One line of the human monitor through QMP, and its text.
    pub(crate) fn hmp(&self, line: &str) -> String {
        self.command(&format!(
            r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"{line}"}}}}"#
        ))
    }

    /// One line of the human monitor through its own socket `hmp`, and its text.
    pub(crate) fn human(&self, line: &str) -> String {
        let mut stream =
            UnixStream::connect(self.dir.path().join("hmp")).expect("the human monitor's socket");
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a timeout");
        let mut text = String::new();
        let mut prompts = 0;
        let mut chunk = [0; 4096];
        loop {
            let n = stream
                .read(&mut chunk)
                .expect("the human monitor answers in time");
            assert!(n > 0, "the human monitor ended: {text}");
            text.push_str(&String::from_utf8_lossy(&chunk[..n]));
            if text.ends_with("(qemu) ") {
                prompts += 1;
                if prompts == 2 {
                    return text;
                }
                text.clear();
                stream
                    .write_all(format!("{line}\n").as_bytes())
                    .expect("the human monitor takes commands");
            }
        }
    }

    /// Runs one test of this program again as user nobody, with our pid in the variable; its output.
    pub(crate) fn as_nobody(&self, test: &str, variable: &str) -> String {
        self.as_nobody_with(test, &[(variable, &self.pid().to_string())])
    }

    /// The same with other variables.
    pub(crate) fn as_nobody_with(&self, test: &str, variables: &[(&str, &str)]) -> String {
        // The test's folder may be closed to nobody; a copy in a folder of its own is not.
        let exe = self.dir().join("tests");
        copy_program(&std::env::current_exe().expect("our own program"), &exe);
        std::fs::set_permissions(self.dir(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("our folder");
        let output = Command::new("setpriv")
            .args([
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "--inh-caps=-all",
            ])
            .arg(&exe)
            .args(["--exact", test, "--nocapture"])
            .envs(variables.iter().copied())
            .output()
            .expect("setpriv of util-linux");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// Kills it, as a crash or an administrator would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill our own QEMU");
        self.child.wait().expect("wait for our own QEMU");
    }

    fn messages(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }
}

/// Copies a program so that it can be run at once. Not by ourselves: another test may fork while we have the copy
/// open for writing, and a program that somebody has open for writing does not run.
pub(crate) fn copy_program(from: &Path, to: &Path) {
    let done = Command::new("cp")
        .arg(from)
        .arg(to)
        .status()
        .expect("cp of coreutils");
    assert!(done.success());
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
