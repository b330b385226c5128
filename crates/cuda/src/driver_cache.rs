//! The driver's own cache on disk: the only place where programs that are compiled as a whole are remembered.
//!
//! Nobody else can be asked for their code: the driver's linker and nvJitLink compile PTX for programs of several parts
//! alone (`ptxas -c`, without `setmaxnreg`), nvPTXCompiler is a static library, NVRTC takes no PTX, and the driver hands
//! no code back. So the driver's cache must be one that it can write. Where it cannot, and nobody chose its folder, it is
//! told to use one beside our own ([`arrange_driver_cache`]): by the variable `CUDA_CACHE_PATH`, which must be there when
//! the driver is started.
//!
//! Source: CUDA Programming Guide, "CUDA Environment Variables", JIT compilation.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;

use crate::disk_cache::DiskCache;
use crate::library;

/// Names the cache's folder.
const PATH: &str = "CUDA_CACHE_PATH";
/// Disables the cache where it is 1.
const DISABLE: &str = "CUDA_CACHE_DISABLE";
/// Bounds the cache to so many bytes: without it to 256 MiB or more, by the driver's age.
const MAX_SIZE: &str = "CUDA_CACHE_MAXSIZE";
/// Room for some hundred kernels of 50 KB.
const FEW_BYTES: u64 = 16 << 20;

/// Why the driver remembers nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Forgets {
    reason: String,
    /// Whether a folder in [`PATH`] would mend it against nobody's wish.
    by_default: bool,
}

/// The folder in which the driver keeps the kernels that it compiles as whole programs, or why it keeps none, in words.
///
/// # Errors
/// When the cache is disabled or too small, or its folder cannot be written.
pub fn driver_cache() -> Result<PathBuf, String> {
    find(&|name| env::var_os(name), env::home_dir(), &writable).map_err(|forgets| forgets.reason)
}

/// A folder beside the [`DiskCache`] for the driver's cache, to be named in `CUDA_CACHE_PATH` before the driver
/// starts. None where the driver has a folder that it can write, or one that somebody chose; where there is no
/// driver, or it was started; and where there is no disk cache either.
pub fn driver_cache_folder() -> Option<PathBuf> {
    if !library::is_installed() || library::is_started() {
        return None;
    }
    let forgets = find(&|name| env::var_os(name), env::home_dir(), &writable).err()?;
    if !forgets.by_default {
        return None;
    }
    let folder = DiskCache::from_env()?.folder().join("driver");
    // Only the owner may write there: the driver trusts what it finds.
    fs::create_dir_all(&folder).and_then(|()| writable(&folder)).ok()?;
    Some(folder)
}

/// Has the driver remember what it compiles: where [`driver_cache_folder`] finds a folder, it becomes the driver's.
///
/// The environment can be changed while this process has one thread, and is of use before the driver starts: otherwise,
/// and on other systems than Linux, nothing happens, and the first kernel that will not be remembered is a warning that
/// says so. Devices call this when they are first opened; a program that starts threads before that calls it first.
pub fn arrange_driver_cache() {
    if !is_only_thread() {
        return;
    }
    let Some(folder) = driver_cache_folder() else { return };
    tracing::info!(
        "the driver's cache: {}; {PATH} is set to {}",
        driver_cache().err().unwrap_or_default(),
        folder.display()
    );
    // SAFETY: no other thread reads the environment meanwhile: there is none, and this one starts none.
    unsafe { env::set_var(PATH, folder) };
}

/// Says once where programs that are compiled as a whole go.
pub(crate) fn report() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| match driver_cache() {
        Ok(folder) => tracing::debug!("the driver keeps what it compiles in {}", folder.display()),
        Err(reason) => tracing::warn!(
            "the driver's cache: {reason}; some kernels are compiled anew in every process, unless {PATH} names a \
             folder that can be written before the process starts"
        ),
    });
}

/// Where the driver keeps what it compiles.
fn find(
    variable: &dyn Fn(&str) -> Option<OsString>,
    home: Option<PathBuf>,
    writable: &dyn Fn(&Path) -> io::Result<()>,
) -> Result<PathBuf, Forgets> {
    let chosen = |reason: String| Forgets { reason, by_default: false };
    if variable(DISABLE).is_some_and(|value| value == "1") {
        return Err(chosen(format!("{DISABLE} is 1, expected 0 or nothing")));
    }
    let bytes = variable(MAX_SIZE).and_then(|value| value.to_str()?.trim().parse::<u64>().ok());
    if let Some(bytes) = bytes.filter(|&bytes| bytes < FEW_BYTES) {
        return Err(chosen(format!("{MAX_SIZE} is {bytes}, expected at least {FEW_BYTES}")));
    }
    if let Some(folder) = variable(PATH).filter(|folder| !folder.is_empty()).map(PathBuf::from) {
        return match writable(&folder) {
            Ok(()) => Ok(folder),
            Err(error) => Err(chosen(format!("{PATH} is {}: {error}", folder.display()))),
        };
    }
    let by_default = |reason: String| Forgets { reason, by_default: true };
    let (parent, name) = if cfg!(windows) {
        (variable("APPDATA").map(PathBuf::from), "NVIDIA\\ComputeCache")
    } else {
        (variable("HOME").map(PathBuf::from).or(home), ".nv/ComputeCache")
    };
    let parent = parent.filter(|parent| !parent.as_os_str().is_empty());
    let folder = parent.ok_or_else(|| by_default("there is no home folder".to_owned()))?.join(name);
    match writable(&folder) {
        Ok(()) => Ok(folder),
        Err(error) => Err(by_default(format!("{}: {error}", folder.display()))),
    }
}

