//! What is packed by gzip, xz or zstd, told by how it begins, and unpacked as it is read.

use std::io::{self, BufRead as _, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use liblzma::bufread::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};

/// Memory that xz may ask for to unpack something: its strongest level takes a quarter.
const MAX_DICTIONARY: u64 = 256 << 20;

/// What is in `from`, unpacked if it is packed.
pub(super) fn unpacked<'r>(from: impl Read + 'r) -> io::Result<Box<dyn Read + 'r>> {
    let mut from = BufReader::with_capacity(1 << 16, from);
    Ok(match from.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(from)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = Stream::new_stream_decoder(MAX_DICTIONARY, CONCATENATED)?;
            Box::new(XzDecoder::new_stream(from, stream))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(from)?),
        _ => Box::new(from),
    })
}

/// All of it, if that is at most `most` bytes.
pub(super) fn whole(from: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    unpacked(from)?
        .take(most.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it holds more than {most} bytes"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn each_form_is_unpacked_and_none_past_its_bound() {
        let text = b"the same thing again and again, the same thing again and again".repeat(50);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&text).unwrap();
        let forms = [
            text.clone(),
            gzip.finish().unwrap(),
            xz.finish().unwrap(),
            zstd::encode_all(text.as_slice(), 1).unwrap(),
        ];
        for (number, form) in forms.iter().enumerate() {
            assert_eq!(whole(form.as_slice(), 1 << 20).unwrap(), text, "form {number}");
            assert!(whole(form.as_slice(), 100).is_err(), "form {number}");
            let cut = whole(&form[..form.len() / 2], 1 << 20);
            assert!(cut.map_or(true, |bytes| bytes != text), "form {number}");
        }
        assert!(whole(&b""[..], 10).unwrap().is_empty());
    }
}
