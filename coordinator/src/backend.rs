//! The cluster as the front door sees it: which attention node gets a request,
//! and what becomes of the request when that node goes.
//!
//! Secret of this module: that a stream may have had several homes. A stream
//! whose node dies, falls silent or drains away is continued on another one
//! from the tokens that are out, and because a sequence's tokens and
//! log-probabilities depend on nothing but the sequence, its client cannot
//! tell. It uses the membership for who is there and knows nothing of text.
//!
//! - [`nodes`]: who there is to choose from, and what is out at each.
//! - [`prefix`]: the beginnings of prompts by name, so that a node that knows one is found again.
//! - [`record`]: what a stream has been asked and has given; pure.
//! - [`relay`]: the stream itself, from home to home.

mod nodes;
mod prefix;
mod record;
mod relay;

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use guild_node::channel::Dialer;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{AbortRequest, GenerateRequest};
use tokio::time::timeout;
use tonic::Status;

use crate::front::{Backend, EventStream, Readiness};
use crate::state::ClusterState;
use nodes::Nodes;
use record::Record;
use relay::Relay;

/// How long attention nodes may take to say whether they have a request that is to end.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

/// The attention nodes behind the front door.
pub(crate) struct AttentionNodes {
    nodes: Arc<Nodes>,
    /// The tokens that end an output by themselves.
    eos: Arc<[u32]>,
    /// How long a stream without a node may wait for one.
    patience: Duration,
}

impl AttentionNodes {
    /// `eos` are the model's end tokens; a stream that has lost its node waits
    /// up to `patience` for another.
    pub(crate) fn new(
        state: Arc<ClusterState>,
        dialer: Dialer,
        eos: &[u32],
        patience: Duration,
    ) -> Self {
        AttentionNodes {
            nodes: Arc::new(Nodes::new(state, dialer)),
            eos: eos.into(),
            patience,
        }
    }
}

impl Backend for AttentionNodes {
    fn readiness(&self) -> Readiness {
        match self.nodes.waiting_for() {
            None => Readiness::Ready,
            Some(reason) => Readiness::NotReady { reason },
        }
    }

    fn generate(
        &self,
        request: GenerateRequest,
    ) -> BoxFuture<'static, Result<EventStream, Status>> {
        let record = Record::new(request, &self.eos);
        // Shared, because the request outlives the call.
        Relay::open(Arc::clone(&self.nodes), record, self.patience).boxed()
    }

    fn abort(&self, request: AbortRequest) -> BoxFuture<'static, u32> {
        let asking = self.nodes.all().into_iter().map(move |channel| {
            let (mut client, request) = (InferenceClient::new(channel), request.clone());
            async move {
                let answer = timeout(ABORT_LIMIT, client.abort(request)).await;
                // A node that cannot be asked ends nothing, and is soon nobody's.
                answer.map_or(0, |answer| {
                    answer.map_or(0, |found| found.get_ref().aborted)
                })
            }
        });
        join_all(asking)
            .map(|found| found.into_iter().fold(0, u32::saturating_add))
            .boxed()
    }
}
