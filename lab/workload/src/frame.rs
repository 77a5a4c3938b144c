//! How the truth travels over a serial line: JSON, compressed, between markers, with its length and its SHA-256.
//!
//! A serial line under emulation loses no bytes as a rule, but "as a rule" is no ground truth. And each byte leaves the guest: half a
//! million of them take seconds, and minutes where the guest is one of a guest. Compressed they are a sixth of it.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use sha2::{Digest, Sha256};

/// Starts the header line, which ends in `<length> <sha-256>`: of what follows, as it is sent.
pub const BEGIN: &str = "@@VMSIGHT-TRUTH ";
/// The line after the document.
pub const END: &str = "@@VMSIGHT-END";
/// The line that says: the guest is quiet now, and stays so.
pub const READY: &str = "@@VMSIGHT-READY";
/// Starts the line that says why the workload could not be set up.
pub const FAILED: &str = "@@VMSIGHT-FAILED ";

/// What is wrong with a received document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// It has not (all) arrived yet.
    Incomplete,
    /// It arrived, but not as it was sent.
    Garbled(String),
}

/// Lower-case hex of the SHA-256 of `data`.
pub fn sha256_hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

/// No document is longer than this, in bytes: ten thousand processes take 4 MB.
const LONGEST: u64 = 64 << 20;

/// The bytes to send for one document.
pub fn pack(json: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(json)?;
    let packed = encoder.finish()?;
    let mut out = format!("{BEGIN}{} {}\n", packed.len(), sha256_hex(&packed)).into_bytes();
    out.extend_from_slice(&packed);
    out.extend_from_slice(format!("\n{END}\n").as_bytes());
    Ok(out)
}

/// Finds the last document in `received` and checks it.
pub fn unpack(received: &[u8]) -> Result<Vec<u8>, Broken> {
    let begin = find_last(received, BEGIN.as_bytes()).ok_or(Broken::Incomplete)?;
    let header = &received[begin + BEGIN.len()..];
    let line = header
        .iter()
        .position(|b| *b == b'\n')
        .ok_or(Broken::Incomplete)?;
    let words = String::from_utf8_lossy(&header[..line]);
    let mut words = words.split_ascii_whitespace();
    let (Some(Ok(length)), Some(digest)) = (words.next().map(str::parse::<usize>), words.next()) else {
        return Err(Broken::Garbled("the header is not a length and a digest".into()));
    };
    let body = &header[line + 1..];
    let tail = length
        .checked_add(1 + END.len())
        .ok_or_else(|| Broken::Garbled("an absurd length".into()))?;
    if body.len() < tail {
        return Err(Broken::Incomplete);
    }
    let packed = &body[..length];
    if !body[length..].starts_with(format!("\n{END}").as_bytes()) {
        return Err(Broken::Garbled(format!("no end marker after {length} bytes")));
    }
    if sha256_hex(packed) != digest {
        return Err(Broken::Garbled("the SHA-256 differs".into()));
    }
    let mut json = Vec::new();
    ZlibDecoder::new(packed)
        .take(LONGEST)
        .read_to_end(&mut json)
        .map_err(|error| Broken::Garbled(error.to_string()))?;
    Ok(json)
}

fn find_last(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    (0..=haystack.len().checked_sub(needle.len())?)
        .rev()
        .find(|&at| haystack[at..].starts_with(needle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_comes_back() {
        let mut line = b"noise on the line\n".to_vec();
        line.extend(pack(b"{\"a\":1}").unwrap());
        line.extend(pack(b"{\"a\":2}").unwrap());
        line.extend_from_slice(b"@@VMSIGHT-READY\n");
        assert_eq!(unpack(&line), Ok(b"{\"a\":2}".to_vec()));
    }

    #[test]
    fn every_truncation_is_incomplete_and_every_flip_is_seen() {
        let whole = pack(b"{\"name\":\"value\"}").unwrap();
        let end = whole.len() - 1;
        for cut in 0..end {
            assert_eq!(unpack(&whole[..cut]), Err(Broken::Incomplete), "cut at {cut}");
        }
        for at in 0..end {
            let mut bad = whole.clone();
            bad[at] ^= 0x01;
            assert!(unpack(&bad).is_err(), "flip at {at}");
        }
    }
}
