//! The connection to a debugger.

use std::io::{self, BufWriter, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use gdbstub::conn::Connection;

use crate::Monitor;

/// How long a debugger may let an answer lie before it is taken for dead.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pieces that are read ahead.
const AHEAD: usize = 16;

/// A connected socket.
#[derive(Debug)]
pub enum Wire {
    /// Of this host's loopback.
    Tcp(TcpStream),
    /// In the file system.
    Unix(UnixStream),
}

impl Wire {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(PATIENCE))
            }
            Self::Unix(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(PATIENCE))
            }
        }
    }

    fn shutdown(&self) {
        // One that is gone already is as good.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buf),
            Self::Unix(stream) => stream.read(buf),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => Write::write(stream, buf),
            Self::Unix(stream) => Write::write(stream, buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => Write::flush(stream),
            Self::Unix(stream) => Write::flush(stream),
        }
    }
}

/// What goes to the debugger.
#[derive(Debug)]
pub(super) struct Outgoing(BufWriter<Wire>);

impl Connection for Outgoing {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.0.write_all(&[byte])
    }

    fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.0.write_all(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// What comes from it, read by a thread that wakes who waits for the guest.
#[derive(Debug)]
pub(super) struct Incoming {
    wire: Wire,
    pieces: Option<Receiver<Vec<u8>>>,
    piece: std::vec::IntoIter<u8>,
    reader: Option<JoinHandle<()>>,
}

/// The next byte, or why there is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    Byte(u8),
    NotYet,
    End,
}

pub(super) fn open(wire: Wire, monitor: &Monitor) -> io::Result<(Incoming, Outgoing)> {
    wire.prepare()?;
    let (sender, pieces) = sync_channel(AHEAD);
    let source = wire.try_clone()?;
    let outgoing = Outgoing(BufWriter::new(wire.try_clone()?));
    let monitor = monitor.clone();
    let reader = std::thread::Builder::new()
        .name("debugger".to_owned())
        .spawn(move || read(source, sender, &monitor))?;
    let incoming = Incoming {
        wire,
        pieces: Some(pieces),
        piece: Vec::new().into_iter(),
        reader: Some(reader),
    };
    Ok((incoming, outgoing))
}

fn read(mut source: Wire, sender: SyncSender<Vec<u8>>, monitor: &Monitor) {
    let mut buf = [0; 4096];
    loop {
        let len = match source.read(&mut buf) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => break,
            Ok(len) => len,
        };
        if sender.send(buf.get(..len).unwrap_or_default().to_vec()).is_err() {
            break;
        }
        monitor.wake();
    }
    // Before that is noticed the end of the connection has to be.
    drop(sender);
    monitor.wake();
}

impl Incoming {
    /// The next byte, waited for at most so long.
    pub(super) fn next(&mut self, patience: Duration) -> Next {
        loop {
            if let Some(byte) = self.piece.next() {
                return Next::Byte(byte);
            }
            use std::sync::mpsc::RecvTimeoutError;
            let Some(pieces) = &self.pieces else {
                return Next::End;
            };
            match pieces.recv_timeout(patience) {
                Ok(piece) => self.piece = piece.into_iter(),
                Err(RecvTimeoutError::Timeout) => return Next::NotYet,
                Err(RecvTimeoutError::Disconnected) => return Next::End,
            }
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.wire.shutdown();
        self.pieces = None;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
