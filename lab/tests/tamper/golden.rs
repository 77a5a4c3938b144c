//! Functions of the kernel and of a module that are jumped out of: held against what the distribution ships, which shows the bytes.

use std::sync::Arc;

use vmsight_analysis::baseline::{Source, Trusted};
use vmsight_analysis::{Context, Evidence, Finding, checks, run};
use vmsight_lab::orders::Tamper;
use vmsight_lab::{Kernel, modules};
use vmsight_target::TargetSpec;

use super::{Lab, MODULE};

pub(super) fn check(lab: &Lab, version: Kernel) {
    assert!(findings(lab, version).is_empty());
    for (symbol, module) in [("__x64_sys_sysinfo", None), ("ext4_readdir", Some("ext4"))] {
        let tamper = Tamper::Inline {
            symbol: symbol.to_owned(),
        };
        let done = lab.tamper(&tamper, false);
        let found = findings(lab, version);
        lab.tamper(&tamper, true);
        let [finding] = found.as_slice() else {
            panic!("{symbol}: {found:#?}")
        };
        assert!(finding.subject.contains(symbol), "{finding:#?}");
        assert_eq!(finding.module.as_deref(), module);
        let at = finding.address.unwrap();
        let bytes = |wanted: &str| {
            let of = |e: &Evidence| match e {
                Evidence::Bytes { what, bytes, .. } if what == wanted => Some(bytes.clone()),
                _ => None,
            };
            let found = finding.evidence.iter().find_map(of);
            found.unwrap_or_else(|| panic!("no {wanted}: {finding:#?}"))
        };
        // A byte of the jump may be what was there before.
        let mut jump = vec![0xe9];
        jump.extend((done.hook.wrapping_sub(done.object + 5) as u32).to_le_bytes());
        let skipped = usize::try_from(at.0 - done.object).unwrap();
        let now = bytes("bytes now");
        assert_eq!(jump.get(skipped..skipped + now.len()), Some(now.as_slice()));
        assert_ne!(now, bytes("bytes then"));
        let code = |e: &Evidence| e.to_string().starts_with("code then");
        assert!(finding.evidence.iter().any(code), "{finding:#?}");
    }
    assert!(findings(lab, version).is_empty());
}

/// With the files of our own modules everything is compared, or a note says what is not.
fn findings(lab: &Lab, version: Kernel) -> Vec<Finding> {
    let target = TargetSpec::Qmp(lab.guest.qmp_path().unwrap());
    let target = vmsight_target::attach(&target, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
    let kernel = vmsight_linux::Kernel::attach(target.memory, Default::default()).unwrap();
    let context = Context::new(kernel);
    let fetched = version.fetch().unwrap();
    let mut given = vec![fetched.vmlinuz(), fetched.modules_folder()];
    let own = modules::build(&fetched).unwrap();
    let loaded = |name: &str| context.modules().iter().any(|module| module.name == name);
    given.extend(
        own.into_iter()
            .filter(|path| loaded(path.file_stem().unwrap().to_str().unwrap())),
    );
    assert!(loaded(MODULE));
    let sources = given.iter().map(|path| Source::open(path).unwrap()).collect();
    let trusted = Trusted::read(&context, sources).unwrap_or_else(|e| panic!("{e}"));
    let outcome = run(
        &context.with_trusted(Arc::new(trusted)),
        &[&checks::GOLDEN],
        &|_| {},
    )
    .remove(0);
    let all = !outcome.notes.iter().any(|note| note.contains("not compared"));
    assert!(!outcome.failed && all, "{:?}", outcome.notes);
    outcome.findings
}
