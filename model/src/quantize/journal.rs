//! What an interrupted run has finished.
//!
//! Secret: the form of the journal, a file in the folder that is not complete yet. Its first line says what is made of
//! what; each further line is a file that is on the disk, with the digests of its tensors. A line that is not whole was
//! not finished. The file is locked while a run uses it.

use std::fs::{self, File, TryLockError};
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Begun;
use super::plan::Plan;
use crate::checkpoint::write::fault;
use crate::{Checkpoint, ModelError};

/// Name of the journal.
const FILE: &str = ".guild-quantize.journal";
/// Form of the journal and of what is written.
const VERSION: u32 = 1;

/// The first line.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    version: u32,
    /// Of configuration, and names, sizes and times of the files of the source.
    source: String,
    /// Of names, types and shapes of all that will be written.
    plan: String,
}

/// A file that is finished.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    file: String,
    blake3: Vec<String>,
}

/// What is finished, and where that is written down.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    done: Vec<Vec<blake3::Hash>>,
    /// Why earlier work is of no use.
    discarded: Option<String>,
}

impl Journal {
    /// Finds out what is there, and makes the folder fit to go on.
    pub(super) fn open(
        dir: &Path,
        source: &Checkpoint,
        plan: &Plan,
    ) -> Result<Journal, ModelError> {
        let path = dir.join(FILE);
        let broken = |e: std::io::Error| fault(&path, &e);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(broken)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let reason = "another process is writing this checkpoint";
                return Err(ModelError::file(dir, reason));
            }
            Err(TryLockError::Error(e)) => return Err(broken(e)),
        }
        let head = Head {
            version: VERSION,
            source: identity(source)?,
            plan: plan_digest(plan),
        };
        let (done, discarded) = match finished(&file, &head, dir, plan) {
            Ok(done) => (done, None),
            Err(reason) => (Vec::new(), reason),
        };
        if done.is_empty() {
            clear(dir)?;
        }
        // Whole lines only, in their order.
        file.seek(SeekFrom::Start(0)).map_err(broken)?;
        file.set_len(0).map_err(broken)?;
        let mut journal = Journal {
            path: path.clone(),
            file,
            done: Vec::new(),
            discarded,
        };
        journal.append(&head)?;
        for (shard, hashes) in plan.shards.iter().zip(&done) {
            journal.add(&shard.file, hashes)?;
        }
        journal.done = done;
        Ok(journal)
    }

    pub(super) fn begun(&mut self, of: usize) -> Begun {
        match self.discarded.take() {
            Some(reason) => Begun::Discarded { reason },
            None if self.done.is_empty() => Begun::Anew,
            None => Begun::Resumed {
                files: self.done.len(),
                of,
            },
        }
    }

    /// The digests of a file that an earlier run has finished.
    pub(super) fn hashes(&self, shard: usize) -> Option<&[blake3::Hash]> {
        self.done.get(shard).map(Vec::as_slice)
    }

    /// A file is on the disk.
    pub(super) fn add(&mut self, file: &str, hashes: &[blake3::Hash]) -> Result<(), ModelError> {
        self.append(&Line {
            file: file.to_owned(),
            blake3: hashes.iter().map(|h| h.to_hex().to_string()).collect(),
        })
    }

    /// Everything is there.
    pub(super) fn remove(self) -> Result<(), ModelError> {
        fs::remove_file(&self.path).map_err(|e| fault(&self.path, &e))
    }

    fn append(&mut self, line: &impl Serialize) -> Result<(), ModelError> {
        let broken = |e: std::io::Error| fault(&self.path, &e);
        let mut text = serde_json::to_vec(line).map_err(|e| broken(e.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(broken)?;
        self.file.sync_data().map_err(broken)
    }
}

/// The digests of the first files, as far as they are finished; why nothing of it is of use, where there is something.
fn finished(
    journal: &File,
    head: &Head,
    dir: &Path,
    plan: &Plan,
) -> Result<Vec<Vec<blake3::Hash>>, Option<String>> {
    let mut lines = BufReader::new(journal).lines();
    let Some(Ok(first)) = lines.next() else {
        return Err(None);
    };
    let was: Head =
        serde_json::from_str(&first).map_err(|_| Some("its journal cannot be read".to_owned()))?;
    if was != *head {
        let reason = match (was.version == head.version, was.source == head.source) {
            (false, _) => "another version of this program has begun it",
            (true, false) => "the checkpoint that is read has changed",
            (true, true) => "another format, group or size of files was asked for",
        };
        return Err(Some(reason.to_owned()));
    }
    let mut done = Vec::new();
    for shard in &plan.shards {
        let Some(Ok(line)) = lines.next() else { break };
        let Ok(line) = serde_json::from_str::<Line>(&line) else {
            break;
        };
        let hashes: Result<Vec<_>, _> =
            { line.blake3.iter() }.map(blake3::Hash::from_hex).collect();
        let there = fs::metadata(dir.join(&shard.file)).is_ok_and(|m| m.len() > shard.bytes());
        match hashes {
            Ok(hashes)
                if line.file == shard.file && hashes.len() == shard.tensors.len() && there =>
            {
                done.push(hashes)
            }
            _ => break,
        }
    }
    Ok(done)
}

/// Removes what an earlier run has left, but for the journal.
fn clear(dir: &Path) -> Result<(), ModelError> {
    let broken = |e: std::io::Error| ModelError::file(dir, format!("cannot be cleared: {e}"));
    for entry in fs::read_dir(dir).map_err(broken)? {
        let entry = entry.map_err(broken)?;
        if entry.file_name() != FILE {
            fs::remove_file(entry.path()).map_err(broken)?;
        }
    }
    Ok(())
}

/// Changes when the source does, as far as that can be seen without reading it.
fn identity(source: &Checkpoint) -> Result<String, ModelError> {
    let mut hasher = blake3::Hasher::new();
    let config = source.dir().join("config.json");
    let text =
        fs::read(&config).map_err(|e| ModelError::file(&config, format!("cannot be read: {e}")))?;
    hasher.update(&text);
    for path in source.files() {
        let meta = fs::metadata(path)
            .map_err(|e| ModelError::file(path, format!("cannot be read: {e}")))?;
        let modified = meta.modified().ok();
        let since = modified.and_then(|m| m.duration_since(std::time::UNIX_EPOCH).ok());
        let line = format!("{}\0{}\0{since:?}\0", path.display(), meta.len());
        hasher.update(line.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn plan_digest(plan: &Plan) -> String {
    let mut hasher = blake3::Hasher::new();
    for shard in &plan.shards {
        hasher.update(shard.file.as_bytes());
        for t in &shard.tensors {
            let line = format!("{}\0{}\0{:?}\0", t.name, t.dtype, t.shape);
            hasher.update(line.as_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}
