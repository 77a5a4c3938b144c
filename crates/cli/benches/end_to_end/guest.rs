//! A running guest of the lab, for as long as it is measured.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// A guest that `vmsight-lab boot` keeps; it ends with this.
pub(crate) struct Guest {
    keeper: Child,
    facts: Value,
}

impl Guest {
    /// Boots a guest with 1 GiB and what `arguments` say besides.
    pub(crate) fn boot(lab: &Path, arguments: &[&str]) -> Guest {
        let mut keeper = Command::new(lab)
            .args(["boot", "--kernel", "6.1", "--memory", "1024", "--json"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {}: {e}", lab.display()));
        let mut line = String::new();
        let output = keeper.stdout.take().expect("its output is a pipe");
        BufReader::new(output)
            .read_line(&mut line)
            .expect("its output can be read");
        let facts = serde_json::from_str(&line).unwrap_or_else(|_| panic!("the guest did not come up"));
        Guest { keeper, facts }
    }

    /// What to give to vmsight so that it attaches by the process.
    pub(crate) fn by_pid(&self) -> String {
        format!("pid:{}", self.facts["pid"])
    }

    /// What to give to vmsight so that it attaches by the QMP socket.
    pub(crate) fn by_qmp(&self) -> String {
        format!("qmp:{}", self.qmp().display())
    }

    /// Its QMP socket.
    pub(crate) fn qmp(&self) -> PathBuf {
        let path = self.facts["qmp"].as_str();
        PathBuf::from(path.expect("a guest with a QMP socket"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The keeper ends the guest when its input closes.
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}
