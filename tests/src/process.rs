//! Real processes: the `guild` binary, started, watched and stopped.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::certs::Certs;
use crate::house::{House, Node, Plan};
use crate::http;

/// How long a cluster may take from start to ready before the test gives up.
pub const START_LIMIT: Duration = Duration::from_secs(60);

/// Where tests listen, unless they say otherwise.
pub const LOOPBACK: &str = "127.0.0.1";

/// Root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The demo checkpoint.
pub fn demo() -> PathBuf {
    root().join("models/demo")
}

/// A golden checkpoint by its folder name.
pub fn golden_dir(case: &str) -> PathBuf {
    root().join("tests/golden").join(case)
}

/// Path of the `guild` binary: `GUILD_BIN` when the recipe has built it, else
/// built here, once per test process and with its fail points, so that a test never runs a stale one.
pub fn guild_bin() -> &'static Path {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| {
        if let Some(bin) = std::env::var_os("GUILD_BIN") {
            return PathBuf::from(bin);
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--features", "guild/failpoints"])
            .args(["--package", "guild"])
            .current_dir(root())
            .status()
            .unwrap();
        assert!(built.success(), "cargo build --package guild failed");
        // <target>/debug/deps/<test binary> -> <target>/debug/guild
        let exe = std::env::current_exe().unwrap();
        exe.ancestors().nth(2).unwrap().join("guild")
    })
}

/// Ports that [`free_port`] gives: below those that a system gives to connections, which would
/// take one before it is listened on.
const PORTS: std::ops::Range<u32> = 10_240..30_240;

/// A loopback port that was free a moment ago. None is given twice.
pub fn free_port() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let given = GIVEN.fetch_add(1, Ordering::SeqCst);
        // Tests in other processes begin elsewhere.
        let at = std::process::id().wrapping_mul(199).wrapping_add(given);
        let port = (PORTS.start + at % PORTS.len() as u32) as u16;
        if TcpListener::bind((LOOPBACK, port)).is_ok() {
            return port;
        }
    }
}

/// A running `guild` process; killed when dropped.
pub struct Guild {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    what: String,
}

impl Guild {
    /// Starts `guild` with these arguments.
    pub fn start<S: AsRef<str>>(args: &[S]) -> Guild {
        Guild::start_in(None, &[], args)
    }

