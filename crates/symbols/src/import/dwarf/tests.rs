//! What a compiler says of C code in DWARF, against what it says of the same code at run time.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::import::{FileKind, Imported, open};
use crate::types::{Kind, Kinds, TypeId};

const SOURCE: &str = r#"
typedef __builtin_va_list list_t;
typedef unsigned long size_t;
#define offset_of(type, member) __builtin_offsetof(struct type, member)
typedef struct { int counter; } atomic_t;
enum state { GONE = -1, HERE = 7, FAR = 200, FARTHER = 40000 };
enum { LOOSE = 1234 };
static int loose __attribute__((used)) = LOOSE;
enum big { HUGE_ONE = 0x10000000000ull };
enum flags { TOP = 0xffffffffu };
struct hidden;
union sigval { int number; void *pointer; };
struct list_head { struct list_head *next, *prev; };
struct task {
    struct list_head tasks;
    atomic_t usage;
    union { int a; unsigned b; };
    struct { char c; long d; } inner[2];
    unsigned one : 1, three : 3;
    unsigned long long wide : 40;
    enum state state;
    enum flags flags;
    const volatile char *restrict name;
    int (*call)(struct task *, const char *, ...);
    struct hidden *secret;
    union sigval values[3][5];
    _Bool done;
    double number;
    char rest[];
};
struct later;
struct earlier { struct later *later; };
struct later { struct earlier earlier; int x; };
enum big big_one;
struct task the_task;
struct later the_later;
static int counter __attribute__((used));
int numbers[17];
const char linux_banner[] = "Linux version 9.9.9 (compiler)\n";
const unsigned long facts[] = {
    sizeof(struct task), offset_of(task, usage), offset_of(task, b), offset_of(task, inner), offset_of(task, state),
    offset_of(task, name), offset_of(task, call), offset_of(task, values), offset_of(task, number),
    offset_of(task, rest), offset_of(later, x), sizeof(enum big), offset_of(task, inner[1].d), 0x600dda7a,
};
"#;

/// Compiles the source with the options given.
fn compiled(options: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (source, object) = (dir.path().join("a.c"), dir.path().join("a.so"));
    std::fs::write(&source, SOURCE).unwrap();
    // The linker that Rust itself needs to build this test is a C compiler.
    let run = Command::new("cc")
        .args([
            "-O1",
            "-w",
            "-shared",
            "-nostdlib",
            "-fPIC",
            "-Wl,--build-id=sha1",
            "-o",
        ])
        .args([&object, &source])
        .args(options)
        .output()
        .expect("a C compiler is there, as Rust needs one to link");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    (dir, object)
}

