//! Has a guest do something at a moment of the test's choosing, and say what came of it.
//!
//! ```no_run
//! use vmsight_lab::{Guest, Kernel, Spec, Work};
//!
//! let guest = Guest::boot(&Spec::new(Kernel::V6_1).idle().orders())?;
//! let account = guest.order(Work::GetPid { count: 10_000 }.on(0))?;
//! assert_eq!((account.made, account.failed), (10_000, 0));
//!
//! let held = guest.prepare(Work::Write { first: 1, step: 1, count: 1000, offset: 0, shared: false })?;
//! // Here a hook is set on `held.address()` of the process `held.pid()`.
//! let account = held.go()?;
//! # Ok::<(), anyhow::Error>(())
//! ```

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
pub use vmsight_workload::orders::{
    Account, Answer, Ended, Exception, INJECTED, OVERWRITTEN, Order, Outcome, Poke, Poked, Reach, Register,
    Request, Tamper, Tampered, UNMAPPED, WITNESS, Work, checksum,
};

/// How long an order may take, unless the caller says otherwise. It is there to end what will never end.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// Who waits for which answer; nobody can, once the line is gone.
type Waiting = Option<HashMap<u64, mpsc::Sender<Outcome>>>;

/// A line to a guest. Several threads may have orders out at once.
#[derive(Debug)]
pub struct Orders {
    line: Mutex<UnixStream>,
    waiting: Arc<Mutex<Waiting>>,
    next: AtomicU64,
}

impl Orders {
    /// Connects to the socket of a guest's third serial port. One client is served at a time.
    pub fn connect(path: &Path) -> Result<Orders> {
        let line = UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        let waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let reader = BufReader::new(line.try_clone()?);
        let told = Arc::clone(&waiting);
        std::thread::Builder::new()
            .name("lab-orders".to_owned())
            .spawn(move || dispatch(reader, &told))?;
        // An answer to what an earlier client has ordered must be taken for no answer to us.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        Ok(Orders {
            line: Mutex::new(line),
            waiting,
            next: AtomicU64::new(u64::try_from(since.as_nanos())?),
        })
    }

    /// Has the guest do something, and waits for its account of it.
    pub fn order(&self, order: impl Into<Order>) -> Result<Account> {
        self.order_within(order, DEADLINE)
    }

    /// The same with a deadline. What has missed it may still be done.
    pub fn order_within(&self, order: impl Into<Order>, deadline: Duration) -> Result<Account> {
        self.send(order.into())?.wait(deadline)
    }

    /// Has the guest do something, and does not wait.
    pub fn send(&self, order: Order) -> Result<Sent> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let request = Request { id, order };
        let mut text = serde_json::to_string(&request)?;
        let (tell, told) = mpsc::channel();
        lock(&self.waiting)
            .as_mut()
            .context("the line for orders was closed")?
            .insert(id, tell);
        let sent = Sent {
            text: text.clone(),
            told,
        };
        text.push('\n');
        lock(&self.line)
            .write_all(text.as_bytes())
            .with_context(|| format!("send {}", sent.text))?;
        Ok(sent)
    }

    /// Starts the process that is to do something, and has it stop short of it.
    pub fn prepare(&self, order: impl Into<Order>) -> Result<Prepared<'_>> {
        let order = Box::new(order.into());
        let account = self.order(Work::Prepare { order })?;
        if account.ended.is_some() {
            bail!("an order ended before its work: {account:?}");
        }
        Ok(Prepared {
            orders: self,
            account,
            gone: false,
        })
    }

    /// Lets several orders go on at the same moment. Gives their accounts in the same order.
    pub fn go<'a>(&self, prepared: impl IntoIterator<Item = Prepared<'a>>) -> Result<Vec<Account>> {
        self.send_go(prepared)?.wait_all(DEADLINE)
    }

    /// The same without waiting: [`Sent::wait_all`] gives the accounts.
    pub fn send_go<'a>(&self, prepared: impl IntoIterator<Item = Prepared<'a>>) -> Result<Sent> {
        let pids = prepared
            .into_iter()
            .map(|mut one| {
                one.gone = true;
                one.pid()
            })
            .collect();
        self.send(Work::Go { pids }.into())
    }
}

impl Drop for Orders {
    fn drop(&mut self) {
        // This ends the reader.
        let _ = lock(&self.line).shutdown(Shutdown::Both);
    }
}

/// An order that is out.
#[derive(Debug)]
pub struct Sent {
    text: String,
    told: mpsc::Receiver<Outcome>,
}

impl Sent {
    /// Waits for the account.
    pub fn wait(self, deadline: Duration) -> Result<Account> {
        match self.told.recv_timeout(deadline) {
            Ok(Outcome::Ok(account)) => Ok(*account),
            Ok(Outcome::Error(error)) => bail!("{}: {error}", self.text),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("{}: no answer after {} s", self.text, deadline.as_secs_f64())
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!("{}: the line for orders was closed", self.text)
            }
        }
    }

    /// Waits for the accounts of all orders that were let go together.
    pub fn wait_all(self, deadline: Duration) -> Result<Vec<Account>> {
        Ok(self.wait(deadline)?.together)
    }
}

/// An order of which only the work is left to do. Dropped, it is ended without.
#[derive(Debug)]
pub struct Prepared<'a> {
    orders: &'a Orders,
    account: Account,
    gone: bool,
}

impl Prepared<'_> {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.account.pid
    }

    /// The virtual address that it will work on; 0 if it works on no memory.
    pub fn address(&self) -> u64 {
        self.account.address.unwrap_or_default()
    }

    /// The virtual addresses of what it keeps ([`Work::Keep`]).
    pub fn addresses(&self) -> Vec<u64> {
        self.account.values.clone()
    }

    /// The number of the physical page at that address; 0 if it works on no memory, or on pages that are not there yet.
    pub fn frame(&self) -> u64 {
        self.account.frame.unwrap_or_default()
    }

    /// Lets it do its work, and waits for the account.
    pub fn go(self) -> Result<Account> {
        let orders = self.orders;
        let mut accounts = orders.go([self])?;
        accounts.pop().context("no account came")
    }

    /// Lets it do its work, and does not wait: [`Sent::wait_all`] gives its account.
    pub fn send_go(self) -> Result<Sent> {
        let orders = self.orders;
        orders.send_go([self])
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        if !self.gone {
            let _ = self.orders.send(Work::Abandon { pid: self.pid() }.into());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands each answer to who waits for it.
fn dispatch(mut reader: BufReader<UnixStream>, waiting: &Mutex<Waiting>) {
    let mut line = Vec::new();
    while let Ok(1..) = reader.read_until(b'\n', &mut line) {
        // Connected in the middle of an answer to somebody else, we may get the end of a line.
        if let Ok(answer) = serde_json::from_slice::<Answer>(&line) {
            let waits = lock(waiting).as_mut().and_then(|w| w.remove(&answer.id));
            if let Some(tell) = waits {
                let _ = tell.send(answer.outcome);
            }
        }
        line.clear();
    }
    // Whoever waits now learns that nothing will come.
    *lock(waiting) = None;
}
