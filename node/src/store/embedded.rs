//! The store in one file, for the coordinators of one machine.
//!
//! Every write makes a new file beside the old one, syncs it, renames it over
//! the old one and syncs the directory: whenever the process or the machine
//! dies, the file is the old one or the new one, whole. A file that does not
//! pass its checksum has been damaged later and is refused, because an older or
//! empty state in its place would bring old epochs back.
//!
//! Whoever leads holds a lock on `PATH.lock`; the operating system gives it up
//! when the process ends, however it ends. So there is no lease to run out: a
//! leader that is alive but silent keeps leading, and nobody else can write.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::state::MAX_PLACEMENT_BYTES;
use super::{
    Candidate, ClusterStore, Hold, Leader, Leadership, MAX_NAME_BYTES, Observation, State,
    StoreError, Validity,
};

/// First bytes of the file.
const MAGIC: &[u8; 8] = b"GUILDST1";
/// How often candidates and observers look at the file.
const POLL: Duration = Duration::from_millis(100);
/// No file of ours is longer.
const MAX_FILE_BYTES: u64 = (MAX_PLACEMENT_BYTES + 16 * MAX_NAME_BYTES + 256) as u64;

/// A store in one file.
#[derive(Clone, Debug)]
pub struct EmbeddedStore {
    file: Arc<StoreFile>,
}

#[derive(Debug)]
struct StoreFile {
    path: PathBuf,
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq)]
struct Contents {
    revision: u64,
    /// Of the last leader, dead or alive.
    leader: Option<Leader>,
    state: Option<State>,
}

impl EmbeddedStore {
    /// The store in `path`, which need not exist yet. It has to be on a local
    /// file system: locks and renames mean too little on others.
    pub fn new(path: impl AsRef<Path>) -> EmbeddedStore {
        EmbeddedStore {
            file: Arc::new(StoreFile {
                path: path.as_ref().to_owned(),
            }),
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<StoreFile>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let file = Arc::clone(&self.file);
        on_blocking_thread(move || work(&file)).await
    }
}

async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(StoreError::unavailable(&"embedded", error)))
}

#[tonic::async_trait]
impl ClusterStore for EmbeddedStore {
    async fn campaign(
        &self,
        candidate: &Candidate,
        _ttl: Duration,
    ) -> Result<Leadership, StoreError> {
        super::check(candidate)?;
        let mut complained = false;
        loop {
            let leader = candidate.clone();
            match self.blocking(move |file| file.try_lead(leader)).await {
                Ok(Some(won)) => return Ok(won),
                Ok(None) => {}
                Err(error) if error.is_retryable() => {
                    if !complained {
                        tracing::warn!("waiting to lead: {error}");
                    }
                    complained = true;
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn observe(&self) -> Result<Observation, StoreError> {
        self.blocking(|file| {
            // In this order: a leader that wins in between is seen next time.
            let led = file.is_led()?;
            let contents = file.read()?;
            Ok(Observation {
                revision: contents.revision,
                leader: contents.leader.filter(|_| led),
                state: contents.state,
            })
        })
        .await
    }

    async fn changed(&self, revision: u64) {
        let led = self.blocking(|file| file.is_led()).await.ok();
        loop {
            tokio::time::sleep(POLL).await;
            let now = self
                .blocking(|file| Ok((file.read()?.revision, file.is_led()?)))
                .await;
            if now.is_ok_and(|(now, now_led)| now > revision || Some(now_led) != led) {
                return;
            }
        }
    }
}

impl StoreFile {
    fn name(&self) -> String {
        format!("embedded:{}", self.path.display())
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(suffix);
        PathBuf::from(name)
    }

    fn failed(&self, what: &str, path: &Path, error: &std::io::Error) -> StoreError {
        StoreError::unavailable(
            &self.name(),
            format_args!("cannot {what} {}: {error}", path.display()),
        )
    }

    fn damaged(&self, reason: String) -> StoreError {
        StoreError::Damaged {
            store: self.name(),
            reason,
            remedy: format!(
                "stop every node of the cluster or let all of them join before requests come, \
                 then move {} away: epochs are learned from the nodes that join",
                self.path.display()
            ),
        }
    }

    fn lock_file(&self) -> Result<File, StoreError> {
        let path = self.beside(".lock");
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|e| self.failed("make", folder, &e))?;
        }
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| self.failed("open", &path, &e))
    }

    /// Whether somebody holds the lock.
    fn is_led(&self) -> Result<bool, StoreError> {
        match self.lock_file()?.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(e)) => Err(self.failed("lock", &self.beside(".lock"), &e)),
        }
    }

    /// None: somebody else leads, or was looking whether anybody does.
    fn try_lead(self: &Arc<Self>, candidate: Candidate) -> Result<Option<Leadership>, StoreError> {
        let lock = self.lock_file()?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => {
                return Err(self.failed("lock", &self.beside(".lock"), &e));
            }
        }
        let mut contents = self.read()?;
        let leader = Leader {
            candidate,
            term: contents.leader.map_or(0, |last| last.term) + 1,
        };
        contents.leader = Some(leader.clone());
        contents.revision += 1;
        self.replace(&contents)?;
        let (lost, lost_rx) = watch::channel(None);
        let hold = EmbeddedHold {
            file: Arc::clone(self),
            term: leader.term,
            lost,
            lock: Arc::new(Mutex::new(lock)),
        };
        let inherited = contents.state;
        // A lock does not run out.
        let validity = Validity {
            lost: lost_rx,
            until: None,
        };
        Ok(Some(Leadership::new(
            leader,
            inherited,
            validity,
            Box::new(hold),
        )))
    }

    fn read(&self) -> Result<Contents, StoreError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Contents::default()),
            Err(error) => return Err(self.failed("open", &self.path, &error)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| self.failed("read", &self.path, &e))?;
        Contents::decode(&bytes).map_err(|reason| self.damaged(reason))
    }

    fn replace(&self, contents: &Contents) -> Result<(), StoreError> {
        let next = self.beside(".next");
        let bytes = contents.encode();
        let written = File::create(&next).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.map_err(|e| self.failed("write", &next, &e))?;
        fs::rename(&next, &self.path).map_err(|e| self.failed("replace", &self.path, &e))?;
        let folder = match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // The rename itself is durable only with its directory.
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(|e| self.failed("sync", folder, &e))
    }
}

