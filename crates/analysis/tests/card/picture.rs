//! VESA's linear framebuffer.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;

use vmsight_analysis::recover::DeviceMemory;
use vmsight_analysis::recover::framebuffers::{WrittenPicture, framebuffers, write};
use vmsight_lab::{Format, Guest, Kernel as Version};
use vmsight_linux::Kernel;

use crate::{boot, devices, dumped, kernel, shell, target};

/// 1024 x 768 with 32 bits a pixel, as SeaBIOS numbers it.
const MODE: &str = "vga=0x344";
const SIDES: (u32, u32) = (1024, 768);

/// Width, height and colours.
type Picture = (u32, u32, Vec<u8>);

fn decoded(path: &Path) -> Picture {
    let decoder = png::Decoder::new(BufReader::new(File::open(path).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut colours = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut colours).unwrap();
    (info.width, info.height, colours)
}

/// What QEMU shows on the card's screen.
fn shown(guest: &Guest) -> Picture {
    let path = guest.folder().join("screen.ppm");
    let file = serde_json::json!({ "filename": path.to_str().unwrap() });
    guest
        .qmp()
        .unwrap()
        .execute("screendump", file)
        .unwrap_or_else(|e| panic!("{e:?}"));
    let bytes = fs::read(path).unwrap();
    let head = format!("P6\n{} {}\n255\n", SIDES.0, SIDES.1);
    let colours = bytes.strip_prefix(head.as_bytes()).unwrap();
    (SIDES.0, SIDES.1, colours.to_vec())
}

/// The only framebuffer there is, and its picture.
fn only(kernel: &Kernel, devices: &DeviceMemory<'_>) -> (WrittenPicture, Option<Picture>) {
    let listing = framebuffers(kernel, devices).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(listing.warnings, [""; 0]);
    assert_eq!(listing.rows.len(), 1, "{listing:#?}");
    let folder = tempfile::tempdir().unwrap();
    let mut written = Vec::new();
    write(kernel, &listing.rows, folder.path(), |done| {
        written.push(done.clone())
    })
    .unwrap_or_else(|e| panic!("{e}"));
    let done = written.pop().unwrap();
    let picture = done.output.as_ref().map(|at| decoded(&folder.path().join(at)));
    (done, picture)
}

#[test]
fn what_is_on_a_vesa_screen_is_read_out_of_the_card_pixel_by_pixel() {
    read_and_refused(Version::V6_12);
}

#[test]
fn so_it_is_of_an_older_kernel() {
    read_and_refused(Version::V6_1);
}

fn read_and_refused(version: Version) {
    let guest = boot(version, &[MODE]);
    shell(
        &guest,
        "echo 0 >/sys/class/graphics/fbcon/cursor_blink
         printf '\\033[?25l\\033[2J' >/dev/tty1
         seq 1 2000000 2>/dev/null | head -c 3145728 >drawn
         dd if=drawn of=/dev/fb0 bs=3145728",
    );
    let expected = shown(&guest);
    // What was drawn is on the screen: its first lines are 1, 2, 3, …, and a pixel is blue, green, red, nothing.
    assert_eq!(expected.2[..6], [b'2', b'\n', b'1', b'4', b'\n', b'3']);

    let running = target(&guest);
    let live = kernel(running.memory.clone());
    let folder = tempfile::tempdir().unwrap();
    let dump = dumped(&guest, Format::Elf, &folder.path().join("core"));
    for (how, (done, picture)) in [
        ("running", only(&live, &devices(&running))),
        ("dumped", only(&dump.0, &dump.1)),
    ] {
        let row = &done.framebuffer;
        assert_eq!((row.name.as_str(), row.kind), ("fb0", "fbdev"), "{how}");
        assert_eq!(row.driver, "VESA VGA", "{how}");
        assert_eq!((row.format.as_str(), row.stride), ("XR24", 4096), "{how}");
        assert_eq!(row.pixels_in, Some("device"), "{how}");
        assert!(row.problems.is_empty(), "{how}: {row:?}");
        assert_eq!((done.missing, &done.failure), (0, &None), "{how}");
        let picture = picture.unwrap();
        assert_eq!((picture.0, picture.1), SIDES, "{how}");
        let wrong = picture.2.iter().zip(&expected.2).position(|(a, b)| a != b);
        assert_eq!(
            wrong.map(|at| at / 3),
            None,
            "{how}: it differs from this pixel on"
        );
    }

    let image = dumped(&guest, Format::Raw, &folder.path().join("image"));
    let nobody = DeviceMemory::new(|| Err("nobody tells".to_owned()));
    for ((done, picture), why) in [
        (only(&image.0, &image.1), "this dump has nothing at 0x"),
        (only(&live, &nobody), "out of reach: nobody tells"),
    ] {
        assert_eq!(done.framebuffer.pixels_in, Some("device"), "{done:?}");
        assert!(picture.is_none(), "{done:?}");
        assert!(done.failure.as_ref().is_some_and(|f| f.contains(why)), "{done:?}");
    }
}
