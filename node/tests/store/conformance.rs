//! What every backend must do.

use std::sync::Arc;
use std::time::Duration;

use guild_node::store::{
    ClusterStore, Leadership, MAX_PLACEMENT_BYTES, Observation, State, StoreError, follow,
};
use tokio::time::timeout;

use crate::beds::{self, Bed, TTL, candidate};

/// Within this time a new leader has to be there.
const TAKEOVER: Duration = TTL.saturating_mul(2);
/// More than anything here needs.
const LONG: Duration = Duration::from_secs(30);

fn state(epoch: u64) -> State {
    State {
        epoch,
        served: true,
        placement: vec![7; 100],
    }
}

async fn lead(store: &Arc<dyn ClusterStore>, id: &str) -> Leadership {
    timeout(LONG, store.campaign(&candidate(id), TTL))
        .await
        .unwrap()
        .unwrap()
}

/// Candidate `b` begins, and does not win.
async fn begin_in_vain(
    store: &Arc<dyn ClusterStore>,
) -> tokio::task::JoinHandle<Result<Leadership, StoreError>> {
    let store = Arc::clone(store);
    let mut campaign = tokio::spawn(async move { store.campaign(&candidate("b"), TTL).await });
    let early = timeout(TTL / 2, &mut campaign).await;
    assert!(early.is_err(), "a second leader: {early:?}");
    campaign
}

async fn one_of_two_leads_and_the_other_follows_it(bed: &dyn Bed) {
    let (one, two) = (bed.open(), bed.open());
    let before = one.observe().await.unwrap();
    assert_eq!((before.leader, before.state), (None, None));
    let a = lead(&one, "a").await;
    assert_eq!(a.inherited(), None);
    let b = begin_in_vain(&two).await;
    let seen = two.observe().await.unwrap();
    assert!(seen.revision > before.revision);
    let leader = seen.leader.unwrap();
    assert_eq!(leader.candidate, candidate("a"));
    assert_eq!(leader.term, a.term());
    assert!(a.holds());

    let first = a.term();
    a.resign().await;
    let b = timeout(TAKEOVER, b).await.unwrap().unwrap().unwrap();
    assert!(b.term() > first, "{} after {first}", b.term());
    let leader = one.observe().await.unwrap().leader.unwrap();
    assert_eq!(leader.candidate, candidate("b"));
}

async fn a_leader_that_falls_silent_is_followed_by_another(bed: &dyn Bed) {
    let (one, two) = (bed.open(), bed.open());
    let a = lead(&one, "a").await;
    a.save(&state(3)).await.unwrap();
    let b = begin_in_vain(&two).await;
    let first = a.term();
    drop(a);
    let b = timeout(TAKEOVER, b).await.unwrap().unwrap().unwrap();
    assert!(b.term() > first);
    assert_eq!(b.inherited(), Some(&state(3)));
}

async fn a_deposed_leader_cannot_write(bed: &dyn Bed) {
    let (one, two) = (bed.open(), bed.open());
    let a = lead(&one, "a").await;
    a.save(&state(5)).await.unwrap();
    bed.depose().await;
    let b = lead(&two, "b").await;
    assert!(b.term() > a.term());
    let refused = a.save(&state(6)).await;
    assert!(
        matches!(refused, Err(StoreError::Fenced { term, .. }) if term == a.term()),
        "{refused:?}"
    );
    timeout(LONG, a.lost()).await.unwrap();
    assert!(!a.holds());
    assert_eq!(one.observe().await.unwrap().state, Some(state(5)));

    b.save(&state(7)).await.unwrap();
    let refused = a.save(&state(8)).await;
    assert!(
        matches!(refused, Err(StoreError::Fenced { .. })),
        "{refused:?}"
    );
    // The end of the old leader is not the end of the new one.
    a.resign().await;
    let seen = one.observe().await.unwrap();
    assert_eq!(seen.state, Some(state(7)));
    assert_eq!(seen.leader.unwrap().term, b.term());
    b.save(&state(9)).await.unwrap();
}

