//! A cluster of real processes that can be killed, silenced and started again one by one, the work
//! it is given, and the line of JSON that each case leaves behind.
//!
//! Its secret is how a [`Plan`] becomes command lines, addresses and environments.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{Role, StatusRequest, StatusResponse};
use guild_proto::inference::v1::GenerateRequest;
use serde_json::{Value, json};

use crate::client::{Answer, generate_each};
use crate::http;
use crate::load::{Load, STREAMS, Seen};
use crate::process::{Cluster, Guild, START_LIMIT, Shape, demo, free_port};
use crate::proxy::Proxy;

/// Lease of nodes, in seconds.
pub const LEASE: &str = "1.5";
/// Longer than a lease, and than what follows from its end.
pub const PAST_THE_LEASE: Duration = Duration::from_secs(3);
/// Names the extent: `short` and `long` hold the stall limits, `long` also asks for every
/// combination and for outages of their full length. Unset, as in the ordinary tests, it is the
/// short extent without the limits, because the machine may be busy with other things.
pub const EXTENT: &str = "GUILD_CHAOS";
/// File that every line is appended to.
pub const REPORT: &str = "GUILD_CHAOS_REPORT";
/// What a busy machine may do to a stream of the ordinary tests.
const BUSY: Duration = Duration::from_secs(10);
/// How long readiness may take to show, in polls of this pause.
const POLL: Duration = Duration::from_millis(20);

/// Whether every combination is asked for.
pub fn long() -> bool {
    std::env::var(EXTENT).is_ok_and(|extent| extent == "long")
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Coordinators; more than one need a store.
    pub coordinators: usize,
    /// `--store`; None: in memory.
    pub store: Option<String>,
    /// Attention nodes.
    pub attention: usize,
    /// Expert nodes.
    pub experts: usize,
    /// Homes of every expert.
    pub replicas: usize,
    /// Of nodes, in seconds.
    pub lease: &'static str,
    /// Before so many of the expert nodes there is a proxy.
    pub proxies: usize,
    /// Where everything listens: the address without the port.
    pub host: String,
    /// Further flags of every coordinator.
    pub coordinator_flags: Vec<String>,
    /// Further environment of every process.
    pub environment: Vec<(String, String)>,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            coordinators: 1,
            store: None,
            attention: 1,
            experts: 3,
            replicas: 2,
            lease: LEASE,
            proxies: 0,
            host: "127.0.0.1".to_owned(),
            coordinator_flags: Vec::new(),
            environment: Vec::new(),
        }
    }
}

/// One process: what it is told, and how it runs.
pub struct Node {
    /// Stable and unique in the cluster.
    pub name: String,
    /// `host:port` of its internal service.
    pub address: String,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    /// Network namespace that it runs in.
    namespace: Option<String>,
    process: Guild,
}

impl Node {
    fn start(
        name: String,
        address: String,
        args: Vec<String>,
        environment: Vec<(String, String)>,
        namespace: Option<String>,
    ) -> Node {
        let process = Guild::start_in(namespace.as_deref(), &environment, &args);
        Node {
            name,
            address,
            args,
            environment,
            namespace,
            process,
        }
    }

    /// Sends a signal by name, such as `KILL` or `STOP`.
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// The process.
    pub fn process(&mut self) -> &mut Guild {
        &mut self.process
    }

    /// All that it has printed since it was last started.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// Kills what still runs and starts the same again, at the same address.
    pub fn restart(&mut self) {
        self.signal_if_running("KILL");
        self.process.wait(START_LIMIT);
        self.process = Guild::start_in(self.namespace.as_deref(), &self.environment, &self.args);
    }

    /// What it will find in its environment when it is started again.
    pub fn set_environment(&mut self, environment: Vec<(String, String)>) {
        self.environment = environment;
    }

