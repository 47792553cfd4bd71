//! A closed cluster of real processes: certificates by `guild certs`, keys by `guild keys`, and
//! nobody else gets in.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod keys;
mod outsider;
mod ports;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use guild_node::RECHECK;
use guild_node::channel::Dialer;
use guild_node::tls::{Identity, Role, Roots, Tls};
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{
    self, DrainNodeRequest, HeartbeatRequest, RebalanceRequest, RegisterRequest, StatusRequest,
};
use guild_tests::certs::Certs;
use guild_tests::process::{Guild, START_LIMIT, demo, free_port, guild, root};
use guild_tests::work::line;
use outsider::Ca;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Clients that ask while certificates change.
const CLIENTS: usize = 3;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Trusts the CA and shows nothing.
fn anonymous(certs: &Certs) -> Dialer {
    Dialer::Server(Roots::open(Path::new(&certs.path("ca.pem"))).unwrap())
}

/// A cluster where everything is closed.
struct Closed {
    _dir: TempDir,
    certs: Certs,
    key: String,
    http: String,
    grpc: String,
    /// Where nodes are: role and `host:port`.
    internal: Vec<(Role, String)>,
    _processes: Vec<Guild>,
}

impl Closed {
    async fn start() -> Closed {
        let dir = TempDir::new().unwrap();
        let certs = Certs::make(&dir.path().join("certs"), &[]);
        let (code, stdout, _) = guild(&["keys", "new", "--name", "tester"]);
        assert_eq!(code, 0);
        let (key, line) = stdout.trim().split_once('\n').unwrap();
        let keys = dir.path().join("keys");
        std::fs::write(&keys, format!("# who may ask\n{line}\n")).unwrap();

        let model = demo().to_str().unwrap().to_owned();
        let cluster = format!("127.0.0.1:{}", free_port());
        let (http, grpc) = (
            format!("127.0.0.1:{}", free_port()),
            format!("127.0.0.1:{}", free_port()),
        );
        let start = |role: Role, args: &[&str]| {
            let mut all: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
            all.extend(["--model".to_owned(), model.clone()]);
            all.extend(["--tls-dir", certs.folder()].map(str::to_owned));
            let mut process = Guild::start(&all);
            let line = process.wait_for_line("guild: listening on ", START_LIMIT);
            let address = line.rsplit(' ').next().unwrap().to_owned();
            (role, address, process)
        };
        let url = format!("https://{cluster}");
        let mut started = vec![start(
            Role::Coordinator,
            &[
                "coordinator",
                "--listen",
                &cluster,
                "--http",
                &http,
                "--grpc",
                &grpc,
                "--min-expert-nodes",
                "2",
                "--api-keys",
                keys.to_str().unwrap(),
                "--http-tls-cert",
                &certs.path("coordinator.pem"),
                "--http-tls-key",
                &certs.path("coordinator.key"),
            ],
        )];
        let attention = ["attention-node", "--coordinator", &url];
        started.push(start(Role::Attention, &attention));
        for _ in 0..2 {
            // Without a scheme it is TLS as well.
            started.push(start(
                Role::Expert,
                &["expert-node", "--coordinator", &cluster],
            ));
        }
        let mut internal = Vec::new();
        let mut processes = Vec::new();
        for (role, address, process) in started {
            internal.push((role, address));
            processes.push(process);
        }
        let mut closed = Closed {
            _dir: dir,
            certs,
            key: key.to_owned(),
            http,
            grpc,
            internal,
            _processes: processes,
        };
        closed.wait_ready().await;
        closed
    }

