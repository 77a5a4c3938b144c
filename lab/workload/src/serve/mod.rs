//! Serves orders on the third serial port (see `vmsight_workload::orders`).

mod child;
mod inject;
mod keep;
mod nftables;
mod observe;
mod page;
mod poke;
mod raw;
mod tamper;
mod work;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{ControlModes, OptionalActions, tcgetattr, tcsetattr};
use vmsight_workload::orders::{Account, Answer, Order, Outcome, Request, Work};

use crate::play::ready;
use child::{Child, News};
use page::Page;

/// The third serial port.
const PORT: &str = "/dev/ttyS2";
/// The fastest that a 16550 of a PC can be set to.
const BAUD: u32 = 115_200;
/// The longest order, bytes.
const LINE: usize = 1 << 20;

/// How it went, in words where it did not.
type Told = Result<Account, String>;

/// Serves orders, for ever.
pub(crate) fn run() -> Result<()> {
    let mut server = Server {
        port: open_port()?,
        shared: Page::shared()?,
        children: BTreeMap::new(),
        waiting: BTreeMap::new(),
        over: BTreeMap::new(),
        groups: Vec::new(),
    };
    settle();
    ready()?;
    let mut received = Vec::new();
    loop {
        server.turn(&mut received)?;
    }
}

/// Has the kernel write down what this process holds. Kernels before 6.2 add up a thread's pages only with every 64th page
/// fault of it (mm/memory.c, check_sync_rss_stat), so that /proc says next to nothing of a process as small as this one,
/// until the first order makes it fault once more.
fn settle() {
    let pages = vec![1u8; 128 * 4096];
    std::hint::black_box(&pages);
}

/// Prints what it was started with.
pub(crate) fn witness() -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let mut out = std::io::stdout().lock();
    let mut code = 0;
    for arg in std::env::args_os() {
        out.write_all(&[b"arg ", arg.as_bytes(), b"\n"].concat())?;
        if let Some(number) = arg.to_str().and_then(|arg| arg.strip_prefix("--exit=")) {
            code = number.parse()?;
        }
    }
    for (name, value) in std::env::vars_os() {
        out.write_all(&[b"env ", name.as_bytes(), b"=", value.as_bytes(), b"\n"].concat())?;
    }
    drop(out);
    std::process::exit(code)
}

fn open_port() -> Result<File> {
    let port = File::options().read(true).write(true).open(PORT).context(PORT)?;
    let mut modes = tcgetattr(&port).context(PORT)?;
    modes.make_raw();
    // Nobody is at the other end who would raise a carrier.
    modes.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
    modes.control_modes -= ControlModes::CRTSCTS;
    modes.set_speed(BAUD).context(PORT)?;
    tcsetattr(&port, OptionalActions::Now, &modes).context(PORT)?;
    Ok(port)
}

/// Orders that go on together, and who waits for them.
struct Group {
    id: u64,
    pids: Vec<u32>,
}

struct Server {
    port: File,
    shared: Page,
    /// Running orders, by pid.
    children: BTreeMap<u32, Child>,
    /// The request that waits for a process, by pid. Nobody may be waiting for a prepared one.
    waiting: BTreeMap<u32, u64>,
    /// What became of processes that nobody has asked after yet.
    over: BTreeMap<u32, Told>,
    groups: Vec<Group>,
}

