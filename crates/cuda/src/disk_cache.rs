//! Compiled kernels on disk, so that a machine compiles each of them once.
//!
//! A cache may lose anything at any time and must never give back anything wrong. An entry is a file named after its
//! key; it carries the key, its length and a checksum, and comes into being by a rename, so a reader sees the whole of
//! it or nothing, whichever other processes write, remove or crash.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

/// Size to which [`DiskCache::from_env`] bounds the cache: some thousand kernels.
pub const DEFAULT_CACHE_BYTES: u64 = 256 << 20;

const MAGIC: [u8; 8] = *b"SAGECUBN";
/// Changes with the file's format, and with anything about compiling that the keys do not hold.
const VERSION: u32 = 1;
/// Magic, version, key, length, checksum.
const HEADER: usize = 8 + 4 + 32 + 8 + 32;
const EXTENSION: &str = "cubin";
const TEMPORARY: &str = ".new-";
/// A temporary file of this age was left by a process that died.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Identity of an entry: SHA-256 of everything that it depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheKey([u8; 32]);

impl CacheKey {
    /// The key of `parts`, of which the boundaries matter, and of this version of the cache.
    pub fn of(parts: &[&[u8]]) -> CacheKey {
        let mut hash = Sha256::new();
        hash.update(VERSION.to_le_bytes());
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        CacheKey(hash.finalize().into())
    }
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A folder of compiled kernels, shared by threads and processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskCache {
    folder: PathBuf,
    limit: u64,
}

impl DiskCache {
    /// The cache in `folder`, which is created, and is bounded to `limit` bytes. An error where it cannot be written.
    pub fn open(folder: impl Into<PathBuf>, limit: u64) -> io::Result<DiskCache> {
        let folder = folder.into();
        fs::create_dir_all(&folder)?;
        // Permissions alone do not tell: only writing does.
        temporary(&folder)?.close()?;
        Ok(DiskCache { folder, limit })
    }

    /// The cache of this process: in `SAGEATTENTION_CACHE_DIR`, or `sageattention` in `XDG_CACHE_HOME` or `~/.cache`; on
    /// Windows in `LOCALAPPDATA`.
    ///
    /// None, with one warning, where that variable is empty or the folder cannot be written. Looked up once.
    pub fn from_env() -> Option<&'static DiskCache> {
        static CACHE: OnceLock<Option<DiskCache>> = OnceLock::new();
        let open = || {
            let folder = location(|name| env::var_os(name), env::home_dir())?;
            DiskCache::open(&folder, DEFAULT_CACHE_BYTES)
                .map_err(|error| format!("{}: {error}", folder.display()))
        };
        let warn =
            |reason| tracing::warn!("disk cache: {reason}; kernels are compiled anew in every process");
        CACHE.get_or_init(|| open().map_err(warn).ok()).as_ref()
    }

    /// Where the entries are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The bytes stored under `key`. An entry that is damaged in any way is removed, with a warning.
    pub fn get(&self, key: &CacheKey) -> Option<Vec<u8>> {
        let path = self.path(key);
        match read(&path, key, self.limit) {
            Ok(bytes) => {
                tracing::trace!("disk cache: {} is used", path.display());
                Some(bytes)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("disk cache: {}: {error}; the kernel is compiled again", path.display());
                if error.kind() == ErrorKind::InvalidData {
                    self.remove(key);
                }
                None
            }
        }
    }

    /// Stores `bytes` under `key`, and removes the entries used longest ago where the cache outgrows its bound. What is
    /// larger than the bound is not stored. Failures are warnings.
    pub fn put(&self, key: &CacheKey, bytes: &[u8]) {
        let path = self.path(key);
        if (HEADER + bytes.len()) as u64 > self.limit {
            tracing::warn!(
                "disk cache: an entry has {} bytes, expected at most {} with its header; it is not stored",
                bytes.len(),
                self.limit
            );
            return;
        }
        if let Err(error) = self.write(&path, key, bytes) {
            tracing::warn!("disk cache: {}: {error}; the kernel is not stored", path.display());
        } else if let Err(error) = self.evict(&path) {
            tracing::warn!("disk cache: {}: {error}; its size is not bounded", self.folder.display());
        }
    }

    /// Forgets what is stored under `key`.
    pub fn remove(&self, key: &CacheKey) {
        let path = self.path(key);
        if let Err(error) = remove_if_there(&path) {
            tracing::warn!("disk cache: {}: {error}; it is not removed", path.display());
        }
    }

    fn path(&self, key: &CacheKey) -> PathBuf {
        self.folder.join(format!("{key}.{EXTENSION}"))
    }

    fn write(&self, path: &Path, key: &CacheKey, bytes: &[u8]) -> io::Result<()> {
        let mut file = temporary(&self.folder)?;
        file.write_all(&header(key, bytes))?;
        file.write_all(bytes)?;
        if let Ok(replaced) = fs::metadata(path) {
            file.as_file().set_permissions(replaced.permissions())?;
        }
        // Without this, a crash of the machine could leave the name in place and the content not.
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }

    /// Removes the entries used longest ago until the rest fits; never `newest`.
    fn evict(&self, newest: &Path) -> io::Result<()> {
        let mut entries = Vec::new();
        let mut total = 0;
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            // Another process may have removed it meanwhile.
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            if !metadata.is_file() {
                continue;
            }
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                total += metadata.len();
                if path != newest {
                    entries.push((used, path, metadata.len()));
                }
            } else if is_temporary(&path) && used.elapsed().is_ok_and(|age| age > ABANDONED) {
                remove_if_there(&path)?;
            }
        }
        entries.sort();
        for (_, path, bytes) in entries {
            if total <= self.limit {
                break;
            }
            remove_if_there(&path)?;
            total -= bytes;
            tracing::debug!("disk cache: {} made room", path.display());
        }
        Ok(())
    }
}

