//! Guests that several tests share, and the program run on them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};
use vmsight_lab::{Format, Guest, Kernel, Memory, Spec};

/// The agent, which cargo built beside this test: beside the program there need be none.
fn agent() -> PathBuf {
    std::env::current_exe()
        .expect("this test has a path")
        .with_file_name("libvmsight_agent.so")
}

/// The program, with a profile cache of the tests' own.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsight"));
    command
        .args(args)
        .env_remove("VMSIGHT_LOG")
        .env_remove("VMSIGHT_PROFILES")
        .env("VMSIGHT_AGENT_LIBRARY", agent())
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

/// Runs it to its end.
pub(crate) fn vmsight(args: &[&str]) -> Output {
    command(args).output().expect("vmsight can be started")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Nothing that a terminal acts on, and no text direction that hides what follows.
pub(crate) fn harmless(what: &str, bytes: &[u8]) {
    let shown = text(bytes);
    let acts = |c: char| {
        (c.is_control() && c != '\n')
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if let Some(line) = shown.lines().find(|line| line.chars().any(acts)) {
        panic!("{what} prints what a terminal acts on: {line:?}");
    }
}

/// What it says on standard error, when it must end with this exit code and must not panic.
pub(crate) fn ends_with(code: i32, args: &[&str]) -> String {
    let out = vmsight(args);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {err}");
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    err
}

/// The rows of `vmsight ARGS -o json`, which must succeed without a word on standard error.
pub(crate) fn rows(args: &[&str]) -> Vec<Map<String, Value>> {
    let out = vmsight(&[args, &["-o", "json"]].concat());
    let err = text(&out.stderr);
    assert!(
        out.status.success() && err.is_empty(),
        "{args:?}: {:?} {err}",
        out.status
    );
    objects(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

/// One JSON array of objects.
pub(crate) fn objects(json: &[u8]) -> Result<Vec<Map<String, Value>>, String> {
    serde_json::from_slice(json).map_err(|e| format!("no array of objects: {e}: {}", text(json)))
}

/// A number however JSON has it: itself, or "0x…".
pub(crate) fn number(value: &Value) -> u64 {
    match value {
        Value::String(text) => text
            .strip_prefix("0x")
            .and_then(|hex| u64::from_str_radix(hex, 16).ok())
            .unwrap_or_else(|| panic!("{text:?} is no address")),
        _ => value.as_u64().unwrap_or_else(|| panic!("{value} is no number")),
    }
}

/// A guest that stays for all tests of this process, and ends with it. Whoever changes it puts that back.
fn shared(slot: &'static Mutex<Option<Arc<Guest>>>, spec: &Spec) -> Arc<Guest> {
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    slot.get_or_insert_with(|| Arc::new(Guest::boot(spec).unwrap_or_else(|e| panic!("{e:?}"))))
        .clone()
}

/// A Debian 12 guest with a QMP socket, and the turn to use it: QEMU serves one client at a time.
pub(crate) struct Prepared {
    pub(crate) guest: Arc<Guest>,
    pub(crate) target: String,
    _turn: MutexGuard<'static, ()>,
}

pub(crate) fn prepared() -> Prepared {
    static GUEST: Mutex<Option<Arc<Guest>>> = Mutex::new(None);
    static TURN: Mutex<()> = Mutex::new(());
    let guest = shared(&GUEST, &Spec::new(Kernel::V6_1Cloud));
    let target = format!("qmp:{}", guest.qmp_path().unwrap().display());
    Prepared {
        guest,
        target,
        _turn: TURN.lock().unwrap_or_else(PoisonError::into_inner),
    }
}

impl Prepared {
    /// What QEMU says of it: `running` or `paused`.
    pub(crate) fn status(&self) -> String {
        let mut qmp = self.guest.qmp().unwrap();
        let status = qmp.execute("query-status", serde_json::json!({})).unwrap();
        status["status"].as_str().unwrap().to_owned()
    }
}

/// A guest with Debian's newest kernel that nobody prepared: private memory, no monitor.
pub(crate) struct Unprepared {
    pub(crate) guest: Arc<Guest>,
    pub(crate) target: String,
}

pub(crate) fn unprepared() -> Unprepared {
    static GUEST: Mutex<Option<Arc<Guest>>> = Mutex::new(None);
    let spec = Spec {
        memory: Memory::Private,
        qmp: false,
        vcpus: 2,
        ..Spec::new(Kernel::Sid)
    };
    let guest = shared(&GUEST, &spec);
    Unprepared {
        target: format!("pid:{}", guest.pid()),
        guest,
    }
}

/// A dump, in a folder that goes with it.
pub(crate) struct Dump {
    pub(crate) path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Dump {
    pub(crate) fn of(guest: &Guest, format: Format) -> Dump {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        guest.dump(format, &path).unwrap_or_else(|e| panic!("{e:?}"));
        Dump {
            path,
            _folder: folder,
        }
    }

    pub(crate) fn target(&self) -> &str {
        utf8(&self.path)
    }
}

pub(crate) fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Pid and name of the processes that stay as they are, as the guest says.
pub(crate) fn processes(guest: &Guest) -> BTreeMap<u64, String> {
    let lasting = guest.truth().processes.iter().filter(|p| !p.is_transient());
    lasting.map(|p| (u64::from(p.pid), p.task_comm())).collect()
}

/// The same as `vmsight ps` says.
pub(crate) fn listed(rows: &[Map<String, Value>]) -> BTreeMap<u64, String> {
    let name = |row: &Map<String, Value>| row["name"].as_str().unwrap().to_owned();
    let pairs = rows.iter().map(|row| (number(&row["pid"]), name(row)));
    pairs.filter(|(_, name)| !name.starts_with("kworker/")).collect()
}