/// An error where nothing can be written to `folder`, or it cannot be created. Leaves nothing behind.
fn writable(folder: &Path) -> io::Result<()> {
    let there = folder.ancestors().find(|folder| folder.exists());
    let there = there.filter(|there| !there.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Permissions alone do not tell: only writing does.
    tempfile::Builder::new().prefix(".sageattention-").tempfile_in(there)?.close()
}

/// Whether this thread is the process's only one. Whether another one exists is known on Linux.
fn is_only_thread() -> bool {
    cfg!(target_os = "linux")
        && fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.take(2).count() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)], home: Option<&str>, read_only: &[&str]) -> Result<PathBuf, Forgets> {
        let get = |name: &str| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| value.into());
        let writable = |folder: &Path| match read_only.iter().any(|of| folder.starts_with(of)) {
            true => Err(io::Error::other("read-only")),
            false => Ok(()),
        };
        find(&get, home.map(PathBuf::from), &writable)
    }

    #[cfg(windows)]
    #[test]
    fn the_roaming_folder_says_where() {
        let roaming = ("APPDATA", "C:\\me\\Roaming");
        assert_eq!(of(&[roaming], Some("C:\\me"), &[]), Ok("C:\\me\\Roaming\\NVIDIA\\ComputeCache".into()));
        assert_eq!(of(&[("CUDA_CACHE_PATH", "D:\\c"), roaming], None, &["C:\\me"]), Ok("D:\\c".into()));
        let none = Forgets { reason: "there is no home folder".to_owned(), by_default: true };
        assert_eq!(of(&[], Some("C:\\me"), &[]), Err(none));
    }

    #[cfg(not(windows))]
    #[test]
    fn the_environment_and_the_home_say_where() {
        assert_eq!(of(&[("HOME", "/me")], Some("/other"), &[]), Ok("/me/.nv/ComputeCache".into()));
        assert_eq!(of(&[], Some("/other"), &[]), Ok("/other/.nv/ComputeCache".into()));
        assert_eq!(of(&[("CUDA_CACHE_PATH", "/c"), ("HOME", "/me")], None, &["/me"]), Ok("/c".into()));
        assert_eq!(of(&[("CUDA_CACHE_MAXSIZE", "268435456"), ("CUDA_CACHE_PATH", "/c")], None, &[]), {
            Ok("/c".into())
        });
        assert_eq!(of(&[("CUDA_CACHE_DISABLE", "0"), ("CUDA_CACHE_PATH", "/c")], None, &[]), Ok("/c".into()));
    }

    #[cfg(not(windows))]
    #[test]
    fn only_what_nobody_chose_is_replaced() {
        let forgets = |variables: &[(&str, &str)], home| {
            let Forgets { reason, by_default } = of(variables, home, &["/ro"]).unwrap_err();
            (reason, by_default)
        };
        let no = |reason: &str, by_default| (reason.to_owned(), by_default);
        assert_eq!(forgets(&[], Some("/ro")), no("/ro/.nv/ComputeCache: read-only", true));
        assert_eq!(forgets(&[], None), no("there is no home folder", true));
        assert_eq!(
            forgets(&[("CUDA_CACHE_PATH", "/ro/c")], Some("/me")),
            no("CUDA_CACHE_PATH is /ro/c: read-only", false)
        );
        assert_eq!(
            forgets(&[("CUDA_CACHE_DISABLE", "1")], Some("/me")),
            no("CUDA_CACHE_DISABLE is 1, expected 0 or nothing", false)
        );
        assert_eq!(
            forgets(&[("CUDA_CACHE_MAXSIZE", "4096")], Some("/me")),
            no("CUDA_CACHE_MAXSIZE is 4096, expected at least 16777216", false)
        );
    }

    #[test]
    fn looking_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        writable(&folder.path().join("new/below")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(writable(&file.join("below")).is_err());
        if cfg!(target_os = "linux") {
            // Also for root, whom permissions do not stop.
            assert!(writable(Path::new("/proc/driver-cache")).is_err());
        }
    }
}
