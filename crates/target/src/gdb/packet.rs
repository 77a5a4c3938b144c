//! Framing: `$data#checksum`, escapes and run lengths (gdb manual, appendix E.1).

/// Longest packet taken. QEMU's have at most 4 KiB of payload, escapes and hex included.
const MAX_PACKET: usize = 256 * 1024;

/// `data` as a packet.
pub(super) fn frame(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len() + 4);
    out.push(b'$');
    for byte in data {
        // The three that would end or escape a packet; run lengths are only in answers.
        if matches!(byte, b'$' | b'#' | b'}') {
            out.extend_from_slice(&[b'}', byte ^ 0x20]);
        } else {
            out.push(*byte);
        }
    }
    let sum = checksum(out.get(1..).unwrap_or_default());
    out.extend_from_slice(format!("#{sum:02x}").as_bytes());
    out
}

fn checksum(data: &[u8]) -> u8 {
    data.iter().fold(0, |sum, b| sum.wrapping_add(*b))
}

/// What a stream of bytes holds next.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Parsed {
    /// A packet's payload, and how many bytes of the stream it took with what came before it.
    Packet(Vec<u8>, usize),
    /// The stub did not understand our last packet; so many bytes were taken.
    Nak(usize),
    /// A packet whose checksum is wrong; so many bytes were taken.
    Broken(usize),
    /// Not whole yet.
    More,
    /// Longer than any packet.
    TooLong,
}

/// Looks for the next packet. Acknowledgements (`+`) and whatever else stands between packets are passed over.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    let Some(start) = bytes.iter().position(|b| matches!(b, b'$' | b'-')) else {
        return Parsed::More;
    };
    if bytes.get(start) == Some(&b'-') {
        return Parsed::Nak(start + 1);
    }
    let body = bytes.get(start + 1..).unwrap_or_default();
    let Some(end) = body.iter().position(|b| *b == b'#') else {
        return if body.len() > MAX_PACKET {
            Parsed::TooLong
        } else {
            Parsed::More
        };
    };
    let (raw, tail) = body.split_at(end);
    let Some(sum) = tail.get(1..3) else {
        return Parsed::More;
    };
    let taken = start + 1 + end + 3;
    let sum = std::str::from_utf8(sum)
        .ok()
        .and_then(|s| u8::from_str_radix(s, 16).ok());
    if sum != Some(checksum(raw)) {
        return Parsed::Broken(taken);
    }
    match unescape(raw) {
        Some(data) => Parsed::Packet(data, taken),
        None => Parsed::TooLong,
    }
}

/// Undoes `}x` and `c*n` (n − 29 more of c).
fn unescape(raw: &[u8]) -> Option<Vec<u8>> {
    let mut out: Vec<u8> = Vec::with_capacity(raw.len());
    let mut bytes = raw.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'}' => out.push(bytes.next().copied().unwrap_or_default() ^ 0x20),
            b'*' => {
                let count = usize::from(bytes.next().copied().unwrap_or_default().saturating_sub(29));
                let last = out.last().copied()?;
                out.resize(out.len() + count, last);
            }
            other => out.push(*other),
        }
        if out.len() > MAX_PACKET {
            return None;
        }
    }
    Some(out)
}

/// Hexadecimal text to bytes; `None` where it is none.
pub(super) fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |b: &u8| (*b as char).to_digit(16);
    text.chunks_exact(2)
        .map(|pair| match pair {
            [a, b] => u8::try_from(digit(a)? * 16 + digit(b)?).ok(),
            _ => None,
        })
        .collect()
}

/// Bytes to hexadecimal text.
pub(super) fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| {
            [
                DIGITS[usize::from(b >> 4)] as char,
                DIGITS[usize::from(b & 15)] as char,
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_back() {
        assert_eq!(frame(b"D"), b"$D#44");
        for data in [&b"qSupported"[..], b"}$#*", b""] {
            let framed = frame(data);
            if !data.contains(&b'*') {
                assert_eq!(parse(&framed), Parsed::Packet(data.to_vec(), framed.len()));
            }
        }
        assert_eq!(parse(b"+$OK#9a"), Parsed::Packet(b"OK".to_vec(), 7));
        assert_eq!(parse(b"+-$OK#9a"), Parsed::Nak(2));
        assert_eq!(parse(b"$OK#00x"), Parsed::Broken(6));
        assert_eq!(parse(b"$OK#9"), Parsed::More);
        assert_eq!(parse(b"+++"), Parsed::More);
        assert_eq!(
            parse(&[b"$".as_slice(), &[b'a'; MAX_PACKET + 2]].concat()),
            Parsed::TooLong
        );
    }

    #[test]
    fn runs_are_bounded() {
        // "0* " is four zeros: ' ' is 32, less 29.
        let sum = checksum(b"0* ");
        let text = format!("$0* #{sum:02x}");
        assert_eq!(
            parse(text.as_bytes()),
            Parsed::Packet(b"0000".to_vec(), text.len())
        );
        assert_eq!(unescape(b"*~"), None, "nothing to repeat");
        let bomb: Vec<u8> = std::iter::once(b'a')
            .chain(b"*~".iter().copied().cycle().take(1 << 20))
            .collect();
        assert_eq!(unescape(&bomb), None);
    }

    #[test]
    fn hex() {
        assert_eq!(from_hex(b"00fF10").unwrap(), [0, 255, 16]);
        assert_eq!(from_hex(b"0"), None);
        assert_eq!(from_hex(b"zz"), None);
        assert_eq!(to_hex(&[0, 255, 16]), "00ff10");
    }
}
