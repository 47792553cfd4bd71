//! Real clients: the `openai` package, and a generic gRPC client that learns
//! the services of every role by reflection.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::process::Command;

use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::{AbortRequest, FinishReason, GenerateRequest};
use guild_tests::certs::Door;
use guild_tests::client::{greedy, request};
use guild_tests::house::{House, Plan};
use guild_tests::process::{Cluster, Shape, client_python, demo, root};

fn run_client(script: &str, args: &[&str]) {
    let python = match client_python() {
        Ok(python) => python,
        Err(reason) => return println!("{script}: {reason}"),
    };
    let out = Command::new(python)
        .arg(root().join("tests/clients").join(script))
        .args(args)
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(out.status.success(), "{script} {args:?}:\n{stdout}{stderr}");
    println!("{stdout}");
}

#[test]
fn the_openai_package_is_served() {
    let cluster = Cluster::up(&demo());
    run_client(
        "openai_client.py",
        &[&format!("http://{}/v1", cluster.http), "demo"],
    );
}

#[test]
fn the_openai_package_gets_what_it_asks_outputs_to_be() {
    let cluster = Cluster::up(&demo());
    run_client(
        "openai_structured.py",
        &[&format!("http://{}/v1", cluster.http), "demo"],
    );
}

#[test]
fn the_openai_package_is_served_by_separate_processes() {
    let cluster = Cluster::start(Shape::Processes, &demo(), 2, 2, &[]);
    run_client(
        "openai_client.py",
        &[&format!("http://{}/v1", cluster.http), "demo"],
    );
}

#[test]
fn every_port_explains_itself_to_a_generic_client() {
    let mut cluster = Cluster::start(Shape::Processes, &demo(), 1, 1, &[]);
    let front = cluster.grpc.trim_start_matches("http://");
    let service = "guild.inference.v1.Inference";
    run_client("reflection_client.py", &[front, "2048", "-", service]);
    // Members print where they listen, and want to see who calls.
    for (index, role, service) in [
        (1, "coordinator", service),
        (2, "attention", "guild.experts.v1.Experts"),
    ] {
        let line = cluster.processes[index]
            .wait_for_line("guild: listening on ", std::time::Duration::from_secs(5));
        let address = line.rsplit(' ').next().unwrap();
        let certificate = cluster.certs.as_ref().unwrap().path(role);
        let args = [address, "2048", &certificate, service];
        run_client("reflection_client.py", &args);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_aborted_at_any_front_door_by_whoever_has_made_it() {
    let dir = tempfile::tempdir().unwrap();
    let house = House::start(Plan {
        coordinators: 2,
        store: Some(format!("embedded:{}", dir.path().join("store").display())),
        experts: 2,
        replicas: 1,
        ..Plan::default()
    })
    .await;
    let mut doors = Vec::new();
    for coordinator in &house.coordinators {
        doors.push(Door::from(&coordinator.grpc).inference().await.unwrap());
    }
    for (at, asked) in [(0, 1), (1, 0)] {
        let endless = GenerateRequest {
            request_id: "mine".to_owned(),
            ..request(&[5, 6, 7], greedy(400, 0))
        };
        let stream = doors[at].generate(endless).await.unwrap();
        let mut stream = stream.into_inner();
        assert!(stream.message().await.unwrap().is_some());
        let abort = |request_id: &str| AbortRequest {
            request_id: request_id.to_owned(),
            owner: 0,
        };
        let mut stranger = tonic::Request::new(abort("mine"));
        let key = "Bearer another".parse().unwrap();
        stranger.metadata_mut().insert("authorization", key);
        for (request, found) in [
            (tonic::Request::new(abort("another")), 0),
            (stranger, 0),
            (tonic::Request::new(abort("mine")), 1),
            (tonic::Request::new(abort("mine")), 0),
        ] {
            let answer = doors[asked].abort(request).await.unwrap();
            assert_eq!(answer.into_inner().aborted, found);
        }
        let mut end = None;
        while let Some(response) = stream.message().await.unwrap() {
            if let Some(Event::Complete(complete)) = response.event {
                end = Some(complete.finish_reason());
            }
        }
        assert_eq!(end, Some(FinishReason::Abort));
    }
}