impl Contents {
    /// `[magic 8][CRC-32C of the rest u32 LE][revision u64][term u64]` then id,
    /// address and state, each as `[length u32][bytes]`; term 0: never led;
    /// a state of length 0: never written.
    fn encode(&self) -> Vec<u8> {
        let mut rest = self.revision.to_le_bytes().to_vec();
        let (term, id, address) = match &self.leader {
            Some(Leader { candidate, term }) => {
                (*term, candidate.id.as_str(), candidate.address.as_str())
            }
            None => (0, "", ""),
        };
        rest.extend_from_slice(&term.to_le_bytes());
        let state = self.state.as_ref().map(State::encode).unwrap_or_default();
        for part in [id.as_bytes(), address.as_bytes(), &state] {
            // Every part is limited far below 4 GiB.
            rest.extend_from_slice(&(part.len() as u32).to_le_bytes());
            rest.extend_from_slice(part);
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&crc32c::crc32c(&rest).to_le_bytes());
        bytes.append(&mut rest);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Contents, String> {
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(format!("longer than {MAX_FILE_BYTES} bytes"));
        }
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or("it does not begin like a store of this version")?;
        let mut rest = Rest(rest);
        let crc = u32::from_le_bytes(rest.array()?);
        if crc32c::crc32c(rest.0) != crc {
            return Err("the checksum does not match".to_owned());
        }
        let revision = u64::from_le_bytes(rest.array()?);
        let term = u64::from_le_bytes(rest.array()?);
        let (id, address) = (rest.text()?, rest.text()?);
        let state = match rest.part()? {
            [] => None,
            state => Some(State::decode(state)?),
        };
        if !rest.0.is_empty() {
            return Err(format!("{} bytes too many", rest.0.len()));
        }
        let leader = (term > 0).then_some(Leader {
            candidate: Candidate { id, address },
            term,
        });
        Ok(Contents {
            revision,
            leader,
            state,
        })
    }
}

/// Bytes not yet read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or("it ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?
            .try_into()
            .map_err(|_| "it ends too early".to_owned())
    }

    fn part(&mut self) -> Result<&'a [u8], String> {
        let length = u32::from_le_bytes(self.array()?);
        self.take(length as usize)
    }

    fn text(&mut self) -> Result<String, String> {
        let text = std::str::from_utf8(self.part()?);
        text.map(str::to_owned)
            .map_err(|_| "a name is not UTF-8".to_owned())
    }
}

/// Holds the lock; the last clone of it gives it up.
#[derive(Debug)]
struct EmbeddedHold {
    file: Arc<StoreFile>,
    term: u64,
    lost: watch::Sender<Option<String>>,
    /// One write at a time.
    lock: Arc<Mutex<File>>,
}

#[tonic::async_trait]
impl Hold for EmbeddedHold {
    async fn write(&self, state: &State) -> Result<u64, StoreError> {
        let (file, lock) = (Arc::clone(&self.file), Arc::clone(&self.lock));
        let (term, state) = (self.term, state.clone());
        let written = on_blocking_thread(move || {
            let _one_at_a_time = lock.lock().unwrap_or_else(PoisonError::into_inner);
            let mut contents = file.read()?;
            // The lock keeps others out, unless somebody has removed its file.
            if contents.leader.as_ref().is_none_or(|l| l.term != term) {
                return Err(StoreError::Fenced {
                    term,
                    reason: format!("another coordinator has written {}", file.name()),
                });
            }
            contents.state = Some(state);
            contents.revision += 1;
            file.replace(&contents)?;
            Ok(contents.revision)
        })
        .await;
        if let Err(StoreError::Fenced { reason, .. }) = &written {
            self.lost.send_replace(Some(reason.clone()));
        }
        written
    }

    async fn release(self: Box<Self>) {}
}
