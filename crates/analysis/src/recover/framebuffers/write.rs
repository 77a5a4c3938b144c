//! Framebuffers as PNG files.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use vmsight_linux::Kernel;

use super::{Framebuffer, Picture, WrittenPicture};
use crate::recover::output::{ExtractError, Manifest, create, digest, failure, name};

/// The colour of what is in no memory: one that screens hardly ever have.
const MISSING: [u8; 3] = [0xff, 0x00, 0xff];

/// Writes framebuffers as PNG files to the folder `into`, which must be new or empty, and a line of JSON on each to `manifest.jsonl`
/// there. `each` is told of every one as it is done. One of which no pixel is in memory gets no file.
///
/// # Errors
/// If the folder is there and not empty, or cannot be written to. What concerns one framebuffer is in its own row.
pub fn write(
    kernel: &Kernel,
    framebuffers: &[Framebuffer],
    into: &Path,
    mut each: impl FnMut(&WrittenPicture),
) -> Result<(), ExtractError> {
    let mut manifest = Manifest::new(into)?;
    for framebuffer in framebuffers {
        let mut done = WrittenPicture {
            framebuffer: framebuffer.clone(),
            output: None,
            missing: 0,
            sha256: None,
            failure: None,
        };
        let result = picture(kernel, framebuffer, into, &mut done);
        done.failure = failure(result, into, done.output.as_deref())?;
        manifest.add(&done)?;
        each(&done);
    }
    manifest.finish()
}

fn picture(
    kernel: &Kernel,
    framebuffer: &Framebuffer,
    into: &Path,
    done: &mut WrittenPicture,
) -> io::Result<()> {
    let Some(picture) = &framebuffer.picture else {
        let problem = framebuffer.problems.first();
        let reason = problem.map_or("its pixels were not found", |problem| problem.reason.as_str());
        return Err(io::Error::other(reason.to_owned()));
    };
    let at = PathBuf::from(name::component(&format!(
        "{}.png",
        framebuffer.name.replace('/', "-")
    )));
    let mut file = create(&into.join(&at))?;
    done.output = Some(at);
    encode(kernel, framebuffer, picture, &file, &mut done.missing)?;
    file.seek(SeekFrom::Start(0))?;
    done.sha256 = Some(digest(&mut file)?);
    Ok(())
}

/// Writes the picture, row by row.
fn encode(
    kernel: &Kernel,
    framebuffer: &Framebuffer,
    picture: &Picture,
    file: &File,
    missing: &mut u64,
) -> io::Result<()> {
    let side = |pixels| u32::try_from(pixels).map_err(io::Error::other);
    let (width, height) = (side(framebuffer.width)?, side(framebuffer.height)?);
    let mut encoder = png::Encoder::new(BufWriter::new(file), width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    let mut stream = writer.stream_writer()?;
    let pixel = picture.format.bytes();
    let mut row = vec![0; (framebuffer.width * pixel) as usize];
    for nth in 0..framebuffer.height {
        let at = picture.offset + nth * framebuffer.stride;
        let gaps = picture.pixels.read(kernel, &picture.memory, at, &mut row);
        let mut colours = picture.format.colours(&row);
        // A pixel may lie in two pages; the second gap begins where the first one ends, then.
        let mut next = 0;
        for gap in gaps {
            let first = (gap.start / pixel as usize).max(next);
            next = gap.end.div_ceil(pixel as usize);
            let gone = colours.get_mut(first * 3..next * 3).unwrap_or(&mut []);
            gone.chunks_exact_mut(3)
                .for_each(|colour| colour.copy_from_slice(&MISSING));
            *missing += next.saturating_sub(first) as u64;
        }
        stream.write_all(&colours)?;
    }
    stream.finish()?;
    writer.finish()?;
    Ok(())
}
