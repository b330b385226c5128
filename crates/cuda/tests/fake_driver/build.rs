//! Building the fake driver. Other crates' tests use this file too.

use std::env;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the fake with `cfgs` as `libcuda.so` in a folder. None, with a word on standard error, without a compiler.
pub fn build(folder: &Path, cfgs: &[&str]) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/tests/fake_driver/libcuda.rs");
    let library = folder.join("libcuda.so");
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition=2024", "--crate-type=cdylib", "--crate-name=cuda", "--cap-lints=allow"]);
    rustc.args(cfgs.iter().flat_map(|cfg| ["--cfg", cfg])).arg("-o").arg(&library).arg(source);
    match rustc.output() {
        Ok(built) => {
            assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
            Some(library)
        }
        Err(error) => {
            // Past the test harness, which would swallow the words of a test that passes.
            let _ = writeln!(io::stderr(), "skipped: no rustc to build the fake driver ({error})");
            None
        }
    }
}
