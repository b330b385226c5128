//! The disk cache gives back what was stored, or nothing; whatever happens to its files.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use sage_cuda::{CacheKey, DiskCache};

const HEADER: usize = 84;
const LIMIT: u64 = 1 << 20;

fn cache(limit: u64) -> (tempfile::TempDir, DiskCache) {
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(folder.path().join("kernels"), limit).unwrap();
    (folder, cache)
}

fn key(name: &str) -> CacheKey {
    CacheKey::of(&[name.as_bytes()])
}

fn path(cache: &DiskCache, key: &CacheKey) -> PathBuf {
    cache.folder().join(format!("{key}.cubin"))
}

fn body(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * 31 + seed * 17 + (i >> 8)) as u8).collect()
}

fn files(cache: &DiskCache) -> usize {
    fs::read_dir(cache.folder()).unwrap().count()
}

/// Collects what is logged on this thread while `work` runs.
fn logged(work: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, work);
    String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
}

#[test]
fn what_was_stored_comes_back() {
    let (_folder, cache) = cache(LIMIT);
    let nothing = logged(|| {
        assert_eq!(cache.get(&key("a")), None);
        for bytes in [0, 1, 4096, 100_000] {
            let (key, body) = (key(&bytes.to_string()), body(bytes, bytes));
            cache.put(&key, &body);
            assert_eq!(cache.get(&key), Some(body));
        }
        cache.put(&key("0"), b"replaced");
        assert_eq!(cache.get(&key("0")).as_deref(), Some(&b"replaced"[..]));
        cache.remove(&key("0"));
        cache.remove(&key("never there"));
        assert_eq!(cache.get(&key("0")), None);
    });
    assert_eq!(nothing, "", "no warnings without a reason");
    assert_eq!(files(&cache), 3, "no temporary files are left");
}

/// Others may share the folder: entries are as private as the umask makes new files, and replaced ones as before.
#[cfg(unix)]
#[test]
fn entries_have_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;

    let mode = |path: &PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let (folder, cache) = cache(LIMIT);
    cache.put(&key("a"), b"compiled");
    let (entry, other) = (path(&cache, &key("a")), folder.path().join("other"));
    fs::write(&other, b"").unwrap();
    assert_eq!(mode(&entry), mode(&other));
    fs::set_permissions(&entry, fs::Permissions::from_mode(0o640)).unwrap();
    cache.put(&key("a"), b"compiled again");
    assert_eq!((cache.get(&key("a")).as_deref(), mode(&entry)), (Some(&b"compiled again"[..]), 0o640));
}

#[test]
fn another_process_finds_it() {
    let (folder, cache) = cache(LIMIT);
    cache.put(&key("a"), b"compiled");
    let reopened = DiskCache::open(folder.path().join("kernels"), LIMIT).unwrap();
    assert_eq!(reopened.get(&key("a")).as_deref(), Some(&b"compiled"[..]));
}

#[test]
fn its_folder_may_have_spaces_and_letters_of_any_script() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("Jörg und 注意").join("mémoire des noyaux");
    let cache = DiskCache::open(&folder, LIMIT).unwrap();
    assert_eq!(logged(|| cache.put(&key("a"), b"compiled")), "");
    let reopened = DiskCache::open(&folder, LIMIT).unwrap();
    assert_eq!(reopened.get(&key("a")).as_deref(), Some(&b"compiled"[..]));
}

#[test]
fn every_damaged_byte_is_found_and_the_entry_rebuilt() {
    let (_folder, cache) = cache(LIMIT);
    let (key, body) = (key("a"), body(1, 5000));
    cache.put(&key, &body);
    let path = path(&cache, &key);
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.len(), HEADER + body.len());
    let in_the_body = [0, 1, 2, 255, 256, 2500, 4998, 4999].map(|at| HEADER + at);
    for at in (0..HEADER).chain(in_the_body) {
        for bit in [0x01, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] ^= bit;
            fs::write(&path, damaged).unwrap();
            let log = logged(|| assert_eq!(cache.get(&key), None, "byte {at} changed by {bit:#x}"));
            assert!(log.contains("WARN") && log.contains("compiled again"), "byte {at}: {log:?}");
            assert!(!path.exists(), "byte {at}: the damaged file is still there");
            cache.put(&key, &body);
            assert_eq!(cache.get(&key).as_ref(), Some(&body));
        }
    }
}

