//! Secrets, kept as programs and the kernel keep them.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use vmsight_workload::Text;

use crate::sys;

const PAGE: usize = 4096;

/// What is kept as long as this is.
pub(super) struct Kept {
    /// Where the bytes lie.
    pub(super) addresses: Vec<u64>,
    /// The socket whose kernel side has the AES key.
    pub(super) socket: Option<OwnedFd>,
}

/// Puts them where they belong.
pub(super) fn keep(memory: &[(Text, u64)], aes: &Text, key: Option<&(String, String, Text)>) -> Result<Kept> {
    let addresses = memory.iter().map(|(bytes, offset)| place(bytes.bytes(), *offset));
    let addresses = addresses.collect::<Result<Vec<u64>>>()?;
    let socket = match aes.bytes() {
        [] => None,
        key => Some(cipher(key).context("a socket of the crypto API")?),
    };
    if let Some((kind, description, payload)) = key {
        add_key(kind, description, payload.bytes()).context("add_key")?;
    }
    Ok(Kept { addresses, socket })
}

fn place(bytes: &[u8], offset: u64) -> Result<u64> {
    let offset = usize::try_from(offset)?;
    if offset >= PAGE {
        bail!("offset {offset} is in no page");
    }
    let length = (offset + bytes.len()).next_multiple_of(PAGE);
    let at = sys::map(
        length,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
    )?;
    sys::small_pages(at, length)?;
    // The last page first: frames are handed out in rising order as often as not.
    for page in (0..length / PAGE).rev() {
        sys::touch(at + page * PAGE, PAGE, 1);
    }
    // SAFETY: so many bytes are mapped there, writable, for as long as the process lives.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (at + offset) as *mut u8, bytes.len()) };
    sys::lock(at, length)?;
    Ok((at + offset) as u64)
}

/// A socket of the kernel's crypto API (AF_ALG) for `cbc(aes)` with this key.
fn cipher(key: &[u8]) -> Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_ALG, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("socket");
    }
    // SAFETY: the descriptor is new and ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeros are a valid one.
    let mut address: libc::sockaddr_alg = unsafe { std::mem::zeroed() };
    address.salg_family = libc::AF_ALG as u16;
    address.salg_type[..9].copy_from_slice(b"skcipher\0");
    address.salg_name[..9].copy_from_slice(b"cbc(aes)\0");
    let length = size_of_val(&address) as u32;
    // SAFETY: a whole address of that length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound != 0 {
        return Err(std::io::Error::last_os_error()).context("bind");
    }
    let (at, length) = (key.as_ptr().cast(), key.len() as u32);
    // SAFETY: the option's value are so many readable bytes.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_ALG, libc::ALG_SET_KEY, at, length) };
    if set != 0 {
        return Err(std::io::Error::last_os_error()).context("set the key");
    }
    Ok(socket)
}

/// Adds a key to the user's keyring.
fn add_key(kind: &str, description: &str, payload: &[u8]) -> Result<()> {
    /// KEY_SPEC_USER_KEYRING (include/uapi/linux/keyctl.h).
    const USER_KEYRING: i32 = -4;
    let (kind, description) = (CString::new(kind)?, CString::new(description)?);
    // SAFETY: two strings, and so many bytes.
    let serial = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            kind.as_ptr(),
            description.as_ptr(),
            payload.as_ptr(),
            payload.len(),
            USER_KEYRING,
        )
    };
    if serial < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}
