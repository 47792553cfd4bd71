//! The command line as scripts see it: exit codes, layers of configuration, the
//! forms of output, and the flags that the manifests use.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const COMMANDS: [&str; 9] = [
    "up",
    "coordinator",
    "attention-node",
    "expert-node",
    "generate",
    "chat",
    "inspect",
    "manifest",
    "random-model",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn demo() -> String {
    root().join("models/demo").to_string_lossy().into_owned()
}

fn guild(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_guild"))
        .args(args)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Fails with this code and says all of this on stderr.
fn refused(args: &[&str], env: &[(&str, &str)], code: i32, says: &[&str]) {
    let output = guild(args, env);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "guild {args:?}: {stderr}");
    for needle in says {
        assert!(
            stderr.contains(needle),
            "guild {args:?} does not say {needle:?}: {stderr}"
        );
    }
}

#[test]
fn every_help_tells_exit_codes_and_comes_on_stdout() {
    for command in COMMANDS {
        let output = guild(&[command, "--help"], &[]);
        assert!(output.status.success());
        let help = out(&output);
        assert!(
            help.contains("Exit codes:") && help.contains("--config"),
            "{command}: {help}"
        );
    }
    assert!(out(&guild(&["--version"], &[])).starts_with("guild "));
}

#[test]
fn failures_have_the_documented_codes() {
    let demo = demo();
    let model = ["--model", demo.as_str()];
    refused(&["serve"], &[], 2, &["serve"]);
    refused(&["up"], &[], 2, &["--model"]);
    refused(&["generate"], &[], 2, &["--prompt", "--token-ids"]);
    refused(
        &["generate", "--prompt", "a", "--token-ids", "1"],
        &[],
        2,
        &["either"],
    );
    refused(
        &["generate", "--token-ids", "1,x"],
        &[],
        2,
        &["--token-ids"],
    );
    refused(
        &["up", model[0], model[1], "--http", "0.0.0.0:0"],
        &[],
        2,
        &["--http", "--insecure"],
    );
    refused(
        &["up", model[0], model[1], "--expert-nodes", "0"],
        &[],
        2,
        &["--expert-nodes"],
    );
    refused(
        &["random-model", "--shape", "nope", "--out", "/tmp/never"],
        &[],
        2,
        &["nope", "moonlight-4L"],
    );
    refused(
        &["inspect", "--model", "/no/such/folder"],
        &[],
        4,
        &["/no/such/folder", "config.json"],
    );
    refused(
        &[
            "generate",
            "--endpoint",
            "http://127.0.0.1:1",
            "--prompt",
            "a",
        ],
        &[],
        5,
        &["127.0.0.1:1"],
    );
    refused(
        &["chat", "--endpoint", "http://127.0.0.1:1"],
        &[],
        5,
        &["127.0.0.1:1"],
    );
    refused(
        &["chat", "--endpoint", "https://127.0.0.1:1"],
        &[],
        2,
        &["--endpoint"],
    );

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    refused(
        &[
            "up",
            model[0],
            model[1],
            "--http",
            &taken,
            "--grpc",
            "127.0.0.1:0",
        ],
        &[],
        5,
        &[&taken, "--http"],
    );
}