#[test]
fn every_truncation_and_every_extension_is_found() {
    let (_folder, cache) = cache(LIMIT);
    let (key, body) = (key("a"), body(2, 300));
    cache.put(&key, &body);
    let path = path(&cache, &key);
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let log = logged(|| assert_eq!(cache.get(&key), None, "{length} bytes"));
        assert!(log.contains("WARN"), "{length} bytes: {log:?}");
    }
    let longer = [&whole[..], &[0]].concat();
    fs::write(&path, longer).unwrap();
    assert_eq!(cache.get(&key), None);
    // Not all of it fits the bound, so it is not even read.
    fs::write(&path, vec![0; LIMIT as usize + 1]).unwrap();
    assert_eq!(cache.get(&key), None);
    assert!(!path.exists());
}

#[test]
fn an_entry_under_another_key_is_not_trusted() {
    let (_folder, cache) = cache(LIMIT);
    cache.put(&key("a"), b"of a");
    fs::copy(path(&cache, &key("a")), path(&cache, &key("b"))).unwrap();
    assert_eq!(cache.get(&key("b")), None);
    assert_eq!(cache.get(&key("a")).as_deref(), Some(&b"of a"[..]));
}

#[test]
fn what_is_not_a_file_is_a_miss() {
    let (_folder, cache) = cache(LIMIT);
    fs::create_dir(path(&cache, &key("a"))).unwrap();
    assert!(logged(|| assert_eq!(cache.get(&key("a")), None)).contains("not a file"));
    assert!(logged(|| cache.put(&key("a"), b"x")).contains("not stored"));
}

#[test]
fn the_entries_used_longest_ago_make_room() {
    let each = 1000;
    let (_folder, cache) = cache(4 * (HEADER as u64 + each));
    let used = |name: &str, seconds| {
        let time = SystemTime::now() - Duration::from_secs(seconds);
        File::options().append(true).open(path(&cache, &key(name))).unwrap().set_modified(time).unwrap();
    };
    for (name, age) in [("a", 40), ("b", 30), ("c", 20), ("d", 10)] {
        cache.put(&key(name), &body(0, each as usize));
        used(name, age);
    }
    let there = |names: &str| {
        let found: String =
            "abcdef".chars().filter(|c| path(&cache, &key(&c.to_string())).exists()).collect();
        assert_eq!(found, names);
    };
    there("abcd");
    // Reading `a` makes `b` the oldest.
    assert!(cache.get(&key("a")).is_some());
    cache.put(&key("e"), &body(0, each as usize));
    there("acde");
    // Twice the size: two have to go.
    cache.put(&key("f"), &body(0, 2 * each as usize));
    there("aef");
    // What can never fit removes nothing.
    let log = logged(|| cache.put(&key("b"), &body(0, 5 * each as usize)));
    assert!(log.contains("expected at most"), "{log}");
    there("aef");
}

#[test]
fn only_what_belongs_to_the_cache_is_removed() {
    let (_folder, cache) = cache(200);
    let old = SystemTime::now() - Duration::from_secs(7200);
    for name in ["notes.txt", ".new-abandoned", ".new-in-work"] {
        let file = File::create(cache.folder().join(name)).unwrap();
        if name != ".new-in-work" {
            file.set_modified(old).unwrap();
        }
    }
    cache.put(&key("a"), &[1; 100]);
    cache.put(&key("b"), &[2; 100]);
    let there = |name: &str| cache.folder().join(name).exists();
    assert!(there("notes.txt") && there(".new-in-work") && !there(".new-abandoned"));
    assert_eq!(cache.get(&key("a")), None);
    assert_eq!(cache.get(&key("b")), Some(vec![2; 100]));
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(DiskCache::open(&file, LIMIT).is_err(), "a file in its place");
    assert!(DiskCache::open(file.join("below"), LIMIT).is_err(), "a file above it");
    if cfg!(target_os = "linux") {
        // Also for root, whom permissions do not stop.
        assert!(DiskCache::open("/proc", LIMIT).is_err(), "a folder in which nothing can be created");
    }
}