    /// SIGTERM, and how it ended.
    pub async fn terminate(&mut self, limit: Duration) -> ExitStatus {
        self.signal("TERM");
        let end = Instant::now() + limit;
        while self.process.is_running() {
            let log = self.process.output();
            assert!(Instant::now() < end, "{} still runs:\n{log}", self.name);
            tokio::time::sleep(POLL).await;
        }
        self.process.wait(Duration::ZERO)
    }

    fn signal_if_running(&mut self, name: &str) {
        if self.process.is_running() {
            self.process.signal(name);
        }
    }
}

/// A coordinator and its front doors.
pub struct Coordinator {
    /// The process.
    pub node: Node,
    /// `host:port` of the OpenAI-shaped door.
    pub http: String,
    /// URL of the gRPC door.
    pub grpc: String,
}

impl Coordinator {
    /// Whether it says that the cluster can serve.
    pub fn is_ready(&self) -> bool {
        http::get(&self.http, "/health").is_ok_and(|answer| answer.status == 200)
    }

    /// What it knows; None: no answer.
    pub async fn status(&self) -> Option<StatusResponse> {
        let url = format!("http://{}", self.node.address);
        let asked = async {
            let mut client = ClusterClient::connect(url).await.ok()?;
            client.status(StatusRequest {}).await.ok()
        };
        let answer = tokio::time::timeout(Duration::from_secs(2), asked).await;
        answer.ok().flatten().map(tonic::Response::into_inner)
    }
}

/// A running cluster.
pub struct House {
    /// What it was made from.
    pub plan: Plan,
    /// The front doors.
    pub coordinators: Vec<Coordinator>,
    /// The attention nodes.
    pub attention: Vec<Node>,
    /// The expert nodes.
    pub experts: Vec<Node>,
    /// Before the first expert nodes.
    pub proxies: Vec<Proxy>,
    /// Of all coordinators.
    urls: String,
}

impl House {
    /// Starts everything and waits until every node is ready.
    pub async fn start(plan: Plan) -> House {
        let house = House::begin(plan, |_| None);
        house.all_ready().await;
        house
    }

    /// Starts everything. `namespace` gives (network namespace, address in it) of an expert node,
    /// if it has one of its own.
    pub fn begin(plan: Plan, namespace: impl Fn(usize) -> Option<(String, String)>) -> House {
        let address = || format!("{}:{}", plan.host, free_port());
        let doors: Vec<[String; 3]> = (0..plan.coordinators)
            .map(|_| [(); 3].map(|()| address()))
            .collect();
        let urls: Vec<String> = doors
            .iter()
            .map(|[at, ..]| format!("http://{at}"))
            .collect();
        let urls = urls.join(",");
        let mut experts = Vec::new();
        let mut proxies = Vec::new();
        for at in 0..plan.experts {
            let space = namespace(at);
            let listen = match &space {
                Some((_, host)) => format!("{host}:{}", free_port()),
                None => address(),
            };
            let proxy = (at < plan.proxies).then(|| Proxy::to(listen.clone()));
            let public = proxy.as_ref().map_or(listen.as_str(), Proxy::address);
            let name = format!("expert-{at}");
            let args = node_args("expert-node", &urls, &name, &listen, public);
            let space = space.map(|(space, _)| space);
            let environment = plan.environment.clone();
            experts.push(Node::start(name, listen, args, environment, space));
            proxies.extend(proxy);
        }
        let attention = (0..plan.attention).map(|at| {
            let (name, listen) = (format!("attention-{at}"), address());
            let args = node_args("attention-node", &urls, &name, &listen, &listen);
            Node::start(name, listen, args, plan.environment.clone(), None)
        });
        let attention = attention.collect();
        let coordinators = doors.into_iter().enumerate();
        let coordinators = coordinators.map(|(at, doors)| coordinator(&plan, at, doors));
        House {
            coordinators: coordinators.collect(),
            attention,
            experts,
            proxies,
            urls,
            plan,
        }
    }

