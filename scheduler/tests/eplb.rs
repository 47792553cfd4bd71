//! The published balancer against the results of the published code.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use guild_scheduler::eplb::{EplbError, Plan, Policy, Shape, rebalance};
use serde_json::Value;

fn number(v: &Value) -> usize {
    v.as_u64().unwrap() as usize
}

fn maps(plan: &Plan) -> Value {
    let layers = 0..plan.layers();
    serde_json::json!({
        "phy2log": layers.clone().map(|l| plan.phy2log(l)).collect::<Vec<_>>(),
        "log2phy": layers.clone().map(|l| plan.log2phy(l).collect::<Vec<_>>()).collect::<Vec<_>>(),
        "logcnt": layers.map(|l| plan.logcnt(l)).collect::<Vec<_>>(),
    })
}

#[test]
fn every_golden_is_met_slot_for_slot() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/eplb");
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let golden: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let weight: Vec<Vec<f32>> = serde_json::from_value(golden["weight"].clone()).unwrap();
        let shape = Shape {
            num_replicas: number(&golden["num_replicas"]),
            num_groups: number(&golden["num_groups"]),
            num_nodes: number(&golden["num_nodes"]),
            num_gpus: number(&golden["num_gpus"]),
        };
        let plan = rebalance(&weight, shape).unwrap();
        let policy = match plan.policy() {
            Policy::Hierarchical => "hierarchical",
            Policy::Global => "global",
        };
        assert_eq!(golden["policy"], policy, "{}", path.display());
        let maps = maps(&plan);
        for field in ["phy2log", "log2phy", "logcnt"] {
            assert!(
                maps[field] == golden["portable"][field],
                "{}: {field}",
                path.display()
            );
        }
        seen += 1;
    }
    assert!(seen >= 8, "{seen} goldens");
}

const FOUR: Shape = Shape {
    num_replicas: 8,
    num_groups: 2,
    num_nodes: 2,
    num_gpus: 4,
};

#[test]
fn one_item_a_pack_is_the_identity() {
    // Four replicas on four devices: nothing is sorted, whatever the loads.
    let shape = Shape {
        num_replicas: 4,
        num_groups: 1,
        num_nodes: 1,
        num_gpus: 4,
    };
    let plan = rebalance(&[[1.0, 9.0, 3.0, 5.0]], shape).unwrap();
    assert_eq!(plan.phy2log(0), [0, 1, 2, 3]);
}

#[test]
fn ties_go_to_the_lowest_index() {
    let plan = rebalance(&[[0.0, -0.0, 0.0, 0.0]], FOUR).unwrap();
    assert_eq!(plan.logcnt(0), [3, 1, 3, 1]);
    let slots: Vec<Vec<u32>> = plan.log2phy(0).map(<[u32]>::to_vec).collect();
    assert_eq!(slots, [vec![0, 2, 3], vec![1], vec![4, 6, 7], vec![5]]);
}

#[test]
fn groups_that_nodes_do_not_divide_are_planned_globally() {
    let shape = Shape {
        num_groups: 3,
        ..FOUR
    };
    let plan = rebalance(&[[4.0, 3.0, 2.0, 1.0]], shape).unwrap();
    assert_eq!(plan.policy(), Policy::Global);
    let alone = rebalance(
        &[[4.0, 3.0, 2.0, 1.0]],
        Shape {
            num_groups: 1,
            num_nodes: 1,
            ..FOUR
        },
    );
    assert_eq!(plan.phy2log(0), alone.unwrap().phy2log(0));
}

#[test]
fn the_known_toy_case_is_met_at_its_known_maximum() {
    let weight = [600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0f32];
    let shape = Shape {
        num_replicas: 16,
        num_groups: 1,
        num_nodes: 1,
        num_gpus: 8,
    };
    let plan = rebalance(&[weight], shape).unwrap();
    let share = |&e: &u32| weight[e as usize] / plan.logcnt(0)[e as usize] as f32;
    let worst = plan
        .phy2log(0)
        .chunks(2)
        .map(|d| d.iter().map(share).sum::<f32>())
        .fold(0.0, f32::max);
    assert_eq!(worst, 232.0);
}

#[test]
fn errors_name_the_field() {
    let even = [[1.0f32; 4]; 2];
    let says = |shape: Shape, field: &str| {
        let message = rebalance(&even, shape).unwrap_err().to_string();
        assert!(message.starts_with(field), "{message}");
    };
    says(
        Shape {
            num_replicas: 6,
            ..FOUR
        },
        "num_replicas: 6 is not a multiple of num_gpus (4)",
    );
    says(
        Shape {
            num_replicas: 0,
            ..FOUR
        },
        "num_replicas",
    );
    says(
        Shape {
            num_replicas: usize::MAX,
            ..FOUR
        },
        "num_replicas",
    );
    says(
        Shape {
            num_groups: 0,
            ..FOUR
        },
        "num_groups",
    );
    says(
        Shape {
            num_nodes: 0,
            ..FOUR
        },
        "num_nodes",
    );
    says(
        Shape {
            num_gpus: 0,
            ..FOUR
        },
        "num_gpus",
    );
    says(
        Shape {
            num_gpus: 1,
            ..FOUR
        },
        "num_gpus: 1 is not a multiple of num_nodes (2)",
    );
    says(
        Shape {
            num_groups: 6,
            ..FOUR
        },
        "weight: 4 is not a multiple of num_groups (6)",
    );
    says(
        Shape {
            num_replicas: 2,
            num_gpus: 2,
            ..FOUR
        },
        "num_replicas: 2 replicas",
    );
    assert_eq!(
        rebalance(&[] as &[[f32; 0]], FOUR),
        Err(EplbError::NoWeight)
    );
    assert_eq!(rebalance(&[[0.0f32; 0]], FOUR), Err(EplbError::NoWeight));
    let ragged = rebalance(&[vec![1.0; 4], vec![1.0; 3]], FOUR).unwrap_err();
    assert_eq!(
        ragged,
        EplbError::Ragged {
            layer: 1,
            found: 3,
            wanted: 4
        }
    );
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        let message = rebalance(&[[1.0, 1.0, bad, 1.0]], FOUR)
            .unwrap_err()
            .to_string();
        assert!(message.starts_with("weight[0][2]"), "{message}");
    }
}
