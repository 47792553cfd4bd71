//! Exchanges over nodes that answer when they are told to, in a time that only passes while all
//! wait: how long one takes is exact.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use guild_scheduler::placement::{NodeSlots, Placement};
use guild_transport::{LinkLimits, Links, SlotHost, Switchboard, Work};
use tokio::time::sleep;

use super::*;

const NODES: u32 = 4;
const EXPERTS: u32 = 16;
const TOP_K: usize = 4;
/// What a healthy node takes for a message, and for each row of it.
const USUAL: (Duration, Duration) = (Duration::from_millis(1), Duration::from_micros(50));
/// Between two exchanges: what else there is to do in a step.
const PAUSE: Duration = Duration::from_millis(2);

/// Gives every row back as it came.
struct Echo;

impl SlotHost for Echo {
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        let rows = work.slots.iter().flat_map(|(_, rows)| rows);
        let row = |&row: &u32| &work.rows[row as usize * work.width..][..work.width];
        Ok(rows.flat_map(row).copied().collect())
    }
}

/// How much longer a node takes for its message of this number and so many rows.
type Delay = Box<dyn Fn(u64, usize) -> Duration + Send + Sync>;

/// Links whose answers take their time.
struct Slowed {
    links: Links,
    delays: Mutex<HashMap<NodeId, Delay>>,
    /// Messages and rows to each node.
    sent: Mutex<HashMap<NodeId, (u64, usize)>>,
    /// Answers that others had to wait for.
    number: AtomicU64,
}

impl Fabric for Slowed {
    fn dispatch(&self, batch: Batch<'_>) -> Result<Handle, ExchangeError> {
        if let Some(first) = batch.assignments.first() {
            let mut sent = self.sent.lock().unwrap();
            let sent = sent.entry(first.node).or_default();
            *sent = (sent.0 + 1, sent.1 + batch.assignments.len());
        }
        self.links.dispatch(batch)
    }

    fn is_here(&self, _: NodeId) -> bool {
        false
    }

    async fn combine(&self, handle: Handle) -> Result<Returned, ExchangeError> {
        let node = handle.nodes().next().unwrap();
        let returned = self.links.combine(handle).await?;
        let rows = returned.rows.len();
        let number = self.number.fetch_add(1, Ordering::SeqCst);
        let more = self
            .delays
            .lock()
            .unwrap()
            .get(&node)
            .map(|d| d(number, rows));
        sleep(USUAL.0 + USUAL.1 * rows as u32 + more.unwrap_or_default()).await;
        Ok(Returned {
            arrived: Instant::now(),
            ..returned
        })
    }
}

struct Rig {
    exchange: Exchange<Slowed>,
    random: u64,
    views: watch::Sender<Option<Arc<View>>>,
    /// The same homes at the next epoch.
    next: Option<Arc<View>>,
}

impl Rig {
    /// Two homes for every expert.
    fn new() -> Rig {
        let slots = |node: u32| NodeSlots {
            node,
            slots: (0..EXPERTS)
                .filter(|expert| {
                    [expert % NODES, (expert + 1 + expert / NODES % 3) % NODES].contains(&node)
                })
                .map(|expert| (0, expert))
                .collect(),
        };
        let placement = |epoch| Placement::new(epoch, (0..NODES).map(slots).collect()).unwrap();
        let board = Switchboard::default();
        let names = (0..NODES).map(|node| (node, format!("expert-{node}")));
        for (_, name) in names.clone() {
            board.attach(name, Arc::new(Echo));
        }
        let runtime = tokio::runtime::Handle::current();
        let links = Links::new("attention", LinkLimits::default(), runtime);
        let endpoints = names
            .clone()
            .map(|(node, name)| (node, name, String::new()));
        links.set_nodes(&endpoints.collect::<Vec<_>>(), Some(&board));
        let view = |epoch| Arc::new(View::new(placement(epoch), names.clone()));
        let (views, newest) = watch::channel(Some(view(1)));
        let fabric = Arc::new(Slowed {
            links,
            delays: Mutex::default(),
            sent: Mutex::default(),
            number: AtomicU64::new(0),
        });
        Rig {
            exchange: Exchange::new(fabric, newest, Patience::default()),
            random: 1,
            next: Some(view(2)),
            views,
        }
    }

