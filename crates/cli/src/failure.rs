//! How a command ends when it does not end well.

use std::fmt;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use sageattn_files::qkv_file::FileError;

/// Result of a command.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why a command stopped.
#[derive(Debug)]
pub enum Failure {
    /// The command line is wrong: exit code 2.
    Usage(String),
    /// The work could not be done: exit code 1.
    Failed(String),
    /// Whoever read our output has seen enough (`| head`): no message, exit code 0.
    ClosedPipe,
}

impl Failure {
    /// A failure to read or write `path`.
    pub fn io(path: &Path, doing: &str, error: &io::Error) -> Self {
        Failure::Failed(format!("{}: {doing}: {error}", path.display()))
    }

    /// A failure with the file that it is about.
    pub fn file(path: &Path, error: &FileError) -> Self {
        Failure::Failed(format!("{}: {error}", path.display()))
    }

    /// The code that the process ends with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Failure::Usage(_) => ExitCode::from(2),
            Failure::Failed(_) => ExitCode::FAILURE,
            Failure::ClosedPipe => ExitCode::SUCCESS,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(message) | Failure::Failed(message) => f.write_str(message),
            Failure::ClosedPipe => f.write_str("output closed"),
        }
    }
}

impl From<sageattention::Error> for Failure {
    fn from(error: sageattention::Error) -> Self {
        Failure::Failed(error.to_string())
    }
}

/// Errors of standard output; those of files are made by [`Failure::io`].
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::ClosedPipe,
            _ => Failure::Failed(format!("standard output: {error}")),
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        io::Error::from(error).into()
    }
}
