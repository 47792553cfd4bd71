//! `guild experts` on a cluster: what the binary asks a coordinator, what it makes
//! of the answers, and its exit codes. The coordinator is only pretended.
#![allow(clippy::unwrap_used)]

use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use guild_node::member::{LEADER_KEY, REASON_NOT_LEADER};
use guild_node::serve::{Server, bind};
use guild_node::{Shutdown, status};
use guild_proto::cluster::v1::cluster_server::{Cluster, ClusterServer};
use guild_proto::cluster::v1::{
    DrainNodeRequest, DrainNodeResponse, ExpertLoadRequest, ExpertLoadResponse, ExpertNodeLoad,
    MigrationPhase, MigrationStatus, NodeStatus, RebalanceRequest, RebalanceResponse, Role, Slot,
    StatusRequest, StatusResponse, WatchMigrationRequest,
};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::watch;
use tonic::codegen::BoxStream;
use tonic::{Code, Request, Response, Status};

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A coordinator that says what a test wants it to say.
#[derive(Clone)]
struct Pretended {
    /// Whom it follows; None: it leads.
    leader: Option<String>,
    migration: watch::Sender<MigrationStatus>,
    /// How the next migration ends: why it is rolled back.
    fails: Option<&'static str>,
    /// Experts that expert-1 still holds.
    held: Arc<AtomicU32>,
}

impl Pretended {
    fn new() -> Pretended {
        Pretended {
            leader: None,
            migration: watch::Sender::new(MigrationStatus {
                phase: MigrationPhase::Idle.into(),
                ..Default::default()
            }),
            fails: None,
            held: Arc::new(AtomicU32::new(3)),
        }
    }

    /// Serves until dropped. Returns where.
    async fn serve(&self) -> (String, Shutdown) {
        let listener = bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let end = Shutdown::new();
        let server = Server::new().await.add(ClusterServer::new(self.clone()));
        tokio::spawn(server.run(listener, end.clone(), Duration::ZERO));
        (address, end)
    }

    fn lead(&self) -> Result<(), Status> {
        match &self.leader {
            None => Ok(()),
            Some(leader) => Err(status::with_reason(
                Code::Unavailable,
                REASON_NOT_LEADER,
                "this coordinator does not lead",
                [(LEADER_KEY, leader.clone())],
            )),
        }
    }

    /// Copies for a while, and ends.
    fn migrate(&self, cause: &str) -> u64 {
        let id = self.migration.borrow().migration + 1;
        let (migration, held, fails) = (self.migration.clone(), self.held.clone(), self.fails);
        migration.send_modify(|now| {
            now.migration = id;
            now.cause = cause.to_owned();
            now.phase = MigrationPhase::Copying.into();
            (now.copies, now.bytes) = (3, 3 << 20);
        });
        tokio::spawn(async move {
            for done in 1..=3 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                migration.send_modify(|now| {
                    now.copies_done = done;
                    now.bytes_done = u64::from(done) << 20;
                });
            }
            held.store(0, Ordering::SeqCst);
            migration.send_modify(|now| {
                now.phase = MigrationPhase::Idle.into();
                match fails {
                    None => now.completed += 1,
                    Some(why) => {
                        now.rolled_back += 1;
                        why.clone_into(&mut now.last_failure);
                    }
                }
            });
        });
        id
    }
}

