//! `guild.inference.v1` at the front door: text and token ids.

use std::{sync::Arc, time::Instant};

use guild_node::call;
use guild_proto::inference::v1::{
    AbortRequest, AbortResponse, GenerateRequest, ModelInfoRequest, ModelInfoResponse,
    SamplingParams, generate_request::Input, inference_server::Inference,
};
use tonic::{Request, Response, Status};

use super::{
    EventStream, FrontDoor, auth,
    fault::Fault,
    request::{Handling, Names, Params, Prompt},
    tenant,
};

/// Bytes of a client's request id at most.
pub const MAX_REQUEST_ID_BYTES: usize = 128;

/// The service, for `InferenceServer`.
#[derive(Clone)]
pub struct InferenceService(pub(super) Arc<FrontDoor>);

/// Unset parameters take the defaults that the schema names.
fn params(sampling: SamplingParams, handling: Handling) -> Params {
    Params {
        max_tokens: sampling.max_tokens,
        default_max_tokens: None,
        temperature: sampling.temperature.unwrap_or(0.0),
        top_p: sampling.top_p.unwrap_or(1.0),
        top_k: sampling.top_k.unwrap_or(0),
        min_p: sampling.min_p.unwrap_or(0.0),
        repetition_penalty: sampling.repetition_penalty.unwrap_or(1.0),
        presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
        frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
        logit_bias: sampling.logit_bias,
        seed: sampling.seed,
        stop: sampling.stop,
        stop_token_ids: sampling.stop_token_ids,
        ignore_eos: sampling.ignore_eos,
        min_tokens: sampling.min_tokens.unwrap_or(0),
        logprobs: sampling.logprobs,
        prompt_logprobs: sampling.prompt_logprobs,
        skip_special_tokens: true,
        kept_tokens: Vec::new(),
        constraint: sampling.constraint,
        handling,
    }
}

impl FrontDoor {
    async fn generate(
        &self,
        request: GenerateRequest,
        timeout_ms: Option<u32>,
        key: Option<&[u8]>,
    ) -> Result<(String, EventStream), Fault> {
        let received = Instant::now();
        self.check_model(&request.model)?;
        let (field, prompt) = match request.input {
            Some(Input::Text(text)) => ("text", Prompt::Text(text)),
            Some(Input::TokenIds(ids)) => ("token_ids", Prompt::Ids(ids.ids)),
            None => return Err(Fault::missing("input", "`text` or `token_ids`")),
        };
        let names = Names {
            prompt: field,
            max_tokens: "max_tokens",
            logprobs: "logprobs",
            constraint: "",
            prefix: "sampling.",
        };
        let mut id = request.request_id;
        if id.len() > MAX_REQUEST_ID_BYTES {
            return Err(Fault::invalid(
                "request_id",
                format!("more than {MAX_REQUEST_ID_BYTES} bytes"),
            ));
        }
        if id.is_empty() {
            id = format!("gen-{}", uuid::Uuid::new_v4().simple());
        }
        let handling = Handling {
            received,
            priority: request.priority,
            tenant: tenant::of_number(key, request.tenant),
            owner: tenant::of(key, None, None),
            timeout_ms,
            max_queue_ms: request.max_queue_ms,
            timing: request.timing,
        };
        let params = params(request.sampling.unwrap_or_default(), handling);
        if params.max_tokens == Some(0) {
            return Err(Fault::invalid(
                "sampling.max_tokens",
                "at least 1 token is generated",
            ));
        }
        params.check(&self.model, &names)?;
        let permits = self.admit(1)?;
        let ids = self.tokenize(vec![prompt], &params, &names).await?;
        let mut streams = self.open(ids, 1, &params, &names, &id, permits).await?;
        match streams.pop() {
            Some(stream) => Ok((id, stream)),
            None => Err(Fault::internal("no stream for the request")),
        }
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let timeout_ms = call::shorter(request.timeout_ms, &metadata);
        let headers = metadata.into_headers();
        let key = auth::key(&headers);
        let (id, stream) = self.0.generate(request, timeout_ms, key).await?;
        let mut response = Response::new(stream);
        call::name(response.metadata_mut(), &id);
        Ok(response)
    }

    async fn abort(
        &self,
        request: Request<AbortRequest>,
    ) -> Result<Response<AbortResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let headers = metadata.into_headers();
        let owner = tenant::of(auth::key(&headers), None, None);
        let here = self.0.calls.end(owner, &request.request_id);
        let aborted = match u32::try_from(here).unwrap_or(u32::MAX) {
            // Another front door may have it.
            0 => {
                self.0
                    .backend
                    .abort(AbortRequest { owner, ..request })
                    .await
            }
            here => here,
        };
        Ok(Response::new(AbortResponse { aborted }))
    }

    async fn model_info(
        &self,
        _: Request<ModelInfoRequest>,
    ) -> Result<Response<ModelInfoResponse>, Status> {
        let model = &self.0.model;
        Ok(Response::new(ModelInfoResponse {
            model: model.name.clone(),
            model_type: model.config.model_type.clone(),
            digest: model.digest.clone(),
            vocab_size: model.config.vocab_size as u32,
            max_context: model.max_context,
            has_tokenizer: model.text.is_some(),
            has_chat_template: model.text.as_ref().is_some_and(|t| t.has_template()),
            eos_token_ids: model.config.eos_token_ids.clone(),
            bos_token_id: model.config.bos_token_id,
        }))
    }
}
