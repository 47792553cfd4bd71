//! Files that may be replaced under a running process: certificates, keys.
//!
//! Nothing runs in the background. Whoever needs the value asks for it, and at most once in
//! [`RECHECK`] the files are read again; what they say is used from then on if it can be used.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::exit::{ExitKind, HasExitKind};

/// How old a look at the files may be.
pub const RECHECK: Duration = Duration::from_secs(1);
/// Bytes of one watched file, at most.
const MAX_BYTES: u64 = 1 << 20;

/// A file cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct FileError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong with it, and what to do.
    pub problem: String,
}

impl HasExitKind for FileError {
    fn exit_kind(&self) -> ExitKind {
        ExitKind::Config
    }
}

impl FileError {
    /// `problem` of the file at `path`.
    pub(crate) fn new(path: &Path, problem: impl Into<String>) -> FileError {
        FileError {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }
}

type Parse<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, FileError> + Send + Sync>;

/// A value that is made of some files.
pub(crate) struct Watched<T> {
    paths: Vec<PathBuf>,
    parse: Parse<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    looked: Instant,
    /// What the files said at the last look, good or bad.
    contents: Vec<Vec<u8>>,
    /// The last failure to read them, to say each once.
    unreadable: Option<String>,
    value: Arc<T>,
}

impl<T> Watched<T> {
    /// Reads the files and makes the value of them by `parse`, in the order of `paths`.
    ///
    /// # Errors
    /// A file cannot be read, or `parse` refuses what is in it.
    pub(crate) fn open(
        paths: Vec<PathBuf>,
        parse: impl Fn(&[Vec<u8>]) -> Result<T, FileError> + Send + Sync + 'static,
    ) -> Result<Watched<T>, FileError> {
        let contents = read(&paths)?;
        let value = Arc::new(parse(&contents)?);
        Ok(Watched {
            paths,
            parse: Box::new(parse),
            state: Mutex::new(State {
                looked: Instant::now(),
                contents,
                unreadable: None,
                value,
            }),
        })
    }

    /// The value of the newest usable files. Bad ones are named in the log once and change
    /// nothing.
    pub(crate) fn get(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() < RECHECK {
            return Arc::clone(&state.value);
        }
        state.looked = Instant::now();
        match read(&self.paths) {
            Err(error) => {
                let error = error.to_string();
                if state.unreadable.as_ref() != Some(&error) {
                    tracing::warn!("{error}; what was read before stays in use");
                    state.unreadable = Some(error);
                }
            }
            Ok(contents) => {
                state.unreadable = None;
                if contents != state.contents {
                    match (self.parse)(&contents) {
                        Ok(value) => {
                            tracing::info!(files = ?self.paths, "read again");
                            state.value = Arc::new(value);
                        }
                        // Files that belong together are not always replaced in one stroke.
                        Err(error) => {
                            tracing::warn!("{error}; what was read before stays in use");
                        }
                    }
                    state.contents = contents;
                }
            }
        }
        Arc::clone(&state.value)
    }
}

impl<T> std::fmt::Debug for Watched<T> {
    /// The files only: what is in them may be secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Watched").field(&self.paths).finish()
    }
}

fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, FileError> {
    paths.iter().map(|path| read_one(path)).collect()
}

/// A whole file of a bounded size.
fn read_one(path: &Path) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| FileError::new(path, format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileError::new(
            path,
            format!("is longer than {MAX_BYTES} bytes"),
        ));
    }
    Ok(bytes)
}
