//! What the tests of the command share: the binary, a directory of its own, and files to feed it.

// Each test binary uses its own part of this module.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, TensorView};
use sage_testkit::uniform;
use tempfile::TempDir;

/// A directory that the command runs in, so that messages hold no long paths.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        Place(TempDir::new().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Names of all files, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs `sageattn` with words separated by spaces.
    pub fn run(&self, words: &str) -> Output {
        self.run_args(&words.split_whitespace().collect::<Vec<_>>())
    }

    pub fn run_args(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_sageattn")).args(args).current_dir(self.0.path()).output().unwrap()
    }

    /// Runs, and demands success and silence on standard error.
    pub fn succeed(&self, words: &str) -> String {
        let output = self.run(words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""), "sageattn {words}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs, and parses what is printed as JSON.
    pub fn json(&self, words: &str) -> serde_json::Value {
        serde_json::from_str(&self.succeed(words)).unwrap()
    }
}

/// A file with this header, as it stands, and this data.
pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// A tensor of a file: name, dtype, shape, bytes.
pub type Entry<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

/// A file with these tensors.
pub fn file(entries: &[Entry<'_>]) -> Vec<u8> {
    let views = entries
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// An F32 tensor of numbers in (−1, 1).
pub fn f32s<'a>(name: &'a str, shape: &[usize], seed: u64) -> Entry<'a> {
    let bytes = uniform(seed, shape.iter().product()).iter().flat_map(|x| x.to_le_bytes()).collect();
    (name, Dtype::F32, shape.to_vec(), bytes)
}

/// Well-formed queries, keys and values.
pub fn qkv() -> Vec<Entry<'static>> {
    vec![f32s("q", &[1, 4, 33, 16], 1), f32s("k", &[1, 2, 40, 16], 2), f32s("v", &[1, 2, 40, 16], 3)]
}