#[tonic::async_trait]
impl Cluster for Pretended {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let node = |node_id: u32, draining| NodeStatus {
            node_id,
            role: Role::Expert.into(),
            name: format!("expert-{node_id}"),
            ready: true,
            draining,
            rows_per_second: 1234.5,
            resident_bytes: 5 << 20,
            free_bytes: Some(7 << 20),
            ..Default::default()
        };
        Ok(Response::new(StatusResponse {
            ready: true,
            nodes: vec![node(1, true), node(2, false)],
            replicas_wanted: 2,
            replicas: 1,
            ..Default::default()
        }))
    }

    async fn expert_load(
        &self,
        _: Request<ExpertLoadRequest>,
    ) -> Result<Response<ExpertLoadResponse>, Status> {
        self.lead()?;
        Ok(Response::new(ExpertLoadResponse {
            epoch: 4,
            layers: vec![1],
            experts: 2,
            rows: vec![0, 0],
            balancedness: vec![1.0],
            even_balancedness: vec![1.0],
            nodes: vec![ExpertNodeLoad {
                node_id: 1,
                name: "expert-1".to_owned(),
                slots: (0..2).map(|expert| Slot { layer: 1, expert }).collect(),
                rows: vec![0.0],
            }],
            ..Default::default()
        }))
    }

    async fn rebalance(
        &self,
        request: Request<RebalanceRequest>,
    ) -> Result<Response<RebalanceResponse>, Status> {
        self.lead()?;
        let request = request.into_inner();
        let migration = match request.dry_run {
            true => 0,
            false => self.migrate("balance"),
        };
        Ok(Response::new(RebalanceResponse {
            moves: vec!["layer 1: expert 0 to expert-2".to_owned()],
            bytes: request.budget_bytes.unwrap_or(1 << 30),
            before: 1.75,
            after: 1.25,
            migration,
        }))
    }

    async fn drain_node(
        &self,
        request: Request<DrainNodeRequest>,
    ) -> Result<Response<DrainNodeResponse>, Status> {
        self.lead()?;
        let request = request.into_inner();
        if request.node != "expert-1" {
            let message = "no expert node is called `nope`; there are expert-1, expert-2";
            return Err(status::not_found("NO_SUCH_NODE", message));
        }
        let slots = self.held.load(Ordering::SeqCst);
        let migration = match slots > 0 && !request.undo {
            true => self.migrate("drain expert-1"),
            false => 0,
        };
        Ok(Response::new(DrainNodeResponse { slots, migration }))
    }

    async fn watch_migration(
        &self,
        _: Request<WatchMigrationRequest>,
    ) -> Result<Response<BoxStream<MigrationStatus>>, Status> {
        self.lead()?;
        let changes = tokio_stream::wrappers::WatchStream::new(self.migration.subscribe());
        let changes = futures::StreamExt::map(changes, Ok);
        Ok(Response::new(Box::pin(changes)))
    }
}

async fn experts(address: &str, args: &[&str]) -> (i32, String, String) {
    let child = Command::new(env!("CARGO_BIN_EXE_guild"))
        .arg("experts")
        .args(args)
        .args(["--coordinator", address])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PATIENCE, child).await;
    let Output {
        status,
        stdout,
        stderr,
    } = output.expect("the command ends").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

