//! The image's linker script. Cargo passes it on for the program only, which is built with the feature `freestanding`.

fn main() {
    println!("cargo:rerun-if-changed=link.ld");
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rustc-link-arg-bins=-T{folder}/link.ld");
}
