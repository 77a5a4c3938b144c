//! What comes from a machine as it runs: events of the monitor, and at the end its exits.

use serde_json::{Map, Value};
use vmsight_sim_image::exits::Exits;

use crate::commands::stream::Happening;

/// One of them, as an object: the hypervisor sends each as a line of JSON.
pub(super) struct Event(Map<String, Value>);

/// The longest line that is waited for: more is no event.
const LONGEST: usize = 1 << 16;

impl Event {
    /// The exits by reason so far, where this says how things are.
    pub(super) fn exits_so_far(&self) -> Option<Vec<Exits>> {
        let exits = self.0.get("exits")?.as_object()?;
        let of = |(name, count): (&String, &Value)| Exits::named(name, count.as_u64()?);
        Some(exits.iter().filter_map(of).collect())
    }

    /// Whether it says how things are, in numbers that are shown as a table.
    pub(super) fn is_account(&self) -> bool {
        self.0.get("state").is_some_and(|state| state == "off")
    }

    /// What the account says besides exits, for people.
    pub(super) fn account(&self) -> String {
        let number = |key: &str| self.0.get(key).and_then(Value::as_u64).unwrap_or(0);
        let calls = self.0.get("calls").and_then(Value::as_object);
        let calls: u64 = calls.map_or(0, |c| c.values().filter_map(Value::as_u64).sum());
        format!(
            "the monitor was called {} times, for {calls} system calls among others; {} events were lost; hooks were written to {} times",
            number("handled"),
            number("lost"),
            number("tampered")
        )
    }

    /// How often the guest was left for one reason.
    pub(super) fn exits(exits: &Exits) -> Self {
        let mut object = Map::new();
        object.insert("event".into(), "exits".into());
        object.insert("exit".into(), exits.reason.into());
        object.insert("reason".into(), exits.name.into());
        object.insert("count".into(), exits.count.into());
        Self(object)
    }

    fn parse(line: &[u8]) -> Option<Self> {
        serde_json::from_slice(line).ok().map(Self)
    }
}

impl Happening for Event {
    const KEYS: &'static [&'static str] = &[
        "event",
        "state",
        "processor",
        "sequence",
        "pid",
        "tgid",
        "errno",
        "number",
        "x32",
        "arguments",
        "child",
        "child_tgid",
        "parent",
        "parent_tgid",
        "kernel",
        "name",
        "path",
        "file",
        "cut",
        "sha256",
        "bytes",
        "listed",
        "uid",
        "euid",
        "new_uid",
        "new_euid",
        "setuid",
        "hooks",
        "slide",
        "stub",
        "why",
        "rip",
        "active",
        "handled",
        "lost",
        "tampered",
        "exits",
        "calls",
        "exit",
        "reason",
        "count",
    ];

    fn line(&self) -> String {
        let mut text = String::from("monitor:");
        for (key, value) in &self.0 {
            let piece = match (key.as_str(), value) {
                ("event" | "state", Value::String(word)) => word.clone(),
                // What is as it is nearly always, or of use for programs only.
                ("sequence" | "processor", _) | ("cut", Value::Bool(false)) => continue,
                ("errno", value) if *value == 0 => continue,
                ("errno", value) => format!("REFUSED errno={value}"),
                ("arguments", Value::Array(all)) => {
                    let all: Vec<&str> = all.iter().filter_map(Value::as_str).collect();
                    format!("arguments={}", all.join(","))
                }
                (key, value) => format!("{key}={value}"),
            };
            text.push(' ');
            text.push_str(&piece);
        }
        text
    }

    fn object(&self) -> Map<String, Value> {
        self.0.clone()
    }
}

/// Pieces of a stream, put together to lines.
#[derive(Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    /// The lines that are whole now, without their ends.
    pub(super) fn add(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut whole = Vec::new();
        for &byte in bytes {
            match byte {
                b'\n' => whole.push(std::mem::take(&mut self.begun)),
                b'\r' => {}
                _ => self.begun.push(byte),
            }
            if self.begun.len() >= LONGEST {
                whole.push(std::mem::take(&mut self.begun));
            }
        }
        whole
    }

    /// What was begun and not ended.
    pub(super) fn rest(&mut self) -> Option<Vec<u8>> {
        let rest = std::mem::take(&mut self.begun);
        (!rest.is_empty()).then_some(rest)
    }
}

/// The events among lines, and those lines that are none.
pub(super) fn events(lines: Vec<Vec<u8>>) -> impl Iterator<Item = Result<Event, String>> {
    lines
        .into_iter()
        .filter(|line| !line.is_empty())
        .map(|line| Event::parse(&line).ok_or_else(|| String::from_utf8_lossy(&line).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_in_pieces_and_are_shown_whole() {
        let mut lines = Lines::default();
        assert!(
            lines
                .add(br#"{"event":"process","sequence":3,"errno":0,"child":58,"#)
                .is_empty()
        );
        let whole = lines.add(b"\"name\":\"sh\\u001b\"}\r\nno event\n{");
        let found: Vec<_> = events(whole).collect();
        assert_eq!(found.len(), 2);
        let event = found[0].as_ref().ok().unwrap();
        assert_eq!(event.line(), r#"monitor: process child=58 name="sh\u001b""#);
        assert_eq!(event.object()["child"], 58);
        let refused =
            Event::parse(br#"{"event":"call","errno":13,"number":83,"arguments":["0x1","0x2"]}"#).unwrap();
        assert_eq!(
            refused.line(),
            "monitor: call REFUSED errno=13 number=83 arguments=0x1,0x2"
        );
        assert!(
            event
                .object()
                .keys()
                .all(|key| Event::KEYS.contains(&key.as_str()))
        );
        assert_eq!(found[1].as_ref().err().unwrap(), "no event");
        assert_eq!(lines.rest().unwrap(), b"{");
    }

    #[test]
    fn an_account_has_exits() {
        let line = br#"{"state":"off","active":true,"handled":7,"lost":1,"tampered":0,"exits":{"CPUID":3,"EPT violation":2},"calls":{"0":2,"59":1}}"#;
        let event = Event::parse(line).unwrap();
        assert!(
            event.is_account()
                && event
                    .object()
                    .keys()
                    .all(|key| Event::KEYS.contains(&key.as_str()))
        );
        let exits = event.exits_so_far().unwrap();
        let found: Vec<_> = exits.iter().map(|e| (e.reason, e.name, e.count)).collect();
        assert_eq!(found, [(10, "CPUID", 3), (48, "EPT violation", 2)]);
        assert!(
            event
                .account()
                .starts_with("the monitor was called 7 times, for 3 system calls")
        );
        assert!(
            Event::parse(br#"{"event":"exec"}"#)
                .unwrap()
                .exits_so_far()
                .is_none()
        );
    }

    #[test]
    fn a_line_without_an_end_is_not_kept_for_ever() {
        let mut lines = Lines::default();
        assert_eq!(lines.add(&vec![b'x'; 3 * LONGEST + 1]).len(), 3);
    }
}
