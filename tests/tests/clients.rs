//! Real clients: the `openai` package, and a generic gRPC client that learns
//! the services of every role by reflection.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::process::Command;

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