/// A new file that everybody may read whom the process's umask lets: others may share the folder.
fn temporary(folder: &Path) -> io::Result<tempfile::NamedTempFile<File>> {
    let create = |path: &Path| File::options().write(true).create_new(true).open(path);
    tempfile::Builder::new().prefix(TEMPORARY).make_in(folder, create)
}

fn is_temporary(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    fs::remove_file(path)
        .or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn header(key: &CacheKey, bytes: &[u8]) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER);
    header.extend(MAGIC);
    header.extend(VERSION.to_le_bytes());
    header.extend(key.0);
    header.extend((bytes.len() as u64).to_le_bytes());
    header.extend(Sha256::digest(bytes));
    header
}

/// The content of an entry. `InvalidData` where it is not what [`header`] says it is.
fn read(path: &Path, key: &CacheKey, limit: u64) -> io::Result<Vec<u8>> {
    let damaged = |why: String| io::Error::new(ErrorKind::InvalidData, why);
    // Looked at before it is opened: opening a pipe would wait for ever.
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a file"));
    }
    if metadata.len() > limit {
        return Err(damaged(format!("has {} bytes, expected at most {limit}", metadata.len())));
    }
    // On Windows a file's times are changed by whoever may write to it.
    let mut file =
        File::options().read(true).write(cfg!(windows)).open(path).or_else(|_| File::open(path))?;
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    Read::by_ref(&mut file).take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    let Some(body) = bytes.get(HEADER..) else {
        return Err(damaged(format!("has {} bytes, expected a header of {HEADER}", bytes.len())));
    };
    if bytes[..HEADER] != header(key, body) {
        return Err(damaged("its header does not describe its content".into()));
    }
    // The time of last use, by which entries are removed. In a folder that lost its permissions it stays as it is.
    let _ = file.set_modified(SystemTime::now());
    bytes.drain(..HEADER);
    Ok(bytes)
}

/// The folder that the environment asks for, or why there is none.
fn location(variable: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Result<PathBuf, String> {
    if let Some(folder) = variable("SAGEATTENTION_CACHE_DIR") {
        let empty = || "SAGEATTENTION_CACHE_DIR is empty, expected a folder".to_owned();
        return if folder.is_empty() { Err(empty()) } else { Ok(folder.into()) };
    }
    // The XDG specification has relative paths ignored.
    let (name, below_home) =
        if cfg!(windows) { ("LOCALAPPDATA", "AppData\\Local") } else { ("XDG_CACHE_HOME", ".cache") };
    let shared = variable(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let home = home.filter(|home| !home.as_os_str().is_empty()).map(|home| home.join(below_home));
    let parent = shared.or(home).ok_or_else(|| {
        format!(
            "there is no home folder and {name} names none, expected one, or SAGEATTENTION_CACHE_DIR to be set"
        )
    })?;
    Ok(parent.join("sageattention"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locate(variables: &[(&str, &str)], home: Option<&str>) -> Result<PathBuf, String> {
        let get = |name: &str| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| value.into());
        location(get, home.map(PathBuf::from))
    }

    #[cfg(windows)]
    #[test]
    fn the_environment_says_where() {
        let (own, local) = (("SAGEATTENTION_CACHE_DIR", "D:\\own"), ("LOCALAPPDATA", "C:\\local"));
        assert_eq!(locate(&[own, local], Some("C:\\me")), Ok("D:\\own".into()));
        assert_eq!(locate(&[local], Some("C:\\me")), Ok("C:\\local\\sageattention".into()));
        for ignored in ["", "relative", "\\on-no-drive"] {
            let found = locate(&[("LOCALAPPDATA", ignored)], Some("C:\\me"));
            assert_eq!(found, Ok("C:\\me\\AppData\\Local\\sageattention".into()));
        }
    }

    #[cfg(not(windows))]
    #[test]
    fn the_environment_says_where() {
        let (own, xdg) = (("SAGEATTENTION_CACHE_DIR", "/own"), ("XDG_CACHE_HOME", "/xdg"));
        assert_eq!(locate(&[own, xdg], Some("/home/me")), Ok("/own".into()));
        assert_eq!(locate(&[xdg], Some("/home/me")), Ok("/xdg/sageattention".into()));
        assert_eq!(locate(&[], Some("/home/me")), Ok("/home/me/.cache/sageattention".into()));
        for ignored in ["", "relative"] {
            let found = locate(&[("XDG_CACHE_HOME", ignored)], Some("/home/me"));
            assert_eq!(found, Ok("/home/me/.cache/sageattention".into()));
        }
    }

    #[test]
    fn an_empty_variable_or_a_missing_home_disables_it() {
        let empty = locate(&[("SAGEATTENTION_CACHE_DIR", "")], Some("/home/me"));
        assert_eq!(empty, Err("SAGEATTENTION_CACHE_DIR is empty, expected a folder".into()));
        for home in [None, Some("")] {
            let reason = locate(&[], home).unwrap_err();
            let name = if cfg!(windows) { "LOCALAPPDATA" } else { "XDG_CACHE_HOME" };
            assert!(
                reason.starts_with(&format!("there is no home folder and {name} names none")),
                "{reason}"
            );
        }
    }

    #[test]
    fn keys_keep_the_boundaries_of_their_parts() {
        assert_ne!(CacheKey::of(&[b"ab", b"c"]), CacheKey::of(&[b"a", b"bc"]));
        assert_ne!(CacheKey::of(&[b"a"]), CacheKey::of(&[b"a", b""]));
        let text = CacheKey::of(&[b"a"]).to_string();
        assert!(text.len() == 64 && text.chars().all(|c| c.is_ascii_hexdigit()), "{text}");
    }
}