impl Server {
    /// Waits until something has come, and sees to it.
    fn turn(&mut self, received: &mut Vec<u8>) -> Result<()> {
        let mut owners = vec![(0, false)];
        let mut polled = vec![PollFd::new(&self.port, PollFlags::IN)];
        for (pid, child) in &self.children {
            for (index, source) in child.sources().enumerate() {
                owners.push((*pid, index == 0));
                polled.push(PollFd::new(source, PollFlags::IN));
            }
        }
        while matches!(poll(&mut polled, None), Err(rustix::io::Errno::INTR)) {}
        let due: Vec<_> = polled
            .iter()
            .zip(owners)
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, owner)| owner)
            .collect();
        // The second source of a child first: reading may do away with the first, and the second then takes its place.
        for (pid, first) in due.into_iter().rev() {
            if pid == 0 {
                self.receive(received)?;
            } else if let Some(news) = self.children.get_mut(&pid).and_then(|child| child.read(first)) {
                self.learn(pid, news)?;
            }
        }
        Ok(())
    }

    fn receive(&mut self, received: &mut Vec<u8>) -> Result<()> {
        let mut buffer = [0; 4096];
        let got = self.port.read(&mut buffer).context(PORT)?;
        received.extend_from_slice(&buffer[..got]);
        while let Some(end) = received.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = received.drain(..=end).collect();
            self.take(&line)?;
        }
        if received.len() > LINE {
            received.clear();
        }
        Ok(())
    }

    /// Takes an order.
    fn take(&mut self, line: &[u8]) -> Result<()> {
        let request = match serde_json::from_slice::<Request>(line) {
            Ok(request) => request,
            Err(error) => {
                // Whose it is may still be told.
                let id = serde_json::from_slice::<serde_json::Value>(line)
                    .ok()
                    .and_then(|value| value.get("id")?.as_u64());
                return self.answer(id.unwrap_or(0), Err(format!("no order: {error}")));
            }
        };
        let id = request.id;
        match request.order.work {
            Work::Go { pids } => return self.go(id, pids),
            Work::Abandon { pid } => {
                if let Some(child) = self.children.get_mut(&pid).filter(|child| child.is_held()) {
                    child.abandon();
                    self.waiting.insert(pid, id);
                    return Ok(());
                }
                let told = self.over.remove(&pid);
                return self.answer(
                    id,
                    told.unwrap_or_else(|| Err(format!("no prepared order {pid}"))),
                );
            }
            _ => {}
        }
        let (order, held) = match request.order {
            Order {
                work: Work::Prepare { order },
                ..
            } => (*order, true),
            order => (order, false),
        };
        match Child::start(order, held, self.shared) {
            Ok(child) => {
                self.waiting.insert(child.pid, id);
                self.children.insert(child.pid, child);
                Ok(())
            }
            Err(error) => self.answer(id, Err(format!("{error:#}"))),
        }
    }

    fn go(&mut self, id: u64, pids: Vec<u32>) -> Result<()> {
        let known = |pid: &u32| {
            self.over.contains_key(pid)
                || self.children.get(pid).is_some_and(Child::is_held) && !self.waiting.contains_key(pid)
        };
        if let Some(stranger) = pids.iter().find(|pid| !known(pid)) {
            return self.answer(id, Err(format!("no prepared order {stranger}")));
        }
        for pid in &pids {
            // One that is gone has its account in `over`, or soon will.
            self.children.get_mut(pid).map(Child::go);
        }
        self.groups.push(Group { id, pids });
        self.settle()
    }

    /// Sees to what has become of an order.
    fn learn(&mut self, pid: u32, news: News) -> Result<()> {
        let told = match news {
            News::Ready(account) => Ok(account),
            News::Over(told) => {
                self.children.remove(&pid);
                told
            }
        };
        match self.waiting.remove(&pid) {
            Some(id) => self.answer(id, told),
            None => {
                self.over.insert(pid, told);
                self.settle()
            }
        }
    }

    /// Answers for the groups of which all are through.
    fn settle(&mut self) -> Result<()> {
        let over = &self.over;
        let (through, left) = std::mem::take(&mut self.groups)
            .into_iter()
            .partition(|group| group.pids.iter().all(|pid| over.contains_key(pid)));
        self.groups = left;
        let through: Vec<Group> = through;
        for group in through {
            let told: Result<Vec<Account>, String> = group
                .pids
                .iter()
                .filter_map(|pid| self.over.remove(pid))
                .collect();
            let told = told.map(|together| Account {
                together,
                ..Account::default()
            });
            self.answer(group.id, told)?;
        }
        Ok(())
    }

    fn answer(&mut self, id: u64, told: Told) -> Result<()> {
        let outcome = match told {
            Ok(account) => Outcome::Ok(Box::new(account)),
            Err(error) => Outcome::Error(error),
        };
        let mut line = serde_json::to_vec(&Answer { id, outcome })?;
        line.push(b'\n');
        self.port.write_all(&line).context(PORT)
    }
}
