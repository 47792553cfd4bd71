//! What nodes are thought of and where rows go, in a time that only passes when told to.
#![allow(clippy::unwrap_used)]

use guild_proto::cluster::v1 as wire;
use tokio::time::{advance, sleep};

use super::*;

/// Two homes for each of as many experts as nodes: its own node and the next.
fn view(nodes: u32, rows_per_second: &[f64]) -> View {
    let slot = |expert| wire::Slot { layer: 0, expert };
    let node = |at: u32| wire::PlacementNode {
        node_id: at,
        name: format!("expert-{at}"),
        slots: vec![slot(at), slot((at + nodes - 1) % nodes)],
        rows_per_second: rows_per_second.get(at as usize).copied().unwrap_or(0.0),
        ..Default::default()
    };
    let placement = wire::Placement {
        epoch: 1,
        nodes: (0..nodes).map(node).collect(),
        ..Default::default()
    };
    View::from_wire(&placement).unwrap().0
}

fn peers(view: &View) -> Arc<Peers> {
    let peers = Peers::new(SUSPECT_AFTER);
    peers.retain(view);
    Arc::new(peers)
}

/// Rows that each node gets of `each` for every expert.
fn shares(peers: &Peers, view: &View, each: u32, near: &dyn Fn(NodeId) -> bool) -> Vec<usize> {
    let experts = view.nodes().count() as u32;
    let targets: Vec<_> = (0..experts * each).map(|at| (at, at / each)).collect();
    let (plan, left) = peers.choose(&Wanted {
        view,
        layer: 0,
        targets: &targets,
        avoid: &BTreeSet::new(),
        least: Trust::Suspected,
        near,
    });
    assert!(left.is_empty());
    let rows = |node| plan.get(&node).map_or(0, Vec::len);
    (0..experts).map(rows).collect()
}

fn far(_: NodeId) -> bool {
    false
}

/// Each node answers some messages of different sizes, in a fixed time and one for every row (ms).
async fn answers(peers: &Arc<Peers>, view: &View, times: &[(f64, f64)]) {
    for rows in [8, 3, 20, 8, 12, 1, 16, 8, 30, 5] {
        for (node, (fixed, row)) in (0..).zip(times) {
            let out = peers.send(view, node, rows);
            sleep(Duration::from_secs_f64((fixed + row * rows as f64) / 1e3)).await;
            out.answered(Instant::now());
        }
    }
}

/// Messages that a node answers late, so that others are asked.
async fn late(peers: &Arc<Peers>, view: &View, node: NodeId, times: u32) {
    for _ in 0..times {
        let out = peers.send(view, node, 8);
        peers.late(node, out.number());
        sleep(Duration::from_millis(40)).await;
        out.answered(Instant::now());
    }
}

