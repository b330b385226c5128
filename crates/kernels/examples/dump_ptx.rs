//! Writes every kernel of the catalogue as PTX into a folder, without comments: a change that leaves the files as they
//! were changes no kernel.
//!
//! ```text
//! cargo run -p sage-kernels --example dump_ptx -- target/ptx-before
//! # … the change …
//! cargo run -p sage-kernels --example dump_ptx -- target/ptx-after
//! diff -rq target/ptx-before target/ptx-after
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use sage_kernels::catalog::catalog_of_all_targets;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(env::args_os().nth(1).ok_or("expected the folder to write to")?);
    fs::create_dir_all(&folder)?;
    let entries = catalog_of_all_targets();
    for entry in &entries {
        let ptx = entry.kernel().program().ptx(entry.kernel().oldest_target())?;
        let code = ptx.lines().filter(|line| !line.trim_start().starts_with("//") && !line.is_empty());
        let code: String = code.flat_map(|line| [line, "\n"]).collect();
        fs::write(folder.join(format!("{}.ptx", entry.kernel().name())), code)?;
    }
    println!("{} kernels in {}", entries.len(), folder.display());
    Ok(())
}
