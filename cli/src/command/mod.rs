//! One module a command. Here: what is common to all of them, from the command
//! line to the runtime.

mod attention;
mod bench;
mod certs;
mod chat;
mod compare;
mod coordinator;
mod expert;
mod experts;
mod generate;
mod inspect;
mod keys;
mod manifest;
mod quantize;
mod random;
mod reference;
mod up;

use std::future::Future;
use std::io::Write as _;
use std::path::Path;

use guild_model::Checkpoint;
use guild_node::channel::Dialer;
use guild_node::member::check_coordinators;
use guild_node::tls::Role;
use guild_node::{ExitKind, Shutdown, config, telemetry};
use tokio::net::TcpListener;

use crate::args::{Cli, Command, Common, Compute, Exposure, Joining};
use crate::failure::Failure;
use crate::listen::{address_of, bind};
use crate::loading::init_log;
use crate::security::{Protection, node_tls};
use crate::shells::{Place, process_id};

/// Runs the command that this process was started with.
pub(crate) fn run() -> Result<(), Failure> {
    #[cfg(feature = "failpoints")]
    guild_node::failpoint::arm().map_err(|error| Failure::of(&error))?;
    let config::Loaded {
        value: cli,
        origins,
    } = config::load::<Cli>()?;
    match cli.command {
        Command::Up(args) => up::run(&args),
        Command::Coordinator(args) => coordinator::run(&args),
        Command::AttentionNode(args) => attention::run(&args),
        Command::ExpertNode(args) => expert::run(&args),
        Command::Generate(args) => generate::run(&args, &origins),
        Command::Chat(args) => chat::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Manifest(args) => manifest::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::RandomModel(args) => random::run(&args),
        Command::Certs(args) => certs::run(&args),
        Command::Keys(args) => keys::run(&args),
        Command::Experts(args) => experts::run(&args),
    }
}

/// Sets up logging for a role: everything at the level that was asked for.
fn log_role(common: &Common) -> Result<(), Failure> {
    init_log(common.log_format, &common.log_level)
}

/// Sets up logging for a tool, whose output is its result: only what is wrong,
/// unless a level was asked for.
fn log_tool(common: &Common) -> Result<(), Failure> {
    let level = if common.log_level == "info" {
        "warn"
    } else {
        &common.log_level
    };
    telemetry::init(common.log_format, level).map_err(|error| Failure::of(&error))
}

/// Runs a future to its end on all cores.
fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new(
                ExitKind::Resources,
                format!("cannot start the runtime: {error}"),
            )
        })?
        .block_on(future)
}

/// The request to end that SIGTERM and Ctrl-C make.
fn signals() -> Result<Shutdown, Failure> {
    Shutdown::from_signals().map_err(|error| {
        Failure::new(
            ExitKind::Resources,
            format!("cannot listen to signals: {error}"),
        )
    })
}

/// The checkpoint of a role that computes.
fn open(model: &Path, compute: Compute) -> Result<Checkpoint, Failure> {
    let checkpoint = Checkpoint::open(model)?;
    if !compute.mmap {
        return Ok(checkpoint);
    }
    Ok(checkpoint.with_mapped_experts()?)
}

/// Says to programs where a role's port is, as soon as it is bound: one line on stdout.
fn listening(address: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "guild: listening on {address}")?;
    Ok(stdout.flush()?)
}

/// Opens a node's listener and, unless a node of this process has done so, its checkpoint, and
/// settles who and where it is.
async fn join(
    role: Role,
    joining: &Joining,
    exposure: Exposure,
    compute: Compute,
    model: Option<&Checkpoint>,
) -> Result<(Place, TcpListener), Failure> {
    let name = joining.name.as_deref();
    let tls = node_tls(&joining.tls, role, name, exposure.insecure)?;
    let dialer = Dialer::to(Role::COORDINATING, tls.as_ref());
    check_coordinators(&joining.coordinator, &dialer)
        .map_err(|error| Failure::usage(format!("--coordinator: {error}")))?;
    let listener = bind("listen", &joining.listen, Protection::Enough).await?;
    let address = address_of(&listener)?;
    let address = match joining.advertise.as_deref() {
        Some(advertised) => match advertised.strip_suffix(":0") {
            Some(host) => format!("{host}:{}", address.port()),
            None => advertised.to_owned(),
        },
        None if address.ip().is_unspecified() => {
            return Err(Failure::usage(format!(
                "--advertise is missing: {address} is no address to be reached at"
            )));
        }
        None => address.to_string(),
    };
    let name = name.map_or_else(|| format!("{role}-{address}"), str::to_owned);
    if let Some(tls) = &tls {
        tls.check_name(&name).map_err(|error| Failure::of(&error))?;
    }
    listening(&address)?;
    let model = match model {
        Some(model) => model.clone(),
        None => open(&joining.model, compute)?,
    };
    let place = Place {
        model_name: joining.named.of(&model),
        model,
        name,
        address,
        tls,
        coordinator: joining.coordinator.clone(),
        health: joining.health.clone(),
        metrics: joining.metrics_listen.clone(),
        process: process_id(),
        failure_domain: joining.failure_domain.clone(),
    };
    Ok((place, listener))
}
