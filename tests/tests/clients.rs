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
    let address = |url: &str| url.trim_start_matches("http://").to_owned();
    run_client(
        "reflection_client.py",
        &[
            &address(&cluster.grpc),
            "2048",
            "guild.inference.v1.Inference",
        ],
    );
    // Members print where they listen.
    for (index, service) in [
        (1, "guild.experts.v1.Experts"),
        (2, "guild.inference.v1.Inference"),
    ] {
        let line = cluster.processes[index]
            .wait_for_line("guild: listening on ", std::time::Duration::from_secs(5));
        let at = line
            .split("guild: listening on ")
            .nth(1)
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
            .to_owned();
        run_client("reflection_client.py", &[&address(&at), "2048", service]);
    }
}