    fn delay(&self, node: NodeId, delay: impl Fn(u64, usize) -> Duration + Send + Sync + 'static) {
        let mut delays = self.exchange.fabric.delays.lock().unwrap();
        delays.insert(node, Box::new(delay));
    }

    fn heal(&self) {
        self.exchange.fabric.delays.lock().unwrap().clear();
    }

    fn sent(&self, node: NodeId) -> (u64, usize) {
        let sent = self.exchange.fabric.sent.lock().unwrap();
        sent.get(&node).copied().unwrap_or_default()
    }

    fn below(&mut self, n: u32) -> u32 {
        // A linear congruential generator; its upper bits are the good ones.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as u32 % n
    }

    /// A few rows, and where they go.
    fn rows(&mut self) -> (Vec<f32>, Routes) {
        let rows = 4 + self.below(6) as usize;
        let mut experts = Vec::new();
        for _ in 0..rows {
            let first = self.below(EXPERTS / TOP_K as u32);
            experts.extend((0..TOP_K as u32).map(|k| first + k * EXPERTS / TOP_K as u32));
        }
        let routes = Routes {
            top_k: TOP_K,
            weights: vec![0.0; experts.len()].into(),
            experts: experts.into(),
            logits: Vec::new().into(),
        };
        ((0..rows).map(|row| row as f32).collect(), routes)
    }

    /// One exchange; how long it took.
    async fn one(&mut self) -> Duration {
        let (x, routes) = self.rows();
        let begun = Instant::now();
        let want: Vec<f32> = x.iter().flat_map(|&row| [row; TOP_K]).collect();
        let away = self.exchange.dispatch(0, x.into(), routes);
        let out = away.combine().await.unwrap();
        let took = begun.elapsed();
        assert_eq!(out.rows, want);
        assert!(out.away <= took);
        sleep(PAUSE).await;
        took
    }

    async fn many(&mut self, count: usize) -> Vec<Duration> {
        let mut took = Vec::new();
        for _ in 0..count {
            took.push(self.one().await);
        }
        took.sort_unstable();
        took
    }

    fn assert_within_the_budget(&self) {
        let counters = self.exchange.counters();
        let hedges = counters.hedges.load(Ordering::SeqCst);
        let all = counters.dispatches.load(Ordering::SeqCst);
        assert!(hedges <= all / 10 + 8, "{hedges} of {all}");
    }

    /// Exchanges until the node has its share of the rows again; how long that took.
    async fn until_used(&mut self, node: NodeId) -> Duration {
        let cured = Instant::now();
        loop {
            let before = self.sent(node).1;
            self.many(10).await;
            if self.sent(node).1 > before + 30 {
                return cured.elapsed();
            }
            assert!(
                cured.elapsed() < Duration::from_secs(60),
                "left alone for ever"
            );
        }
    }
}

/// 99 of 100 are no longer.
fn p99(sorted: &[Duration]) -> Duration {
    sorted[sorted.len() * 99 / 100]
}

