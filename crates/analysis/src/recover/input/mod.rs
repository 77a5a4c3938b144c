//! What was typed, below the terminals: events of keys and buttons in the input layer, as every program that has a device open by evdev
//! (drivers/input/evdev.c) is to read them: X and Wayland's compositors, and who logs keys.
//!
//! Each such program has a ring of its own in the kernel. What it has read stays there until other events come in its place.

mod names;

use rustc_hash::FxHashMap;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::clock::{boot_time, rfc3339};
use vmsight_linux::file::FileFilter;
use vmsight_linux::listing::address;
use vmsight_linux::structures::list;
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::ReadError;

use super::member::{Member, Structure};

const MODULE: &str = "evdev";
/// Devices, what handles one, and who has one open.
const MAX_DEVICES: usize = 1024;
const MAX_HANDLES: usize = 256;
const MAX_CLIENTS: usize = 1024;
/// Events of one ring: eight packets, and no fewer than 64 events.
const MAX_EVENTS: u64 = 1 << 13;
/// Rows in all.
const MAX_ROWS: usize = 1 << 18;
/// Processes that are named for one ring: each of its rows has them.
const MAX_PIDS: usize = 64;
/// The longest name of a device.
const MAX_NAME: usize = 256;
/// Bytes of a `struct input_event`: seconds, microseconds, type, code, value.
const EVENT: usize = 24;
/// `EV_KEY`.
const KEY: u16 = 1;

/// A key or a button that was pressed or let go.
#[derive(Clone, Debug, Serialize)]
pub struct KeyEvent {
    /// The device file: `event0`.
    pub device: String,
    /// What the device calls itself.
    pub device_name: String,
    /// When: RFC 3339. Times that a program asked to be told since boot leave out how long the machine slept.
    pub time: Option<String>,
    /// `KEY_A`, `BTN_LEFT`, or `KEY_` and the code in hex: the place on the keyboard, not the letter on it.
    pub key: String,
    /// `press`, `release`, `repeat`.
    pub action: &'static str,
    /// Its program has not read it yet. What has been read is left over.
    pub waiting: bool,
    /// The processes that have this ring, 64 at most.
    pub pids: Vec<i32>,
    /// The `struct evdev_client`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// The events of keys in all rings: device by device, ring by ring, oldest first.
///
/// # Errors
/// If devices or open files cannot be listed; if nothing reads devices in this way (the module evdev is not loaded); if the kernel keeps
/// no types of that module (before Linux 5.11) or they lack a member.
pub fn key_events(kernel: &Kernel) -> Result<Listing<KeyEvent>, LinuxError> {
    let reader = Reader::new(kernel)?;
    let space = kernel.space();
    let mut out = Listing::default();
    let holders = reader.holders(&mut out)?;
    let devices = list::walk(space, kernel.symbol("input_dev_list")?, MAX_DEVICES).walk;
    if let Some(warning) = devices.end.warning("input devices") {
        out.warn(warning);
    }
    for node in devices.items {
        let device = reader.device_node.container(node);
        let handles = list::walk(space, reader.device_handles.at(device), MAX_HANDLES).walk;
        if let Some(warning) = handles.end.warning("what handles an input device") {
            out.warn(warning);
        }
        for node in handles.items {
            let handle = reader.handle_node.container(node);
            match reader.evdev(device, handle) {
                Ok(Some((evdev, row))) => reader.clients(evdev, &row, &holders, &mut out),
                Ok(None) => {}
                Err(error) => out.warn(format!("the input device at {device} cannot be read: {error}")),
            }
            if out.rows.len() >= MAX_ROWS {
                out.warn(format!("events of keys: cut after {MAX_ROWS}"));
                return Ok(out);
            }
        }
    }
    Ok(out)
}

struct Reader<'k> {
    kernel: &'k Kernel,
    /// When the guest was booted, nanoseconds since 1970.
    boot: Option<i64>,
    device_node: Member,
    device_name: Member,
    device_handles: Member,
    handle_node: Member,
    handle_private: Member,
    handler: Member,
    handler_name: Member,
    file_name: Member,
    clients: Member,
    client_node: Member,
    head: Member,
    tail: Member,
    size: Member,
    clock: Member,
    buffer: Member,
    file_data: Member,
}

