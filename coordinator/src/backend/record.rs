//! What a stream has been asked for and what it has given so far: all that a
//! node needs to go on with it, and all that its client must not get twice.
//!
//! A sequence's next token is a function of its tokens, its sampling parameters
//! and the token's position in the whole sequence, however much of it is called
//! prompt. So the request that continues a stream has the tokens that are out
//! behind its prompt, says how many they are, for penalties, and only what counts
//! tokens of output is less by them.

use guild_proto::inference::v1::complete::MatchedStop;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::{
    Complete, FinishReason, GenerateRequest, GenerateResponse, TokenIds, Usage,
};

/// The state of one stream, apart from where it runs.
#[derive(Debug)]
pub(super) struct Record {
    /// As it came, but for its input.
    request: GenerateRequest,
    /// Tokens of the prompt, then those of the output that have been passed on.
    tokens: Vec<u32>,
    /// How many of them are the prompt.
    prompt: usize,
    /// Tokens that end the output.
    enders: Vec<u32>,
    /// The client has had the Prompt event.
    prompt_told: bool,
}

impl Record {
    /// A stream that nothing has come of yet. `eos` ends it unless the request
    /// says otherwise.
    pub(super) fn new(mut request: GenerateRequest, eos: &[u32]) -> Record {
        // Nobody outside says where prompts are run.
        request.prefill_from.clear();
        let tokens = match request.input.take() {
            Some(Input::TokenIds(tokens)) => tokens.ids,
            _ => Vec::new(),
        };
        let sampling = request.sampling.get_or_insert_default();
        let mut enders = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            enders.extend_from_slice(eos);
        }
        Record {
            prompt: tokens.len(),
            tokens,
            enders,
            prompt_told: false,
            request,
        }
    }

    /// The request's id.
    pub(super) fn id(&self) -> &str {
        &self.request.request_id
    }

    /// Who asks.
    pub(super) fn tenant(&self) -> u64 {
        self.request.tenant
    }

    /// All tokens so far: the next node's prompt.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of output so far.
    pub(super) fn emitted(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Tokens that a node has to run for the rest of the stream: all there are,
    /// and those to come.
    pub(super) fn to_run(&self) -> usize {
        self.tokens.len().saturating_add(self.to_come())
    }

    /// Tokens of output that may still come.
    pub(super) fn to_come(&self) -> usize {
        let most = self.sampling_max().unwrap_or(0);
        most.saturating_sub(self.emitted())
    }

    /// Whether another node may run the prompt of the node that decodes: rows of
    /// others have no logits.
    pub(super) fn may_be_paired(&self) -> bool {
        let sampling = self.request.sampling.as_ref();
        let scores = sampling.is_some_and(|s| s.prompt_logprobs.is_some());
        self.prompt_told || !scores
    }

    /// The request for what is still to come.
    pub(super) fn request(&self) -> GenerateRequest {
        let mut request = self.request.clone();
        let ids = self.tokens.clone();
        request.input = Some(Input::TokenIds(TokenIds { ids }));
        request.output_tokens = u32::try_from(self.emitted()).unwrap_or(u32::MAX);
        if let Some(sampling) = &mut request.sampling {
            let emitted = u32::try_from(self.emitted()).unwrap_or(u32::MAX);
            let less = |count: &mut u32| *count = count.saturating_sub(emitted);
            sampling.max_tokens.as_mut().map(less);
            sampling.min_tokens.as_mut().map(less);
            if self.prompt_told {
                sampling.prompt_logprobs = None;
            }
        }
        request
    }

    /// Notes an event from the node; returns it as the client is to see it, or
    /// None when the client has had it.
    pub(super) fn take(&mut self, mut response: GenerateResponse) -> Option<GenerateResponse> {
        match &mut response.event {
            Some(Event::Prompt(_)) if self.prompt_told => return None,
            Some(Event::Prompt(_)) => self.prompt_told = true,
            Some(Event::Chunk(chunk)) => self.tokens.extend_from_slice(&chunk.token_ids),
            // The node counts from where it took over.
            Some(Event::Complete(complete)) => {
                let said = complete.usage.take().unwrap_or_default();
                let usage = self.usage();
                complete.usage = Some(Usage {
                    // Of a continued stream the node's prompt is more than the client's.
                    cached_tokens: said.cached_tokens.min(usage.prompt_tokens),
                    drafted_tokens: said.drafted_tokens,
                    accepted_tokens: said.accepted_tokens,
                    ..usage
                });
            }
            None => {}
        }
        Some(response)
    }

    /// The Complete event, when all else is out already: nothing must be asked
    /// for then.
    pub(super) fn end(&self) -> Option<GenerateResponse> {
        if !self.prompt_told {
            return None;
        }
        let last = self.tokens[self.prompt..].last();
        if let Some(&token) = last.filter(|token| self.enders.contains(token)) {
            return Some(self.complete(FinishReason::Stop, Some(token)));
        }
        let out = self
            .sampling_max()
            .is_some_and(|most| self.emitted() >= most);
        out.then(|| self.cut_short())
    }

    /// The Complete event of an output that no node has room to go on with.
    pub(super) fn cut_short(&self) -> GenerateResponse {
        self.complete(FinishReason::Length, None)
    }

    fn complete(&self, reason: FinishReason, stop: Option<u32>) -> GenerateResponse {
        GenerateResponse {
            event: Some(Event::Complete(Complete {
                finish_reason: reason.into(),
                matched_stop: stop.map(MatchedStop::StopTokenId),
                usage: Some(self.usage()),
            })),
        }
    }

    fn usage(&self) -> Usage {
        let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        Usage {
            prompt_tokens: count(self.prompt),
            completion_tokens: count(self.emitted()),
            ..Usage::default()
        }
    }

    fn sampling_max(&self) -> Option<usize> {
        let sampling = self.request.sampling.as_ref()?;
        sampling.max_tokens.map(|most| most as usize)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use guild_proto::inference::v1::{Chunk, Prompt, SamplingParams};

    use super::*;

    const EOS: u32 = 1;

    fn record(sampling: SamplingParams) -> Record {
        let request = GenerateRequest {
            request_id: "r".into(),
            input: Some(Input::TokenIds(TokenIds { ids: vec![10, 11] })),
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        Record::new(request, &[EOS])
    }

    fn event(event: Event) -> GenerateResponse {
        GenerateResponse { event: Some(event) }
    }

    fn prompt() -> GenerateResponse {
        event(Event::Prompt(Prompt::default()))
    }

    fn chunk(ids: &[u32]) -> GenerateResponse {
        event(Event::Chunk(Chunk {
            token_ids: ids.to_vec(),
            ..Chunk::default()
        }))
    }

    fn complete_of(response: GenerateResponse) -> Complete {
        match response.event {
            Some(Event::Complete(complete)) => complete,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_continues_a_stream_asks_for_the_rest_and_nothing_twice() {
        let sampling = SamplingParams {
            max_tokens: Some(5),
            min_tokens: Some(2),
            seed: Some(7),
            temperature: Some(0.5),
            logprobs: Some(3),
            prompt_logprobs: Some(4),
            stop_token_ids: vec![9],
            ..SamplingParams::default()
        };
        let mut record = record(sampling.clone());
        let ids = |request: &GenerateRequest| match &request.input {
            Some(Input::TokenIds(tokens)) => tokens.ids.clone(),
            other => panic!("{other:?}"),
        };
        let first = record.request();
        assert_eq!(
            (ids(&first), first.sampling),
            (vec![10, 11], Some(sampling.clone()))
        );
        assert_eq!((record.to_run(), record.to_come()), (7, 5));

        assert!(record.take(prompt()).is_some());
        let after_prompt = SamplingParams {
            prompt_logprobs: None,
            ..sampling
        };
        let again = record.request();
        assert_eq!(
            (ids(&again), again.sampling),
            (vec![10, 11], Some(after_prompt.clone()))
        );

        for (out, min_tokens, max_tokens) in [(20, 1, 4), (21, 0, 3), (22, 0, 2)] {
            assert!(record.take(chunk(&[out])).is_some());
            assert!(record.take(prompt()).is_none(), "one Prompt is enough");
            let expected = SamplingParams {
                min_tokens: Some(min_tokens),
                max_tokens: Some(max_tokens),
                ..after_prompt.clone()
            };
            assert_eq!(record.request().sampling, Some(expected));
        }
        assert_eq!(ids(&record.request()), [10, 11, 20, 21, 22]);
        assert_eq!(record.request().output_tokens, 3);
        assert_eq!(
            (record.request().request_id.as_str(), record.id()),
            ("r", "r")
        );
        assert_eq!((record.to_run(), record.to_come()), (7, 2));
        assert!(record.end().is_none());
    }

    #[test]
    fn usage_is_that_of_the_whole_stream() {
        let mut record = record(SamplingParams::default());
        record.take(prompt());
        record.take(chunk(&[3, 4, 5]));
        let said = event(Event::Complete(Complete {
            usage: Some(Usage {
                prompt_tokens: 4,
                completion_tokens: 1,
                cached_tokens: 3,
                ..Usage::default()
            }),
            ..Complete::default()
        }));
        let usage = complete_of(record.take(said).unwrap()).usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (2, 3));
        assert_eq!(
            usage.cached_tokens, 2,
            "never more than the client's prompt"
        );
    }

    #[test]
    fn an_output_that_is_all_out_ends_without_a_node() {
        let params = |ignore_eos| SamplingParams {
            max_tokens: Some(3),
            ignore_eos,
            stop_token_ids: vec![9],
            ..SamplingParams::default()
        };
        let stopped = |ignore_eos, tokens: &[u32]| {
            let mut record = record(params(ignore_eos));
            assert!(record.end().is_none());
            record.take(prompt());
            record.take(chunk(tokens));
            let complete = complete_of(record.end()?);
            assert_eq!(
                complete.usage.as_ref().unwrap().completion_tokens as usize,
                tokens.len()
            );
            Some((complete.finish_reason(), complete.matched_stop))
        };
        let stop = |token| Some((FinishReason::Stop, Some(MatchedStop::StopTokenId(token))));
        let length = Some((FinishReason::Length, None));
        assert_eq!(stopped(false, &[5, EOS]), stop(EOS));
        assert_eq!(stopped(false, &[5, 9]), stop(9));
        assert_eq!(stopped(true, &[5, EOS]), None);
        assert_eq!(stopped(false, &[5, 6]), None);
        assert_eq!(stopped(false, &[5, 6, 7]), length);
        // As at the node: a stop token in the last place is a stop.
        assert_eq!(stopped(false, &[5, 6, EOS]), stop(EOS));
        assert_eq!(stopped(true, &[5, 6, EOS]), length);
    }

    #[test]
    fn a_prompt_alone_ends_once_it_is_told() {
        let mut record = record(SamplingParams {
            max_tokens: Some(0),
            ..SamplingParams::default()
        });
        assert!(record.end().is_none());
        record.take(prompt());
        let complete = complete_of(record.end().unwrap());
        assert_eq!(complete.finish_reason(), FinishReason::Length);
    }
}