#[tokio::test(start_paused = true)]
async fn rows_go_where_they_are_answered_first() {
    let view = view(4, &[]);
    let peers = peers(&view);
    assert_eq!(shares(&peers, &view, 6, &far), [6; 4], "nothing is known");
    answers(
        &peers,
        &view,
        &[(1.0, 0.1), (1.0, 0.1), (40.0, 0.1), (1.0, 0.1)],
    )
    .await;
    let rows = shares(&peers, &view, 6, &far);
    assert_eq!(rows[2], 0, "{rows:?}");
    // With enough to do for all of them even that one is of use.
    let rows = shares(&peers, &view, 2000, &far);
    assert!(rows[2] > 0 && rows[2] < rows[1], "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_has_come_near_again_gets_rows_after_a_few_probes() {
    let view = view(4, &[]);
    let peers = peers(&view);
    let near = (1.0, 0.1);
    answers(&peers, &view, &[(200.0, 0.1), near, near, near]).await;
    assert_eq!(shares(&peers, &view, 6, &far)[0], 0);
    for _ in 0..3 {
        advance(PROBE_IDLE).await;
        assert!(peers.to_probe(&far).contains(&0));
        let out = peers.send(&view, 0, 1);
        sleep(Duration::from_micros(1100)).await;
        out.answered(Instant::now());
    }
    let rows = shares(&peers, &view, 6, &far);
    assert!(rows[0] > 0, "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn differences_within_the_noise_move_no_rows() {
    let view = view(4, &[]);
    let peers = peers(&view);
    let times = [(1.0, 0.10), (1.1, 0.10), (0.9, 0.11), (1.0, 0.12)];
    answers(&peers, &view, &times).await;
    assert_eq!(shares(&peers, &view, 6, &far), [6; 4]);
}

#[tokio::test(start_paused = true)]
async fn a_home_in_this_process_goes_before_as_long_as_it_is_no_later() {
    let view = view(3, &[]);
    let peers = peers(&view);
    let near = |node: NodeId| node == 1;
    answers(&peers, &view, &[(2.0, 0.1), (0.0, 0.1), (2.0, 0.1)]).await;
    // Experts 0 and 1 live there, each with another home.
    let rows = shares(&peers, &view, 5, &near);
    assert_eq!(rows[1], 10, "{rows:?}");
    let rows = shares(&peers, &view, 300, &near);
    assert!((300..350).contains(&rows[1]), "{rows:?}");
}

#[tokio::test(start_paused = true)]
async fn capacities_of_the_placement_count_before_anything_is_measured() {
    let view = view(2, &[1000.0, 3000.0]);
    let peers = peers(&view);
    assert_eq!(shares(&peers, &view, 100, &far), [50, 150]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_owes_a_late_answer_gets_nothing_until_it_comes() {
    let view = view(4, &[]);
    let peers = peers(&view);
    answers(&peers, &view, &[(1.0, 0.1); 4]).await;
    let out = peers.send(&view, 1, 8);
    let usual = peers.late_after(1, 8).unwrap();
    assert!(usual < Duration::from_millis(20), "{usual:?}");
    peers.late(1, out.number());
    assert_eq!(shares(&peers, &view, 6, &far)[1], 0);
    // Where many are late the reason is elsewhere, and nobody is left alone.
    let other = peers.send(&view, 2, 8);
    peers.late(2, other.number());
    assert!(shares(&peers, &view, 6, &far).iter().all(|&rows| rows > 0));
    drop(other);
    advance(Duration::from_millis(2)).await;
    out.answered(Instant::now());
    assert!(shares(&peers, &view, 6, &far)[1] > 0);
}

#[tokio::test(start_paused = true)]
async fn only_a_share_of_the_nodes_is_ever_left_alone_for_being_slow() {
    let view = view(6, &[]);
    let peers = peers(&view);
    answers(&peers, &view, &[(1.0, 0.1); 6]).await;
    for node in 0..5 {
        late(&peers, &view, node, 5).await;
    }
    assert_eq!(peers.counters().slow.load(Ordering::Relaxed), 2);
    let idle = shares(&peers, &view, 6, &far);
    let idle = idle.iter().filter(|&&rows| rows == 0).count();
    assert!(idle <= 6 / SLOW_PART, "{idle}");
}

#[tokio::test(start_paused = true)]
async fn a_slow_node_is_used_again_soon_after_it_is_cured_and_its_only_experts_always() {
    let view = view(4, &[]);
    let peers = peers(&view);
    answers(&peers, &view, &[(1.0, 0.1); 4]).await;
    for _ in 0..6 {
        late(&peers, &view, 1, 4).await;
        assert_eq!(shares(&peers, &view, 6, &far)[1], 0);
        // Where the other home of an expert must not be asked there is no choice.
        let (plan, _) = peers.choose(&Wanted {
            view: &view,
            layer: 0,
            targets: &[(0, 1)],
            avoid: &BTreeSet::from([2]),
            least: Trust::Suspected,
            near: &far,
        });
        assert_eq!(plan.keys().copied().collect::<Vec<_>>(), [1]);
        let cured = Instant::now();
        let mut probes = 0;
        while shares(&peers, &view, 6, &far)[1] == 0 {
            assert!(cured.elapsed() < Duration::from_secs(10));
            for node in peers.to_probe(&far) {
                let out = peers.send(&view, node, 1);
                advance(Duration::from_millis(1)).await;
                out.answered(Instant::now());
                probes += u32::from(node == 1);
            }
            advance(Duration::from_millis(20)).await;
        }
        assert!((3..=20).contains(&probes), "{probes}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspected_node_is_probed_within_seconds_and_answers_end_it() {
    let view = view(3, &[]);
    let peers = peers(&view);
    answers(&peers, &view, &[(1.0, 0.1); 3]).await;
    let lost = peers.send(&view, 2, 8);
    peers.suspect(2);
    for _ in 0..8 {
        let begun = Instant::now();
        while !peers.to_probe(&far).contains(&2) {
            advance(Duration::from_millis(50)).await;
        }
        assert!(begun.elapsed() <= PROBE_MAX + Duration::from_millis(100));
        drop(peers.send(&view, 2, 1));
        assert!(!peers.to_probe(&far).contains(&2));
    }
    assert_eq!(shares(&peers, &view, 6, &far)[2], 0);
    peers.send(&view, 2, 1).answered(Instant::now());
    assert!(shares(&peers, &view, 6, &far)[2] > 0);
    // What it will never answer is no queue any more.
    assert_eq!(peers.known().peers[&2].owed.len(), 0);
    drop(lost);
}