#[test]
fn environment_and_file_are_twins_of_the_flags() {
    let demo = demo();
    let nodes = |output: &Output| {
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        json["cluster"]["expert_nodes"].as_u64().unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guild.toml");
    std::fs::write(
        &file,
        format!("model = {demo:?}\n[inspect]\nnodes = 3\njson = true\n"),
    )
    .unwrap();
    let file = file.to_string_lossy().into_owned();
    assert_eq!(nodes(&guild(&["inspect", "--config", &file], &[])), 3);
    assert_eq!(
        nodes(&guild(
            &["inspect"],
            &[("GUILD_CONFIG", &file), ("GUILD_NODES", "4")]
        )),
        4
    );
    assert_eq!(
        nodes(&guild(
            &["inspect", "--config", &file, "--nodes", "5"],
            &[("GUILD_NODES", "4")]
        )),
        5
    );

    refused(
        &["inspect", "--config", "/no/such.toml"],
        &[],
        3,
        &["/no/such.toml"],
    );
    refused(
        &["inspect", "--model", &demo],
        &[("GUILD_NODES", "many")],
        3,
        &["GUILD_NODES", "many"],
    );
    let misspelt = folder.path().join("misspelt.toml");
    std::fs::write(&misspelt, "modle = \"x\"\n").unwrap();
    refused(
        &["inspect", "--config", &misspelt.to_string_lossy()],
        &[],
        3,
        &["modle", "did you mean `model`"],
    );
}

#[test]
fn a_completion_without_a_server_agrees_with_the_reference() {
    let demo = demo();
    let prompt = "0,839,30,203";
    let served = guild(
        &[
            "generate",
            "--model",
            &demo,
            "--token-ids",
            prompt,
            "--max-tokens",
            "6",
            "--ignore-eos",
            "--logprobs",
            "2",
            "--prompt-logprobs",
            "2",
            "--json",
            "--threads",
            "2",
        ],
        &[],
    );
    let reference = guild(
        &[
            "inspect",
            "--model",
            &demo,
            "--reference",
            "--token-ids",
            prompt,
            "--max-tokens",
            "6",
            "--logprobs",
            "2",
            "--json",
        ],
        &[],
    );
    let [served, reference]: [Value; 2] = [served, reference].map(|o| {
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        assert_eq!(out(&o).lines().count(), 1, "one object on one line");
        serde_json::from_slice(&o.stdout).unwrap()
    });
    for key in ["token_ids", "text", "finish_reason", "usage"] {
        assert_eq!(served[key], reference[key], "{key}");
    }
    for key in ["logprobs", "prompt_logprobs"] {
        let (served, reference) = (
            served[key].as_array().unwrap(),
            reference[key].as_array().unwrap(),
        );
        assert_eq!(served.len(), reference.len());
        for (a, b) in served.iter().zip(reference) {
            assert_eq!(a["token_id"], b["token_id"]);
            let distance = a["logprob"].as_f64().unwrap() - b["logprob"].as_f64().unwrap();
            assert!(distance.abs() < 5e-4, "{key}: {a} and {b}");
            assert_eq!(a["top"].as_array().unwrap().len(), 2);
        }
    }
}

#[test]
fn a_random_model_is_the_same_every_time_and_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name).to_string_lossy().into_owned());
    let digests = paths.clone().map(|path| {
        let made = guild(
            &[
                "random-model",
                "--shape",
                "tiny",
                "--set",
                "n_routed_experts=8",
                "--seed",
                "5",
                "--out",
                &path,
            ],
            &[],
        );
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let report: Value =
            serde_json::from_slice(&guild(&["inspect", "--model", &path, "--json"], &[]).stdout)
                .unwrap();
        assert_eq!(report["routed_experts"], 16, "8 in each of two layers");
        report["digest"].as_str().unwrap().to_owned()
    });
    assert_eq!(digests[0], digests[1]);
    refused(
        &["random-model", "--shape", "tiny", "--out", &paths[0]],
        &[],
        4,
        &[&paths[0]],
    );
}

#[test]
fn random_weights_of_another_format_are_those_that_quantising_makes() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (plain, packed, direct) = (path("plain"), path("packed"), path("direct"));
    let done = |args: &[&str]| {
        let output = guild(args, &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        output.stdout
    };
    let shape = ["random-model", "--shape", "tiny"];
    let small = ["--set", "n_routed_experts=8", "--out"];
    done(&[&shape[..], &small, &[plain.as_str()]].concat());
    done(&[
        "quantize", "--model", &plain, "--to", "int4", "--out", &packed,
    ]);
    let int4 = ["--dtype", "int4"];
    done(&[&shape[..], &int4, &small, &[direct.as_str()]].concat());
    let digest = |path: &str| {
        let report = done(&["inspect", "--model", path, "--json"]);
        let report: Value = serde_json::from_slice(&report).unwrap();
        report["digest"].as_str().unwrap().to_owned()
    };
    assert_eq!(digest(&packed), digest(&direct));
    assert_ne!(digest(&packed), digest(&plain));
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 3, "what was made on the way is gone");
    let never = path("never");
    for (dtype, says) in [("f32", "bf16, fp8, int8, int4"), ("int5", "int5")] {
        let asked = ["--dtype", dtype, "--out", never.as_str()];
        refused(&[&shape[..], &asked].concat(), &[], 2, &["--dtype", says]);
    }
}

/// Every flag and every variable in the manifests is one that its role has.
#[test]
fn manifests_use_flags_that_exist() {
    let mut seen = 0;
    for file in ["coordinator", "attention", "expert"] {
        let text =
            std::fs::read_to_string(root().join(format!("deploy/base/{file}.yaml"))).unwrap();
        let items: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- "))
            .collect();
        let role = COMMANDS
            .iter()
            .find(|command| items.contains(command))
            .unwrap();
        let help = out(&guild(&[role, "--help"], &[]));
        let flags = items
            .iter()
            .filter(|item| item.starts_with("--"))
            .map(|item| item.split('=').next().unwrap().to_owned());
        let twins = items
            .iter()
            .filter_map(|item| item.strip_prefix("name: GUILD_"))
            .map(|name| format!("--{}", name.to_lowercase().replace('_', "-")));
        for flag in flags.chain(twins) {
            assert!(
                help.contains(&format!("{flag} ")) || help.contains(&format!("{flag}\n")),
                "{file}.yaml: {role} has no {flag}"
            );
            seen += 1;
        }
    }
    assert!(seen > 12, "{seen} flags seen");
}