/// The numbers that the compiler put into `facts`.
fn facts(path: &Path, imported: &Imported) -> Vec<u64> {
    use object::{Object, ObjectSection};
    let data = std::fs::read(path).unwrap();
    let file = object::File::parse(&*data).unwrap();
    let address = imported.symbols.as_ref().unwrap().address("facts").unwrap();
    let bytes = file
        .sections()
        .find_map(|s| s.data_range(address, 14 * 8).ok().flatten())
        .unwrap();
    bytes
        .chunks(8)
        .map(|b| u64::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

#[test]
fn dwarf_tells_what_the_compiler_did() {
    for options in [
        &["-gdwarf-5"][..],
        &["-gdwarf-4"],
        &["-gdwarf-3", "-gstrict-dwarf"],
        &["-gdwarf-5", "-gz=zlib"],
    ] {
        let (_dir, object) = compiled(options);
        let imported = open(&object).unwrap();
        assert_eq!(
            (imported.kind, imported.notes.as_slice()),
            (FileKind::Dwarf, &[][..]),
            "{options:?}"
        );
        assert_eq!(imported.build_id.as_ref().map(Vec::len), Some(20));
        assert_eq!(imported.banner.as_deref(), Some("Linux version 9.9.9 (compiler)"));
        let types = imported.types.as_ref().unwrap();
        let offset = |of, path| {
            types
                .member(of, path)
                .unwrap_or_else(|| panic!("{of}.{path}"))
                .offset
        };
        let task = types.find_struct("task").unwrap();
        let told = [
            types.size_of(task).unwrap(),
            offset("task", "usage"),
            offset("task", "b"),
            offset("task", "inner"),
            offset("task", "state"),
            offset("task", "name"),
            offset("task", "call"),
            offset("task", "values"),
            offset("task", "number"),
            offset("task", "rest"),
            offset("later", "x"),
            types.size_of(types.find_enum("big").unwrap()).unwrap(),
            offset("task", "inner[1].d"),
            0x600d_da7a,
        ];
        assert_eq!(facts(&object, &imported), told, "{options:?}");

        let bits = |path| {
            types
                .member("task", path)
                .map(|f| (f.offset * 8 + u64::from(f.bit_offset), f.bit_size))
        };
        let (one, three, wide) = (
            bits("one").unwrap(),
            bits("three").unwrap(),
            bits("wide").unwrap(),
        );
        assert_eq!((one.1, three.1, wide.1), (Some(1), Some(3), Some(40)));
        assert_eq!(three.0, one.0 + 1);
        // 40 bits of an 8-byte unit follow the 4 bits before, within the same unit.
        assert_eq!(wide.0, one.0 + 4, "{options:?}");

        let spelled = |path| types.type_name(types.member("task", path).unwrap().type_id);
        assert_eq!(spelled("call"), "int (*)(struct task *, const char *, ...)");
        // Which qualifier comes first is the compiler's choice.
        let name = spelled("name");
        assert!(
            ["const volatile char *restrict", "volatile const char *restrict"].contains(&&*name),
            "{name}"
        );
        assert_eq!(spelled("values"), "union sigval [3][5]");
        assert_eq!(spelled("usage"), "atomic_t");
        assert_eq!(spelled("secret"), "struct hidden *");
        assert_eq!(spelled("rest"), "char []");
        assert_eq!(spelled("done"), "_Bool");
        assert_eq!(
            types
                .get(types.find("hidden", Kinds::FWD).unwrap())
                .unwrap()
                .kind(),
            Kind::Fwd
        );
        assert_eq!(
            (types.enumerator("GONE"), types.enumerator("HERE")),
            (Some(-1), Some(7))
        );
        assert_eq!(
            (types.enumerator("FAR"), types.enumerator("FARTHER")),
            (Some(200), Some(40_000))
        );
        assert_eq!(types.enumerator("LOOSE"), Some(1234));
        assert_eq!(types.enumerator("HUGE_ONE"), Some(1 << 40));
        assert_eq!(types.enumerator("TOP"), Some(0xffff_ffff), "{options:?}");
        // Declared first, defined later: one type.
        let (earlier, later) = (
            types.find_struct("earlier").unwrap(),
            types.find_struct("later").unwrap(),
        );
        let pointer = types.get(types.members(earlier).next().unwrap().type_id).unwrap();
        assert_eq!(pointer.target(), Some(later));
        assert_eq!(types.find("later", Kinds::FWD), None);

        assert_eq!(types.variable("the_task"), Some(task));
        assert_eq!(types.type_name(types.variable("numbers").unwrap()), "int [17]");
        assert_eq!(
            types.type_name(types.variable("counter").unwrap_or(TypeId(u32::MAX))),
            "int"
        );
        let symbols = imported.symbols.as_ref().unwrap();
        assert_eq!(symbols.find("the_task").next().map(|s| s.kind), Some(b'B'));
        assert_eq!(symbols.find("counter").next().map(|s| s.kind), Some(b'b'));
        assert_eq!(symbols.find("linux_banner").next().map(|s| s.kind), Some(b'R'));
    }
}

#[test]
fn damaged_dwarf_gives_notes_or_an_error() {
    let (dir, object) = compiled(&["-gdwarf-5"]);
    let good = std::fs::read(&object).unwrap();
    let path = dir.path().join("bad.so");
    // A generator of our own, so that a failure can be repeated.
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..300 {
        let mut bad = good.clone();
        for _ in 0..1 + round % 24 {
            let at = random() as usize % bad.len();
            bad[at] = random() as u8;
        }
        if round % 10 == 0 {
            bad.truncate(random() as usize % good.len());
        }
        std::fs::write(&path, &bad).unwrap();
        if let Ok(imported) = open(&path) {
            imported.types.iter().for_each(crate::types::random::exercise);
        }
    }
}

#[test]
fn a_relocatable_object_is_refused() {
    let (dir, _) = compiled(&[]);
    let object = dir.path().join("a.o");
    let run = Command::new("cc")
        .args(["-g", "-w", "-c", "-o"])
        .arg(&object)
        .arg(dir.path().join("a.c"))
        .status();
    assert!(run.unwrap().success());
    assert!(open(&object).unwrap_err().to_string().contains("relocatable"));
    let (_dir, stripped) = compiled(&["-s"]);
    let error = open(&stripped).unwrap_err().to_string();
    assert!(error.contains("neither symbols, BTF nor DWARF"), "{error}");
}
