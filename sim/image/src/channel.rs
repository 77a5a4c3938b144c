//! The second serial port of a machine in Bochs: the line between the hypervisor and the host.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::Error;
use crate::error::io;

/// The host's end. Bochs connects to it as it starts.
#[derive(Debug)]
pub struct Channel {
    port: u16,
    shared: Arc<Mutex<Shared>>,
}

/// What gives the hypervisor orders, from wherever it is kept, as long as there is a [`Channel`].
#[derive(Debug, Clone)]
pub struct Orders(Weak<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    received: Vec<u8>,
    stream: Option<TcpStream>,
    closed: bool,
}

impl Channel {
    /// Waits for Bochs, in a thread of its own, at a port that is free.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn listen() -> Result<Self, Error> {
        let failed = || io("listen at", "a port for the second serial port");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed())?;
        let port = listener.local_addr().map_err(failed())?.port();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let theirs = Arc::downgrade(&shared);
        std::thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else {
                return;
            };
            if let Some(shared) = theirs.upgrade() {
                lock(&shared).stream = stream.try_clone().ok();
            }
            let mut bytes = [0; 4096];
            // Until Bochs ends or nobody is interested any more.
            while let Ok(count @ 1..) = stream.read(&mut bytes) {
                let Some(shared) = theirs.upgrade() else { return };
                lock(&shared)
                    .received
                    .extend_from_slice(bytes.get(..count).unwrap_or_default());
            }
            if let Some(shared) = theirs.upgrade() {
                lock(&shared).closed = true;
            }
        });
        Ok(Self { port, shared })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// All that has come. Lines are JSON objects; the last may not be complete yet.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared).received).into_owned()
    }

    /// What has come after the first `done` bytes.
    pub(crate) fn after(&self, done: usize) -> Vec<u8> {
        lock(&self.shared)
            .received
            .get(done..)
            .unwrap_or_default()
            .to_vec()
    }

    /// Waits until what is on its way has come, once Bochs has ended.
    pub(crate) fn settle(&self) {
        for _ in 0..100 {
            let shared = lock(&self.shared);
            if shared.closed || shared.stream.is_none() {
                break;
            }
            drop(shared);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Gives the hypervisor an order, as [`Orders::give`] does.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn order(&self, order: &str) -> Result<bool, Error> {
        self.orders().give(order)
    }

    /// What gives orders.
    pub fn orders(&self) -> Orders {
        Orders(Arc::downgrade(&self.shared))
    }
}

impl Orders {
    /// Gives the hypervisor an order: `stats`, `hook`, `unhook`. `false` if Bochs is not connected.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn give(&self, order: &str) -> Result<bool, Error> {
        let Some(shared) = self.0.upgrade() else {
            return Ok(false);
        };
        match &mut lock(&shared).stream {
            Some(stream) => {
                writeln!(stream, "{order}").map_err(io("write to", "the second serial port"))?;
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Whoever still waits for Bochs to connect does so no longer.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

fn lock(shared: &Mutex<Shared>) -> std::sync::MutexGuard<'_, Shared> {
    // What a thread that panicked has left is as whole as any.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
