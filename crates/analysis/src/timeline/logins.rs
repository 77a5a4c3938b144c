//! Logins as programs write them down: the records of utmp, wtmp and btmp, the table of last logins, and the sessions of systemd's
//! logind. All of them are files; what of those is in memory is read.

use vmsight_linux::Kernel;
use vmsight_linux::clock::rfc3339;
use vmsight_linux::text::guest_text;

use super::{Clock, Event, Gathered, Kind, event, subject_of};
use crate::recover::files::CachedFile;
use crate::recover::files::pieces::{Piece, pieces};

/// Bytes of one file that are looked at, some 170,000 records.
const MAX_BYTES: u64 = 64 << 20;
/// A session's file has some hundred.
const MAX_SESSION: u64 = 1 << 14;

/// The form of a file, told by its path as the programs have it that write it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    /// Records of who is logged in, or of all logins.
    Records(&'static str),
    /// Records of logins that failed.
    Failures,
    /// The last login of each user, by number.
    Last,
    /// One session of logind's.
    Session,
}

impl Form {
    fn of(path: &str) -> Option<Self> {
        let (folder, name) = path.rsplit_once('/')?;
        // logrotate's older ones: wtmp.1.
        let stem = name
            .split_once('.')
            .filter(|(_, rest)| rest.bytes().all(|b| b.is_ascii_digit()))
            .map_or(name, |(stem, _)| stem);
        let is_log = folder.ends_with("/log");
        match stem {
            "utmp" if folder.ends_with("/run") => Some(Self::Records("utmp")),
            "wtmp" if is_log => Some(Self::Records("wtmp")),
            "btmp" if is_log => Some(Self::Failures),
            "lastlog" if is_log => Some(Self::Last),
            _ if folder.ends_with("/run/systemd/sessions") && !name.contains('.') => Some(Self::Session),
            _ => None,
        }
    }
}

/// Adds what a file says of logins, if it is one that does.
pub(super) fn add(kernel: &Kernel, file: &CachedFile, out: &mut Gathered) {
    let form = file
        .path
        .as_deref()
        .filter(|_| file.kind == "REG")
        .and_then(Form::of);
    let Some(form) = form else { return };
    let limit = if form == Form::Session {
        MAX_SESSION
    } else {
        MAX_BYTES
    };
    let what = subject_of(file);
    let (found, all) = match pieces(kernel, file, limit) {
        Ok(found) => found,
        Err(error) => return out.0.warn(format!("login: {what}: {error}")),
    };
    if !all {
        out.0.warn(format!(
            "login: {what}: no more than its first {limit} bytes are looked at"
        ));
    }
    for piece in &found {
        let events: Vec<Event> = match form {
            Form::Records(source) => records(piece).filter_map(|r| login(&r, source)).collect(),
            Form::Failures => records(piece).filter_map(|r| failure(&r)).collect(),
            Form::Last => last_logins(piece),
            Form::Session => session(piece).into_iter().collect(),
        };
        events.into_iter().for_each(|event| out.add(event));
    }
}

/// `struct utmp` of glibc (login/utmp.h): the same on all 64-bit x86, in 384 bytes.
struct Record<'p>(&'p [u8]);

/// Bytes of one.
const RECORD: u64 = 384;

/// `ut_type`.
const RUN_LEVEL: u16 = 1;
const BOOT: u16 = 2;
const NEW_TIME: u16 = 3;
const OLD_TIME: u16 = 4;
const GETTY: u16 = 6;
const USER: u16 = 7;
const DEAD: u16 = 8;

impl Record<'_> {
    fn number(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    }

    fn text(&self, at: usize, size: usize) -> String {
        let bytes = self.0.get(at..at + size).unwrap_or_default();
        guest_text(bytes.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    fn kind(&self) -> u16 {
        self.number(0) as u16
    }

    fn pid(&self) -> Option<i32> {
        i32::try_from(self.number(4)).ok().filter(|pid| *pid > 0)
    }

    fn line(&self) -> String {
        self.text(8, 32)
    }

    fn user(&self) -> String {
        self.text(44, 32)
    }

    /// The terminal, and from where.
    fn whence(&self) -> Option<String> {
        place(self.line(), self.text(76, 256))
    }

    fn time(&self) -> Option<String> {
        moment(self.number(340), self.number(344))
    }
}

/// The records of which all bytes are there.
fn records(piece: &Piece) -> impl Iterator<Item = Record<'_>> {
    whole(piece, RECORD).map(|(_, bytes)| Record(bytes))
}

