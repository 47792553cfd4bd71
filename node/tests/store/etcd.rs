//! The etcd store through what happens to etcd.

use std::sync::Arc;
use std::time::Duration;

use guild_node::store::{ClusterStore, Leadership, State, StoreError, follow};
use tokio::time::timeout;

use crate::beds::{self, Bed, Etcd, TTL, candidate};

/// More than anything here needs.
const LONG: Duration = Duration::from_secs(60);

fn state(epoch: u64) -> State {
    State {
        epoch,
        ..State::default()
    }
}

async fn lead(store: &Arc<dyn ClusterStore>, id: &str) -> Leadership {
    timeout(LONG, store.campaign(&candidate(id), TTL))
        .await
        .unwrap()
        .unwrap()
}

/// Saves as soon as etcd takes it.
async fn save_at_last(leadership: &Leadership, state: &State) {
    let saved = timeout(LONG, async {
        while let Err(error) = leadership.save(state).await {
            assert!(error.is_retryable(), "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    saved.await.unwrap();
}

#[tokio::test]
async fn a_blocked_worker_does_not_cost_the_lease() {
    let Some(bed) = beds::etcd() else { return };
    let store = bed.open();
    let a = lead(&store, "a").await;
    // The only worker of this runtime.
    std::thread::sleep(2 * TTL);
    assert!(a.holds());
    a.save(&state(1)).await.unwrap();
    let leader = store.observe().await.unwrap().leader.unwrap();
    assert_eq!(leader.term, a.term());
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_that_dies_and_returns_keeps_what_was_written() {
    let Some(mut bed) = beds::etcd() else { return };
    let store = bed.open();
    let a = lead(&store, "a").await;
    a.save(&state(4)).await.unwrap();
    bed.kill(0);
    let refused = a.save(&state(5)).await;
    assert!(
        matches!(
            refused,
            Err(StoreError::Unavailable { .. } | StoreError::Fenced { .. })
        ),
        "{refused:?}"
    );
    assert!(store.observe().await.unwrap_err().is_retryable());
    // Without renewals the leader knows by itself that its time is over.
    let reason = timeout(LONG, a.lost()).await.unwrap();
    assert!(reason.contains("renewed"), "{reason}");
    let refused = a.save(&state(6)).await;
    assert!(
        matches!(refused, Err(StoreError::Fenced { .. })),
        "{refused:?}"
    );

    // A candidate that began while etcd was away wins when it is back.
    let campaign = tokio::spawn({
        let store = Arc::clone(&store);
        async move { lead(&store, "b").await }
    });
    bed.run(0);
    bed.wait_until_up();
    let b = timeout(LONG, campaign).await.unwrap().unwrap();
    assert!(b.term() > a.term());
    assert!(b.inherited().unwrap().epoch >= 4);
    save_at_last(&b, &state(7)).await;
    assert_eq!(store.observe().await.unwrap().state, Some(state(7)));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_members_is_not_missed_and_two_are() {
    let Some(mut bed) = Etcd::start(3) else {
        return;
    };
    let store = bed.open();
    let mut a = lead(&store, "a").await;
    save_at_last(&a, &state(1)).await;
    for (epoch, member) in (2..).zip(0..3) {
        bed.kill(member);
        // etcd itself may need an election, and the lease may not survive it.
        if timeout(LONG, save_or_lose(&a, &state(epoch)))
            .await
            .unwrap()
            .is_err()
        {
            a = lead(&store, "a").await;
            save_at_last(&a, &state(epoch)).await;
        }
        assert_eq!(store.observe().await.unwrap().state, Some(state(epoch)));
        bed.run(member);
        bed.wait_until_up();
    }

    bed.kill(0);
    bed.kill(1);
    timeout(LONG, a.lost()).await.unwrap();
    assert!(store.observe().await.unwrap_err().is_retryable());
    let refused = a.save(&state(9)).await;
    assert!(
        matches!(refused, Err(StoreError::Fenced { .. })),
        "{refused:?}"
    );

    bed.run(0);
    bed.run(1);
    bed.wait_until_up();
    let b = lead(&store, "b").await;
    assert!(b.term() > a.term());
    assert_eq!(b.inherited(), Some(&state(4)));
    save_at_last(&b, &state(10)).await;
}

/// Ok: written. Err: deposed before it could be.
async fn save_or_lose(leadership: &Leadership, state: &State) -> Result<(), ()> {
    loop {
        match leadership.save(state).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_retryable() => {}
            Err(_) => return Err(()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_was_wiped_fences_the_leader_and_is_followed_at_last() {
    let Some(mut bed) = beds::etcd() else { return };
    let store = bed.open();
    let a = lead(&store, "a").await;
    for epoch in 0..20 {
        a.save(&state(epoch)).await.unwrap();
    }
    let mut seen = follow(bed.open(), Duration::from_millis(300));
    let known = seen.wait_for(|seen| seen.as_ref().is_some_and(|s| s.state == Some(state(19))));
    timeout(LONG, known).await.unwrap().unwrap();
    bed.kill(0);
    bed.wipe(0);
    bed.run(0);
    bed.wait_until_up();
    loop {
        match a.save(&state(30)).await {
            Err(error) if error.is_retryable() => {}
            refused => {
                assert!(
                    matches!(refused, Err(StoreError::Fenced { .. })),
                    "{refused:?}"
                );
                break;
            }
        }
    }
    let empty = seen.wait_for(|seen| seen.as_ref().is_some_and(|s| s.state.is_none()));
    timeout(LONG, empty).await.unwrap().unwrap();
    assert_eq!(lead(&store, "b").await.inherited(), None);
}
