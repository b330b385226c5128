//! Files of any name, on every system: in folders with spaces and in letters of any script, given relative or whole.

#![allow(clippy::unwrap_used)] // the helpers of tests are tests too

mod common;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{Place, file, qkv};
use safetensors::SafeTensors;

/// A space, letters outside ASCII and outside the basic plane, and what a shell would take for its own.
const FOLDER: &str = "With space & Größe 注意 🦀 (1)";

/// Runs `sageattn` with words as they are, whatever they hold.
fn run(place: &Place, words: &[OsString]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sageattn")).args(words).current_dir(place.path("")).output().unwrap()
}

/// Words of a command line, of which those that start with `@` are files in `folder`.
fn words(line: &str, folder: &Path) -> Vec<OsString> {
    let word = |word: &str| match word.strip_prefix('@') {
        Some(name) => folder.join(name).into_os_string(),
        None => word.into(),
    };
    line.split_whitespace().map(word).collect()
}

/// Names of all files in a folder, sorted.
fn names(folder: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// Every command that takes files reads and writes them in `folder`, twice: an older output is replaced.
fn every_command_finds_its_files(place: &Place, folder: &Path) {
    let whole = place.path("").join(folder);
    fs::write(whole.join("Öl.safetensors"), file(&qkv())).unwrap();
    for _ in 0..2 {
        for line in [
            "run @Öl.safetensors -o @выход.safetensors",
            "accuracy @Öl.safetensors --schemes int8 --plot @точность.png",
            "bench --shapes 1,1,16,8 --reps 1 --plot @速度.svg",
            "sparse @Öl.safetensors --predictor sla --topk 0.5 --reps 1 --plot @疎.svg --map @地図.png",
        ] {
            let output = run(place, &words(line, folder));
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""), "{line}");
        }
    }
    let out = fs::read(whole.join("выход.safetensors")).unwrap();
    assert_eq!(SafeTensors::deserialize(&out).unwrap().tensor("out").unwrap().shape(), [1, 4, 33, 16]);
    for (name, start) in [
        ("точность.png", &b"\x89PNG"[..]),
        ("速度.svg", b"<svg"),
        ("疎.svg", b"<svg"),
        ("地図.png", b"\x89PNG"),
    ] {
        assert!(fs::read(whole.join(name)).unwrap().starts_with(start), "{name}");
    }
    // No temporary file is left.
    assert_eq!(names(&whole).len(), 6, "{:?}", names(&whole));
}

#[test]
fn files_may_lie_below_folders_of_any_name() {
    let place = Place::new();
    fs::create_dir(place.path(FOLDER)).unwrap();
    every_command_finds_its_files(&place, Path::new(FOLDER));
}

#[test]
fn whole_paths_are_taken_as_well() {
    let place = Place::new();
    let folder = place.path(FOLDER);
    fs::create_dir(&folder).unwrap();
    every_command_finds_its_files(&place, &folder);
}

#[test]
fn messages_have_the_name_as_it_was_given() {
    let place = Place::new();
    for (line, doing) in [
        ("run @注意.safetensors -o @out.safetensors", "注意.safetensors: cannot be read: "),
        ("accuracy @Größe 1", "Größe: cannot be read: "),
    ] {
        let output = run(&place, &words(line, Path::new(FOLDER)));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}: {stderr}");
        let start = format!("error: {}", Path::new(FOLDER).join(doing).display());
        assert!(stderr.starts_with(&start), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    assert_eq!(place.names(), [""; 0]);
}

/// A name that is no text, as an archive of another system may have left it. macOS takes no such name.
#[cfg(all(unix, not(target_os = "macos")))]
#[test]
fn names_need_not_be_text() {
    use std::os::unix::ffi::OsStringExt;
    let name = OsString::from_vec(b"in\xff.safetensors".to_vec());
    let place = Place::new();
    fs::write(place.path("").join(&name), file(&qkv())).unwrap();
    let mut out = OsString::from("out ");
    out.push(&name);
    for _ in 0..2 {
        let output = run(&place, &["run".into(), name.clone(), "-o".into(), out.clone()]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(SafeTensors::deserialize(&fs::read(place.path("").join(&out)).unwrap()).is_ok());
    assert_eq!(names(&place.path("")), [name, out]);
}
