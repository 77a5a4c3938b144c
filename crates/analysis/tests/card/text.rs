//! VGA's text mode.

use vmsight_analysis::recover::DeviceMemory;
use vmsight_analysis::recover::screen::{Console, consoles};
use vmsight_arch::Gva;
use vmsight_lab::{Format, Guest, Kernel as Version};
use vmsight_linux::Kernel;

use crate::{boot, devices, dumped, kernel, shell, target};

/// What the guest says of the console in front: `/dev/vcsa1`.
struct Account {
    columns: u64,
    rows: u64,
    cursor: (u64, u64),
    text: String,
    attributes: Vec<String>,
}

impl Account {
    fn of(guest: &Guest) -> Self {
        let hex = shell(guest, "hexdump -v -e '1/1 \"%02x\"' /dev/vcsa1");
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let bytes: Vec<u8> = (0..hex.trim().len()).step_by(2).map(byte).collect();
        let (head, cells) = bytes.split_at(4);
        let columns = usize::from(head[1]);
        let mut lines = Vec::new();
        let mut attributes = Vec::new();
        for row in cells.chunks_exact(columns * 2) {
            let text: String = row.chunks(2).map(|cell| char::from(cell[0])).collect();
            lines.push(text.trim_end().to_owned());
            let colours: Vec<u8> = row.chunks(2).map(|cell| cell[1]).collect();
            let runs = colours.chunk_by(|a, b| a == b);
            let runs: Vec<String> = runs.map(|run| format!("{:02x}x{}", run[0], run.len())).collect();
            attributes.push(runs.join(" "));
        }
        Self {
            columns: columns as u64,
            rows: u64::from(head[0]),
            cursor: (u64::from(head[2]), u64::from(head[3])),
            text: lines.join("\n").trim_end().to_owned(),
            attributes,
        }
    }
}

fn front(kernel: &Kernel, devices: &DeviceMemory<'_>) -> Console {
    let listing = consoles(kernel, devices).unwrap();
    assert_eq!(listing.warnings, [""; 0]);
    let mut rows = listing.rows.into_iter();
    rows.find(|row| row.foreground).unwrap()
}

fn is_out_of_reach(console: &Console, why: &str) {
    assert_eq!((&console.text, console.text_in), (&None, None), "{console:?}");
    let reason = &console.problems[0].reason;
    assert!(reason.contains(why), "{reason}");
}

#[test]
fn the_console_in_front_is_read_out_of_the_card() {
    read_and_refused(Version::V6_1);
}

#[test]
fn so_it_is_of_a_newer_kernel() {
    read_and_refused(Version::V6_12);
}

fn read_and_refused(version: Version) {
    let guest = boot(version, &[]);
    // More than fits: the screen begins further down in the card's memory then.
    shell(
        &guest,
        "seq 1 60 >/dev/tty1; printf 'in front, and \\033[1;31;44mred on blue\\033[0m, down here\\r\\n  $ ' >/dev/tty1",
    );
    let account = Account::of(&guest);
    assert!(
        account
            .text
            .ends_with("60\nin front, and red on blue, down here\n  $")
    );

    let running = target(&guest);
    let live = kernel(running.memory.clone());
    let folder = tempfile::tempdir().unwrap();
    let dump = dumped(&guest, Format::Elf, &folder.path().join("core"));
    for (how, console) in [
        ("running", front(&live, &devices(&running))),
        ("dumped", front(&dump.0, &dump.1)),
    ] {
        assert_eq!(console.tty, "tty1", "{how}");
        assert_eq!(console.text.as_ref(), Some(&account.text), "{how}: {console:?}");
        assert_eq!(console.attributes, account.attributes, "{how}");
        assert_eq!(
            (console.columns, console.rows, console.cursor),
            (account.columns, account.rows, Some(account.cursor)),
            "{how}"
        );
        assert_eq!(console.text_in, Some("device"), "{how}");
        assert!(console.problems.is_empty(), "{how}: {console:?}");
    }
    // All that looks through a guest's memory does not look through its card's.
    let card = running.device_memory().unwrap();
    assert!(!card.regions().is_empty());
    for region in card.regions() {
        assert_eq!(running.memory.region_of(region.start), None);
    }

    let image = dumped(&guest, Format::Raw, &folder.path().join("image"));
    is_out_of_reach(&front(&image.0, &image.1), "this dump has nothing at 0x");
    let nobody = DeviceMemory::new(|| Err("nobody tells".to_owned()));
    is_out_of_reach(&front(&live, &nobody), "out of reach: nobody tells");

    // A guest that lies costs itself its row. It stands still, and nobody lets it go on.
    guest
        .qmp()
        .unwrap()
        .execute("stop", serde_json::json!({}))
        .unwrap();
    let put = |at: Gva, value: u64| {
        let gpa = live.space().translate(at).unwrap().gpa;
        live.memory().write(gpa, &value.to_le_bytes()).unwrap();
    };
    let origin = front(&live, &nobody)
        .address
        .wrapping_add(live.offset("vc_data", "vc_origin").unwrap());
    let cells = live.space().read_u64(origin).unwrap();
    let window = live.space().translate(Gva(cells)).unwrap().gpa.0;
    for (cells, why) in [
        // The last cell of the window; one behind it; one that is none; what is mapped nowhere.
        (cells - window + 0xb_fffe, "no cells in the window"),
        (cells - window + 0xc_0000, "no cells in the window"),
        (cells + 1, "no cells in the window"),
        (8, "out of reach"),
    ] {
        put(origin, cells);
        is_out_of_reach(&front(&live, &devices(&running)), why);
    }
    put(origin, cells);
    let card = live.symbol("vga_default").unwrap();
    let resource =
        Gva(live.space().read_u64(card).unwrap()).wrapping_add(live.offset("pci_dev", "resource").unwrap());
    put(resource, 0x1000);
    is_out_of_reach(&front(&live, &devices(&running)), "no device with memory at 0x");
    put(card, 0);
    is_out_of_reach(
        &front(&live, &devices(&running)),
        "has no memory in the guest's address space",
    );
}
