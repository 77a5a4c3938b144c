//! Files that are there whole or not at all.

use std::fs::{File, Permissions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Has `write` fill a file beside `file`, under a name that nobody can know before, and then moves it there: nobody finds half
/// of it. `what` names it in messages.
pub(crate) fn write_beside<T>(
    file: &Path,
    what: &str,
    write: impl FnOnce(&mut BufWriter<&mut File>) -> Result<T>,
) -> Result<T> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut part = tempfile::Builder::new()
        .prefix(".vmsight-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .with_context(|| format!("making a file in {}", folder.display()))?;
    let mut out = BufWriter::new(part.as_file_mut());
    let written = write(&mut out)?;
    out.flush()
        .and_then(|()| out.get_ref().sync_all())
        .with_context(|| format!("writing {what}"))?;
    drop(out);
    part.persist(file)
        .map_err(|e| e.error)
        .with_context(|| format!("moving {what} to {}", file.display()))?;
    Ok(written)
}