#[cfg(unix)]
#[test]
fn a_folder_that_becomes_read_only_is_a_warning() {
    use std::os::unix::fs::PermissionsExt;
    let (_folder, cache) = cache(LIMIT);
    cache.put(&key("a"), b"x");
    fs::set_permissions(cache.folder(), fs::Permissions::from_mode(0o555)).unwrap();
    if File::create(cache.folder().join("probe")).is_ok() {
        // Permissions do not stop root: take the folder away instead, which fails the write just so.
        eprintln!("running as root: the folder is removed rather than made read-only");
        fs::remove_dir_all(cache.folder()).unwrap();
        assert!(logged(|| cache.put(&key("b"), b"y")).contains("not stored"));
        assert_eq!(logged(|| assert_eq!(cache.get(&key("a")), None)), "");
        return;
    }
    assert!(logged(|| cache.put(&key("b"), b"y")).contains("not stored"));
    assert_eq!(cache.get(&key("a")).as_deref(), Some(&b"x"[..]), "reading still works");
    fs::set_permissions(cache.folder(), fs::Permissions::from_mode(0o755)).unwrap();
}

/// Writes, reads, damages and removes entries of a cache so small that it always evicts. Whatever comes back must be
/// what belongs to its key.
fn hammer(cache: &DiskCache, seed: usize) -> (usize, usize) {
    let (mut hits, mut misses) = (0, 0);
    for round in 0..150 {
        let which = (round * 7 + seed * 3) % 10;
        let (key, body) = (key(&which.to_string()), body(which, 200 + 1500 * which));
        match cache.get(&key) {
            Some(found) => {
                assert_eq!(found, body, "entry {which}");
                hits += 1;
            }
            None => {
                misses += 1;
                cache.put(&key, &body);
            }
        }
        if round % 20 == 19 {
            // Not through a rename: what a broken disk does.
            let _ = File::options()
                .write(true)
                .open(path(cache, &key))
                .and_then(|mut file| file.write_all(&[0xee; 90]));
        }
    }
    (hits, misses)
}

#[test]
fn threads_share_it() {
    let (_folder, cache) = cache(40_000);
    let cache = &cache;
    let counts: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|seed| scope.spawn(move || hammer(cache, seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let hits: usize = counts.iter().map(|(hits, _)| hits).sum();
    assert!(hits > 0, "{counts:?}");
    assert!(files(cache) <= 10, "temporary files are left");
}

#[test]
fn processes_share_it() {
    let folder = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(folder.path(), 40_000).unwrap();
    let program = std::env::current_exe().unwrap();
    let children: Vec<_> = (0..4)
        .map(|seed| {
            Command::new(&program)
                .args(["--exact", "hammering_child", "--ignored", "--nocapture"])
                .env("HAMMER_FOLDER", folder.path())
                .env("HAMMER_SEED", seed.to_string())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.contains("hammered: "), "{out}\n{err}");
    }
    assert!(files(&cache) <= 10, "temporary files are left");
}

#[test]
#[ignore = "a part of processes_share_it, which starts it"]
fn hammering_child() {
    let folder = std::env::var_os("HAMMER_FOLDER").expect("processes_share_it starts this");
    let seed = std::env::var("HAMMER_SEED").unwrap().parse().unwrap();
    let (hits, misses) = hammer(&DiskCache::open(folder, 40_000).unwrap(), seed);
    println!("hammered: {hits} hits, {misses} misses");
}
