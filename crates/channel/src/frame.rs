//! Messages on the wire: four bytes of length, little-endian, then JSON.

use std::io::{Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ChannelError;

/// Most bytes of a [`crate::Request`].
pub const MAX_REQUEST: usize = 64 << 10;
/// Most bytes of a [`crate::Reply`].
pub const MAX_REPLY: usize = 1 << 20;

/// Sends one message, in one piece.
///
/// # Errors
/// Where the other side is gone or does not read.
pub fn write(mut to: impl Write, message: &impl Serialize, most: usize) -> Result<(), ChannelError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let len = bytes.len() - 4;
    let too_long = ChannelError::TooLong { bytes: len, most };
    match u32::try_from(len) {
        Ok(prefix) if len <= most => {
            for (to, from) in bytes.iter_mut().zip(prefix.to_le_bytes()) {
                *to = from;
            }
        }
        _ => return Err(too_long),
    }
    to.write_all(&bytes).map_err(ChannelError::io("send a message"))
}

/// Receives one message of at most `most` bytes.
///
/// # Errors
/// [`ChannelError::Closed`] at the end of the connection; others where the message is too long or not one of ours.
pub fn read<T: DeserializeOwned>(mut from: impl Read, most: usize) -> Result<T, ChannelError> {
    let mut prefix = [0; 4];
    from.read_exact(&mut prefix)
        .map_err(ChannelError::io("receive a message"))?;
    let len = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if len > most {
        return Err(ChannelError::TooLong { bytes: len, most });
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes)
        .map_err(ChannelError::io("receive a message"))?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Reply, Request};

    #[test]
    fn a_message_arrives_as_it_was_sent() {
        let mut wire = Vec::new();
        write(&mut wire, &Request::Hello { version: 7 }, MAX_REQUEST).unwrap();
        let mut from = wire.as_slice();
        assert!(matches!(
            read(&mut from, MAX_REQUEST).unwrap(),
            Request::Hello { version: 7 }
        ));
        assert!(matches!(
            read::<Request>(&mut from, MAX_REQUEST),
            Err(ChannelError::Closed)
        ));
    }

    #[test]
    fn hostile_messages_are_errors() {
        let read = |wire: &[u8]| read::<Request>(wire, MAX_REQUEST);
        assert!(matches!(
            read(&[0xff; 16]),
            Err(ChannelError::TooLong {
                bytes: 0xffff_ffff,
                ..
            })
        ));
        assert!(matches!(read(&[4, 0, 0]), Err(ChannelError::Closed)));
        assert!(matches!(read(&[4, 0, 0, 0, b'{']), Err(ChannelError::Closed)));
        assert!(matches!(
            read(&[2, 0, 0, 0, b'{', b'}']),
            Err(ChannelError::Message(_))
        ));
        // JSON nested deeper than the stack: the parser has a limit of its own.
        let mut deep = 60_000_u32.to_le_bytes().to_vec();
        deep.resize(60_004, b'[');
        assert!(matches!(read(&deep), Err(ChannelError::Message(_))));
    }

    #[test]
    fn nothing_too_long_is_sent() {
        let text = "x".repeat(100);
        let notice = Reply::Notice { hook: None, text };
        assert!(matches!(
            write(Vec::new(), &notice, 50),
            Err(ChannelError::TooLong { .. })
        ));
    }
}
