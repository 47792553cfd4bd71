//! A cluster of real processes that can be killed, silenced and started again one by one. Inside
//! it everything is mutual TLS, unless its [`Plan`] says otherwise.
//!
//! Its secret is how a plan becomes command lines, addresses, certificates and environments.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use guild_node::tls;
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{Role, StatusRequest, StatusResponse};
use tonic::transport::Channel;

use crate::certs::{Certs, Door};
use crate::http;
use crate::process::{Guild, LOOPBACK, START_LIMIT, demo, free_port};
use crate::proxy::Proxy;

/// Lease of nodes, in seconds.
pub const LEASE: &str = "1.5";
/// Longer than a lease, and than what follows from its end.
pub const PAST_THE_LEASE: Duration = Duration::from_secs(3);
/// How long readiness may take to show, in polls of this pause.
const POLL: Duration = Duration::from_millis(20);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The checkpoint.
    pub model: PathBuf,
    /// Coordinators; more than one need a store.
    pub coordinators: usize,
    /// `--store`; None: in memory.
    pub store: Option<String>,
    /// Attention nodes.
    pub attention: usize,
    /// Whether each of them holds experts, too; then there are no expert nodes besides.
    pub together: bool,
    /// Expert nodes.
    pub experts: usize,
    /// Homes of every expert.
    pub replicas: usize,
    /// Of nodes, in seconds.
    pub lease: &'static str,
    /// Before so many of the ports for rows there is a proxy.
    pub proxies: usize,
    /// Whether the inside is mutual TLS. What has to be seen or spoiled on the wire needs
    /// plaintext.
    pub tls: bool,
    /// Where everything listens: the address without the port.
    pub host: String,
    /// Further flags of every coordinator.
    pub coordinator_flags: Vec<String>,
    /// Further flags of every node.
    pub node_flags: Vec<String>,
    /// `--role` of the first attention nodes; the others do both.
    pub roles: Vec<&'static str>,
    /// Further flags of every attention node.
    pub attention_flags: Vec<String>,
    /// Further environment of every process.
    pub environment: Vec<(String, String)>,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            model: demo(),
            coordinators: 1,
            store: None,
            attention: 1,
            together: false,
            experts: 3,
            replicas: 2,
            lease: LEASE,
            proxies: 0,
            tls: true,
            host: LOOPBACK.to_owned(),
            coordinator_flags: Vec::new(),
            node_flags: strings(&["--threads", "1"]),
            roles: Vec::new(),
            attention_flags: Vec::new(),
            environment: Vec::new(),
        }
    }
}

impl Plan {
    /// Processes that hold experts.
    fn holders(&self) -> usize {
        match self.together {
            true => self.attention,
            false => self.experts,
        }
    }
}