    /// Health is open to everybody.
    async fn wait_ready(&mut self) {
        let channel = anonymous(&self.certs).lazy(&self.grpc).unwrap();
        let mut health = HealthClient::new(channel);
        let end = Instant::now() + START_LIMIT;
        loop {
            let asked = health.check(HealthCheckRequest::default()).await;
            if asked.is_ok_and(|answer| answer.get_ref().status() == ServingStatus::Serving) {
                return;
            }
            if Instant::now() > end {
                let logs: Vec<String> = self._processes.iter().map(Guild::output).collect();
                panic!("not ready:\n{}", logs.join("\n==\n"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn generate(&self, more: &[&str]) -> (i32, String, String) {
        let endpoint = format!("https://{}", self.grpc);
        let ca = self.certs.path("ca.pem");
        let args = [
            &["generate", "--endpoint", &endpoint, "--tls-ca", &ca],
            PROMPT,
            more,
        ];
        guild(&args.concat())
    }
}

const PROMPT: &[&str] = &["--token-ids", "0,839,30", "--max-tokens", "12", "--json"];

fn token_ids(stdout: &str) -> Value {
    serde_json::from_str::<Value>(stdout).unwrap()["token_ids"].clone()
}

/// Whether the port answers at all: health is on every one.
async fn answers(channel: Channel) -> bool {
    let mut health = HealthClient::new(channel);
    let asked = health.check(HealthCheckRequest::default());
    matches!(tokio::time::timeout(PATIENCE, asked).await, Ok(Ok(_)))
}

/// Who may dial a node of this role.
fn callers(of: Role) -> &'static [Role] {
    match of {
        Role::Coordinator => Role::JOINING,
        Role::Attention => Role::REQUESTING,
        Role::Expert => Role::SENDING_ROWS,
        Role::Operator => &[],
    }
}

/// One of those that are let in: what is wrong with a certificate that names it is something else.
fn caller(of: Role) -> Role {
    callers(of)[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_cluster_serves_its_own_and_refuses_everybody_else() {
    let cluster = Closed::start().await;
    let certs = &cluster.certs;

    // It serves, and encryption changes no token.
    let (code, stdout, stderr) = cluster.generate(&["--api-key", &cluster.key]);
    assert_eq!(code, 0, "{stderr}");
    let model = demo();
    let alone = [&["generate", "--model", model.to_str().unwrap()], PROMPT].concat();
    assert_eq!(token_ids(&stdout), token_ids(&guild(&alone).1));

    // Keys.
    for more in [&[][..], &["--api-key", "guild-0000"]] {
        let (code, _, stderr) = cluster.generate(more);
        assert!(code == 2 && stderr.contains("API key"), "{code}: {stderr}");
    }
    // Without encryption, or with another CA, nothing is said at the front door either.
    for door in [&cluster.http, &cluster.grpc] {
        assert!(!answers(Dialer::Plain.lazy(door).unwrap()).await, "{door}");
        assert!(
            answers(anonymous(certs).lazy(door).unwrap()).await,
            "{door}"
        );
    }

    // Internal ports: every role, an outsider of another CA, nobody, plaintext.
    let elsewhere = TempDir::new().unwrap();
    let others = Certs::make(&elsewhere.path().join("certs"), &[]);
    let namesake = Certs::make(&elsewhere.path().join("other"), &["--cluster", "other"]);
    let (own, foreign) = (
        Ca::of(Path::new(certs.folder())),
        Ca::of(Path::new(others.folder())),
    );
    let mut refused = 0;
    let mut refuse = |let_in: bool, who: &str, of: Role| {
        assert!(!let_in, "{who} is let in by the {of}");
        refused += 1;
    };
    for (of, address) in &cluster.internal {
        let of = *of;
        let peers: &'static [Role] = match of {
            Role::Coordinator => Role::COORDINATING,
            Role::Attention => Role::ATTENDING,
            _ => Role::TAKING_ROWS,
        };
        for role in Role::ALL {
            let asks = async |tls: Tls| {
                answers(Dialer::Mutual { tls, peers }.lazy(address).unwrap()).await
            };
            if callers(of).contains(&role) {
                assert!(asks(certs.tls(role)).await, "{role} at {of}");
            } else {
                let who = format!("the role {role}");
                refuse(asks(certs.tls(role)).await, &who, of);
                let shows = own.dial(address, Some(own.right(role)));
                refuse(answers(shows).await, &who, of);
            }
            let who = format!("{role} of another CA");
            refuse(asks(others.tls(role)).await, &who, of);
            let shows = own.dial(address, Some(foreign.right(role)));
            refuse(answers(shows).await, &who, of);
            let who = format!("{role} of another cluster");
            refuse(asks(namesake.tls(role)).await, &who, of);
        }
        let right = own.dial(address, Some(own.right(caller(of))));
        assert!(answers(right).await, "the outsider's own tools work");
        for (wrong, shown) in own.useless(caller(of)) {
            let let_in = answers(own.dial(address, Some(shown))).await;
            refuse(let_in, wrong, of);
        }
        let plain = Dialer::Plain.lazy(address).unwrap();
        refuse(answers(plain).await, "plaintext", of);
        refuse(answers(own.dial(address, None)).await, "nobody", of);
    }
    line(&json!({
        "test": "security", "case": "internal_ports", "ports": cluster.internal.len(),
        "refused": refused, "failed": 0,
    }));

    // A node is what its certificate says.
    let tls = certs.tls(Role::Attention);
    let dialer = Dialer::to(Role::COORDINATING, Some(&tls));
    let mut client = ClusterClient::new(dialer.lazy(&cluster.internal[0].1).unwrap());
    let request = RegisterRequest {
        role: v1::Role::Expert.into(),
        name: "intruder".to_owned(),
        address: "127.0.0.1:1".to_owned(),
        ..Default::default()
    };
    let refused = client.register(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    // And may do what its role may do: nodes change no placement, operators are no nodes.
    let asked = client.drain_node(DrainNodeRequest::default()).await;
    assert_eq!(asked.unwrap_err().code(), Code::PermissionDenied);
    let asked = client.rebalance(RebalanceRequest::default()).await;
    assert_eq!(asked.unwrap_err().code(), Code::PermissionDenied);
    let tls = certs.tls(Role::Operator);
    let dialer = Dialer::to(Role::COORDINATING, Some(&tls));
    let mut client = ClusterClient::new(dialer.lazy(&cluster.internal[0].1).unwrap());
    let asked = client.heartbeat(HeartbeatRequest::default()).await;
    assert_eq!(asked.unwrap_err().code(), Code::PermissionDenied);
    assert!(client.status(StatusRequest {}).await.is_ok());

    // New certificates under requests that come without a pause: none of them fails.
    let renewed = elsewhere.path().join("renewed");
    std::fs::create_dir(&renewed).unwrap();
    for file in ["ca.pem", "ca.key"] {
        std::fs::copy(certs.path(file), renewed.join(file)).unwrap();
    }
    let renewed = Certs::make(&renewed, &[]);
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    let (code, again, stderr) = cluster.generate(&["--api-key", &cluster.key]);
                    assert_eq!(code, 0, "{stderr}");
                    assert_eq!(token_ids(&again), token_ids(&stdout));
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for file in ["coordinator", "attention", "expert"] {
            for ending in ["pem", "key"] {
                let name = format!("{file}.{ending}");
                std::fs::copy(renewed.path(&name), certs.path(&name)).unwrap();
            }
            std::thread::sleep(RECHECK);
        }
        stop.store(true, Ordering::SeqCst);
    });
    let answered = answered.into_inner();
    line(&json!({
        "test": "security", "case": "rotation", "whole": answered, "failed": 0, "wrong": 0,
    }));
    assert!(answered > CLIENTS);
    // And who comes from now on meets the new ones.
    let newcomer = Dialer::to(Role::COORDINATING, Some(&renewed.tls(Role::Expert)));
    let channel = newcomer.lazy(&cluster.internal[0].1).unwrap();
    assert!(answers(channel).await);
    assert_eq!(cluster.generate(&["--api-key", &cluster.key]).0, 0);
}

/// Runs a role that must not start.
fn refused(args: &[&str], code: i32, says: &[&str]) {
    let (ended, _, stderr) = guild(args);
    assert_eq!(ended, code, "{args:?}: {stderr}");
    for needle in says {
        assert!(stderr.contains(needle), "{args:?}: {needle}: {stderr}");
    }
}

#[test]
fn no_role_starts_without_a_certificate_unless_told_to() {
    let model = demo();
    let model = ["--model", model.to_str().unwrap()];
    let joining = ["--coordinator", "http://127.0.0.1:1"];
    let roles: [&[&str]; 4] = [
        &["coordinator"],
        &["attention-node", joining[0], joining[1]],
        &["attention-node", "--experts", joining[0], joining[1]],
        &["expert-node", joining[0], joining[1]],
    ];
    let missing = ["--tls-dir", "--tls-cert", "guild certs", "--insecure"];
    for role in roles {
        for anywhere in [&[][..], &["--listen", "0.0.0.0:0"]] {
            refused(&[role, &model, anywhere].concat(), 2, &missing);
        }
    }
    // Operators reach a `guild up` of the same machine without any.
    let asks = ["experts", "ls", "--coordinator"];
    refused(
        &[&asks[..], &["http://127.0.0.1:1"]].concat(),
        5,
        &["127.0.0.1:1"],
    );
    refused(&[&asks[..], &["http://192.0.2.1:1"]].concat(), 2, &missing);
    refused(
        &[&asks[..], &["127.0.0.1:1,192.0.2.1:1"]].concat(),
        2,
        &missing,
    );
    // A folder without them is no certificate either.
    let empty = TempDir::new().unwrap();
    let dir = ["--tls-dir", empty.path().to_str().unwrap()];
    refused(
        &[&["coordinator"], &model[..], &dir].concat(),
        3,
        &["coordinator.pem", "guild certs"],
    );
}

#[test]
fn a_folder_of_certificates_is_that_of_guild_certs_or_a_mounted_secret() {
    let dir = TempDir::new().unwrap();
    let certs = Certs::make(dir.path(), &[]);
    let named = ["--role", "expert", "--name", "e-1"];
    Certs::make(dir.path(), &named);
    let secret = TempDir::new().unwrap();
    for (from, to) in [
        ("attention.pem", "tls.crt"),
        ("attention.key", "tls.key"),
        ("ca.pem", "ca.crt"),
    ] {
        std::fs::copy(certs.path(from), secret.path().join(to)).unwrap();
    }
    let model = demo();
    let joining = [
        "--model",
        model.to_str().unwrap(),
        "--coordinator",
        "127.0.0.1:1",
    ];
    let made = ["--tls-dir", certs.folder()];
    let mounted = ["--tls-dir", secret.path().to_str().unwrap()];
    let attention = "spiffe://guild/guild/role/attention";
    for (role, dir, identity) in [
        (&["attention-node"][..], &made, attention),
        (&["attention-node"], &mounted, attention),
        (&["attention-node", "--experts"], &made, attention),
        (
            &["expert-node", "--name", "e-2"],
            &made,
            "spiffe://guild/guild/role/expert",
        ),
        (
            &["expert-node", "--name", "e-1"],
            &made,
            "spiffe://guild/guild/role/expert/e-1",
        ),
    ] {
        let mut process = Guild::start(&[role, &joining, dir].concat());
        let line = process.wait_for_line("  mutual TLS ", START_LIMIT);
        assert!(line.ends_with(identity), "{role:?}: {line}");
    }
    // A certificate of another role is none.
    refused(
        &[&["expert-node"], &joining[..], &mounted].concat(),
        3,
        &["tls.crt", "attention"],
    );
    // One with a name is for that node alone.
    let file = |flag: &str, name: &str| [flag.to_owned(), certs.path(name)];
    let files = [file("--tls-cert", "e-1.pem"), file("--tls-key", "e-1.key")].concat();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let other = ["expert-node", "--name", "e-2"];
    refused(&[&other[..], &joining, &made, &files].concat(), 3, &["e-1"]);
}

#[test]
fn a_front_door_leaves_loopback_only_with_certificates_and_keys() {
    let certs = Certs::new(&[]);
    let model = demo();
    let model = ["--model", model.to_str().unwrap()];
    let anywhere = "0.0.0.0:0";
    let inside = ["--tls-dir", certs.folder()];
    let door = |role: &[&str], says: &str| refused(&[role, &model].concat(), 2, &[says]);
    door(&["up", "--grpc", anywhere], "--http-tls-cert");
    door(&["up", "--http", anywhere], "--api-keys");
    // What is good inside opens no front door, nor does a certificate alone.
    door(
        &["coordinator", "--http", anywhere, inside[0], inside[1]],
        "--api-keys",
    );
    let (cert, key) = (certs.path("coordinator.pem"), certs.path("coordinator.key"));
    let shown = ["--http-tls-cert", &cert, "--http-tls-key", &key];
    door(
        &[&["up", "--http", anywhere], &shown[..]].concat(),
        "--api-keys",
    );
}

#[test]
fn a_start_without_addresses_is_seen_on_loopback_alone() {
    let certs = Certs::new(&[]);
    let model = demo();
    let model = ["--model", model.to_str().unwrap()];
    let inside = ["--tls-dir", certs.folder()];
    let node = ["--coordinator", "127.0.0.1:1"];
    let mut seen = 0;
    for role in [
        ["up", "--expert-nodes", "2", "--fabric", "grpc"].to_vec(),
        [&["coordinator"], &inside[..]].concat(),
        [&["attention-node"], &node[..], &inside].concat(),
        [&["expert-node"], &node[..], &inside].concat(),
        [&["expert-node"], &node[..], &["--insecure"]].concat(),
    ] {
        let mut process = Guild::start(&[&role[..], &model].concat());
        let needle = match role[0] {
            "up" => "  cluster ",
            _ => "guild: listening on ",
        };
        process.wait_for_line(needle, START_LIMIT);
        let open = ports::open_by(process.id());
        assert!(!open.is_empty(), "{role:?}");
        for address in &open {
            assert!(address.ip().is_loopback(), "{role:?} listens on {address}");
        }
        seen += open.len();
    }
    line(&json!({ "test": "security", "case": "default_start", "ports": seen, "elsewhere": 0 }));
}

#[test]
fn certificates_are_made_once_and_keys_are_for_the_owner_alone() {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = TempDir::new().unwrap();
    let certs = Certs::make(dir.path(), &[]);
    let before = std::fs::read(certs.path("ca.pem")).unwrap();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "key") {
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        }
    }
    let out = dir.path().to_str().unwrap();
    let (code, _, stderr) = guild(&["certs", "--out", out]);
    assert!(code == 2 && stderr.contains("not overwritten"), "{stderr}");
    // By another cluster's name the CA that is there cannot sign, and nothing is left behind.
    let (code, _, _) = guild(&[
        "certs",
        "--out",
        out,
        "--cluster",
        "other",
        "--role",
        "expert",
        "--name",
        "e-9",
    ]);
    assert_eq!(code, 3);
    assert!(!dir.path().join("e-9.pem").exists());
    assert_eq!(before, std::fs::read(certs.path("ca.pem")).unwrap());
    for bad in [
        &["--name", "e-1"][..],
        &["--role", "admin"],
        &["--cluster", "a b"],
        &["--role", "expert", "--name", "../e"],
        &["--hosts", "ü"],
    ] {
        let elsewhere = dir.path().join("elsewhere");
        let args = [&["certs", "--out", elsewhere.to_str().unwrap()], bad].concat();
        let (code, _, stderr) = guild(&args);
        assert_eq!(code, 2, "{bad:?}: {stderr}");
    }
}

/// What is asked for by the example is what nodes check.
#[test]
fn cert_manager_is_asked_for_the_roles_as_they_are_checked() {
    let text = std::fs::read_to_string(root().join("deploy/cert-manager.yaml")).unwrap();
    let items: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- "))
        .collect();
    for role in Role::ALL {
        let identity = Identity::new("guild", role, None).unwrap();
        assert!(items.contains(&identity.to_string().as_str()), "{role}");
        let dialled = items.contains(&identity.anywhere().as_str());
        assert_eq!(dialled, role != Role::Operator, "{role}");
    }
}
