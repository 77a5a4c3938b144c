//! Graphics cards: a known picture is on the screen of each.

use std::fs::{self, File, OpenOptions};
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vmsight_analysis::recover::DeviceMemory;
use vmsight_analysis::recover::framebuffers::{Framebuffer, WrittenPicture, framebuffers, write};
use vmsight_arch::Gva;
use vmsight_lab::Guest;
use vmsight_linux::{Kernel, Listing};

use crate::support::{SUBJECT, attach, load, shell};

/// One card with memory of its own, and one whose buffers are in the guest's.
pub(crate) const CARDS: [&str; 4] = ["-device", "bochs-display", "-device", "virtio-gpu-pci"];
/// How long the guest may take to bring what was drawn to a card's buffer.
const LIMIT: Duration = Duration::from_secs(120);
/// What is not in memory, in a picture.
const MISSING: [u8; 3] = [0xff, 0, 0xff];

/// A picture: width, height and colours.
type Picture = (u32, u32, Vec<u8>);

/// A listing of framebuffers, and what each is as a picture.
pub(crate) struct Pictures {
    pub(crate) listing: Listing<Framebuffer>,
    pub(crate) written: Vec<(WrittenPicture, Option<Picture>)>,
}

impl Pictures {
    pub(crate) fn of(kernel: &Kernel, devices: &DeviceMemory<'_>) -> Self {
        let listing = framebuffers(kernel, devices).unwrap_or_else(|e| panic!("{e}"));
        let folder = tempfile::tempdir().unwrap();
        let mut written = Vec::new();
        write(kernel, &listing.rows, folder.path(), |done| {
            written.push(done.clone())
        })
        .unwrap_or_else(|e| panic!("{e}"));
        let lines = fs::read_to_string(folder.path().join("manifest.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), written.len());
        let with_picture = |done: WrittenPicture| {
            let picture = done.output.as_ref().map(|at| decoded(&folder.path().join(at)));
            (done, picture)
        };
        Self {
            listing,
            written: written.into_iter().map(with_picture).collect(),
        }
    }

    fn one(&self, driver: &str) -> &(WrittenPicture, Option<Picture>) {
        let mut found = self
            .written
            .iter()
            .filter(|(done, _)| done.framebuffer.driver == driver);
        let one = found
            .next()
            .unwrap_or_else(|| panic!("no {driver}: {:#?}", self.listing));
        assert!(
            found.next().is_none(),
            "{driver} is there twice: {:#?}",
            self.listing
        );
        one
    }

    fn colours(&self, driver: &str) -> &[u8] {
        let (done, picture) = self.one(driver);
        let (.., colours) = picture.as_ref().unwrap_or_else(|| panic!("{done:?}"));
        colours
    }
}

fn decoded(path: &Path) -> Picture {
    let decoder = png::Decoder::new(BufReader::new(File::open(path).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut colours = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut colours).unwrap();
    assert_eq!(
        (info.color_type, info.bit_depth),
        (png::ColorType::Rgb, png::BitDepth::Eight)
    );
    (info.width, info.height, colours)
}

/// What is drawn: numbers, a line each, from this one on. No two pixels' neighbourhoods are the same.
fn drawn(first: u32) -> Vec<u8> {
    let text: String = (first..).take(700_000).map(|n| format!("{n}\n")).collect();
    let size = 1280 * 800 * 4;
    assert!(text.len() >= size);
    text.as_bytes()[..size].to_vec()
}

/// The colours that this is on a screen of 32 bits a pixel: blue, green, red, nothing.
fn colours(drawn: &[u8]) -> Vec<u8> {
    drawn
        .chunks(4)
        .flat_map(|pixel| [pixel[2], pixel[1], pixel[0]])
        .collect()
}

/// What is drawn on `fb0` and on `fb1`.
const FIRST: [u32; 2] = [1, 300_000];

pub(crate) fn load_drivers(guest: &Guest) {
    for module in [
        "drm",
        "drm_kms_helper",
        "drm_shmem_helper",
        "ttm",
        "drm_ttm_helper",
        "drm_vram_helper",
        "bochs",
        "virtio_ring",
        "virtio",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "virtio_pci",
        "virtio_dma_buf",
        "virtio_gpu",
    ] {
        load(guest, module);
    }
}

/// Draws, when all else has been done that the console might tell of, and no cursor blinks. Linux 6.1 does not always bring the last pixel
/// of a row to the card's buffer when it is written to in small pieces.
pub(crate) fn draw(guest: &Guest) {
    shell(
        guest,
        &format!(
            "until [ -e /dev/fb0 ] && [ -e /dev/fb1 ]; do sleep 0.1; done
             cat /sys/class/graphics/fb0/name /sys/class/graphics/fb1/name
             echo 0 >/sys/class/graphics/fbcon/cursor_blink
             printf '\\033[?25l\\033[2J' >/dev/tty1
             seq {} 2000000 2>/dev/null | head -c 4096000 >first
             seq {} 2000000 2>/dev/null | head -c 4096000 >second
             dd if=first of=/dev/fb0 bs=4096000
             dd if=second of=/dev/fb1 bs=4096000",
            FIRST[0], FIRST[1]
        ),
    );
}

/// The pictures of a running guest, when what was drawn has come to the cards' own buffers: the kernel takes it there later on.
pub(crate) fn when_shown(kernel: &Kernel, devices: &DeviceMemory<'_>) -> Pictures {
    let begin = Instant::now();
    let expected = [("bochs-drm", FIRST[0]), ("virtio_gpu", FIRST[1])]
        .map(|(driver, first)| (driver, colours(&drawn(first))));
    loop {
        let pictures = Pictures::of(kernel, devices);
        let all_shown = expected
            .iter()
            .all(|(driver, expected)| pictures.colours(driver) == expected);
        if all_shown || begin.elapsed() > LIMIT {
            return pictures;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn each_screen_is_what_was_drawn_on_it_pixel_by_pixel() {
    for (how, pictures) in &SUBJECT.pictures {
        assert_eq!(pictures.listing.warnings, [""; 0], "{how}");
        assert_eq!(pictures.listing.rows.len(), 4, "{how}: {:#?}", pictures.listing);
        for (driver, name, kind, first) in [
            ("bochs-drmdrmfb", "fb0", "fbdev", FIRST[0]),
            ("virtio_gpudrmfb", "fb1", "fbdev", FIRST[1]),
            ("virtio_gpu", "card1/", "drm", FIRST[1]),
        ] {
            let (done, picture) = pictures.one(driver);
            let row = &done.framebuffer;
            assert!(row.name.starts_with(name) && row.kind == kind, "{how}: {row:?}");
            assert_eq!(
                (row.format.as_str(), row.stride),
                ("XR24", 5120),
                "{how}: {row:?}"
            );
            assert_eq!(row.pixels_in, Some("memory"), "{how}: {row:?}");
            // The console is on the other card.
            assert_eq!(row.shown, (kind == "drm").then_some(false), "{how}: {row:?}");
            assert_eq!((done.missing, &done.failure), (0, &None), "{how}: {done:?}");
            let (width, height, got) = picture.as_ref().unwrap();
            assert_eq!((*width, *height), (1280, 800), "{how}");
            let wrong = got.iter().zip(colours(&drawn(first))).position(|(a, b)| *a != b);
            assert_eq!(
                wrong.map(|at| at / 3),
                None,
                "{how}: {driver} differs from this pixel on"
            );
        }
    }
}

#[test]
fn what_only_a_card_has_is_read_there_and_no_picture_is_made_up_where_it_cannot_be() {
    for (how, pictures) in &SUBJECT.pictures {
        let (done, picture) = pictures.one("bochs-drm");
        assert_eq!(done.framebuffer.pixels_in, Some("device"), "{how}: {done:?}");
        assert_eq!(done.framebuffer.shown, Some(true), "{how}: {done:?}");
        if *how == "running" {
            assert_eq!((done.missing, &done.failure), (0, &None), "{done:?}");
            let (.., got) = picture.as_ref().unwrap();
            let wrong = got
                .iter()
                .zip(colours(&drawn(FIRST[0])))
                .position(|(a, b)| *a != b);
            assert_eq!(wrong.map(|at| at / 3), None, "it differs from this pixel on");
            continue;
        }
        // The image has the guest's memory and nothing else.
        let failure = done.failure.as_ref().unwrap();
        assert!(
            picture.is_none() && failure.contains("out of reach"),
            "{how}: {done:?}"
        );
    }
}

/// What a target that is a dump says of its devices. A file that somebody writes to, as tampering does, is not taken for one.
pub(crate) fn dumped() -> DeviceMemory<'static> {
    DeviceMemory::new(|| Err("it is a dump".to_owned()))
}

/// What the dump says after it was tampered with.
pub(crate) struct Forged {
    /// The screens' sizes are none that can be; the card's list of framebuffers has no end.
    sizes: Pictures,
    /// The pixels begin where the memory that they are in nearly ends.
    ends: Pictures,
}

/// Bytes that are left of the pixels.
const LEFT: u64 = 64 << 10;

/// Tampers with a raw dump, in which a physical address is an offset.
pub(crate) fn forge(path: &Path, kernel: &Kernel, pictures: &Pictures) -> Forged {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let put = |at: Gva, bytes: &[u8]| {
        let gpa = kernel.space().translate(at).unwrap().gpa;
        file.write_all_at(bytes, gpa.0).unwrap();
    };
    let info = |member: &str, of: &str| {
        let at = pictures.one(of).0.framebuffer.address;
        at.wrapping_add(kernel.offset("fb_info", member).unwrap())
    };
    let start = pictures.one("virtio_gpudrmfb").0.framebuffer.pixels_at.unwrap();
    let late = start.wrapping_add(1280 * 800 * 4 - LEFT);
    put(info("screen_base", "virtio_gpudrmfb"), &late.0.to_le_bytes());
    let ends = Pictures::of(&attach(path), &dumped());
    put(info("var.xres", "bochs-drmdrmfb"), &u32::MAX.to_le_bytes());
    put(info("var.yres", "virtio_gpudrmfb"), &60_000u32.to_le_bytes());
    // The first member of a framebuffer of DRM is the device, the second one its node in the list.
    let looped = pictures.one("virtio_gpu").0.framebuffer.address.wrapping_add(8);
    put(looped, &looped.0.to_le_bytes());
    Forged {
        sizes: Pictures::of(&attach(path), &dumped()),
        ends,
    }
}

#[test]
fn sizes_that_cannot_be_are_no_pictures_and_a_list_without_end_is_cut() {
    let forged = &SUBJECT.forged.sizes;
    for driver in ["bochs-drmdrmfb", "virtio_gpudrmfb"] {
        let (done, picture) = forged.one(driver);
        assert!(picture.is_none() && done.failure.is_some(), "{done:?}");
        assert!(!done.framebuffer.problems.is_empty(), "{done:?}");
    }
    let warnings = &forged.listing.warnings;
    assert!(
        warnings.iter().any(|w| w.starts_with("framebuffers of card1")),
        "{warnings:?}"
    );
}

#[test]
fn pixels_that_are_nowhere_are_counted_and_have_a_colour_of_their_own() {
    let (done, picture) = SUBJECT.forged.ends.one("virtio_gpudrmfb");
    let (.., got) = picture.as_ref().unwrap();
    let drawn = colours(&drawn(FIRST[1]));
    let (known, beyond) = got.split_at(LEFT as usize / 4 * 3);
    assert!(drawn.ends_with(known));
    // Behind what the kernel maps there is at least a page that is nothing.
    let magenta = beyond.chunks(3).take_while(|colour| *colour == MISSING).count() as u64;
    assert!(magenta >= 1024 && done.missing >= magenta, "{magenta}: {done:?}");
}
