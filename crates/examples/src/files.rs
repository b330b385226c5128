//! The files that `scripts/fetch_models.sh` has fetched.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;

/// Where the weights and texts lie.
#[derive(Clone, Debug, clap::Args)]
pub struct Files {
    /// Folder that scripts/fetch_models.sh filled.
    #[arg(long, default_value = "target/models", value_name = "FOLDER", global = true)]
    pub models: PathBuf,
}

impl Files {
    /// SmolLM2-135M-Instruct, Q4_1.
    pub fn smollm2(&self) -> Result<PathBuf> {
        self.existing("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    }

    /// The folder of all-MiniLM-L6-v2: `model.safetensors`, `tokenizer.json`.
    pub fn minilm(&self) -> Result<PathBuf> {
        self.existing("minilm")
    }

    /// The text given, or the prose about how Django is developed (BSD-3-Clause), from its source package.
    pub fn text(&self, path: Option<&Path>) -> Result<String> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => self.existing("text/django-internals.txt")?,
        };
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    fn existing(&self, name: &str) -> Result<PathBuf> {
        let path = self.models.join(name);
        match path.try_exists() {
            Ok(true) => Ok(path),
            Ok(false) => {
                Err(format!("{}: not there; run scripts/fetch_models.sh first", path.display()).into())
            }
            Err(error) => Err(format!("{}: {error}", path.display()).into()),
        }
    }
}
