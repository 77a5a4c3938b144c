//! What goes over the second serial port: a JSON object a line.
//!
//! What the guest chose, the text of events, is escaped: each byte that is no printable ASCII becomes the character of its
//! number, so that nothing of it can end a line or a string.

use core::fmt::{self, Display, Formatter};

use vmsight_sim_abi::{Event, Kind};

/// Text as a string of JSON, quotes included.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a>(pub &'a [u8]);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for &byte in self.0 {
            match byte {
                b'"' => f.write_str("\\\"")?,
                b'\\' => f.write_str("\\\\")?,
                b' '..=b'~' => write!(f, "{}", char::from(byte))?,
                _ => write!(f, "\\u{byte:04x}")?,
            }
        }
        f.write_str("\"")
    }
}

/// An event as an object, without the line's end, and the number of the processor that it happened on, each of which
/// numbers its own events.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a>(pub &'a Event, pub usize);

impl Display for Line<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let event = self.0;
        let kind = Kind::from_number(event.kind);
        let (name, words, text): (_, &[&str], _) = match kind {
            Some(Kind::Call) => ("call", &["number"], None),
            Some(Kind::OtherCall) => ("other-call", &["number", "x32"], None),
            Some(Kind::Process) => (
                "process",
                &["child", "child_tgid", "parent", "parent_tgid", "kernel"],
                Some("name"),
            ),
            Some(Kind::Exec) => ("exec", &["setuid"], Some("path")),
            Some(Kind::Module) => ("module", &[], Some("file")),
            Some(Kind::Credentials) => (
                "credentials",
                &["uid", "euid", "new_uid", "new_euid", "setuid"],
                Some("name"),
            ),
            None => ("unknown", &[], None),
        };
        write!(
            f,
            "{{\"event\":\"{name}\",\"processor\":{},\"sequence\":{},\"pid\":{},\"tgid\":{},\"errno\":{}",
            self.1, event.sequence, event.pid, event.tgid, event.errno
        )?;
        for (key, word) in words.iter().zip(event.words) {
            write!(f, ",\"{key}\":{word}")?;
        }
        match kind {
            Some(Kind::Call) => {
                f.write_str(",\"arguments\":[")?;
                for (n, argument) in event.words.iter().skip(1).enumerate() {
                    // Words of 64 bits do not fit into the numbers that JSON's readers have.
                    write!(f, "{}\"{argument:#x}\"", if n == 0 { "" } else { "," })?;
                }
                f.write_str("]")?;
            }
            Some(Kind::Module) => {
                let [hash @ .., length, listed, _] = event.words;
                f.write_str(",\"sha256\":\"")?;
                for byte in hash.iter().flat_map(|word| word.to_le_bytes()) {
                    write!(f, "{byte:02x}")?;
                }
                write!(f, "\",\"bytes\":{length},\"listed\":{listed}")?;
            }
            _ => {}
        }
        if let Some(key) = text {
            write!(f, ",\"{key}\":{},\"cut\":{}", Text(event.text()), event.cut != 0)?;
        }
        f.write_str("}")
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    fn event(kind: u32, words: [u64; 7], text: &[u8]) -> Event {
        let mut event = Event {
            sequence: 9,
            kind,
            pid: 57,
            tgid: 56,
            words,
            length: text.len() as u32,
            ..Event::EMPTY
        };
        event.text[..text.len()].copy_from_slice(text);
        event
    }

    #[test]
    fn events_are_objects() {
        let process = event(Kind::Process as u32, [58, 58, 57, 56, 0, 0, 0], b"sh");
        assert_eq!(
            Line(&process, 1).to_string(),
            r#"{"event":"process","processor":1,"sequence":9,"pid":57,"tgid":56,"errno":0,"child":58,"child_tgid":58,"parent":57,"parent_tgid":56,"kernel":0,"name":"sh","cut":false}"#
        );
        let mut call = event(Kind::Call as u32, [41, 2, u64::MAX, 0, 0, 0, 7], b"");
        call.errno = 13;
        assert_eq!(
            Line(&call, 1).to_string(),
            r#"{"event":"call","processor":1,"sequence":9,"pid":57,"tgid":56,"errno":13,"number":41,"arguments":["0x2","0xffffffffffffffff","0x0","0x0","0x0","0x7"]}"#
        );
        let module = event(Kind::Module as u32, [1, 0, 0, 1 << 63, 4096, 2, 0], b"m.ko");
        let hash = std::format!("01{}80", "00".repeat(30));
        assert_eq!(
            Line(&module, 1).to_string(),
            std::format!(
                r#"{{"event":"module","processor":1,"sequence":9,"pid":57,"tgid":56,"errno":0,"sha256":"{hash}","bytes":4096,"listed":2,"file":"m.ko","cut":false}}"#
            )
        );
        assert!(Line(&event(77, [0; 7], b""), 1).to_string().contains("unknown"));
    }

    #[test]
    fn what_the_guest_chose_ends_no_line() {
        let all: std::vec::Vec<u8> = (0..=255).collect();
        let text = Text(&all).to_string();
        assert!(text.bytes().all(|b| (b' '..=b'~').contains(&b)));
        assert!(text.contains("!\\\"#") && text.contains("[\\\\]") && text.contains("\\u000a"));
        let inside = &text[1..text.len() - 1];
        assert_eq!(
            inside
                .replace("\\\\", "")
                .replace("\\\"", "")
                .matches('"')
                .count(),
            0
        );
    }
}
