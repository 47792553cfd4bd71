//! guild.pages.v1 at an attention node: prompts that are run for another one, and requests whose prompts
//! another one runs.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use guild_model::sampler::{Sampling, Shaping};
use guild_node::metrics::Page;
use guild_node::status;
use guild_proto::cluster::v1::Duty;
use guild_proto::pages::v1::pages_server::Pages;
use guild_proto::pages::v1::{PageFrame, PrefillRequest};
use tonic::codegen::BoxStream;
use tonic::{Code, Request as Call, Response, Status};

use super::{Inference, failed, in_vocabulary, output_room, refused};
use crate::desk::{EngineHandle, SubmitError};
use crate::pages::{Fetching, agree, give, told};
use crate::sequence::{Constraint, Events, Request};

/// ErrorInfo reason: this node runs no prompts for others.
const REASON_DUTY: &str = "NO_PREFILL_HERE";

impl Inference {
    /// Hands a request in, with another node to run its prompt if `from` names one.
    pub(super) fn submit(
        &self,
        (engine, digest): (EngineHandle, String),
        request: Request,
        constraint: Option<Box<dyn Constraint>>,
        from: String,
    ) -> Result<Events, SubmitError> {
        // Rows that others have run have no logits.
        let helpers = self.helpers.as_ref();
        let helpers = helpers.filter(|_| !from.is_empty() && request.prompt_logprobs.is_none());
        let Some(helpers) = helpers else {
            return engine.submit_constrained(request, constraint);
        };
        let fetching = Fetching {
            from,
            digest,
            prompt: request.prompt.clone(),
            tenant: request.tenant,
            priority: request.priority,
            timeout: request.timeout,
            row_cost: engine.row_cost(),
            step_rows: engine.limits().max_step_tokens,
        };
        let (events, arriving) = engine.submit_arriving(request, constraint)?;
        if arriving.known < arriving.keys.len() {
            let helpers = Arc::clone(helpers);
            tokio::spawn(async move { helpers.fetch(fetching, arriving).await });
        }
        Ok(events)
    }

    /// What this node says to Prometheus.
    pub(crate) fn page(&self) -> Page {
        let helpers = self.helpers.as_ref();
        self.meter
            .page(&self.model, helpers.map(|helpers| helpers.counters()))
    }

    /// Writes a line about prompts that others have run, if there were any.
    pub(crate) fn log(&self) {
        if let Some(helpers) = &self.helpers {
            helpers.counters().log();
        }
    }
}

#[tonic::async_trait]
impl Pages for Inference {
    async fn prefill(
        &self,
        call: Call<PrefillRequest>,
    ) -> Result<Response<BoxStream<PageFrame>>, Status> {
        let (engine, digest) = self.engine()?;
        let limits = engine.limits();
        let none = |why: &str| {
            let text = format!("{why}, so this node runs no prompts for others");
            status::with_reason(Code::FailedPrecondition, REASON_DUTY, text, [])
        };
        let Some(helpers) = &self.helpers else {
            return Err(none("it belongs to no others"));
        };
        if self.duty == Duty::Decode {
            return Err(none("its role is decode"));
        }
        if !limits.prefix_cache {
            return Err(none("it has --no-prefix-cache"));
        }
        let call = call.into_inner();
        let form = engine.form();
        let theirs = call.form.unwrap_or_default();
        agree(
            &told(&form, form.drafts, &digest, helpers.numerics()),
            &theirs,
        )?;
        in_vocabulary(&self.config, "token_ids", &call.token_ids)?;
        let prompt = call.token_ids;
        let pages = prompt.len().saturating_sub(1) / form.page_tokens;
        let first = call.first_page as usize;
        if first >= pages {
            let text = format!("the prompt has {pages} full pages before its last token");
            return Err(status::invalid("first_page", text));
        }
        output_room(&limits, prompt.len(), Some(0))?;
        let request = Request {
            prompt,
            max_tokens: 0,
            sampling: Sampling::GREEDY,
            shaping: Shaping::default(),
            output_before: 0,
            stop_tokens: Vec::new(),
            min_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
            priority: call.priority,
            tenant: call.tenant,
            timeout: call.timeout_ms.map(|n| Duration::from_millis(n.into())),
            max_queue: None,
        };
        let handed = engine.submit_leaving(request, theirs.drafts, first);
        let (events, leaving) = handed.map_err(refused)?;
        let frames = give(theirs, engine, leaving, events, failed);
        Ok(Response::new(frames.boxed()))
    }
}
