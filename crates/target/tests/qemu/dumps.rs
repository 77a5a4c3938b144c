//! Dumps of real machines through the same door.

use vmsight_arch::Gpa;
use vmsight_memory::GuestMemory;
use vmsight_target::{AttachOptions, TargetError, TargetKind, attach};

use crate::machine::Machine;

const MARKS: [&str; 4] = [
    "-device",
    "loader,addr=0x300000,data=0x1122334455667788,data-len=8",
    "-device",
    "loader,addr=0x100200000,data=0x99aabbccddeeff00,data-len=8",
];

#[test]
fn an_elf_core_of_qemu_has_memory_and_registers() {
    let vm = Machine::start(&["-m", "64", "-smp", "2", MARKS[0], MARKS[1]]);
    let path = vm.dir().join("core");
    vm.command(&format!(
        r#"{{"execute":"dump-guest-memory","arguments":{{"paging":false,"protocol":"file:{}"}}}}"#,
        path.display()
    ));
    let target = attach(
        &path.to_str().unwrap().parse().unwrap(),
        &AttachOptions::default(),
    )
    .unwrap();
    assert!(matches!(target.kind, TargetKind::Dump(_)));
    assert_eq!(target.name, "core");
    assert_eq!(
        target.memory.read_u64(Gpa(0x30_0000)).unwrap(),
        0x1122_3344_5566_7788
    );
    assert_eq!(target.registers(None).unwrap().len(), 2);
    assert_eq!(target.registers(Some(0)).unwrap()[0].rip, 0xfff0);
    assert!(target.pause().unwrap_err().to_string().contains("it is a dump"));
    let write = AttachOptions {
        write: true,
        ..AttachOptions::default()
    };
    let error = attach(&path.to_str().unwrap().parse().unwrap(), &write).unwrap_err();
    assert!(matches!(error, TargetError::DumpWrite { .. }), "{error}");
}

#[test]
fn a_memory_file_above_the_hole_is_laid_out_by_proof() {
    // The backend's own file, opened by its name: sparse, so 5 GiB cost nothing.
    let vm = Machine::start(&[
        "-machine",
        "q35,memory-backend=m",
        "-m",
        "5G",
        "-object",
        "memory-backend-file,id=m,size=5G,share=on,mem-path=DIR/ram",
        MARKS[0],
        MARKS[1],
        MARKS[2],
        MARKS[3],
    ]);
    let prove = |memory: &GuestMemory| match memory.read_u64(Gpa(0x1_0020_0000)) {
        Ok(0x99aa_bbcc_ddee_ff00) => Ok("the mark is there".to_owned()),
        other => Err(format!("{other:x?}")),
    };
    let options = AttachOptions {
        prove: Some(&prove),
        ..AttachOptions::default()
    };
    let spec = format!("raw:{}", vm.dir().join("ram").display()).parse().unwrap();
    let target = attach(&spec, &options).unwrap_or_else(|e| panic!("{e}"));
    assert!(
        target.notes[0].contains("split at 0x80000000"),
        "{:?}",
        target.notes
    );
    assert_eq!(
        target.memory.read_u64(Gpa(0x30_0000)).unwrap(),
        0x1122_3344_5566_7788
    );
    assert!(target.memory.read_u64(Gpa(0x8000_0000)).is_err());
    let refuse = |_: &GuestMemory| Err("nothing".to_owned());
    let options = AttachOptions {
        prove: Some(&refuse),
        ..AttachOptions::default()
    };
    let target = attach(&spec, &options).unwrap();
    assert!(
        target.notes[0].contains("no guest was found"),
        "{:?}",
        target.notes
    );
    assert_eq!(target.memory.regions().len(), 1);
}
