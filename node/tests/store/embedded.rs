//! The embedded store through kill -9, damage and a second process.

use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use guild_node::store::{ClusterStore, EmbeddedStore, State, StoreError};
use tokio::time::timeout;

use crate::beds::{self, Bed, TTL, candidate};

/// Tells the child process which store to write.
const STORE: &str = "GUILD_TEST_STORE";

/// Not a test of its own: the process that is killed. Leads, writes for ever
/// and says each epoch once it is written.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the tests that kill it"]
async fn writer() {
    let path = std::env::var_os(STORE).unwrap();
    let store = EmbeddedStore::new(Path::new(&path));
    let leadership = store.campaign(&candidate("child"), TTL).await.unwrap();
    let mut epoch = leadership.inherited().map_or(0, |state| state.epoch);
    loop {
        epoch += 1;
        let state = State {
            epoch,
            served: true,
            placement: vec![epoch as u8; (epoch as usize * 997) % 100_000],
        };
        leadership.save(&state).await.unwrap();
        let mut out = std::io::stdout().lock();
        writeln!(out, "\nwritten {epoch}").unwrap();
        out.flush().unwrap();
    }
}

fn spawn_writer(path: &Path) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "embedded::writer", "--nocapture"])
        .env(STORE, path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

/// The epochs that the child has said, up to `n` of them.
fn written(out: &mut impl BufRead, n: usize) -> Option<u64> {
    out.lines()
        .map_while(Result::ok)
        .filter_map(|line| line.strip_prefix("written ")?.parse().ok())
        .take(n)
        .last()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_by_kill_9() {
    let bed = beds::embedded().unwrap();
    let mut last = 0;
    for round in 1..=8 {
        let (mut child, mut out) = spawn_writer(&bed.path());
        let said = written(&mut out, round).unwrap();
        assert!(said > last, "epoch {said} after {last}");
        // At no particular point of a write.
        std::thread::sleep(Duration::from_millis(round as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        last = written(&mut out, usize::MAX).unwrap_or(said);
        let seen = bed.open().observe().await.unwrap();
        let state = seen.state.unwrap();
        assert!(seen.leader.is_none(), "the dead do not lead");
        assert!(state.epoch >= last, "{} of {last}", state.epoch);
        assert!(
            state
                .placement
                .iter()
                .all(|byte| *byte == state.epoch as u8)
        );
        last = state.epoch;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_never_lead_at_once() {
    let bed = beds::embedded().unwrap();
    let (mut child, mut out) = spawn_writer(&bed.path());
    written(&mut out, 1).unwrap();
    let store = bed.open();
    let theirs = store.observe().await.unwrap().leader.unwrap();
    assert_eq!(theirs.candidate.id, "child");
    let me = candidate("parent");
    let early = timeout(Duration::from_millis(500), store.campaign(&me, TTL)).await;
    assert!(early.is_err(), "the child still leads");
    child.kill().unwrap();
    child.wait().unwrap();
    let mine = timeout(2 * TTL, store.campaign(&me, TTL))
        .await
        .unwrap()
        .unwrap();
    assert!(mine.term() > theirs.term);
    assert!(mine.inherited().unwrap().epoch >= 1);
}

async fn with_epoch_5() -> (beds::Embedded, Vec<u8>) {
    let bed = beds::embedded().unwrap();
    let a = bed.open().campaign(&candidate("a"), TTL).await.unwrap();
    let state = State {
        epoch: 5,
        served: true,
        placement: b"where the experts are".to_vec(),
    };
    a.save(&state).await.unwrap();
    a.resign().await;
    let bytes = std::fs::read(bed.path()).unwrap();
    (bed, bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_refused_and_never_read_as_an_older_epoch() {
    let (bed, whole) = with_epoch_5().await;
    let store = bed.open();
    let mut bad: Vec<Vec<u8>> = (0..whole.len()).map(|end| whole[..end].to_vec()).collect();
    bad.extend((0..whole.len() * 8).map(|bit| {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        flipped
    }));
    bad.push([&whole[..], b"\0"].concat());
    bad.push(vec![0; whole.len()]);
    bad.push(vec![0xff; 4 << 20]);
    for (case, bytes) in bad.into_iter().enumerate() {
        std::fs::write(bed.path(), bytes).unwrap();
        let seen = store.observe().await;
        let Err(error @ StoreError::Damaged { .. }) = seen else {
            panic!("case {case}: {seen:?}");
        };
        assert!(error.to_string().contains(bed.path().to_str().unwrap()));
        if case % 97 == 0 {
            let won = store.campaign(&candidate("b"), TTL).await;
            assert!(
                matches!(won, Err(StoreError::Damaged { .. })),
                "case {case}"
            );
        }
    }
    std::fs::write(bed.path(), whole).unwrap();
    let state = store.observe().await.unwrap().state.unwrap();
    assert_eq!(state.epoch, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_cut_off_leaves_the_one_before_it() {
    let (bed, whole) = with_epoch_5().await;
    let next = bed.path().with_extension("next");
    for end in [0, 1, 13, whole.len() / 2, whole.len() - 1] {
        // What a process leaves that dies between opening and renaming.
        std::fs::write(&next, &whole[..end]).unwrap();
        let store = bed.open();
        let b = store.campaign(&candidate("b"), TTL).await.unwrap();
        let inherited = b.inherited().unwrap().clone();
        assert_eq!(inherited.epoch, 5);
        b.save(&inherited).await.unwrap();
        assert_eq!(store.observe().await.unwrap().state, Some(inherited));
        b.resign().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_missing_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::new(folder.path().join("new/deeper/store"));
    let a = store.campaign(&candidate("a"), TTL).await.unwrap();
    a.save(&State::default()).await.unwrap();
    assert_eq!(store.observe().await.unwrap().state, Some(State::default()));
}
