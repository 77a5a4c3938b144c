//! One event as it is shown.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use vmsight_events::linux::{LifecycleRecord, SyscallRecord};
use vmsight_linux::Current;
use vmsight_linux::syscall::Abi;

use super::plain::PlainRecord;
use crate::commands::stream::Happening;

/// An event.
pub(super) enum Row {
    Syscall(SyscallRecord),
    Lifecycle(LifecycleRecord),
    Plain(PlainRecord),
}

impl Row {
    /// What kind of event it is: `syscall`, `exec`, ….
    pub(super) fn event(&self) -> &'static str {
        match self {
            Self::Syscall(_) => "syscall",
            Self::Lifecycle(record) => record.what.name(),
            Self::Plain(record) => record.event,
        }
    }

    /// What it is counted as: the system call, the function, the program.
    pub(super) fn subject(&self) -> String {
        match self {
            Self::Syscall(record) => record.name.clone(),
            Self::Lifecycle(record) => record.subject.clone().unwrap_or_default(),
            Self::Plain(record) => record.subject.clone(),
        }
    }

    /// Who did it, where it is known.
    fn current(&self) -> Option<&Current> {
        match self {
            Self::Syscall(record) => Some(&record.current),
            Self::Lifecycle(record) => Some(&record.current),
            Self::Plain(record) => record.current.as_ref(),
        }
    }

    fn time(&self) -> SystemTime {
        match self {
            Self::Syscall(record) => record.time,
            Self::Lifecycle(record) => record.time,
            Self::Plain(record) => record.time,
        }
    }

    fn vcpu(&self) -> u32 {
        match self {
            Self::Syscall(record) => record.vcpu,
            Self::Lifecycle(record) => record.vcpu,
            Self::Plain(record) => record.vcpu,
        }
    }

    /// What happened, in a line for people. Escape it before a terminal, but for what the records escape themselves.
    fn text(&self) -> String {
        match self {
            Self::Syscall(record) => record.to_string(),
            Self::Lifecycle(record) => record.to_string(),
            Self::Plain(record) => record.text.clone(),
        }
    }
}

impl Happening for Row {
    const KEYS: &'static [&'static str] = &[
        "time",
        "event",
        "vcpu",
        "pid",
        "tid",
        "name",
        "uid",
        "subject",
        "args",
        "result",
        "error",
        "duration_us",
        "text",
    ];

    fn line(&self) -> String {
        line(self.time(), self.vcpu(), self.current(), &self.text())
    }

    fn object(&self) -> Map<String, Value> {
        let current = self.current();
        let mut map = Map::new();
        map.insert("time".into(), timestamp(self.time()).into());
        map.insert("event".into(), self.event().into());
        map.insert("vcpu".into(), self.vcpu().into());
        map.insert("pid".into(), json!(current.map(|c| c.pid)));
        map.insert("tid".into(), json!(current.map(|c| c.tid)));
        map.insert("name".into(), json!(current.map(|c| &c.name)));
        map.insert("uid".into(), json!(current.and_then(|c| c.uid)));
        map.insert("subject".into(), self.subject().into());
        let (mut result, mut error, mut duration) = (Value::Null, Value::Null, Value::Null);
        let args = match self {
            Self::Syscall(record) => {
                result = json!(record.result);
                error = json!(record.error());
                duration = json!(record.duration.map(|d| d.as_micros() as u64));
                let pairs = record.arguments.iter().map(|a| (a.name.clone(), json!(a.value)));
                let mut args: Map<String, Value> = pairs.collect();
                if record.abi == Abi::Ia32 {
                    args.insert("abi".into(), "ia32".into());
                }
                Value::Object(args)
            }
            Self::Lifecycle(record) => {
                let mut args = Map::new();
                if let Some(arguments) = &record.arguments {
                    args.insert("argv".into(), json!(arguments));
                }
                if let Some(child) = &record.child {
                    args.insert("pid".into(), child.pid.into());
                    args.insert("tid".into(), child.tid.into());
                    args.insert("name".into(), child.name.clone().into());
                }
                if let Some(code) = record.code {
                    args.insert("status".into(), (code >> 8 & 0xff).into());
                    args.insert("signal".into(), (code & 0x7f).into());
                }
                Value::Object(args)
            }
            Self::Plain(record) => Value::Object(record.values.clone()),
        };
        map.insert("args".into(), args);
        map.insert("result".into(), result);
        map.insert("error".into(), error);
        map.insert("duration_us".into(), duration);
        map.insert("text".into(), self.text().into());
        map
    }
}

/// When, where, who, what.
pub(crate) fn line(time: SystemTime, vcpu: u32, current: Option<&Current>, text: &str) -> String {
    let who = match current {
        Some(c) if c.pid == c.tid => format!("{:<15} {:>6}", c.name, c.pid),
        Some(c) => format!("{:<15} {:>6}/{}", c.name, c.pid, c.tid),
        None => format!("{:<15} {:>6}", "-", "-"),
    };
    let uid = current
        .and_then(|c| c.uid)
        .map_or("-".to_owned(), |u| u.to_string());
    let time = timestamp(time);
    // The clock of the day is enough for eyes; the day stands in the JSON form.
    let clock = time.get(11..26).unwrap_or(&time);
    format!("{clock} {vcpu:>2} {who} {uid:>5}  {text}")
}

/// `2026-11-28T09:36:48.196123Z`
pub(crate) fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let nanoseconds = i64::try_from(since.as_nanos()).unwrap_or(i64::MAX);
    let text = vmsight_linux::clock::rfc3339(nanoseconds).unwrap_or_default();
    match text.strip_suffix('Z') {
        Some(millis) => format!("{millis}{:03}Z", since.subsec_micros() % 1000),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_have_microseconds() {
        let time = UNIX_EPOCH + Duration::from_micros(1_795_858_608_196_123);
        assert_eq!(timestamp(time), "2026-11-28T09:36:48.196123Z");
    }
}
