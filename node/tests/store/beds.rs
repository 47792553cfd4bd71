//! The backends as the suite meets them, and etcd as a process of the test's.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guild_node::store::{self, Candidate, ClusterStore, MemoryStore, StoreUrl};

/// A lease that every backend can keep: etcd gives none below two seconds.
pub(crate) const TTL: Duration = Duration::from_secs(2);
/// etcd on a busy machine is up within this time.
const UP: Duration = Duration::from_secs(60);

pub(crate) fn candidate(id: &str) -> Candidate {
    Candidate {
        id: id.to_owned(),
        address: format!("http://{id}:7000"),
    }
}

/// A backend under test.
#[tonic::async_trait]
pub(crate) trait Bed: Send + Sync {
    /// The store as another process would open it.
    fn open(&self) -> Arc<dyn ClusterStore>;
    /// Takes the leadership from whoever has it, without asking.
    async fn depose(&self);
}

pub(crate) struct Memory(MemoryStore);

pub(crate) fn memory() -> Option<Memory> {
    Some(Memory(MemoryStore::default()))
}

#[tonic::async_trait]
impl Bed for Memory {
    fn open(&self) -> Arc<dyn ClusterStore> {
        Arc::new(self.0.clone())
    }

    async fn depose(&self) {
        self.0.depose();
    }
}

pub(crate) struct Embedded(tempfile::TempDir);

pub(crate) fn embedded() -> Option<Embedded> {
    Some(Embedded(tempfile::tempdir().unwrap()))
}

impl Embedded {
    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("store")
    }
}

#[tonic::async_trait]
impl Bed for Embedded {
    fn open(&self) -> Arc<dyn ClusterStore> {
        store::open(&StoreUrl::Embedded(self.path()))
    }

    async fn depose(&self) {
        // The one way past the lock: somebody removes its file.
        std::fs::remove_file(self.0.path().join("store.lock")).unwrap();
    }
}

/// An etcd cluster on loopback.
pub(crate) struct Etcd {
    folder: tempfile::TempDir,
    members: Vec<Member>,
}

struct Member {
    client: u16,
    peer: u16,
    process: Option<Child>,
}

/// A single etcd; None where it is not installed.
pub(crate) fn etcd() -> Option<Etcd> {
    Etcd::start(1)
}

impl Etcd {
    pub(crate) fn start(members: usize) -> Option<Etcd> {
        let installed = Command::new("etcd")
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if installed.is_err() {
            assert!(
                std::env::var_os("CI").is_none(),
                "etcd is not installed: cargo xtask test installs it, or apt-get install etcd-server"
            );
            eprintln!("SKIPPED: etcd is not installed (apt-get install etcd-server)");
            return None;
        }
        // All at once, so that no port is given twice.
        let ports: Vec<TcpListener> = (0..members * 2)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let members = ports
            .chunks(2)
            .map(|pair| Member {
                client: port(&pair[0]),
                peer: port(&pair[1]),
                process: None,
            })
            .collect();
        drop(ports);
        let mut etcd = Etcd {
            folder: tempfile::tempdir().unwrap(),
            members,
        };
        for member in 0..etcd.members.len() {
            etcd.run(member);
        }
        etcd.wait_until_up();
        Some(etcd)
    }

    pub(crate) fn url(&self) -> StoreUrl {
        StoreUrl::Etcd {
            endpoints: self
                .members
                .iter()
                .map(|m| format!("127.0.0.1:{}", m.client))
                .collect(),
            prefix: "test/guild".to_owned(),
        }
    }

    fn data(&self, member: usize) -> PathBuf {
        self.folder.path().join(format!("m{member}"))
    }

    /// Starts a member that does not run, with the data it has.
    pub(crate) fn run(&mut self, member: usize) {
        let all: Vec<String> = (0..)
            .zip(&self.members)
            .map(|(i, m)| format!("m{i}=http://127.0.0.1:{}", m.peer))
            .collect();
        let data = self.data(member);
        let log = std::fs::File::create(data.with_extension("log")).unwrap();
        let it = &mut self.members[member];
        let client = format!("http://127.0.0.1:{}", it.client);
        let peer = format!("http://127.0.0.1:{}", it.peer);
        let process = Command::new("etcd")
            .args(["--name", &format!("m{member}")])
            .arg("--data-dir")
            .arg(&data)
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &all.join(",")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        it.process = Some(process);
    }

    /// Kills a member as the kernel would.
    pub(crate) fn kill(&mut self, member: usize) {
        if let Some(mut process) = self.members[member].process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Takes a dead member's data away.
    pub(crate) fn wipe(&self, member: usize) {
        std::fs::remove_dir_all(self.data(member)).unwrap();
    }

    pub(crate) fn wait_until_up(&self) {
        let until = Instant::now() + UP;
        for (index, member) in self.members.iter().enumerate() {
            if member.process.is_none() {
                continue;
            }
            let address = format!("127.0.0.1:{}", member.client);
            while !healthy(&address) {
                let log = log_of(&self.data(index));
                assert!(Instant::now() < until, "etcd does not come up:\n{log}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// Whether the member at `address` is part of a quorum.
fn healthy(address: &str) -> bool {
    use std::io::{Read as _, Write as _};
    let Ok(mut stream) = std::net::TcpStream::connect(address) else {
        return false;
    };
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let mut answer = String::new();
    let asked = stream
        .write_all(b"GET /health HTTP/1.0\r\n\r\n")
        .and_then(|()| stream.read_to_string(&mut answer));
    asked.is_ok() && answer.contains("\"true\"")
}

fn log_of(data: &Path) -> String {
    std::fs::read_to_string(data.with_extension("log")).unwrap_or_default()
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in 0..self.members.len() {
            self.kill(member);
        }
    }
}

#[tonic::async_trait]
impl Bed for Etcd {
    fn open(&self) -> Arc<dyn ClusterStore> {
        store::open(&self.url())
    }

    async fn depose(&self) {
        let address = format!("127.0.0.1:{}", self.members[0].client);
        let mut client = etcd_client::Client::connect([address], None).await.unwrap();
        client.delete("test/guild/leader", None).await.unwrap();
    }
}
