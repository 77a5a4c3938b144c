//! Builds the programs that run without an operating system, to be part of the library: whoever has vmsight has them.
//!
//! Where they cannot be built, as on another architecture without a linker for this one, the library is built without them
//! and says why when they are asked for.

#[path = "build/freestanding.rs"]
mod freestanding;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use freestanding::{Source, TARGET, workspace};
use object::{Object, ObjectSegment};
use rustix::fs::{FlockOperation, flock};

/// The name under which `src/programs.rs` includes each, what it is made of, and whether what is wanted is what of it is
/// loaded into memory.
const PROGRAMS: [(&str, Source, bool); 8] = [
    ("HYPERVISOR", hypervisor(""), false),
    ("TWO_VIEWS", hypervisor("two-views"), false),
    ("TWO_VIEWS_APT", hypervisor("two-views-apt"), false),
    ("GUEST_TABLES", hypervisor("guest-tables"), false),
    (
        "MONITOR",
        Source {
            package: "vmsight-sim-monitor",
            program: "vmsight-monitor",
            features: "",
        },
        true,
    ),
    (
        "ENDLESS_MONITOR",
        Source {
            package: "vmsight-sim-monitor",
            program: "vmsight-monitor",
            features: "endless",
        },
        true,
    ),
    (
        "TRIAL",
        Source {
            package: "vmsight-sim-trial",
            program: "vmsight-trial",
            features: "",
        },
        true,
    ),
    (
        "WITNESS",
        Source {
            package: "vmsight-sim-witness",
            program: "vmsight-witness",
            features: "",
        },
        false,
    ),
];

const fn hypervisor(features: &'static str) -> Source {
    Source {
        package: "vmsight-sim-hypervisor",
        program: "vmsight-hypervisor",
        features,
    }
}

fn main() -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo does not say where to write")?);
    let target = target(&out);
    watch();
    let mut code = String::new();
    for (name, source, flat) in &PROGRAMS {
        let value = match build(source, *flat, &target) {
            Ok(bytes) => {
                let path = out.join(name);
                fs::write(&path, bytes)
                    .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
                format!("Ok(include_bytes!({path:?}))")
            }
            Err(why) => {
                println!(
                    "cargo:warning=vmsight sim will not work: {}",
                    why.replace('\n', " ")
                );
                format!("Err({why:?})")
            }
        };
        code.push_str(&format!("const {name}: Built = {value};\n"));
    }
    fs::write(out.join("programs.rs"), code).map_err(|error| format!("cannot write programs.rs: {error}"))
}

/// One target folder for all profiles and variants of this build script, beside theirs, so that each program is built once.
fn target(out: &Path) -> PathBuf {
    let shared = out
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").is_file());
    shared.unwrap_or(out).join("sim")
}

/// What the programs are built from: all packages beside this one, and those below them.
fn watch() {
    let workspace = workspace();
    let mut paths = vec![
        workspace.join("Cargo.lock"),
        workspace.join("Cargo.toml"),
        workspace.join("crates/arch"),
        workspace.join("sim/image/build"),
        workspace.join("sim/image/build.rs"),
    ];
    if let Ok(folder) = fs::read_dir(workspace.join("sim")) {
        let packages = folder.flatten().map(|entry| entry.path());
        paths.extend(packages.filter(|path| !path.ends_with("image")));
    }
    for path in paths {
        println!("cargo:rerun-if-changed={}", path.display());
    }
}

fn build(source: &Source, flat: bool, target: &Path) -> Result<Vec<u8>, String> {
    // Variants of the hypervisor have one name, and builds of other profiles are at work in the same folder.
    fs::create_dir_all(target).map_err(|error| format!("cannot make {}: {error}", target.display()))?;
    let path = target.join("lock");
    let locked = File::create(&path).and_then(|file| {
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    });
    let _lock = locked.map_err(|error| format!("cannot lock {}: {error}", path.display()))?;
    source.cargo("build", target, &[])?;
    let path = target.join(TARGET).join("release").join(source.program);
    let bytes = fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    match flat {
        true => flatten(&bytes).map_err(|why| format!("{}: {why}", path.display())),
        false => Ok(bytes),
    }
}

/// What an ELF file loads, from its lowest address on.
fn flatten(bytes: &[u8]) -> Result<Vec<u8>, String> {
    /// No program of ours is longer.
    const MOST: u64 = 16 << 20;
    let file = object::File::parse(bytes).map_err(|error| error.to_string())?;
    let base = file.segments().map(|s| s.address()).min();
    let base = base.ok_or("it loads nothing")?;
    let mut image = Vec::new();
    for segment in file.segments() {
        let data = segment.data().map_err(|error| error.to_string())?;
        let start = segment.address() - base;
        let end = start.saturating_add(data.len() as u64);
        if end > MOST {
            return Err(format!("it loads {end} bytes"));
        }
        let (start, end) = (start as usize, end as usize);
        if image.len() < end {
            image.resize(end, 0);
        }
        if let Some(slot) = image.get_mut(start..end) {
            slot.copy_from_slice(data);
        }
    }
    Ok(image)
}
