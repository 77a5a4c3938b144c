//! Logins that never were, written down as programs do: the records of utmp(5), and a session of systemd's logind.

/// Seconds since 1970 of the first of them; each of the others is a minute later than the one before.
pub const FIRST: u32 = 1_700_000_000;
/// A session as logind keeps it.
pub const SESSION: &str = "UID=1000\nUSER=alice\nACTIVE=1\nSTATE=active\nREMOTE=1\nREMOTE_HOST=192.0.2.9\nSERVICE=sshd\n\
                           LEADER=4711\nREALTIME=1700000360500000\nMONOTONIC=9\n";

const BOOT: u16 = 2;
const USER: u16 = 7;
const DEAD: u16 = 8;

/// Who is logged in.
pub fn utmp() -> Vec<u8> {
    record(USER, "alice", "pts/0", "192.0.2.7", 1)
}

/// Who was, longer ago than a page holds: what is between are logins of `bob`, on a terminal each.
pub fn wtmp() -> Vec<u8> {
    let mut records = record(BOOT, "reboot", "~", "6.0.0", 0);
    records.extend(record(USER, "alice", "pts/0", "192.0.2.7", 1));
    for number in 0..20 {
        records.extend(record(USER, "bob", &format!("tty{number}"), "", 2));
    }
    records.extend(record(DEAD, "", "pts/0", "", 3));
    records
}

/// Who wanted to.
pub fn btmp() -> Vec<u8> {
    record(6, "mallory", "ssh:notty", "203.0.113.5", 4)
}

fn record(kind: u16, user: &str, line: &str, host: &str, minute: u32) -> Vec<u8> {
    let mut record = vec![0; 384];
    let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &kind.to_le_bytes());
    put(4, &4321u32.to_le_bytes());
    put(8, line.as_bytes());
    put(44, user.as_bytes());
    put(76, host.as_bytes());
    put(340, &(FIRST + 60 * minute).to_le_bytes());
    put(344, &125_000u32.to_le_bytes());
    record
}
