//! Rows come out as the expert alone would compute them, whatever travels with
//! them, and placements follow each other without a gap.
#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use guild_expert_node::{
    host::Host,
    merge::Merging,
    residents::{ExpertKey, LoadError, Residents},
};
use guild_model::{Checkpoint, Cpu, ModelError, checkpoint::Dtype, expert::Expert};
use guild_transport::{ExchangeCode, ExchangeError, Rows, SlotHost, Work};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-basic")
}

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&golden()).unwrap()
}

/// `n` rows that differ in every element.
fn rows(n: usize, width: usize) -> Vec<f32> {
    (0..n * width)
        .map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0)
        .collect()
}

fn run(
    host: &Host,
    epoch: u64,
    width: usize,
    rows: &[f32],
    slots: &[(u32, Vec<u32>)],
) -> Result<Vec<f32>, ExchangeError> {
    host.execute(Work {
        epoch,
        width,
        rows: Rows::from(rows.to_vec()),
        slots: slots.to_vec(),
        deadline: None,
        source: 0,
    })
}

fn load(residents: &Residents, slots: &[ExpertKey]) -> Vec<Arc<Expert>> {
    let read = slots.iter().map(|&key| residents.read(key).unwrap());
    read.collect()
}

fn bits(rows: &[f32]) -> Vec<u32> {
    rows.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn rows_equal_the_expert_alone_whatever_the_grouping() {
    let checkpoint = checkpoint();
    let width = checkpoint.config().hidden_size;
    let cpu = Cpu::new(2);
    let host = Host::new("e0", width, cpu.clone());
    let slots: Vec<ExpertKey> = (1..4).flat_map(|layer| [(layer, 3), (layer, 14)]).collect();
    let residents = Residents::new(checkpoint.clone(), Dtype::Auto, 0);
    host.publish(1, load(&residents, &slots));

    let n = 9;
    let input = rows(n, width);
    let alone = |slot: u32, row: u32| {
        let (layer, expert) = slots[slot as usize];
        let expert =
            Expert::load(&checkpoint, layer as usize, expert as usize, Dtype::Auto).unwrap();
        let start = row as usize * width;
        expert.forward(&cpu, &input[start..start + width])
    };
    let all: Vec<u32> = (0..n as u32).collect();
    let groupings: Vec<Vec<(u32, Vec<u32>)>> = vec![
        vec![(0, vec![4])],
        vec![(5, all.clone()), (0, all.clone())],
        vec![
            (0, vec![8, 0, 8, 3]),
            (2, vec![]),
            (1, vec![3]),
            (0, vec![1]),
        ],
        (0..6)
            .rev()
            .map(|slot| (slot, vec![slot, 8 - slot]))
            .collect(),
    ];
    for grouping in groupings {
        let out = run(&host, 1, width, &input, &grouping).unwrap();
        let expected: Vec<f32> = grouping
            .iter()
            .flat_map(|(slot, rows)| rows.iter().flat_map(|row| alone(*slot, *row)))
            .collect();
        assert_eq!(bits(&out), bits(&expected), "{grouping:?}");
    }
    assert!(run(&host, 1, width, &[], &[]).unwrap().is_empty());
}

/// A reproducible sequence of numbers below `n`.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        // xorshift64 (Marsaglia 2003).
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

#[test]
fn merged_rows_have_the_bits_of_rows_run_alone_in_every_interleaving() {
    const SENDERS: u64 = 6;
    const WORKS: usize = 40;
    let checkpoint = checkpoint();
    let width = checkpoint.config().hidden_size;
    let merging = Merging::default();
    merging.set_from_bytes(0);
    let host = Host::new("e0", width, Cpu::new(2)).merging(merging.clone());
    // The same experts in other slots of the next epoch, which merge with these.
    let slots: Vec<ExpertKey> = (0..8).map(|expert| (1, expert)).collect();
    let turned: Vec<ExpertKey> = slots.iter().rev().copied().collect();
    let residents = Residents::new(checkpoint, Dtype::Auto, 0);
    let before = load(&residents, &slots);
    host.publish(1, before);
    host.publish(2, load(&residents, &turned));

    let work = |sender: u64, number: usize| {
        let mut dice = Dice(1 + sender * 1000 + number as u64);
        let n = 1 + dice.below(12);
        let row = (0..n * width).map(|_| dice.below(2001) as f32 / 1000.0 - 1.0);
        let row = Rows::from(row.collect::<Vec<_>>());
        let slots = (0..dice.below(7)).map(|_| {
            let rows = (0..dice.below(5)).map(|_| dice.below(n) as u32).collect();
            (dice.below(8) as u32, rows)
        });
        let slots = slots.collect();
        let mut work = Work {
            epoch: 1 + dice.below(2) as u64,
            width,
            rows: row,
            slots,
            deadline: None,
            source: sender,
        };
        // Now and then one that is refused, beside those that are not.
        match dice.below(12) {
            0 => work.epoch = 7,
            1 => work.slots.push((8, vec![0])),
            2 => work.width = width / 2,
            _ => {}
        }
        work
    };
    let outcome = |out: Result<Vec<f32>, ExchangeError>| match out {
        Ok(rows) => Ok(bits(&rows)),
        Err(error) => Err(error.code),
    };
    let all = |host: &Host, sender| -> Vec<_> {
        (0..WORKS)
            .map(|number| outcome(host.execute(work(sender, number))))
            .collect()
    };
    let alone: Vec<_> = (0..SENDERS).map(|sender| all(&host, sender)).collect();
    let one_by_one = merging.products();
    assert!(alone.iter().flatten().any(|out| out.is_err()));

    // Until some have met, which the machine decides.
    for round in 1.. {
        let together: Vec<_> = std::thread::scope(|scope| {
            let (all, host) = (&all, &host);
            let senders: Vec<_> = (0..SENDERS)
                .map(|sender| scope.spawn(move || all(host, sender)))
                .collect();
            let outcomes = senders.into_iter().map(|sender| sender.join().unwrap());
            outcomes.collect()
        });
        assert_eq!(together, alone);
        let all = merging.products();
        assert_eq!(all.rows, (1 + round) * one_by_one.rows);
        if all.products < (1 + round) * one_by_one.products {
            break;
        }
        assert!(round < 200, "no rows have met");
    }
}

#[test]
fn tables_nobody_routes_by_go_when_they_are_forgotten_or_withdrawn() {
    let checkpoint = checkpoint();
    let width = checkpoint.config().hidden_size;
    let host = Host::new("e0", width, Cpu::new(1));
    let residents = Residents::new(checkpoint, Dtype::Auto, 0);
    for epoch in 1..4 {
        host.publish(epoch, load(&residents, &[(1, epoch as u32)]));
    }
    assert!(host.expert(2, 0).is_ok());
    host.withdraw(3);
    host.forget_before(2);
    assert_eq!(host.epochs(), [2]);
    assert_eq!(residents.len(), 1);
    let code = |epoch, slot| host.expert(epoch, slot).unwrap_err().code;
    assert_eq!(code(1, 0), ExchangeCode::UnknownEpoch);
    assert_eq!(code(2, 1), ExchangeCode::UnknownSlot);
}

#[test]
fn what_a_node_can_do_is_measured_once_it_has_experts() {
    let checkpoint = checkpoint();
    let width = checkpoint.config().hidden_size;
    let host = Host::new("e0", width, Cpu::new(1));
    host.calibrate();
    assert_eq!(host.rows_per_second(), None);
    let residents = Residents::new(checkpoint, Dtype::Auto, 0);
    host.publish(1, load(&residents, &[(1, 0), (1, 1)]));
    host.publish(2, Vec::new());
    assert_eq!(host.rows_per_second(), None);
    host.calibrate();
    let rate = host.rows_per_second().unwrap();
    assert!(rate.is_finite() && rate > 0.0, "{rate}");
    // It holds no expert for that.
    host.forget_before(2);
    assert!(residents.is_empty());
}

#[test]
fn what_does_not_fit_the_placement_is_refused_by_name() {
    let checkpoint = checkpoint();
    let width = checkpoint.config().hidden_size;
    let host = Host::new("e0", width, Cpu::new(1));
    let input = rows(1, width);
    let code = |epoch, width, input: &[f32], slot| {
        let error = run(&host, epoch, width, input, &[(slot, vec![0])]).unwrap_err();
        assert_eq!(error.node, "e0");
        (error.code, error.is_retryable())
    };
    assert_eq!(
        code(1, width, &input, 0),
        (ExchangeCode::UnknownEpoch, true)
    );
    let residents = Residents::new(checkpoint, Dtype::Auto, 0);
    host.publish(1, load(&residents, &[(1, 0)]));
    assert!(run(&host, 1, width, &input, &[(0, vec![0])]).is_ok());
    assert_eq!(
        code(2, width, &input, 0),
        (ExchangeCode::UnknownEpoch, true)
    );
    assert_eq!(
        code(1, width, &input, 1),
        (ExchangeCode::UnknownSlot, false)
    );
    assert_eq!(code(1, 1, &input, 0), (ExchangeCode::Malformed, false));
}

#[test]
fn an_epoch_serves_on_while_its_successor_is_here_and_then_goes() {
    let checkpoint = checkpoint();
    let width = checkpoint.config().hidden_size;
    let host = Host::new("e0", width, Cpu::new(1));
    let input = rows(1, width);
    let residents = Residents::new(checkpoint, Dtype::Auto, 0);
    let publish = |epoch, slots: &[ExpertKey]| {
        host.publish(epoch, load(&residents, slots));
        residents.len()
    };
    let first = |epoch| run(&host, epoch, width, &input, &[(0, vec![0])]).map(|out| bits(&out));

    assert_eq!(publish(1, &[(1, 0), (1, 1)]), 2);
    let by_1 = first(1).unwrap();
    // Expert (1, 0) moves to another slot and stays resident.
    assert_eq!(publish(2, &[(2, 5), (1, 0)]), 3);
    assert_eq!(first(1).unwrap(), by_1);
    assert_ne!(first(2).unwrap(), by_1);
    let moved = run(&host, 2, width, &input, &[(1, vec![0])]).unwrap();
    assert_eq!(bits(&moved), by_1);
    assert_eq!(publish(3, &[(2, 5)]), 3);
    assert_eq!(first(2).unwrap(), first(3).unwrap());
    // The table of epoch 1 goes, and with it the expert that only it used.
    assert_eq!(publish(4, &[]), 2);
    assert_eq!(host.epochs(), [2, 3, 4]);
    assert_eq!(first(1).unwrap_err().code, ExchangeCode::UnknownEpoch);
    assert_eq!(first(4).unwrap_err().code, ExchangeCode::UnknownSlot);
    assert_eq!(publish(5, &[]), 1);
    assert_eq!(publish(6, &[]), 0);
}

#[test]
fn an_expert_is_in_memory_once_and_only_as_long_as_somebody_holds_it() {
    let residents = Residents::new(checkpoint(), Dtype::Auto, 0);
    let slots = [(1, 0), (3, 15), (1, 0)];
    assert_eq!(residents.missing(&slots), [(1, 0), (3, 15)]);
    let held = load(&residents, &slots);
    assert!(Arc::ptr_eq(&held[0], &held[2]));
    assert!(residents.missing(&slots).is_empty());
    assert!(
        residents
            .find((3, 15))
            .is_some_and(|expert| Arc::ptr_eq(&expert, &held[1]))
    );
    assert_eq!(
        (residents.len(), residents.bytes()),
        (2, 2 * held[0].bytes())
    );
    drop(held);
    assert_eq!((residents.len(), residents.bytes()), (0, 0));
    assert!(residents.find((1, 0)).is_none());
}

#[test]
fn an_expert_that_comes_as_a_blob_is_the_one_that_is_read() {
    let residents = Residents::new(checkpoint(), Dtype::Auto, 0);
    let read = residents.read((2, 7)).unwrap();
    let (blob, right) = (read.blob().to_vec(), read.digest());
    drop(read);
    let copied = |key| -> Result<Arc<Expert>, ModelError> {
        let mut arriving = residents.arriving(key).unwrap();
        let mut pieces = blob.chunks(1000);
        pieces.try_for_each(|piece| arriving.take(piece))?;
        residents.adopt(key, arriving)
    };
    let adopted = copied((2, 7)).unwrap();
    assert_eq!(adopted.digest(), right);
    assert!(
        residents
            .find((2, 7))
            .is_some_and(|found| Arc::ptr_eq(&found, &adopted))
    );
    let error = copied((2, 8)).unwrap_err().to_string();
    assert!(error.contains("layer 2, expert 8"), "{error}");
    assert_eq!(residents.len(), 1);
}

#[test]
fn what_cannot_be_read_or_has_no_room_is_named_and_takes_no_memory() {
    let checkpoint = checkpoint();
    let residents = Residents::new(checkpoint.clone(), Dtype::Auto, 0);
    let each = load(&residents, &[(1, 0)])[0].bytes();
    // Layer 0 is dense, layer 9 does not exist.
    for (key, says) in [
        ((1, 16), "layer 1, expert 16"),
        ((0, 0), "layer 0"),
        ((9, 0), "layer 9"),
        ((u32::MAX, u32::MAX), "layer 4294967295"),
    ] {
        for error in [
            residents.read(key).unwrap_err(),
            residents.check_room(&[key]).unwrap_err(),
            residents.blob_len(key).unwrap_err(),
        ] {
            assert!(error.to_string().contains(says), "{error}");
        }
    }
    assert!(residents.is_empty());

    let residents = Residents::new(checkpoint, Dtype::Auto, each * 3);
    let held = load(&residents, &[(1, 0), (1, 1)]);
    assert_eq!(residents.free_bytes(), Some(each));
    residents.check_room(&[(1, 2)]).unwrap();
    let error = residents.check_room(&[(1, 2), (1, 3)]).unwrap_err();
    assert!(
        matches!(error, LoadError::Capacity { missing: 2, held, .. } if held == 2 * each),
        "{error}"
    );
    assert!(error.to_string().contains("--capacity"), "{error}");
    drop(held);
    residents.check_room(&[(1, 2), (1, 3)]).unwrap();
}

#[test]
fn a_kept_dtype_is_the_one_asked_for() {
    let checkpoint = checkpoint();
    let bytes = |dtype| {
        let residents = Residents::new(checkpoint.clone(), dtype, 0);
        load(&residents, &[(1, 0)])[0].bytes()
    };
    assert_eq!(bytes(Dtype::F32), 2 * bytes(Dtype::Bf16));
}
