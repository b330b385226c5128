//! Files that are either written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};

/// Links that are followed one after the other, as many as Linux follows.
const MAX_LINKS: usize = 40;

/// Writes `bytes` to a temporary file beside `path`, makes sure that the disk has them, and renames it to `path`.
///
/// A file that was there keeps its permissions, and its owner and group where the system allows that; a new one gets
/// what the process's umask leaves. A link keeps pointing to its file, there or not, which is the one that is written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    followed(path)
        .and_then(|target| replace(&target, bytes))
        .map_err(|error| Failure::Failed(format!("{}: cannot be written: {error}", path.display())))
}

/// The file that a path names in the end, whether it is there or not.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(target) = fs::read_link(&path) else { return Ok(path) };
        // An absolute target takes the place of all.
        path = path.parent().unwrap_or(Path::new("")).join(target);
    }
    Err(io::Error::other(format!("more than {MAX_LINKS} links lead from one to the next")))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let replaced = match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        // Renaming over a device or a pipe would remove it.
        Ok(found) if !found.is_file() => return fs::write(path, bytes),
        // The rename needs no permission to write to the file, but whoever took that away meant it.
        Ok(_) => Some(OpenOptions::new().write(true).open(path)?),
        Err(_) => None,
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let create = |path: &Path| create(path, replaced.is_some());
    let mut file = tempfile::Builder::new().prefix(".sageattn-").make_in(parent, create)?;
    file.write_all(bytes)?;
    if let Some(replaced) = replaced {
        keep_permissions(&replaced, file.as_file())?;
    }
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // The rename itself lasts only once the directory is on the disk.
    #[cfg(unix)]
    File::open(parent)?.sync_all()?;
    Ok(())
}

/// A new file: private where it shall take the place of one that may be.
fn create(path: &Path, private: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if private {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    #[cfg(not(unix))]
    let _ = private;
    options.open(path)
}

/// Gives `new` the permissions of `old`, and its owner and group as far as the system allows.
#[cfg(unix)]
fn keep_permissions(old: &File, new: &File) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

    let (found, own) = (old.metadata()?, new.metadata()?);
    // Bits to run it as its owner were for other contents.
    let mut mode = found.mode() & 0o777;
    if own.uid() != found.uid() {
        // Only root may give a file away.
        let _ = fchown(new, Some(found.uid()), None);
    }
    if own.gid() != found.gid() && fchown(new, None, Some(found.gid())).is_err() {
        // Another group may do no more than everybody may.
        mode &= 0o707 | (mode & 0o007) << 3;
    }
    new.set_permissions(fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn keep_permissions(old: &File, new: &File) -> io::Result<()> {
    new.set_permissions(old.metadata()?.permissions())
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, reason = "the helpers of tests are tests too")]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    /// The names in a folder, in which no temporary file may be left.
    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_keeps_its_permissions() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        for wanted in [0o600, 0o640, 0o644, 0o666, 0o755] {
            fs::write(&path, "before").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
            write(&path, b"after").unwrap();
            assert_eq!(
                (fs::read(&path).unwrap().as_slice(), mode(&path)),
                (&b"after"[..], wanted),
                "{wanted:o}"
            );
        }
        assert_eq!(names(folder.path()), ["out"]);
    }

    #[test]
    fn a_new_file_gets_what_every_new_file_gets() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("out"), folder.path().join("other"));
        write(&path, b"new").unwrap();
        fs::write(&other, b"new").unwrap();
        assert_eq!(mode(&path), mode(&other));
    }

    #[test]
    fn links_stay_and_their_files_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("deep")).unwrap();
        fs::write(at("deep/file"), "before").unwrap();
        fs::set_permissions(at("deep/file"), fs::Permissions::from_mode(0o600)).unwrap();
        symlink("deep/file", at("relative")).unwrap();
        symlink(at("relative"), at("chain")).unwrap();
        symlink("deep/none", at("dangling")).unwrap();
        write(&at("chain"), b"after").unwrap();
        write(&at("dangling"), b"made").unwrap();
        assert_eq!(fs::read(at("deep/file")).unwrap(), b"after");
        assert_eq!(mode(&at("deep/file")), 0o600);
        assert_eq!(fs::read(at("deep/none")).unwrap(), b"made");
        for link in ["relative", "chain", "dangling"] {
            assert!(fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link}");
        }
        symlink("loop", at("loop")).unwrap();
        let refused = write(&at("loop"), b"").unwrap_err().to_string();
        assert!(
            refused.ends_with("loop: cannot be written: more than 40 links lead from one to the next"),
            "{refused}"
        );
        assert_eq!(names(folder.path()), ["chain", "dangling", "deep", "loop", "relative"]);
        assert_eq!(names(&at("deep")), ["file", "none"]);
    }

    #[test]
    fn a_device_stays_one() {
        write(Path::new("/dev/null"), b"gone").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn a_file_that_may_not_be_written_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        // Root may write to any file.
        let allowed = OpenOptions::new().write(true).open(&path).is_ok();
        assert_eq!(write(&path, b"after").is_ok(), allowed);
        assert_eq!(fs::read(&path).unwrap(), if allowed { &b"after"[..] } else { b"before" });
        assert_eq!(mode(&path), 0o400);
    }
}
