//! Whose a page is that was the kernel's image's at boot, and was given back.

use vmsight_analysis::frames::Frames;
use vmsight_arch::Gpa;

use crate::support::subject;

#[test]
fn what_was_given_back_of_the_image_after_boot_is_the_images_no_more() {
    let subject = subject();
    for (how, kernel) in subject.both() {
        let image = kernel.image();
        let gpa = |symbol: &str| {
            let at = kernel.symbol(symbol).unwrap_or_else(|e| panic!("{how}: {e}"));
            Gpa(image.phys.0 + (at.0 - image.text.0))
        };
        let banner = gpa("linux_banner");
        let (begin, end) = (gpa("__init_begin"), gpa("__init_end"));
        let given_back: Vec<Gpa> = (begin.0..end.0).step_by(4096).map(Gpa).collect();
        assert!(given_back.len() > 100, "{how}");
        let frames = Frames::find(&kernel, given_back.iter().copied().chain([banner]));
        let of_image = |gpa: &Gpa| {
            let mut holders = frames.of(*gpa).iter();
            holders.any(|holder| holder.place.as_deref() == Some("kernel image"))
        };
        assert!(of_image(&banner), "{how}");
        let still: Vec<&Gpa> = given_back.iter().filter(|gpa| of_image(gpa)).collect();
        assert!(still.is_empty(), "{how}: {still:?} of {}", given_back.len());
        assert!(given_back.iter().all(|gpa| !frames.of(*gpa).is_empty()), "{how}");
    }
}
