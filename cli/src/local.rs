//! A whole cluster in this process: the real shells on loopback listeners,
//! sharing one `Cpu`, started together and ended front to back.

use std::future::Future;
use std::time::Duration;

use guild_coordinator::{CoordinatorConfig, Farewell, Listeners};
use guild_model::{Checkpoint, Cpu};
use guild_node::{ExitKind, HasExitKind, Shutdown, channel};
use guild_proto::cluster::v1::StatusRequest;
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_transport::Switchboard;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::args::{Balance, Compute, Engine, Exposure, FabricKind, PlannerArg, Redundancy};
use crate::failure::Failure;
use crate::listen::{EPHEMERAL, address_of, bind};
use crate::security::{Door, Protection};
use crate::shells;

/// Between two looks at whether the cluster is ready.
const READY_POLL: Duration = Duration::from_millis(20);

/// What the cluster is made of.
pub(crate) struct Plan {
    pub(crate) model: Checkpoint,
    pub(crate) model_name: String,
    pub(crate) attention_nodes: u16,
    pub(crate) expert_nodes: u16,
    pub(crate) fabric: FabricKind,
    pub(crate) compute: Compute,
    pub(crate) exposure: Exposure,
    pub(crate) engine: Engine,
    /// What protects the front doors.
    pub(crate) door: Door,
    pub(crate) redundancy: Redundancy,
    pub(crate) balance: Balance,
}

impl Plan {
    /// One node of each kind, for one request.
    pub(crate) fn smallest(model: Checkpoint, compute: Compute) -> Self {
        Self {
            model_name: model.name(),
            model,
            attention_nodes: 1,
            expert_nodes: 1,
            fabric: FabricKind::Local,
            compute,
            exposure: Exposure {
                insecure: false,
                drain: 1,
            },
            engine: Engine {
                max_running: 1,
                ..Engine::default()
            },
            door: Door::default(),
            redundancy: Redundancy::default(),
            balance: Balance::off(),
        }
    }
}

/// A running cluster. Dropped, it ends without a drain.
pub(crate) struct Local {
    coordinator: Tier,
    attention: Tier,
    experts: Tier,
    cluster: String,
    process: String,
    farewell: Farewell,
}

impl Local {
    /// Starts every role; `listeners` are the coordinator's.
    ///
    /// # Errors
    /// No port is free.
    pub(crate) async fn start(
        plan: &Plan,
        cpu: &Cpu,
        listeners: Listeners,
    ) -> Result<Self, Failure> {
        let cluster = format!("http://{}", address_of(&listeners.cluster)?);
        let switchboard = (plan.fabric == FabricKind::Local).then(Switchboard::default);
        let mut local = Self {
            coordinator: Tier::default(),
            attention: Tier::default(),
            experts: Tier::default(),
            cluster,
            process: shells::process_id(),
            farewell: Farewell::default(),
        };

        let config = shells::coordinator(&shells::FrontDesk {
            model: &plan.model,
            model_name: &plan.model_name,
            weights: plan.compute.weights,
            max_context: plan.engine.max_context,
            // All that will ever join are known: nothing is to be waited for after them.
            min_expert_nodes: plan.expert_nodes,
            redundancy: plan.redundancy,
            // Where all nodes share one machine, moving experts gains nothing.
            rebalance: plan.balance.policy(PlannerArg::Off),
            redundant_experts: plan.balance.redundant_experts,
            settle: Some(Duration::ZERO),
            exposure: plan.exposure,
            // Nothing of it leaves the process.
            tls: None,
            door: &plan.door,
        });
        let config = CoordinatorConfig {
            farewell: Some(local.farewell.clone()),
            ..config
        };
        local.coordinator.spawn("coordinator", |end| {
            guild_coordinator::run(config, listeners, end)
        });
        for index in 0..plan.attention_nodes {
            let (place, listener) = local.place(plan, format!("attention-{index}")).await?;
            let config = shells::attention(&place, plan.compute, plan.engine, plan.exposure);
            let (cpu, switchboard) = (cpu.clone(), switchboard.clone());
            local.attention.spawn(&place.name, |end| {
                guild_attention_node::run(config, listener, cpu, switchboard, end)
            });
        }
        for index in 0..plan.expert_nodes {
            let (place, listener) = local.place(plan, format!("expert-{index}")).await?;
            let config = shells::expert(&place, plan.compute, 0, plan.exposure);
            let (cpu, switchboard) = (cpu.clone(), switchboard.clone());
            local.experts.spawn(&place.name, |end| {
                guild_expert_node::run(config, listener, cpu, switchboard, end)
            });
        }
        Ok(local)
    }