    /// One more expert node.
    pub fn add_expert(&mut self, name: String, environment: Vec<(String, String)>) {
        let listen = format!("{}:{}", self.plan.host, free_port());
        let args = node_args("expert-node", &self.urls, &name, &listen, &listen);
        let node = Node::start(name, listen, args, environment, None);
        self.experts.push(node);
    }

    /// URL of the first gRPC front door.
    pub fn grpc(&self) -> &str {
        &self.coordinators[0].grpc
    }

    /// URLs of all gRPC front doors.
    pub fn doors(&self) -> Vec<String> {
        self.coordinators.iter().map(|c| c.grpc.clone()).collect()
    }

    /// URLs of the attention nodes' own ports.
    pub fn direct(&self) -> Vec<String> {
        let attention = self.attention.iter();
        attention
            .map(|node| format!("http://{}", node.address))
            .collect()
    }

    /// What the first coordinator that answers knows.
    pub async fn status(&self) -> Option<StatusResponse> {
        for coordinator in &self.coordinators {
            if let Some(status) = coordinator.status().await {
                return Some(status);
            }
        }
        None
    }

    /// Waits until every coordinator that is asked says that the cluster serves, by a placement
    /// that is as told; returns its epoch.
    pub async fn ready_with(&self, what: &str, told: impl Fn(&StatusResponse) -> bool) -> u64 {
        let end = Instant::now() + START_LIMIT;
        loop {
            let mut epochs = Vec::new();
            let mut last = None;
            for coordinator in &self.coordinators {
                let status = coordinator.status().await;
                if let Some(status) = &status
                    && status.ready
                    && told(status)
                {
                    epochs.push(status.epoch);
                }
                last = status;
            }
            if epochs.len() == self.coordinators.len() {
                return epochs.into_iter().max().unwrap_or_default();
            }
            let logs = || {
                let coordinators = self.coordinators.iter().map(|c| &c.node);
                let nodes = coordinators.chain(&self.attention).chain(&self.experts);
                let logs = nodes.map(|node| format!("== {}\n{}", node.name, node.output()));
                logs.collect::<Vec<_>>().join("\n")
            };
            assert!(Instant::now() < end, "not {what}: {last:?}\n{}", logs());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until every process is a member and has the newest placement, and every expert has
    /// all its homes.
    pub async fn all_ready(&self) -> u64 {
        let (attention, experts) = (self.attention.len(), self.experts.len());
        self.ready_with("all ready", |status| {
            let has = |role| ready(status, role);
            let whole = status.replicas >= status.replicas_wanted;
            whole && has(Role::Attention) == attention && has(Role::Expert) == experts
        })
        .await
    }

    /// Waits until so many expert nodes serve, by an epoch above `before`.
    pub async fn down_to(&self, experts: usize, before: u64) -> u64 {
        let told = |status: &StatusResponse| {
            status.epoch > before && ready(status, Role::Expert) == experts
        };
        self.ready_with(&format!("down to {experts} expert nodes"), told)
            .await
    }
}

/// Nodes of a role that serve by the newest placement.
pub fn ready(status: &StatusResponse, role: Role) -> usize {
    let nodes = status.nodes.iter().filter(|node| node.role() == role);
    let ready = nodes.filter(|node| node.ready && node.epoch == status.epoch);
    ready.count()
}

fn coordinator(plan: &Plan, at: usize, [cluster, http, grpc]: [String; 3]) -> Coordinator {
    let (experts, replicas) = (plan.experts.to_string(), plan.replicas.to_string());
    let model = demo();
    let mut args = strings(&[
        "coordinator",
        "--model",
        model.to_str().unwrap(),
        "--listen",
        &cluster,
        "--http",
        &http,
        "--grpc",
        &grpc,
        "--min-expert-nodes",
        &experts,
        "--replicas",
        &replicas,
        "--lease",
        plan.lease,
        "--insecure",
    ]);
    if let Some(store) = &plan.store {
        args.extend(strings(&["--store", store]));
    }
    args.extend(plan.coordinator_flags.clone());
    let name = format!("coordinator-{at}");
    Coordinator {
        node: Node::start(name, cluster, args, plan.environment.clone(), None),
        http,
        grpc: format!("http://{grpc}"),
    }
}

fn node_args(role: &str, urls: &str, name: &str, listen: &str, public: &str) -> Vec<String> {
    let model = demo();
    strings(&[
        role,
        "--model",
        model.to_str().unwrap(),
        "--coordinator",
        urls,
        "--name",
        name,
        "--listen",
        listen,
        "--advertise",
        public,
        "--threads",
        "1",
        "--insecure",
    ])
}

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|&arg| arg.to_owned()).collect()
}

