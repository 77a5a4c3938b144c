//! What a stub is asked for: commands of the monitor behind it, what registers it has, its threads.

use std::time::Instant;

use super::error::GdbError;
use super::features;
use super::link::Link;
use super::packet::{from_hex, to_hex};

/// Most text taken from one command of the monitor.
const MAX_TEXT: usize = 32 << 20;
/// Most vCPUs taken from a stub.
const MAX_VCPUS: usize = 4096;

impl Link {
    /// Runs one line of QEMU's human monitor and gives its text.
    pub(super) fn hmp(&mut self, line: &str) -> Result<String, GdbError> {
        self.send(format!("qRcmd,{}", to_hex(line.as_bytes())).as_bytes(), line)?;
        let mut text = Vec::new();
        let deadline = Instant::now() + self.timeout();
        loop {
            let answer = self.receive(deadline, line)?;
            match answer.split_first() {
                Some((b'O', hex)) if answer != b"OK" => {
                    let part = from_hex(hex)
                        .ok_or_else(|| self.protocol("console output that is not hexadecimal"))?;
                    text.extend_from_slice(&part);
                    if text.len() > MAX_TEXT {
                        return Err(self.protocol("console output without end"));
                    }
                }
                Some(_) if answer == b"OK" => return Ok(String::from_utf8_lossy(&text).replace("\r\n", "\n")),
                _ => {
                    return Err(self.unsupported("pass commands to QEMU's monitor"));
                }
            }
        }
    }

    /// The core registers: those of the first file that the description includes, which make up the `g` packet.
    pub(super) fn description(&mut self) -> Result<Vec<features::Register>, GdbError> {
        let mut all = Vec::new();
        let xml = self.file("target.xml")?;
        all.extend(features::registers(&xml));
        for name in features::includes(&xml) {
            let xml = self.file(&name)?;
            all.extend(features::registers(&xml));
        }
        Ok(all)
    }

    fn file(&mut self, name: &str) -> Result<String, GdbError> {
        let mut text = Vec::new();
        loop {
            let answer = self.ask(&format!("qXfer:features:read:{name}:{:x},7f0", text.len()))?;
            match answer.split_first() {
                Some((kind @ (b'm' | b'l'), part)) => {
                    text.extend_from_slice(part);
                    if *kind == b'l' {
                        return Ok(String::from_utf8_lossy(&text).into_owned());
                    }
                    if part.is_empty() || text.len() > 1 << 20 {
                        return Err(self.protocol("a target description without end"));
                    }
                }
                _ => {
                    return Err(self.unsupported("describe its registers"));
                }
            }
        }
    }

    /// The threads' ids, one for each vCPU.
    pub(super) fn threads(&mut self) -> Result<Vec<String>, GdbError> {
        let mut all = Vec::new();
        let mut answer = self.ask("qfThreadInfo")?;
        while let Some((b'm', list)) = answer.split_first() {
            let list = String::from_utf8_lossy(list).into_owned();
            let ids = list
                .split(',')
                .filter(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.'));
            all.extend(ids.map(str::to_owned));
            if all.len() > MAX_VCPUS {
                return Err(self.protocol("more vCPUs than machines have"));
            }
            answer = self.ask("qsThreadInfo")?;
        }
        Ok(all)
    }
}
