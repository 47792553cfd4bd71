//! Who runs what, with experts that begin and end when the test says so.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread::{self, JoinHandle},
};

use super::*;

const WIDTH: usize = 2;
/// A row that begins with this makes its expert panic.
const POISON: f32 = -1.0;

/// An expert that says when it begins, and goes on when it is told to.
struct Gated {
    number: f32,
    begun: Sender<(f32, Vec<f32>)>,
    go: Mutex<Receiver<()>>,
}

/// What the test holds of such experts.
struct House {
    merger: Arc<Merger<Gated>>,
    experts: Vec<Arc<Gated>>,
    begun: Receiver<(f32, Vec<f32>)>,
    go: Vec<Sender<()>>,
}

type Answer = JoinHandle<Result<Vec<f32>, Stopped>>;

impl House {
    fn with(experts: usize) -> House {
        let (say, begun) = channel();
        let (go, experts) = (0..experts)
            .map(|number| {
                let (go, wait) = channel();
                let gated = Gated {
                    number: number as f32,
                    begun: say.clone(),
                    go: Mutex::new(wait),
                };
                (go, Arc::new(gated))
            })
            .unzip();
        House {
            merger: Arc::new(Merger::new(Merging::default())),
            experts,
            begun,
            go,
        }
    }

    /// Rows that begin with `first` to `experts`, on a thread of its own,
    /// which has let them in when this returns.
    fn send(&self, first: f32, experts: &[usize], deadline: Option<Instant>) -> Answer {
        let pieces = (0..).zip(experts).map(|(at, &expert)| Piece {
            expert: Arc::clone(&self.experts[expert]),
            rows: vec![0],
            at,
        });
        let order = Order {
            source: first as u64,
            deadline,
            rows: Rows::from(vec![first, 0.5]),
            width: WIDTH,
            pieces: pieces.collect(),
        };
        let merger = Arc::clone(&self.merger);
        let known = self.merger.lock().next;
        let answer = thread::spawn(move || {
            merger.run(order, |expert, rows| {
                let firsts: Vec<f32> = rows.iter().step_by(WIDTH).copied().collect();
                expert.begun.send((expert.number, firsts.clone())).unwrap();
                expert.go.lock().unwrap().recv().unwrap();
                assert!(!firsts.contains(&POISON));
                rows.iter().map(|x| x + 100.0 * expert.number).collect()
            })
        });
        while self.merger.lock().next == known {
            thread::yield_now();
        }
        answer
    }

    /// The next product that begins: which expert, and who is in it.
    fn next(&self) -> (usize, Vec<f32>) {
        let (expert, rows) = self.begun.recv().unwrap();
        (expert as usize, rows)
    }

    fn go(&self, expert: usize) {
        self.go[expert].send(()).unwrap();
    }
}

fn ok(answer: Answer) -> Vec<f32> {
    answer.join().unwrap().unwrap()
}

#[test]
fn what_arrives_while_one_expert_runs_joins_the_next() {
    let house = House::with(4);
    let a = house.send(1.0, &[0, 1, 2], None);
    assert_eq!(house.next(), (0, vec![1.0]));
    let b = house.send(2.0, &[0, 2], None);
    let c = house.send(3.0, &[2, 1, 3], None);
    house.go(0);
    assert_eq!(house.next(), (1, vec![1.0, 3.0]));
    house.go(1);
    assert_eq!(house.next(), (2, vec![1.0, 2.0, 3.0]));
    house.go(2);
    // Done: its answer waits for nobody else's experts.
    assert_eq!(ok(a), [1.0, 0.5, 101.0, 100.5, 201.0, 200.5]);
    // The next oldest leads.
    assert_eq!(house.next(), (0, vec![2.0]));
    house.go(0);
    assert_eq!(ok(b), [2.0, 0.5, 202.0, 200.5]);
    assert_eq!(house.next(), (3, vec![3.0]));
    house.go(3);
    assert_eq!(ok(c), [203.0, 200.5, 103.0, 100.5, 303.0, 300.5]);
    let products = house.merger.merging.products();
    assert_eq!((products.products, products.rows), (5, 8));
    assert!(house.merger.lock().queue.is_empty());
}

#[test]
fn a_follower_whose_rows_are_done_leaves_before_the_leader() {
    let house = House::with(3);
    let a = house.send(1.0, &[0, 1, 2], None);
    house.next();
    let b = house.send(2.0, &[1], None);
    house.go(0);
    assert_eq!(house.next(), (1, vec![1.0, 2.0]));
    house.go(1);
    assert_eq!(ok(b), [102.0, 100.5]);
    house.next();
    house.go(2);
    ok(a);
}

#[test]
fn who_comes_too_late_is_not_run_and_holds_up_nobody() {
    let house = House::with(2);
    let a = house.send(1.0, &[0], None);
    house.next();
    let late = house.send(2.0, &[1], Some(Instant::now()));
    let b = house.send(3.0, &[1], None);
    house.go(0);
    ok(a);
    assert_eq!(house.next(), (1, vec![3.0]));
    house.go(1);
    assert_eq!(late.join().unwrap(), Err(Stopped::Late));
    assert_eq!(ok(b), [103.0, 100.5]);
}

#[test]
fn a_panic_is_answered_to_all_whose_rows_were_in_it_and_others_go_on() {
    let house = House::with(2);
    let a = house.send(1.0, &[0, 1], None);
    house.next();
    let poisoned = house.send(POISON, &[1], None);
    let b = house.send(3.0, &[0], None);
    house.go(0);
    assert_eq!(house.next(), (1, vec![1.0, POISON]));
    house.go(1);
    assert_eq!(a.join().unwrap(), Err(Stopped::Panicked));
    assert_eq!(poisoned.join().unwrap(), Err(Stopped::Panicked));
    assert_eq!(house.next(), (0, vec![3.0]));
    house.go(0);
    assert_eq!(ok(b), [3.0, 0.5]);
    let c = house.send(4.0, &[1], None);
    house.next();
    house.go(1);
    assert_eq!(ok(c), [104.0, 100.5]);
}

#[test]
fn a_product_has_its_limit_and_large_work_runs_as_it_is() {
    let rows = |n: usize| vec![0; n];
    let expert = Arc::new(0);
    let order = |source, n| Order {
        source,
        deadline: None,
        rows: Rows::from(vec![0.0; WIDTH]),
        width: WIDTH,
        pieces: vec![Piece {
            expert: Arc::clone(&expert),
            rows: rows(n),
            at: 0,
        }],
    };
    let taken = |sizes: &[usize]| {
        let merger = Merger::new(Merging::default());
        let mut state = merger.lock();
        for (source, &n) in (0..).zip(sizes) {
            state.enter(order(source, n), Arc::default());
        }
        let batch = state.take(0, Instant::now()).unwrap();
        let sources = batch.pieces.iter().map(|(id, ..)| *id);
        (batch.rows(), sources.collect::<Vec<_>>())
    };
    let most = MERGED_ROWS;
    assert_eq!(taken(&[1, most - 2, 2, 1]), (most, vec![0, 1, 3]));
    assert_eq!(taken(&[most + 1, 1]), (most + 1, vec![0]));
}