/// One process: what it is told, and how it runs.
pub struct Node {
    /// Stable and unique in the cluster.
    pub name: String,
    /// `host:port` of its internal service.
    pub address: String,
    /// `host:port` where it tells what it counts.
    pub metrics: String,
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
        mut args: Vec<String>,
        environment: Vec<(String, String)>,
        namespace: Option<String>,
    ) -> Node {
        let metrics = format!("{LOOPBACK}:{}", free_port());
        args.extend(strings(&["--metrics-listen", &metrics]));
        let process = Guild::start_in(namespace.as_deref(), &environment, &args);
        Node {
            name,
            address,
            metrics,
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

    /// The process alone.
    pub fn into_process(self) -> Guild {
        self.process
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

/// A coordinator and its doors.
pub struct Coordinator {
    /// The process.
    pub node: Node,
    /// `host:port` of the OpenAI-shaped front door.
    pub http: String,
    /// URL of the gRPC front door.
    pub grpc: String,
    certs: Option<Certs>,
}

impl Coordinator {
    /// Whether it says that the cluster can serve.
    pub fn is_ready(&self) -> bool {
        http::get(&self.http, "/health").is_ok_and(|answer| answer.status == 200)
    }

    /// Where nodes join it, for somebody of a role.
    pub fn door(&self, knocking: tls::Role) -> Door {
        let (at, certs) = (&self.node.address, self.certs.as_ref());
        Door::of(at, certs, knocking, tls::Role::COORDINATING)
    }

    /// A client of the cluster's service; None: nobody answers.
    pub async fn client(&self, knocking: tls::Role) -> Option<ClusterClient<Channel>> {
        self.door(knocking).cluster().await.ok()
    }

    /// What it knows; None: no answer.
    pub async fn status(&self) -> Option<StatusResponse> {
        let asked = async {
            let mut client = self.client(tls::Role::Operator).await?;
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
    /// Of its inside; None: plaintext.
    pub certs: Option<Certs>,
    /// The coordinators, with the front doors.
    pub coordinators: Vec<Coordinator>,
    /// The attention nodes.
    pub attention: Vec<Node>,
    /// The expert nodes that are processes of their own.
    pub experts: Vec<Node>,
    /// Before the first ports for rows.
    pub proxies: Vec<Proxy>,
    /// Where nodes find the coordinators.
    pub urls: String,
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
        let spaces: Vec<_> = (0..plan.experts).map(namespace).collect();
        let certs = plan.tls.then(|| {
            let inside = spaces.iter().flatten().map(|(_, host)| host.as_str());
            let hosts: BTreeSet<&str> = inside.chain([LOOPBACK, &plan.host]).collect();
            let hosts: Vec<&str> = hosts.into_iter().collect();
            Certs::new(&["--hosts", &hosts.join(",")])
        });
        let address = || format!("{}:{}", plan.host, free_port());
        let doors: Vec<[String; 3]> = (0..plan.coordinators)
            .map(|_| [(); 3].map(|()| address()))
            .collect();
        let scheme = if plan.tls { "https" } else { "http" };
        let urls: Vec<String> = doors
            .iter()
            .map(|[at, ..]| format!("{scheme}://{at}"))
            .collect();
        let mut house = House {
            certs,
            coordinators: Vec::new(),
            attention: Vec::new(),
            experts: Vec::new(),
            proxies: Vec::new(),
            urls: urls.join(","),
            plan,
        };
        // Members first: the order must not matter.
        for (at, space) in spaces.into_iter().enumerate() {
            house.start_expert(at, space);
        }
        for at in 0..house.plan.attention {
            house.start_attention(at);
        }
        for (at, doors) in doors.into_iter().enumerate() {
            house.start_coordinator(at, doors);
        }
        house
    }

    fn start_expert(&mut self, at: usize, space: Option<(String, String)>) {
        let (space, host) = space.map_or((None, None), |(space, host)| (Some(space), Some(host)));
        let host = host.as_ref().unwrap_or(&self.plan.host);
        let listen = format!("{host}:{}", free_port());
        let public = self.public(at, &listen);
        let name = format!("expert-{at}");
        let args = self.node("expert-node", &name, &listen, &public);
        let environment = self.plan.environment.clone();
        let node = Node::start(name, listen, args, environment, space);
        self.experts.push(node);
    }

    fn start_attention(&mut self, at: usize) {
        let address = || format!("{}:{}", self.plan.host, free_port());
        let (name, listen, rows) = (format!("attention-{at}"), address(), address());
        let mut args = self.node("attention-node", &name, &listen, &listen);
        args.extend(self.plan.attention_flags.clone());
        if let Some(role) = self.plan.roles.get(at) {
            args.extend(strings(&["--role", role]));
        }
        if self.plan.together {
            let (public, domain) = (self.public(at, &rows), format!("host-{at}"));
            args.extend(strings(&[
                "--experts",
                "--expert-listen",
                &rows,
                "--expert-advertise",
                &public,
                "--failure-domain",
                &domain,
            ]));
        }
        let environment = self.plan.environment.clone();
        let node = Node::start(name, listen, args, environment, None);
        self.attention.push(node);
    }

    fn start_coordinator(&mut self, at: usize, [cluster, http, grpc]: [String; 3]) {
        let plan = &self.plan;
        let (least, replicas) = (plan.holders().max(1).to_string(), plan.replicas.to_string());
        let mut args = strings(&[
            "coordinator",
            "--model",
            plan.model.to_str().unwrap(),
            "--listen",
            &cluster,
            "--http",
            &http,
            "--grpc",
            &grpc,
            "--min-expert-nodes",
            &least,
            "--replicas",
            &replicas,
            "--lease",
            plan.lease,
        ]);
        args.extend(self.protection());
        if plan.tls && plan.host != LOOPBACK {
            // The front doors are without TLS and keys.
            args.push("--insecure".to_owned());
        }
        if let Some(store) = &plan.store {
            args.extend(strings(&["--store", store]));
        }
        args.extend(plan.coordinator_flags.clone());
        let environment = plan.environment.clone();
        let name = format!("coordinator-{at}");
        self.coordinators.push(Coordinator {
            node: Node::start(name, cluster, args, environment, None),
            http,
            grpc: format!("http://{grpc}"),
            certs: self.certs.clone(),
        });
    }

    /// Flags of the inside, of roles and of `guild experts`.
    pub fn protection(&self) -> Vec<String> {
        match &self.certs {
            Some(certs) => strings(&["--tls-dir", certs.folder()]),
            None => strings(&["--insecure"]),
        }
    }

    /// Where others reach the port for rows number `at`: through a proxy, if it has one.
    fn public(&mut self, at: usize, listen: &str) -> String {
        if at >= self.plan.proxies {
            return listen.to_owned();
        }
        let proxy = Proxy::to(listen.to_owned());
        let public = proxy.address().to_owned();
        self.proxies.push(proxy);
        public
    }

    fn node(&self, role: &str, name: &str, listen: &str, public: &str) -> Vec<String> {
        let mut args = strings(&[
            role,
            "--model",
            self.plan.model.to_str().unwrap(),
            "--coordinator",
            &self.urls,
            "--name",
            name,
            "--listen",
            listen,
            "--advertise",
            public,
        ]);
        args.extend(self.protection());
        args.extend(self.plan.node_flags.clone());
        args
    }

    /// One more expert node.
    pub fn add_expert(&mut self, name: String, environment: Vec<(String, String)>) {
        let listen = format!("{}:{}", self.plan.host, free_port());
        let args = self.node("expert-node", &name, &listen, &listen);
        let node = Node::start(name, listen, args, environment, None);
        self.experts.push(node);
    }

    /// URL of the first gRPC front door.
    pub fn grpc(&self) -> &str {
        &self.coordinators[0].grpc
    }

    /// All gRPC front doors.
    pub fn doors(&self) -> Vec<Door> {
        let doors = self.coordinators.iter();
        doors.map(|c| Door::from(&c.grpc)).collect()
    }

    /// The attention nodes' own ports, as for a coordinator.
    pub fn direct(&self) -> Vec<Door> {
        let (certs, knocking) = (self.certs.as_ref(), tls::Role::Coordinator);
        let attention = self.attention.iter();
        attention
            .map(|node| Door::of(&node.address, certs, knocking, tls::Role::ATTENDING))
            .collect()
    }

    /// All of them, coordinators first, then attention nodes, then expert nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        let coordinators = self.coordinators.iter().map(|c| &c.node);
        coordinators.chain(&self.attention).chain(&self.experts)
    }

    /// What all of them have printed.
    pub fn logs(&self) -> String {
        let logs = self.nodes();
        let logs = logs.map(|node| format!("== {}\n{}", node.name, node.output()));
        logs.collect::<Vec<_>>().join("\n")
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
            let late = Instant::now() >= end;
            assert!(!late, "not {what}: {last:?}\n{}", self.logs());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until every process is a member and has the newest placement, and every expert has
    /// all its homes.
    pub async fn all_ready(&self) -> u64 {
        let attention = self.attention.len();
        let holders = match self.plan.together {
            true => attention,
            false => self.experts.len(),
        };
        self.ready_with("all ready", |status| {
            let has = |role| ready(status, role);
            let whole = status.replicas >= status.replicas_wanted;
            whole && has(Role::Attention) == attention && has(Role::Expert) == holders
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

fn strings(args: &[&str]) -> Vec<String> {
    args.iter().map(|&arg| arg.to_owned()).collect()
}
