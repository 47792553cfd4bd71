//! Serving: health tells the truth, reflection answers, and a drain ends.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use futures::StreamExt;
use guild_node::Shutdown;
use guild_node::channel;
use guild_node::metrics::{MEDIA_TYPE, MetricsPort, Page};
use guild_node::serve::{Health, ServeError, Server, bind};
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::cluster_server::{Cluster, ClusterServer};
use guild_proto::cluster::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Hands every watch stream's sender to the test.
struct Streams(mpsc::Sender<mpsc::Sender<Result<Placement, Status>>>);

#[tonic::async_trait]
impl Cluster for Streams {
    async fn heartbeat(
        &self,
        _: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        Ok(Response::new(HeartbeatResponse {}))
    }
    async fn watch_placement(
        &self,
        _: Request<WatchPlacementRequest>,
    ) -> Result<Response<BoxStream<Placement>>, Status> {
        let (tx, rx) = mpsc::channel(4);
        self.0.send(tx).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

struct Running {
    address: String,
    health: Health,
    shutdown: Shutdown,
    streams: mpsc::Receiver<mpsc::Sender<Result<Placement, Status>>>,
    task: tokio::task::JoinHandle<Result<(), ServeError>>,
}

async fn start(drain: Duration) -> Running {
    let listener = bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (tx, streams) = mpsc::channel(4);
    let server = Server::new().await.add(ClusterServer::new(Streams(tx)));
    let health = server.health();
    let shutdown = Shutdown::new();
    let task = tokio::spawn(server.run(listener, shutdown.clone(), drain));
    Running {
        address,
        health,
        shutdown,
        streams,
        task,
    }
}

#[tokio::test]
async fn health_says_not_serving_until_told_and_flips_with_it() {
    let server = start(Duration::from_secs(5)).await;
    let mut client = HealthClient::new(channel::lazy(&server.address).unwrap());
    let ask = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    let status = client.check(ask("")).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::NotServing);
    assert_eq!(
        client.check(ask("unheard.of")).await.unwrap_err().code(),
        Code::NotFound
    );

    let mut watch = client.watch(ask("")).await.unwrap().into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::NotServing
    );
    server.health.set_serving("", true).await;
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::Serving
    );
    server.health.set_serving("", false).await;
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::NotServing
    );

    // A drain is final, and an open Watch does not hold it up.
    server.health.set_serving("", true).await;
    server.shutdown.trigger();
    server.task.await.unwrap().unwrap();
    while let Some(Ok(last)) = watch.next().await {
        let _ = last.status();
    }
}

#[tokio::test]
async fn reflection_lists_what_the_port_answers() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let server = start(Duration::from_secs(5)).await;
    let mut client = ServerReflectionClient::new(channel::lazy(&server.address).unwrap());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = client
        .server_reflection_info(futures::stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers
        .message()
        .await
        .unwrap()
        .unwrap()
        .message_response
        .unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}");
    };
    let mut names: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "guild.cluster.v1.Cluster",
        ]
    );
}

#[tokio::test]
async fn a_drain_lets_running_streams_end_and_takes_no_new_connections() {
    let mut server = start(Duration::from_secs(30)).await;
    let mut client = ClusterClient::new(channel::lazy(&server.address).unwrap());
    let request = WatchPlacementRequest { node_id: 1 };
    let mut stream = client.watch_placement(request).await.unwrap().into_inner();
    let out = server.streams.recv().await.unwrap();
    server.shutdown.trigger();
    // The listener goes; the stream stays.
    let mut refused = false;
    for _ in 0..200 {
        let mut other = ClusterClient::new(channel::lazy(&server.address).unwrap());
        refused = other.heartbeat(HeartbeatRequest::default()).await.is_err();
        if refused {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(refused);
    out.send(Ok(Placement {
        epoch: 3,
        ..Placement::default()
    }))
    .await
    .unwrap();
    assert_eq!(stream.message().await.unwrap().unwrap().epoch, 3);
    assert!(!server.task.is_finished());
    drop(out);
    assert_eq!(stream.message().await.unwrap(), None);
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drain_cuts_what_does_not_end() {
    let mut server = start(Duration::from_millis(50)).await;
    let mut client = ClusterClient::new(channel::lazy(&server.address).unwrap());
    let request = WatchPlacementRequest { node_id: 1 };
    let mut stream = client.watch_placement(request).await.unwrap().into_inner();
    let _out = server.streams.recv().await.unwrap();
    server.shutdown.trigger();
    server.task.await.unwrap().unwrap();
    assert!(stream.message().await.is_err());
}

#[tokio::test]
async fn a_server_that_is_dropped_takes_its_connections_with_it() {
    let mut server = start(Duration::from_secs(30)).await;
    let mut client = ClusterClient::new(channel::lazy(&server.address).unwrap());
    let request = WatchPlacementRequest { node_id: 1 };
    let mut stream = client.watch_placement(request).await.unwrap().into_inner();
    let _out = server.streams.recv().await.unwrap();
    server.task.abort();
    assert!(stream.message().await.is_err());
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let first = bind("127.0.0.1:0").await.unwrap();
    let address = first.local_addr().unwrap().to_string();
    let error = bind(&address).await.unwrap_err().to_string();
    assert!(error.contains(&address), "{error}");
    assert!(bind("no-such-host.invalid:1").await.is_err());
}

/// The answer of a plain port to a GET: its head and its body.
async fn get(address: &str, path: &str) -> (String, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let asked = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(asked.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn a_plain_port_tells_what_is_counted_and_whether_the_process_serves() {
    let free = bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let port = MetricsPort::at(Some(address.clone()), || {
        let mut page = Page::of("m");
        page.gauge("guild_things", "Things.", 7u64);
        page
    });
    let server = Server::new().await.measured_at(port);
    let health = server.health();
    let shutdown = Shutdown::new();
    let listener = bind("127.0.0.1:0").await.unwrap();
    let serving = tokio::spawn(server.run(listener, shutdown.clone(), Duration::ZERO));
    let there = async {
        while tokio::net::TcpStream::connect(&address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), there)
        .await
        .unwrap();

    let (head, body) = get(&address, "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(
        head.to_ascii_lowercase()
            .contains(&format!("content-type: {MEDIA_TYPE}")),
        "{head}"
    );
    assert!(
        body.contains("guild_things{model_name=\"m\"} 7\n"),
        "{body}"
    );
    for (serves, status) in [(false, "503"), (true, "200")] {
        health.set_serving("", serves).await;
        let (head, _) = get(&address, "/health").await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
    }
    let (head, _) = get(&address, "/v1/models").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");

    shutdown.trigger();
    assert!(serving.await.unwrap().is_ok());
    assert!(tokio::net::TcpStream::connect(&address).await.is_err());

    let taken = bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let port = MetricsPort::at(Some(address.clone()), || Page::of("m"));
    let server = Server::new().await.measured_at(port);
    let listener = bind("127.0.0.1:0").await.unwrap();
    let error = server.run(listener, Shutdown::new(), Duration::ZERO).await;
    assert!(error.unwrap_err().to_string().contains(&address));
}
