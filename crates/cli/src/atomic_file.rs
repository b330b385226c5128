//! Files that are either written whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crate::failure::{Failure, Result};

/// Writes `bytes` to a temporary file beside `path`, makes sure that the disk has them, and renames it to `path`.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    // A link keeps pointing to the file, whose contents change.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    replace(&target, bytes).map_err(|error| {
        // The temporary file's name says nothing to the user: only the kind of error does.
        let reason = match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code).to_string(),
            None => error.kind().to_string(),
        };
        Failure::Failed(format!("{}: cannot be written: {reason}", path.display()))
    })
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        // Renaming over a device or a pipe would remove it.
        Ok(found) if !found.is_file() => return fs::write(path, bytes),
        _ => {}
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".sageattn-");
    // Temporary files are private by default, but this one becomes an ordinary file: the umask decides.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(parent)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // The rename itself lasts only once the directory is on the disk.
    #[cfg(unix)]
    fs::File::open(parent)?.sync_all()?;
    Ok(())
}