/// Requests, and what each gives in a cluster of one process where nothing happens.
pub struct Work {
    requests: Arc<Vec<GenerateRequest>>,
    want: Arc<Vec<Answer>>,
}

impl Work {
    /// Runs the requests one after the other by themselves.
    pub async fn of(requests: Vec<GenerateRequest>) -> Work {
        let cluster = Cluster::start(Shape::Local, &demo(), 1, 1, &["--threads", "1"]);
        let want = without_text(generate_each(&cluster.grpc, &requests).await);
        Work {
            requests: Arc::new(requests),
            want: Arc::new(want),
        }
    }

    /// Keeps streams running at one door.
    pub fn load(&self, endpoint: &str) -> Load {
        self.load_at(&[endpoint.to_owned()])
    }

    /// The same for clients that know several doors and turn to the next when one is shut.
    pub fn load_at(&self, endpoints: &[String]) -> Load {
        Load::start(endpoints, &self.requests, &self.want)
    }

    /// Every request once more, in a quiet cluster: none may fail now.
    pub async fn again(&self, endpoint: &str) {
        let answers = without_text(generate_each(endpoint, &self.requests).await);
        assert_eq!(*self.want, answers, "afterwards");
    }
}

/// Attention nodes know no text.
fn without_text(mut answers: Vec<Answer>) -> Vec<Answer> {
    for answer in &mut answers {
        answer.text.clear();
    }
    answers
}

/// Prints the line of a case, and appends it to the file that [`REPORT`] names.
#[allow(clippy::print_stdout)]
pub fn line(line: &Value) {
    println!("{line}");
    if let Some(path) = std::env::var_os(REPORT) {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

/// The line of a case under load; `more` is what else there is to say. A token that differs has
/// ended the load with a panic before.
pub fn report(case: &str, seen: &Seen, more: Value) {
    let mut all = json!({
        "test": "chaos",
        "case": case,
        "whole": seen.whole,
        "failed": seen.failed.len(),
        "turned": seen.turned,
        "wrong": 0,
        "itl_p99_ms": ms(seen.p99()),
        "longest_stall_ms": ms(seen.stall()),
    });
    let more = more.as_object().unwrap().clone();
    all.as_object_mut().unwrap().extend(more);
    line(&all);
}

/// Whole milliseconds.
pub fn ms(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

/// Every request was answered, and there was some.
pub fn assert_nothing_failed(seen: &Seen) {
    assert!(seen.failed.is_empty(), "{:?}", seen.failed);
    assert!(seen.whole >= STREAMS);
}

/// No stream stood still for longer than `bar` after the fault. What the machine did by itself
/// before it, doubled, comes on top; see [`EXTENT`].
pub fn assert_stall(seen: &Seen, fault: Instant, bar: Duration) {
    let quiet = seen.stall_before(fault);
    let limit = match std::env::var_os(EXTENT) {
        Some(_) => bar + 2 * quiet,
        None => bar.max(BUSY),
    };
    let stall = seen.stall_after(fault);
    assert!(stall <= limit, "{stall:?} of {limit:?}; {quiet:?} before");
}

/// Passes the time.
pub async fn seconds(n: u64) {
    tokio::time::sleep(Duration::from_secs(n)).await;
}