/// The records of a size that are whole, with their numbers in the file.
fn whole(piece: &Piece, size: u64) -> impl Iterator<Item = (u64, &[u8])> {
    let first = piece.offset.div_ceil(size);
    let skipped = usize::try_from(first * size - piece.offset).unwrap_or(usize::MAX);
    let rest = piece.bytes.get(skipped..).unwrap_or_default();
    let records = rest.chunks_exact(usize::try_from(size).unwrap_or(usize::MAX));
    (first..).zip(records)
}

fn place(line: String, host: String) -> Option<String> {
    match (line.is_empty(), host.is_empty()) {
        (true, true) => None,
        (false, true) => Some(line),
        (true, false) => Some(format!("from {host}")),
        (false, false) => Some(format!("{line} from {host}")),
    }
}

/// A moment that is no 0, which stands where there is none. In glibc's records seconds end in 2106.
fn moment(seconds: u32, micros: u32) -> Option<String> {
    let whole = i64::from(seconds).checked_mul(1_000_000_000)?;
    let parts = i64::from(if micros < 1_000_000 { micros } else { 0 });
    (seconds != 0).then(|| rfc3339(whole + parts * 1000)).flatten()
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn login(record: &Record<'_>, source: &'static str) -> Option<Event> {
    let action = match record.kind() {
        USER => "logged in",
        DEAD => "logged out",
        GETTY => "waits for a login",
        BOOT => "booted",
        RUN_LEVEL if record.user() == "shutdown" => "shut down",
        RUN_LEVEL => "changed run level",
        NEW_TIME => "set the clock to this",
        OLD_TIME => "set the clock from this",
        _ => return None,
    };
    Some(Event {
        pid: record.pid(),
        name: some(record.user()),
        subject: record.whence(),
        ..event(Kind::Login, action, record.time()?, source, Clock::Claimed)
    })
}

fn failure(record: &Record<'_>) -> Option<Event> {
    if record.kind() == 0 {
        return None;
    }
    Some(Event {
        pid: record.pid(),
        name: some(record.user()),
        subject: record.whence(),
        ..event(
            Kind::Login,
            "failed to log in",
            record.time()?,
            "btmp",
            Clock::Claimed,
        )
    })
}

/// `struct lastlog` of glibc (login/lastlog.h): a time, a line, a host, for each user by number.
fn last_logins(piece: &Piece) -> Vec<Event> {
    const SIZE: u64 = 292;
    let read = |(user, bytes): (u64, &[u8])| {
        let record = Record(bytes);
        Some(Event {
            name: Some(format!("uid {user}")),
            subject: place(record.text(4, 32), record.text(36, 256)),
            ..event(
                Kind::Login,
                "logged in last",
                moment(record.number(0), 0)?,
                "lastlog",
                Clock::Claimed,
            )
        })
    };
    whole(piece, SIZE).filter_map(read).collect()
}

/// A file of /run/systemd/sessions, of lines of `NAME=value`.
fn session(piece: &Piece) -> Option<Event> {
    let text = guest_text(&piece.bytes);
    let value = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.filter(|value| !value.is_empty()).map(str::to_owned)
    };
    let micros: i64 = value("REALTIME")?.parse().ok()?;
    let time = micros.checked_mul(1000).and_then(rfc3339)?;
    let line = value("TTY").or_else(|| value("SERVICE")).unwrap_or_default();
    Some(Event {
        pid: value("LEADER").and_then(|pid| pid.parse().ok()),
        name: value("USER"),
        subject: place(line, value("REMOTE_HOST").unwrap_or_default()),
        ..event(Kind::Login, "logged in", time, "logind's session", Clock::Claimed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u16, user: &str, seconds: u32) -> Vec<u8> {
        let mut bytes = vec![0; 384];
        let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
        put(0, &kind.to_le_bytes());
        put(4, &77u32.to_le_bytes());
        put(8, b"pts/3");
        put(44, user.as_bytes());
        put(76, b"192.0.2.7");
        put(340, &seconds.to_le_bytes());
        put(344, &250_000u32.to_le_bytes());
        bytes
    }

    #[test]
    fn files_of_logins_are_told_by_their_paths() {
        let is = |path, form| assert_eq!(Form::of(path), form, "{path}");
        is("/run/utmp", Some(Form::Records("utmp")));
        is("/srv/web/var/log/wtmp.1", Some(Form::Records("wtmp")));
        is("/var/log/btmp", Some(Form::Failures));
        is("/var/log/lastlog", Some(Form::Last));
        is("/run/systemd/sessions/c2", Some(Form::Session));
        for other in [
            "/run/systemd/sessions/4.ref",
            "/var/log/wtmp.gz",
            "/tmp/utmp",
            "utmp",
            "",
        ] {
            is(other, None);
        }
    }

    #[test]
    fn records_that_are_whole_are_read_wherever_a_piece_begins() {
        let mut bytes = record(USER, "alice", 1_700_000_000);
        bytes.extend(record(DEAD, "", 1_700_000_060));
        bytes.extend(record(0, "", 0));
        let all = Piece {
            offset: 0,
            bytes: bytes.clone(),
        };
        let events: Vec<Event> = records(&all).filter_map(|r| login(&r, "wtmp")).collect();
        assert_eq!(events.len(), 2);
        let first = &events[0];
        assert_eq!(first.time, "2023-11-14T22:13:20.250Z");
        assert_eq!(
            (first.action.as_str(), first.pid, first.name.as_deref()),
            ("logged in", Some(77), Some("alice"))
        );
        assert_eq!(first.subject.as_deref(), Some("pts/3 from 192.0.2.7"));
        assert_eq!(
            (events[1].action.as_str(), events[1].name.as_deref()),
            ("logged out", None)
        );
        // A piece in the middle of a file, as pages are.
        let later = Piece {
            offset: 100,
            bytes: bytes[100..].to_vec(),
        };
        assert_eq!(records(&later).filter_map(|r| login(&r, "wtmp")).count(), 1);
        assert_eq!(whole(&later, RECORD).next().map(|(number, _)| number), Some(1));
        assert_eq!(
            failure(&Record(&bytes)).map(|e| e.action),
            Some("failed to log in".to_owned())
        );
        assert_eq!(
            records(&Piece {
                offset: 1,
                bytes: Vec::new()
            })
            .count(),
            0
        );
    }

    #[test]
    fn last_logins_are_by_the_numbers_of_users() {
        let mut bytes = vec![0; 292 * 3];
        bytes[292..296].copy_from_slice(&1_700_000_000u32.to_le_bytes());
        bytes[296..300].copy_from_slice(b"tty1");
        let found = last_logins(&Piece {
            offset: 292 * 1000,
            bytes,
        });
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_deref(), found[0].subject.as_deref()),
            (Some("uid 1001"), Some("tty1"))
        );
    }

    #[test]
    fn a_session_says_who_from_where_and_when() {
        let text = "UID=1000\nUSER=alice\nREMOTE_HOST=192.0.2.7\nSERVICE=sshd\nTTY=\nLEADER=812\nREALTIME=1700000000250000\n";
        let of = |text: &str| {
            session(&Piece {
                offset: 0,
                bytes: text.as_bytes().to_vec(),
            })
        };
        let found = of(text).unwrap();
        assert_eq!((found.pid, found.name.as_deref()), (Some(812), Some("alice")));
        assert_eq!(found.subject.as_deref(), Some("sshd from 192.0.2.7"));
        assert_eq!(found.time, "2023-11-14T22:13:20.250Z");
        assert!(of("USER=alice\nREALTIME=later\n").is_none() && of("").is_none());
    }
}
