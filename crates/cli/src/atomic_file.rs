//! Files that are either written whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crate::failure::{Failure, Result};

/// Writes `bytes` to a temporary file beside `path`, makes sure that the disk has them, and renames it to `path`.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    // A link keeps pointing to the file, whose contents change.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    replace(&target, bytes)
        .map_err(|error| Failure::Failed(format!("{}: cannot be written: {error}", path.display())))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        // Renaming over a device or a pipe would remove it.
        Ok(found) if !found.is_file() => return fs::write(path, bytes),
        _ => {}
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Made by hand, since temporary files are private by default, but this one becomes an ordinary file.
    let create = |path: &Path| fs::OpenOptions::new().write(true).create_new(true).open(path);
    let mut file = tempfile::Builder::new().prefix(".sageattn-").make_in(parent, create)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // The rename itself lasts only once the directory is on the disk.
    #[cfg(unix)]
    fs::File::open(parent)?.sync_all()?;
    Ok(())
}