async fn epochs_only_grow_from_leader_to_leader(bed: &dyn Bed) {
    let a = lead(&bed.open(), "a").await;
    let first = a.save(&state(5)).await.unwrap();
    let same = a.save(&state(5)).await.unwrap();
    assert!(same >= first);
    let refused = a.save(&state(4)).await;
    assert!(
        matches!(refused, Err(StoreError::Refused { field: "epoch", .. })),
        "{refused:?}"
    );
    a.resign().await;

    let store = bed.open();
    let b = lead(&store, "b").await;
    assert_eq!(b.inherited(), Some(&state(5)));
    let refused = b.save(&state(4)).await;
    assert!(
        matches!(refused, Err(StoreError::Refused { field: "epoch", .. })),
        "{refused:?}"
    );
    let second = b.save(&state(6)).await.unwrap();
    assert!(second > first);
    assert_eq!(store.observe().await.unwrap().state, Some(state(6)));
}

async fn many_candidates_lead_one_after_the_other(bed: &dyn Bed) {
    let mut tasks = tokio::task::JoinSet::new();
    for id in 0..6 {
        let store = bed.open();
        tasks.spawn(async move {
            let leadership = lead(&store, &format!("c{id}")).await;
            let epoch = leadership.inherited().map_or(0, |state| state.epoch) + 1;
            leadership.save(&state(epoch)).await.unwrap();
            let term = leadership.term();
            leadership.resign().await;
            (epoch, term)
        });
    }
    let mut reigns = tasks.join_all().await;
    reigns.sort_unstable();
    let epochs: Vec<u64> = reigns.iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(epochs, [1, 2, 3, 4, 5, 6], "nobody's write was lost");
    assert!(reigns.is_sorted_by(|a, b| a.1 < b.1), "{reigns:?}");
}

async fn followers_see_leaders_come_and_go(bed: &dyn Bed) {
    let mut seen = follow(bed.open(), Duration::from_millis(500));
    let mut until = async |what: &str, wanted: &dyn Fn(&Observation) -> bool| {
        let wait = seen.wait_for(|seen| seen.as_ref().is_some_and(wanted));
        let seen = timeout(LONG, wait).await;
        assert!(seen.is_ok_and(|seen| seen.is_ok()), "never saw {what}");
    };
    until("nobody", &|seen| seen.leader.is_none()).await;
    let a = lead(&bed.open(), "a").await;
    until("the leader", &|seen| {
        seen.leader.as_ref().is_some_and(|l| l.candidate.id == "a")
    })
    .await;
    a.save(&state(11)).await.unwrap();
    until("its state", &|seen| seen.state == Some(state(11))).await;
    a.resign().await;
    until("its end", &|seen| {
        seen.leader.is_none() && seen.state == Some(state(11))
    })
    .await;
}

async fn what_no_backend_can_keep_is_refused(bed: &dyn Bed) {
    let store = bed.open();
    let a = lead(&store, "a").await;
    let mut large = state(1);
    large.placement = vec![0xa5; MAX_PLACEMENT_BYTES];
    a.save(&large).await.unwrap();
    assert_eq!(store.observe().await.unwrap().state, Some(large.clone()));
    large.placement.push(0);
    let refused = a.save(&large).await;
    assert!(matches!(
        refused,
        Err(StoreError::Refused {
            field: "placement",
            ..
        })
    ));
    a.resign().await;
    for id in [String::new(), "x".repeat(2000)] {
        let refused = store.campaign(&candidate(&id), TTL).await;
        assert!(matches!(
            refused,
            Err(StoreError::Refused { field: "id", .. })
        ));
    }
}

macro_rules! conforms {
    ($bed:ident: $($case:ident),* $(,)?) => {
        mod $bed {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    if let Some(bed) = super::beds::$bed() {
                        super::$case(&bed).await;
                    }
                }
            )*
        }
    };
    ($($bed:ident),*) => {
        $(conforms!($bed:
            one_of_two_leads_and_the_other_follows_it,
            a_leader_that_falls_silent_is_followed_by_another,
            a_deposed_leader_cannot_write,
            epochs_only_grow_from_leader_to_leader,
            many_candidates_lead_one_after_the_other,
            followers_see_leaders_come_and_go,
            what_no_backend_can_keep_is_refused,
        );)*
    };
}

conforms!(memory, embedded, etcd);