fn object(stdout: &str) -> Value {
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_is_asked_of_the_leader_and_can_be_waited_for() {
    let (leader, _end) = Pretended::new().serve().await;
    let follower = Pretended {
        leader: Some(leader.clone()),
        ..Pretended::new()
    };
    let (follower, _end) = follower.serve().await;
    // A follower says who leads; of several addresses a dead one does not matter.
    for address in [follower.clone(), format!("127.0.0.1:1,{follower}")] {
        let args = ["rebalance", "--dry-run", "--budget", "8MiB", "--json"];
        let (code, stdout, stderr) = experts(&address, &args).await;
        assert_eq!(code, 0, "{stderr}");
        let plan = object(&stdout);
        assert_eq!(plan["bytes"], json!(8 << 20));
        assert_eq!(
            (&plan["before"], &plan["after"]),
            (&json!(1.75), &json!(1.25))
        );
        assert_eq!(plan["migration"], Value::Null);
    }
    let (code, stdout, stderr) = experts(&follower, &["rebalance", "--wait"]).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("layer 1: expert 0 to expert-2"), "{stdout}");
    assert!(stdout.contains("1.00 GiB to move"), "{stdout}");
    assert!(stdout.contains("migration 1 has begun"), "{stdout}");

    let unlucky = Pretended {
        fails: Some("`expert-2` cannot load epoch 9: the disk is full"),
        ..Pretended::new()
    };
    let (unlucky, _end) = unlucky.serve().await;
    let (code, _, stderr) = experts(&unlucky, &["rebalance", "--wait"]).await;
    assert_eq!(code, 5, "{stderr}");
    assert!(
        stderr.contains("rolled back: `expert-2` cannot load epoch 9: the disk is full"),
        "{stderr}"
    );

    let (code, _, stderr) = experts("127.0.0.1:1", &["rebalance"]).await;
    assert_eq!(code, 5, "{stderr}");
    assert!(stderr.contains("--coordinator 127.0.0.1:1"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_drained_to_the_end_and_an_unknown_one_named() {
    let (leader, _end) = Pretended::new().serve().await;
    let (code, _, stderr) = experts(&leader, &["drain", "nope"]).await;
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("there are expert-1, expert-2"), "{stderr}");

    let (code, stdout, stderr) = experts(&leader, &["drain", "expert-1", "--wait"]).await;
    assert_eq!(code, 0, "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].contains("3 experts are being moved"), "{stdout}");
    assert_eq!(lines[1], "expert-1 holds no experts: it can be stopped");
    let (code, stdout, _) = experts(&leader, &["drain", "expert-1", "--wait", "--json"]).await;
    assert_eq!(code, 0);
    assert_eq!(
        object(&stdout),
        json!({"node": "expert-1", "draining": true, "slots": 0, "migration": null})
    );
    let (code, stdout, _) = experts(&leader, &["drain", "expert-1", "--undo"]).await;
    assert_eq!(
        (code, stdout.trim()),
        (0, "experts may come to expert-1 again")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_a_line_until_interrupted() {
    let coordinator = Pretended::new();
    let (leader, _end) = coordinator.serve().await;
    let mut child = Command::new(env!("CARGO_BIN_EXE_guild"))
        .args(["experts", "watch", "--json", "--coordinator", &leader])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = {
        use tokio::io::AsyncBufReadExt as _;
        tokio::io::BufReader::new(child.stdout.take().unwrap()).lines()
    };
    let mut next = async || {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
        let line = line.expect("a line").unwrap().unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    };
    assert_eq!(next().await["phase"], "idle");
    coordinator.migrate("balance");
    let mut phases = Vec::new();
    let end = loop {
        let now = next().await;
        phases.push(now["phase"].as_str().unwrap().to_owned());
        if now["completed"] == json!(1) {
            break now;
        }
    };
    assert!(phases.contains(&"copying".to_owned()), "{phases:?}");
    assert_eq!(
        (&end["cause"], &end["copies_done"]),
        (&json!("balance"), &json!(3))
    );

    let pid = child.id().unwrap().to_string();
    let kill = Command::new("kill").args(["-INT", &pid]).status().await;
    assert!(kill.unwrap().success());
    let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
    assert_eq!(ended.expect("it ends").unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_with_the_next_leader() {
    let first = Pretended::new();
    let (one, end) = first.serve().await;
    // Another process: it shares what the store holds, and no connection.
    let (two, _end) = first.serve().await;
    let both = format!("{one},{two}");
    let mut child = Command::new(env!("CARGO_BIN_EXE_guild"))
        .args(["experts", "watch", "--json", "--coordinator", &both])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    use tokio::io::AsyncBufReadExt as _;
    let mut lines = tokio::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
        let line = line.expect("a line").unwrap().unwrap();
        serde_json::from_str::<Value>(&line).unwrap()
    };
    assert_eq!(next().await["migration"], json!(0));
    end.trigger();
    // How it stands is the first word of the next one.
    assert_eq!(next().await["migration"], json!(0));
    first.migrate("balance");
    while next().await["completed"] != json!(1) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_says_who_drains_how_fast_nodes_are_and_what_fits() {
    let (leader, _end) = Pretended::new().serve().await;
    let (code, stdout, stderr) = experts(&leader, &["ls"]).await;
    assert_eq!(code, 0, "{stderr}");
    let line = |name: &str| {
        let mut lines = stdout.lines().filter(|line| line.contains(name));
        lines.next().unwrap().to_owned()
    };
    for word in ["1,234", "5.00 MiB", "7.00 MiB", "draining"] {
        assert!(line("expert-1").contains(word), "{word}: {stdout}");
    }
    // One that holds nothing has its line, too.
    assert!(line("expert-2").ends_with("ready"), "{stdout}");
    assert!(stdout.contains("every expert has 1 of 2 homes"), "{stdout}");
    let (code, stdout, _) = experts(&leader, &["ls", "--json"]).await;
    assert_eq!(code, 0);
    let held = object(&stdout);
    assert_eq!(
        (&held["replicas_wanted"], &held["replicas"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(held["nodes"][0]["draining"], json!(true));
    assert_eq!(held["nodes"][1]["slots"], json!([]));
    assert_eq!(held["nodes"][1]["free_bytes"], json!(7 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_that_do_not_go_together_are_usage() {
    for args in [
        &["drain"][..],
        &["drain", "expert-1", "--undo", "--wait"],
        &["rebalance", "--budget", "8 apples"],
        &["rebalance", "--dry-run", "--wait"],
        &["watch", "expert-1"],
    ] {
        let (code, stdout, stderr) = experts("127.0.0.1:1", args).await;
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
    }
}