    async fn place(
        &self,
        plan: &Plan,
        name: String,
    ) -> Result<(shells::Place, TcpListener), Failure> {
        let listener = bind("listen", EPHEMERAL, Protection::LOOPBACK).await?;
        let place = shells::Place {
            model: plan.model.clone(),
            model_name: plan.model_name.clone(),
            name,
            address: address_of(&listener)?.to_string(),
            coordinator: self.cluster.clone(),
            tls: None,
            health: None,
            metrics: None,
            process: self.process.clone(),
            failure_domain: String::new(),
        };
        Ok((place, listener))
    }

    /// Completes when the cluster serves.
    ///
    /// # Errors
    /// A role has ended before.
    pub(crate) async fn ready(&mut self) -> Result<(), Failure> {
        let channel = channel::lazy(&self.cluster).map_err(|error| Failure::of(&error))?;
        let mut client = ClusterClient::new(channel);
        // The coordinator logs what is being waited for.
        let serves = async {
            while !client
                .status(StatusRequest {})
                .await
                .is_ok_and(|status| status.get_ref().ready)
            {
                tokio::time::sleep(READY_POLL).await;
            }
        };
        tokio::select! {
            () = serves => Ok(()),
            failure = self.failed() => Err(failure),
        }
    }

    /// Completes when a role ends without having been asked to: none may be missing.
    pub(crate) async fn failed(&mut self) -> Failure {
        tokio::select! {
            failure = self.coordinator.failed() => failure,
            failure = self.attention.failed() => failure,
            failure = self.experts.failed() => failure,
        }
    }

    /// Ends one tier after the other: the door closes first, experts stay until
    /// the last request is through, and all say goodbye to the coordinator.
    ///
    /// # Errors
    /// The first role that did not end well.
    pub(crate) async fn stop(mut self) -> Result<(), Failure> {
        self.coordinator.end.trigger();
        let early = tokio::select! {
            // One that has failed shuts no doors.
            ended = self.coordinator.ended() => ended,
            () = self.farewell.doors_shut.requested() => Ok(()),
        };
        let attention = self.attention.stop().await;
        let experts = self.experts.stop().await;
        self.farewell.nodes_left.trigger();
        let coordinator = self.coordinator.ended().await;
        early.and(coordinator).and(attention).and(experts)
    }
}

/// Roles that are ended together.
#[derive(Default)]
pub(crate) struct Tier {
    end: Shutdown,
    roles: JoinSet<(String, Result<(), Failure>)>,
}

impl Tier {
    pub(crate) fn spawn<E, F>(&mut self, name: &str, run: impl FnOnce(Shutdown) -> F)
    where
        E: HasExitKind + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
    {
        let (name, role) = (name.to_owned(), run(self.end.clone()));
        self.roles.spawn(async move {
            let outcome = role.await.map_err(|error| Failure::of(&error));
            (name, outcome)
        });
    }

    /// Never completes while every role runs.
    pub(crate) async fn failed(&mut self) -> Failure {
        match self.roles.join_next().await {
            Some(Ok((_, Err(failure)))) => failure,
            Some(Ok((name, Ok(())))) => {
                Failure::new(ExitKind::Internal, format!("{name} has ended by itself"))
            }
            Some(Err(error)) => {
                Failure::new(ExitKind::Internal, format!("a role has failed: {error}"))
            }
            None => std::future::pending().await,
        }
    }

    /// Asks every role to end and waits for it.
    pub(crate) async fn stop(&mut self) -> Result<(), Failure> {
        self.end.trigger();
        self.ended().await
    }

    /// Completes when every role has ended.
    async fn ended(&mut self) -> Result<(), Failure> {
        let mut outcome = Ok(());
        while let Some(ended) = self.roles.join_next().await {
            let this = match ended {
                Ok((_, this)) => this,
                Err(error) => Err(Failure::new(
                    ExitKind::Internal,
                    format!("a role has failed: {error}"),
                )),
            };
            outcome = outcome.and(this);
        }
        outcome
    }
}