#[tokio::test(start_paused = true)]
async fn a_node_that_has_moved_far_away_costs_a_few_short_pauses_and_is_used_again_when_it_is_back()
{
    let mut rig = Rig::new();
    let usual = rig.many(300).await;
    rig.delay(1, |_, _| Duration::from_millis(400));
    let before = rig.sent(1);
    let slow = rig.many(2000).await;
    assert!(p99(&slow) <= 2 * p99(&usual), "{:?}", p99(&slow));
    assert!(slow[slow.len() - 1] < Duration::from_millis(50), "{slow:?}");
    let asked = rig.sent(1).0 - before.0;
    assert!(asked < 60, "{asked}");
    rig.assert_within_the_budget();
    rig.heal();
    let again = rig.until_used(1).await;
    assert!(again < Duration::from_secs(10), "{again:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_often_held_up_is_left_alone_and_used_again_when_it_is_cured() {
    let mut rig = Rig::new();
    let usual = rig.many(300).await;
    // Like one that has used up its share of a processor's time.
    rig.delay(2, |number, rows| match (number % 5, rows) {
        (_, 1) | (1.., _) => Duration::ZERO,
        _ => Duration::from_millis(90),
    });
    let slow = rig.many(4000).await;
    assert!(p99(&slow) <= 2 * p99(&usual), "{:?}", p99(&slow));
    let counters = rig.exchange.counters();
    assert!(counters.slow.load(Ordering::SeqCst) > 0);
    rig.assert_within_the_budget();
    rig.heal();
    let again = rig.until_used(2).await;
    assert!(again < Duration::from_secs(10), "{again:?}");
}

#[tokio::test(start_paused = true)]
async fn where_all_nodes_become_slow_all_go_on_working() {
    let mut rig = Rig::new();
    rig.many(300).await;
    for node in 0..NODES {
        rig.delay(node, |_, _| Duration::from_millis(60));
    }
    rig.many(50).await;
    let before: Vec<usize> = (0..NODES).map(|node| rig.sent(node).1).collect();
    rig.many(200).await;
    let rows = (0..NODES).map(|node| rig.sent(node).1 - before[node as usize]);
    let rows: Vec<usize> = rows.collect();
    let all: usize = rows.iter().sum();
    assert!(
        rows.iter().filter(|&&rows| rows > all / 10).count() >= 3,
        "{rows:?}"
    );
    rig.assert_within_the_budget();
}

#[tokio::test(start_paused = true)]
async fn a_silent_node_is_helped_at_once_and_suspected_after_its_time() {
    let mut rig = Rig::new();
    rig.many(300).await;
    rig.delay(3, |_, _| Duration::from_secs(3600));
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    while rig.exchange.counters().suspected.load(Ordering::SeqCst) == 0 {
        longest = longest.max(rig.one().await);
        assert!(begun.elapsed() < Duration::from_secs(2));
    }
    assert!(begun.elapsed() >= SUSPECT_AFTER);
    assert!(longest < Duration::from_millis(50), "{longest:?}");
    rig.assert_within_the_budget();
}

#[tokio::test(start_paused = true)]
async fn a_placement_is_left_when_its_last_rows_are_back_and_not_before() {
    let mut rig = Rig::new();
    rig.many(10).await;
    // Nothing is away by the first one.
    let left = rig.views.borrow().as_ref().unwrap().left();
    let next = rig.next.take();
    rig.views.send_replace(next);
    left.await;
    let (x, routes) = rig.rows();
    let away = rig.exchange.dispatch(0, x.into(), routes);
    let mut left = Box::pin(rig.views.borrow().as_ref().unwrap().left());
    rig.views.send_replace(None);
    assert!(left.as_mut().now_or_never().is_none());
    away.combine().await.unwrap();
    left.await;
}

#[tokio::test(start_paused = true)]
async fn rows_of_experts_that_are_lost_for_good_are_not_waited_for() {
    let mut rig = Rig::new();
    let whole = rig.views.borrow().clone();
    let lost = whole
        .as_ref()
        .map(|view| Arc::new(view.without("there is no room")));
    // Nobody is reached any more, and after a moment that is known to stay so.
    rig.exchange.fabric.links.set_nodes(&[], None);
    let (x, routes) = rig.rows();
    let begun = Instant::now();
    let away = rig.exchange.dispatch(0, x.into(), routes);
    let told = Duration::from_millis(700);
    let tell = async {
        sleep(told).await;
        rig.views.send_replace(lost);
    };
    let (failed, ()) = tokio::join!(away.combine(), tell);
    let failed = failed.err().unwrap();
    assert_eq!(begun.elapsed(), told);
    assert_eq!(
        (failed.message.as_str(), failed.epoch),
        ("there is no room", 1)
    );
    assert!(!failed.experts.is_empty(), "{failed}");
}
