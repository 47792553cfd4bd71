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
        let mut merger = Merger::new(Merging::default());
        // One expert at a time, however quick they are.
        merger.call = Duration::ZERO;
        House {
            merger: Arc::new(merger),
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
            merger.run(order, |x, parts| {
                let mut out = Vec::new();
                for Part { expert, rows } in parts {
                    let rows = rows.iter().map(|&row| &x[row as usize * WIDTH..][..WIDTH]);
                    let firsts: Vec<f32> = rows.clone().map(|row| row[0]).collect();
                    expert.begun.send((expert.number, firsts.clone())).unwrap();
                    expert.go.lock().unwrap().recv().unwrap();
                    assert!(!firsts.contains(&POISON));
                    out.extend(rows.flatten().map(|x| x + 100.0 * expert.number));
                }
                out
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
        let batch = state.take(0, CALL, Instant::now()).unwrap();
        let [expert] = &batch.experts[..] else {
            panic!("one expert");
        };
        let sources = expert.pieces.iter().map(|(id, _)| *id);
        (expert.rows(), sources.collect::<Vec<_>>())
    };
    let most = MERGED_ROWS;
    assert_eq!(taken(&[1, most - 2, 2, 1]), (most, vec![0, 1, 3]));
    assert_eq!(taken(&[most + 1, 1]), (most + 1, vec![0]));
}

#[test]
fn experts_that_are_quick_run_in_one_call_and_late_ones_join_the_next() {
    let mut house = House::with(5);
    let quick = Duration::from_micros(100);
    {
        let merger = Arc::get_mut(&mut house.merger).unwrap();
        merger.call = 3 * quick;
        merger.lock().company.product_took(quick);
    }
    let a = house.send(1.0, &[0, 1, 2, 3, 4], None);
    assert_eq!(house.next(), (0, vec![1.0]));
    // Too late for 0, 1 and 2, and here before 3 and 4 begin.
    let b = house.send(2.0, &[1, 4], None);
    for expert in [0, 1] {
        house.go(expert);
        assert_eq!(house.next(), (expert + 1, vec![1.0]));
    }
    // Now they are slow: one at a time.
    house.merger.lock().company = Company::default();
    house.merger.lock().company.product_took(1000 * quick);
    house.go(2);
    assert_eq!(house.next(), (3, vec![1.0]));
    let c = house.send(3.0, &[4], None);
    house.go(3);
    assert_eq!(house.next(), (4, vec![1.0, 2.0, 3.0]));
    house.go(4);
    assert_eq!(ok(a).len(), 5 * WIDTH);
    assert_eq!(house.next(), (1, vec![2.0]));
    house.go(1);
    assert_eq!(ok(b), [102.0, 100.5, 402.0, 400.5]);
    assert_eq!(ok(c), [403.0, 400.5]);
    let products = house.merger.merging.products();
    assert_eq!((products.products, products.rows), (6, 8));
}

#[test]
fn rows_of_several_orders_find_their_experts_and_their_way_back_in_one_call() {
    let merger = Merger::new(Merging::default());
    let experts: Vec<Arc<f32>> = [0.0, 1.0, 2.0].map(Arc::new).to_vec();
    // Rows as wide as one element: which order, and which of its rows.
    let order = |source: u64, rows: usize, pieces: &[(usize, &[u32])]| {
        let mut at = 0;
        let pieces = pieces.iter().map(|&(expert, rows)| {
            let piece = Piece {
                expert: Arc::clone(&experts[expert]),
                rows: rows.to_vec(),
                at,
            };
            at += rows.len();
            piece
        });
        Order {
            source,
            deadline: None,
            width: 1,
            pieces: pieces.collect(),
            rows: Rows::from(
                (0..rows)
                    .map(|row| (100 * source as usize + row) as f32)
                    .collect::<Vec<_>>(),
            ),
        }
    };
    let mut state = merger.lock();
    state.company.product_took(Duration::from_nanos(1));
    state.enter(order(1, 3, &[(2, &[2, 0]), (1, &[1])]), Arc::default());
    state.enter(order(2, 1, &[(0, &[0])]), Arc::default());
    state.enter(order(3, 2, &[(1, &[1, 0]), (2, &[1])]), Arc::default());
    let batch = state.take(0, CALL, Instant::now()).unwrap();
    drop(state);
    // The second order has nothing for these experts, and its rows are not brought along.
    assert_eq!(batch.orders.len(), 2);
    let out = batch.run(1, &|x, parts| {
        assert_eq!(x.len(), 5);
        let row = |part: &Part<'_, f32>, row: u32| 1000.0 * part.expert + x[row as usize];
        { parts.iter() }
            .flat_map(|part| {
                part.rows
                    .iter()
                    .map(move |&r| row(part, r))
                    .collect::<Vec<_>>()
            })
            .collect()
    });
    let expected = [2102.0, 2100.0, 2301.0, 1101.0, 1301.0, 1300.0];
    assert_eq!(out.unwrap(), expected);
}