impl<'k> Reader<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let types = match kernel.types().find_struct("evdev_client") {
            // It is built in.
            Some(_) => kernel.types().clone(),
            None => {
                kernel.module_address(MODULE)?;
                kernel.module_types(MODULE)?
            }
        };
        let of = |name| Structure::within(&types, kernel.release(), name);
        let (device, handle) = (of("input_dev")?, of("input_handle")?);
        let (evdev, client) = (of("evdev")?, of("evdev_client")?);
        Ok(Self {
            kernel,
            boot: boot_time(kernel).ok(),
            device_node: device.member("node")?,
            device_name: device.member("name")?,
            device_handles: device.member("h_list")?,
            handle_node: handle.member("d_node")?,
            handle_private: handle.member("private")?,
            handler: handle.member("handler")?,
            handler_name: of("input_handler")?.member("name")?,
            file_name: evdev.member("dev.kobj.name")?,
            clients: evdev.member("client_list")?,
            client_node: client.member("node")?,
            head: client.member("head")?,
            tail: client.member("tail")?,
            size: client.member("bufsize")?,
            clock: client.member("clk_type")?,
            buffer: client.member("buffer")?,
            file_data: Structure::of(kernel, "file")?.member("private_data")?,
        })
    }

    /// Which processes have which open file's private data.
    fn holders(&self, out: &mut Listing<KeyEvent>) -> Result<FxHashMap<Gva, Vec<i32>>, LinuxError> {
        let files = self.kernel.open_files(FileFilter {
            directories: false,
            peers: false,
            ..FileFilter::default()
        })?;
        files.warnings.into_iter().for_each(|warning| out.warn(warning));
        let mut found: FxHashMap<Gva, Vec<i32>> = FxHashMap::default();
        for file in files.rows.iter().filter(|file| file.kind == "CHR") {
            let data = file
                .address
                .and_then(|at| self.file_data.pointer(self.kernel.space(), at).ok());
            if let Some(data) = data.filter(|data| !data.is_null()) {
                let pids = found.entry(data).or_default();
                if pids.len() < MAX_PIDS && !pids.contains(&file.pid) {
                    pids.push(file.pid);
                }
            }
        }
        Ok(found)
    }

    /// The `struct evdev` of a handle, and what rows of it have in common; `None` for what handles devices in other ways.
    fn evdev(&self, device: Gva, handle: Gva) -> Result<Option<(Gva, KeyEvent)>, ReadError> {
        let space = self.kernel.space();
        let text = |at: Gva| match at.is_null() {
            true => Ok(String::new()),
            false => Ok(guest_text(&space.read_cstr(at, MAX_NAME)?)),
        };
        let handler = self.handler.pointer(space, handle)?;
        if text(self.handler_name.pointer(space, handler)?)? != MODULE {
            return Ok(None);
        }
        let evdev = self.handle_private.pointer(space, handle)?;
        let row = KeyEvent {
            device: text(self.file_name.pointer(space, evdev)?)?,
            device_name: text(self.device_name.pointer(space, device)?)?,
            time: None,
            key: String::new(),
            action: "",
            waiting: false,
            pids: Vec::new(),
            address: evdev,
            problems: Vec::new(),
        };
        Ok(Some((evdev, row)))
    }

    fn clients(
        &self,
        evdev: Gva,
        row: &KeyEvent,
        holders: &FxHashMap<Gva, Vec<i32>>,
        out: &mut Listing<KeyEvent>,
    ) {
        let clients = list::walk(self.kernel.space(), self.clients.at(evdev), MAX_CLIENTS).walk;
        if let Some(warning) = clients.end.warning(&format!("who reads {}", row.device)) {
            out.warn(warning);
        }
        for node in clients.items {
            let address = self.client_node.container(node);
            let row = KeyEvent {
                address,
                pids: holders.get(&address).cloned().unwrap_or_default(),
                ..row.clone()
            };
            match self.ring(address) {
                Ok((events, since_boot)) => {
                    let keys = events.iter().filter(|(event, _)| event.kind == KEY);
                    out.rows.extend(keys.map(|(event, waiting)| KeyEvent {
                        time: self.time(event, since_boot),
                        key: names::name(event.code),
                        action: match event.value {
                            0 => "release",
                            1 => "press",
                            _ => "repeat",
                        },
                        waiting: *waiting,
                        ..row.clone()
                    }));
                }
                Err(error) => out.rows.push(KeyEvent {
                    problems: vec![Problem::read("key", &error)],
                    ..row
                }),
            }
            if out.rows.len() >= MAX_ROWS {
                return;
            }
        }
    }

    /// The events in a ring and whether they wait, oldest first; and whether their times count from boot.
    fn ring(&self, client: Gva) -> Result<(Vec<(Event, bool)>, bool), ReadError> {
        let space = self.kernel.space();
        let size = self.size.number(space, client)?.min(MAX_EVENTS);
        let mut bytes = vec![0; size as usize * EVENT];
        space.read(self.buffer.at(client), &mut bytes)?;
        let (head, tail) = (self.head.number(space, client)?, self.tail.number(space, client)?);
        let events: Vec<Event> = bytes.chunks_exact(EVENT).map(Event::of).collect();
        // `INPUT_CLK_REAL`, before the clocks that count from boot (include/linux/input.h).
        let since_boot = self.clock.number(space, client)? != 0;
        Ok((in_order(&events, head, tail), since_boot))
    }

    fn time(&self, event: &Event, since_boot: bool) -> Option<String> {
        let own = event.seconds.checked_mul(1_000_000_000)?;
        let own = own.checked_add(event.microseconds.checked_mul(1000)?)?;
        match since_boot {
            true => rfc3339(self.boot?.checked_add(own)?),
            false => rfc3339(own),
        }
    }
}

