//! The house rules that a compiler does not check: who may use whom, where
//! `unsafe` may stand, and what the coordinator may see of the model.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Room -> the rooms it may use. `cli` and `tests` may use everything.
const MAY_USE: &[(&str, &[&str])] = &[
    (
        "guild-attention-node",
        &[
            "guild-model",
            "guild-scheduler",
            "guild-transport",
            "guild-node",
            "guild-proto",
        ],
    ),
    (
        "guild-expert-node",
        &[
            "guild-model",
            "guild-transport",
            "guild-node",
            "guild-proto",
        ],
    ),
    (
        "guild-coordinator",
        &[
            "guild-scheduler",
            "guild-node",
            "guild-proto",
            "guild-model",
        ],
    ),
    ("guild-transport", &["guild-proto"]),
    ("guild-node", &["guild-proto"]),
    ("guild-model", &["guild-kernels"]),
    ("guild-kernels", &[]),
    ("guild-scheduler", &[]),
    ("guild-proto", &[]),
    ("xtask", &[]),
];
const MAY_USE_EVERYTHING: &[&str] = &["guild", "guild-tests"];

/// What the coordinator may name of `model`: tokenizer, template and identity, never the maths.
const MODEL_FOR_COORDINATOR: &[&str] = &[
    "Checkpoint",
    "Config",
    "ModelError",
    "checkpoint",
    "config",
    "error",
    "text",
];

/// (user, used) among the rooms, for everything that ends up in a build of the user.
fn edges(metadata: &Metadata) -> BTreeSet<(String, String)> {
    let rooms: BTreeSet<String> = metadata
        .workspace_packages()
        .iter()
        .map(|p| p.name.to_string())
        .collect();
    metadata
        .workspace_packages()
        .iter()
        .flat_map(|package| {
            package
                .dependencies
                .iter()
                .filter(|d| d.kind != DependencyKind::Development && rooms.contains(&d.name))
                .map(|d| (package.name.to_string(), d.name.clone()))
        })
        .collect()
}

fn violations(edges: &BTreeSet<(String, String)>) -> Vec<String> {
    let table: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    edges
        .iter()
        .filter_map(|(user, used)| {
            if MAY_USE_EVERYTHING.contains(&user.as_str()) {
                return None;
            }
            match table.get(user.as_str()) {
                None => Some(format!(
                    "{user} is not in the table of rooms: add it with what it may use"
                )),
                Some(allowed) if allowed.contains(&used.as_str()) => None,
                Some(_) => Some(format!("{user} may not use {used}")),
            }
        })
        .collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn workspace() -> Metadata {
    MetadataCommand::new()
        .current_dir(root())
        .no_deps()
        .exec()
        .unwrap()
}

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn sources(room: &str) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    rust_files(&root().join(room), &mut files);
    files
        .into_iter()
        .map(|f| (f.clone(), std::fs::read_to_string(&f).unwrap()))
        .collect()
}

#[test]
fn rooms_use_only_the_rooms_they_may() {
    let found = violations(&edges(&workspace()));
    assert!(found.is_empty(), "layering: {found:#?}");
}

#[test]
fn the_layering_check_can_fail() {
    let real = edges(&workspace());
    assert!(
        real.contains(&("guild-model".into(), "guild-kernels".into())),
        "the check sees real edges"
    );
    for (user, used) in [
        ("guild-scheduler", "guild-transport"),
        ("guild-model", "guild-transport"),
        ("guild-transport", "guild-model"),
        ("guild-attention-node", "guild-expert-node"),
        ("guild-coordinator", "guild-transport"),
        ("guild-kernels", "guild-model"),
        ("guild-newcomer", "guild-model"),
    ] {
        let mut edges = real.clone();
        edges.insert((user.into(), used.into()));
        let found = violations(&edges);
        assert_eq!(
            found.len(),
            1,
            "{user} -> {used} must be reported, got {found:?}"
        );
        assert!(found[0].contains(user));
    }
}

#[test]
fn only_kernels_may_hold_unsafe_code() {
    for package in workspace().workspace_packages() {
        let manifest = std::fs::read_to_string(&package.manifest_path).unwrap();
        let inherits = manifest.contains("[lints]\nworkspace = true");
        assert_eq!(
            inherits,
            package.name.as_str() != "guild-kernels",
            "{}: workspace lints forbid unsafe code",
            package.name
        );
    }
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"forbid\""));
}

#[test]
fn the_coordinator_sees_no_maths() {
    for (path, text) in sources("coordinator/src") {
        for (at, _) in text.match_indices("guild_model::") {
            let rest = &text[at + "guild_model::".len()..];
            let names: Vec<&str> = match rest.strip_prefix('{') {
                Some(list) => list
                    .split('}')
                    .next()
                    .unwrap()
                    .split(',')
                    .map(str::trim)
                    .filter(|n| !n.is_empty())
                    .collect(),
                None => vec![rest],
            };
            for name in names {
                let first = name
                    .split(|c: char| !c.is_alphanumeric() && c != '_')
                    .next()
                    .unwrap();
                assert!(
                    MODEL_FOR_COORDINATOR.contains(&first),
                    "{}: coordinator may not use guild_model::{first}",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn the_scheduler_never_awaits_and_never_reads_a_clock() {
    for (path, text) in sources("scheduler/src") {
        for banned in [
            "async ",
            ".await",
            "Instant",
            "SystemTime",
            "std::net",
            "std::fs",
            "std::env",
            "std::thread",
        ] {
            assert!(
                !text.contains(banned),
                "{}: `{banned}` does not belong in the scheduler",
                path.display()
            );
        }
    }
}

#[test]
fn only_the_node_room_and_the_binary_read_the_environment() {
    for room in [
        "kernels",
        "model",
        "scheduler",
        "transport",
        "coordinator",
        "attention-node",
        "expert-node",
        "proto",
    ] {
        for (path, text) in sources(&format!("{room}/src")) {
            assert!(
                !text.contains("std::env::var") && !text.contains("env::var("),
                "{}: configuration comes in as arguments",
                path.display()
            );
        }
    }
}

#[test]
fn every_room_opens_with_its_secret() {
    for package in workspace().workspace_packages() {
        let dir = package.manifest_path.parent().unwrap();
        let file = ["src/lib.rs", "src/main.rs"]
            .iter()
            .map(|f| dir.join(f))
            .find(|f| f.exists())
            .unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let head: Vec<&str> = text.lines().take_while(|l| l.starts_with("//!")).collect();
        assert!(
            head.len() >= 3,
            "{file}: a `//!` paragraph says what the room hides, may use and must not know"
        );
    }
}

/// A ratchet: files that grow past this are split by what they hide, not by length alone.
const MAX_LINES: usize = 900;

#[test]
fn no_file_is_one_that_a_reader_would_dread() {
    for package in workspace().workspace_packages() {
        let dir = package.manifest_path.parent().unwrap();
        let mut files = Vec::new();
        rust_files(dir.as_std_path(), &mut files);
        for file in files {
            let lines = std::fs::read_to_string(&file).unwrap().lines().count();
            assert!(
                lines <= MAX_LINES,
                "{}: {lines} lines, at most {MAX_LINES}",
                file.display()
            );
        }
    }
}
