//! Dumps, which need no VMM.

use std::path::Path;

use vmsight_memory::dump::{self, Dump, DumpFormat};

use super::AttachOptions;
use crate::target::{Control, Target, TargetKind};
use crate::{TargetError, TargetSpec};

/// Opens a dump. `prefix` is the format that the user forces.
pub(super) fn attach(
    path: &Path,
    prefix: Option<&str>,
    options: &AttachOptions<'_>,
) -> Result<Target, TargetError> {
    if options.write {
        return Err(TargetError::DumpWrite {
            path: path.to_owned(),
        });
    }
    let known = |name: &str| DumpFormat::NAMED.iter().find(|(known, _)| *known == name);
    let format = match prefix.map(|name| (name, known(name))) {
        None => None,
        Some((_, Some(&(_, format)))) => Some(format),
        Some((name, None)) => {
            let spec = TargetSpec::File {
                path: path.to_owned(),
                format: Some(name.to_owned()),
            };
            let names: Vec<_> = DumpFormat::NAMED.iter().map(|(name, _)| *name).collect();
            return Err(TargetError::BadSpec {
                spec: spec.to_string(),
                reason: format!("the formats are {}", names.join(", ")),
            });
        }
    };
    let mut dump = dump::open(path, format)?;
    let mut notes = Vec::new();
    if let DumpFormat::Raw(_) = dump.format
        && let Some(note) = lay_out(&mut dump, options)?
    {
        notes.push(note);
    }
    notes.extend(dump.notes);
    let name = path
        .file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned();
    Ok(Target {
        memory: dump.memory,
        name,
        kind: TargetKind::Dump(dump.format),
        notes,
        info: None,
        vmcoreinfo: dump.vmcoreinfo,
        ahead: false,
        control: Control::Dump(dump.registers),
    })
}

/// A raw image does not say where the memory above the hole belongs: the layout in which a guest is found is taken.
/// Where none is, it stays flat, and a note says so.
fn lay_out(dump: &mut Dump, options: &AttachOptions<'_>) -> Result<Option<String>, TargetError> {
    let layouts = dump.layouts();
    let (Some(prove), true) = (options.prove, layouts.len() > 1) else {
        return Ok(None);
    };
    for layout in layouts {
        let laid_out = dump.with_layout(layout)?;
        if let Ok(proof) = prove(&laid_out.memory) {
            *dump = laid_out;
            return Ok(Some(format!("the image is laid out {layout}: {proof}")));
        }
    }
    Ok(Some(
        "no guest was found in any layout of the image: it is read as it is, flat (an image that was cut may have lost \
         the page tables at its end; one that LiME wrote with format=raw has lost its addresses: use format=lime or \
         format=padded)"
            .to_owned(),
    ))
}
