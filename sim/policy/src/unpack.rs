//! A bzImage's payload: the kernel as an ELF file, compressed.

use std::io::{Read, Take};

use crate::{ImageError, lz4};

/// No kernel is larger unpacked, in bytes.
const MOST: u64 = 1 << 30;

/// The kernel of a bzImage (Documentation/arch/x86/boot.rst: setup_sects, payload_offset and payload_length, since 2.08).
pub(crate) fn payload(image: &[u8]) -> Result<Vec<u8>, ImageError> {
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(ImageError::NoKernel);
    }
    let short = ImageError::CutShort;
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let sectors = match image.get(0x1f1) {
        // A zero stands for four, for the sake of very old kernels.
        Some(0) => 4,
        Some(&n) => usize::from(n),
        None => return Err(short),
    };
    let (Some(offset), Some(length)) = (word(0x248), word(0x24c)) else {
        return Err(short);
    };
    let start = (sectors + 1) * 512 + offset;
    let payload = start
        .checked_add(length)
        .and_then(|end| image.get(start..end))
        .ok_or(short)?;
    unpack(payload)
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>, ImageError> {
    match payload {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => all("xz", liblzma::read::XzDecoder::new(payload).take(MOST)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            // The length of the kernel follows the frame, as for every compression.
            let decoder = zstd::Decoder::with_buffer(payload).map(zstd::Decoder::single_frame);
            all("zstd", decoder.map_err(|cause| broken("zstd", cause))?.take(MOST))
        }
        [0x1f, 0x8b, ..] => all("gzip", flate2::read::GzDecoder::new(payload).take(MOST)),
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4::unpack(blocks, MOST).ok_or(ImageError::CutShort),
        [0x7f, b'E', b'L', b'F', ..] => Ok(payload.to_vec()),
        _ => Err(ImageError::Compression),
    }
}

fn all<R: Read>(how: &'static str, mut from: Take<R>) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).map_err(|cause| broken(how, cause))?;
    Ok(bytes)
}

fn broken(how: &'static str, cause: std::io::Error) -> ImageError {
    ImageError::Unpack { how, cause }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A bzImage around a payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn what_kernels_are_packed_with_is_unpacked() {
        let text = b"a kernel, as it were".repeat(100);
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&text).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let packed = [
            xz.finish().unwrap(),
            gzip.finish().unwrap(),
            zstd::encode_all(text.as_slice(), 1).unwrap(),
            lz4::tests::packed(&text),
        ];
        for mut payload in packed {
            // As the kernel's build leaves it.
            payload.extend((text.len() as u32).to_le_bytes());
            assert_eq!(super::payload(&image(&payload)).unwrap(), text);
            assert!(super::payload(&image(&payload[..payload.len() / 2])).is_err());
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(matches!(payload(b"MZ"), Err(ImageError::NoKernel)));
        assert!(matches!(payload(&image(b"LZO?")), Err(ImageError::Compression)));
        let whole = image(b"\x7fELF");
        assert_eq!(payload(&whole).unwrap(), b"\x7fELF");
        assert!(matches!(
            payload(&whole[..whole.len() - 1]),
            Err(ImageError::CutShort)
        ));
        assert!(matches!(payload(&whole[..0x24a]), Err(ImageError::CutShort)));
    }
}
