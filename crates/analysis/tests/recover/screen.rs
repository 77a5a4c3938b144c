//! What was written to a console that is not in front.

use vmsight_analysis::recover::DeviceMemory;
use vmsight_analysis::recover::screen::{Console, consoles};
use vmsight_linux::{Kernel, Listing};

use crate::support::{Forgery, subject};

/// The guest has no card.
fn listing(kernel: &Kernel) -> Listing<Console> {
    let nobody = DeviceMemory::new(|| panic!("no console here is a card's"));
    consoles(kernel, &nobody).unwrap()
}

fn second(rows: &[Console]) -> &Console {
    rows.iter()
        .find(|row| row.tty == "tty2")
        .unwrap_or_else(|| panic!("{rows:#?}"))
}

#[test]
fn the_text_of_a_console_behind_the_one_in_front_is_there() {
    let subject = subject();
    for (how, kernel) in subject.both() {
        let listing = listing(&kernel);
        assert_eq!(listing.warnings, [""; 0], "{how}");
        assert!(
            listing.rows.iter().any(|row| row.foreground && row.tty == "tty1"),
            "{how}"
        );
        let console = second(&listing.rows);
        assert_eq!(
            console.text.as_deref(),
            Some("on the second console\n\n  and red, further down"),
            "{how}: {console:?}"
        );
        assert!(!console.foreground && console.problems.is_empty(), "{how}");
        assert_eq!((console.columns, console.rows), (80, 25), "{how}");
        assert_eq!(console.attributes.len(), 25);
        // Six cells as they were, three red ones, the rest as it was.
        assert_eq!(console.attributes[2], "07x6 04x3 07x71", "{how}");
        assert_eq!(console.cursor, Some((0, 3)), "{how}");
        assert_eq!(console.text_in, Some("memory"), "{how}");
    }
}

#[test]
fn a_console_that_lies_about_its_size_costs_its_row() {
    let subject = subject();
    let forged = Forgery::of(&subject);
    let address = second(&listing(&forged.kernel).rows).address;
    for member in ["vc_cols", "vc_rows", "vc_size_row"] {
        let forged = Forgery::of(&subject);
        forged.put(forged.member("vc_data", member, address), &u32::MAX.to_le_bytes());
        let rows = listing(&forged.forged()).rows;
        let console = second(&rows);
        assert!(
            console.text.is_none() && !console.problems.is_empty(),
            "{member}: {console:?}"
        );
    }
}