/// A `struct input_event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    seconds: i64,
    microseconds: i64,
    kind: u16,
    code: u16,
    value: i32,
}

impl Event {
    fn of(bytes: &[u8]) -> Self {
        let word = |at: usize, len: usize| {
            let part = bytes.get(at..at + len).unwrap_or(&[]);
            part.iter()
                .rev()
                .fold(0u64, |all, byte| all << 8 | u64::from(*byte))
        };
        Self {
            seconds: word(0, 8) as i64,
            microseconds: word(8, 8) as i64,
            kind: word(16, 2) as u16,
            code: word(18, 2) as u16,
            value: word(20, 4) as i32,
        }
    }
}

/// The events of a ring, oldest first, each with whether it waits: those from `tail` up to `head` do, and what lies behind them was read.
/// Places that never held one are left out.
fn in_order(ring: &[Event], head: u64, tail: u64) -> Vec<(Event, bool)> {
    let size = ring.len() as u64;
    if size == 0 {
        return Vec::new();
    }
    let (head, tail) = (head % size, tail % size);
    let waiting = (head + size - tail) % size;
    let place = |nth: u64| ring.get(((head + nth) % size) as usize).copied();
    (0..size)
        .filter_map(|nth| Some((place(nth)?, nth >= size - waiting)))
        .filter(|(event, _)| event.seconds != 0 || event.microseconds != 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seconds: i64) -> Event {
        Event {
            seconds,
            microseconds: 0,
            kind: KEY,
            code: 30,
            value: 1,
        }
    }

    fn told(times: &[i64], head: u64, tail: u64) -> Vec<(i64, bool)> {
        let ring: Vec<Event> = times.iter().map(|time| event(*time)).collect();
        let events = in_order(&ring, head, tail);
        events
            .into_iter()
            .map(|(event, waiting)| (event.seconds, waiting))
            .collect()
    }

    #[test]
    fn a_ring_is_read_from_its_oldest_event_on() {
        // Nothing was ever written to the last two places.
        assert_eq!(told(&[1, 2, 0, 0], 2, 1), [(1, false), (2, true)]);
        assert_eq!(
            told(&[5, 2, 3, 4], 1, 3),
            [(2, false), (3, false), (4, true), (5, true)]
        );
        assert_eq!(
            told(&[5, 2, 3, 4], 1, 1),
            [(2, false), (3, false), (4, false), (5, false)]
        );
        assert_eq!(told(&[], 1, 1), []);
    }

    #[test]
    fn a_ring_that_lies_is_no_larger_than_it_is() {
        for (head, tail) in [(u64::MAX, 0), (0, u64::MAX), (9, 7)] {
            assert_eq!(told(&[1, 2, 3, 4], head, tail).len(), 4);
        }
    }

    #[test]
    fn an_events_members_are_where_the_kernel_has_them() {
        let mut bytes = [0u8; EVENT];
        bytes[..8].copy_from_slice(&1_700_000_000u64.to_le_bytes());
        bytes[8..16].copy_from_slice(&250_000u64.to_le_bytes());
        bytes[16..18].copy_from_slice(&1u16.to_le_bytes());
        bytes[18..20].copy_from_slice(&42u16.to_le_bytes());
        bytes[20..].copy_from_slice(&(-1i32).to_le_bytes());
        let event = Event::of(&bytes);
        assert_eq!((event.seconds, event.microseconds), (1_700_000_000, 250_000));
        assert_eq!((event.kind, event.code, event.value), (1, 42, -1));
    }
}