    /// The same in a network namespace, where one is given, and with a further environment.
    pub fn start_in<S: AsRef<str>>(
        namespace: Option<&str>,
        environment: &[(String, String)],
        args: &[S],
    ) -> Guild {
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let mut command = match namespace {
            Some(namespace) => {
                // It replaces itself by what it starts: signals reach `guild`.
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(guild_bin());
                command
            }
            None => Command::new(guild_bin()),
        };
        let mut child = command
            .args(&args)
            .env(
                "GUILD_LOG_LEVEL",
                std::env::var("GUILD_TEST_LOG").unwrap_or_else(|_| "info".into()),
            )
            .envs(environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let streams: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().unwrap()),
            Box::new(child.stderr.take().unwrap()),
        ];
        for stream in streams {
            let log = log.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines() {
                    let Ok(line) = line else { break };
                    log.lock().unwrap().push(line);
                }
            });
        }
        Guild {
            child,
            log,
            what: format!("guild {}", args.join(" ")),
        }
    }

    /// Everything printed so far, stdout and stderr.
    pub fn output(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Waits for a line that contains `needle` and returns it.
    pub fn wait_for_line(&mut self, needle: &str, limit: Duration) -> String {
        let end = Instant::now() + limit;
        loop {
            if let Some(line) = self.log.lock().unwrap().iter().find(|l| l.contains(needle)) {
                return line.clone();
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!(
                    "{} ended with {status} before `{needle}`:\n{}",
                    self.what,
                    self.output()
                );
            }
            assert!(
                Instant::now() < end,
                "{}: no `{needle}` within {limit:?}:\n{}",
                self.what,
                self.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its id in the operating system.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// True while the process runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < end,
                "{} still runs after {limit:?}:\n{}",
                self.what,
                self.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal by name, such as `TERM` or `STOP`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// SIGTERM, then waits for the drain to end.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait(Duration::from_secs(30))
    }
}

impl Drop for Guild {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How the rows travel in `guild up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One process, rows handed over in memory.
    Local,
    /// One process, rows over loopback gRPC.
    Grpc,
    /// A process for every role.
    Processes,
}

/// A ready cluster and where it listens.
pub struct Cluster {
    /// `host:port` of the OpenAI front door.
    pub http: String,
    /// URL of the gRPC front door.
    pub grpc: String,
    /// Coordinator first, then attention nodes, then expert nodes; just one for `guild up`.
    pub processes: Vec<Guild>,
    /// Of the inside; `guild up` has none.
    pub certs: Option<Certs>,
}

impl Cluster {
    /// Starts a cluster of `attention` x `expert` nodes and waits until it is ready; `extra` are
    /// flags of the nodes.
    pub fn start(
        shape: Shape,
        model: &Path,
        attention: usize,
        expert: usize,
        extra: &[&str],
    ) -> Cluster {
        let extra = extra.iter().map(|&arg| arg.to_owned());
        let mut cluster = match shape {
            Shape::Processes => Cluster::of(House::begin(
                Plan {
                    model: model.to_owned(),
                    attention,
                    experts: expert,
                    replicas: 1,
                    node_flags: extra.collect(),
                    ..Plan::default()
                },
                |_| None,
            )),
            Shape::Local => Cluster::in_one(model, attention, expert, "local", extra),
            Shape::Grpc => Cluster::in_one(model, attention, expert, "grpc", extra),
        };
        cluster.wait_ready(Duration::from_secs(0));
        cluster
    }

    fn of(house: House) -> Cluster {
        let door = &house.coordinators[0];
        let (http, grpc) = (door.http.clone(), door.grpc.clone());
        let coordinators = house.coordinators.into_iter().map(|c| c.node);
        let nodes = coordinators.chain(house.attention).chain(house.experts);
        Cluster {
            http,
            grpc,
            processes: nodes.map(Node::into_process).collect(),
            certs: house.certs,
        }
    }

    fn in_one(
        model: &Path,
        attention: usize,
        expert: usize,
        fabric: &str,
        extra: impl Iterator<Item = String>,
    ) -> Cluster {
        let [http, grpc] = [(); 2].map(|()| format!("{LOOPBACK}:{}", free_port()));
        let args = [
            "up",
            "--model",
            model.to_str().unwrap(),
            "--attention-nodes",
            &attention.to_string(),
            "--expert-nodes",
            &expert.to_string(),
            "--fabric",
            fabric,
            "--http",
            &http,
            "--grpc",
            &grpc,
        ];
        let args = args.iter().map(|&arg| arg.to_owned()).chain(extra);
        Cluster {
            processes: vec![Guild::start(&args.collect::<Vec<_>>())],
            grpc: format!("http://{grpc}"),
            http,
            certs: None,
        }
    }

    /// `guild up` with one attention and two expert nodes.
    pub fn up(model: &Path) -> Cluster {
        Cluster::start(Shape::Local, model, 1, 2, &[])
    }

    /// Waits until `/health` answers 200; `extra` is added to the usual limit.
    pub fn wait_ready(&mut self, extra: Duration) {
        let end = Instant::now() + START_LIMIT + extra;
        loop {
            if http::get(&self.http, "/health").is_ok_and(|r| r.status == 200) {
                return;
            }
            for process in &mut self.processes {
                assert!(
                    process.is_running(),
                    "a process ended before the cluster was ready:\n{}",
                    process.output()
                );
            }
            if Instant::now() >= end {
                let logs: Vec<String> = self
                    .processes
                    .iter()
                    .map(|p| format!("== {}\n{}", p.what, p.output()))
                    .collect();
                panic!("not ready within {START_LIMIT:?}:\n{}", logs.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Runs `guild` to its end and returns (exit code, stdout, stderr); one that
/// still runs after [`START_LIMIT`] is killed and has the code -1.
pub fn guild(args: &[&str]) -> (i32, String, String) {
    let mut child = Command::new(guild_bin())
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let read = |mut stream: Box<dyn std::io::Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let (stdout, stderr) = (
        read(Box::new(child.stdout.take().unwrap())),
        read(Box::new(child.stderr.take().unwrap())),
    );
    let end = Instant::now() + START_LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() >= end {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    (
        status.unwrap_or(-1),
        stdout.join().unwrap(),
        stderr.join().unwrap(),
    )
}

/// The Python with the client packages, or why a client test cannot run here.
pub fn client_python() -> Result<PathBuf, String> {
    match std::env::var_os("GUILD_TEST_PYTHON") {
        Some(python) => Ok(PathBuf::from(python)),
        None if std::env::var_os("CI").is_some() => panic!("GUILD_TEST_PYTHON is not set: run the tests through `cargo xtask test`"),
        None => Err("skipped: GUILD_TEST_PYTHON is not set; `cargo xtask test` prepares the client packages".into()),
    }
}
