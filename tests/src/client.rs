//! The gRPC client of `guild.inference.v1`, and answers that compare bit for bit.

use futures::future::join_all;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::{
    FinishReason, GenerateRequest, SamplingParams, TokenIds, TokenLogprobs,
};
use tonic::Status;

use crate::certs::Door;

/// A whole answer. Floats are kept as bits: equality here is bit equality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Output tokens.
    pub token_ids: Vec<u32>,
    /// Text, when the server has a tokenizer.
    pub text: String,
    /// Of each output token.
    pub logprobs: Vec<Logprobs>,
    /// Of each prompt token from the second on.
    pub prompt_logprobs: Vec<Logprobs>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// Log-probabilities at one position, as bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logprobs {
    /// Token there.
    pub token: u32,
    /// Its log-probability, f32 bits.
    pub logprob: u32,
    /// Best alternatives: (token, f32 bits).
    pub top: Vec<(u32, u32)>,
}

impl From<TokenLogprobs> for Logprobs {
    fn from(l: TokenLogprobs) -> Self {
        Logprobs {
            token: l.token_id,
            logprob: l.logprob.to_bits(),
            top: l
                .top
                .into_iter()
                .map(|t| (t.token_id, t.logprob.to_bits()))
                .collect(),
        }
    }
}

/// A request by token ids.
pub fn request(prompt: &[u32], sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::TokenIds(TokenIds {
            ids: prompt.to_vec(),
        })),
        sampling: Some(sampling),
        ..Default::default()
    }
}

/// Greedy, EOS ignored, with `top` alternatives at every output and prompt position.
pub fn greedy(max_tokens: u32, top: u32) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ignore_eos: true,
        logprobs: Some(top),
        prompt_logprobs: Some(top),
        ..Default::default()
    }
}

/// Sends one request and collects its answer.
///
/// # Errors
/// The server's status.
pub async fn generate(door: impl Into<Door>, request: GenerateRequest) -> Result<Answer, Status> {
    let mut client = door.into().inference().await?;
    let mut stream = client.generate(request).await?.into_inner();
    let mut answer = Answer {
        token_ids: vec![],
        text: String::new(),
        logprobs: vec![],
        prompt_logprobs: vec![],
        finish: FinishReason::Unspecified,
    };
    while let Some(response) = stream.message().await? {
        match response.event.expect("every response carries an event") {
            Event::Prompt(prompt) => answer
                .prompt_logprobs
                .extend(prompt.logprobs.into_iter().map(Logprobs::from)),
            Event::Chunk(chunk) => {
                answer.token_ids.extend(chunk.token_ids);
                answer.text.push_str(&chunk.text);
                answer
                    .logprobs
                    .extend(chunk.logprobs.into_iter().map(Logprobs::from));
            }
            Event::Complete(complete) => answer.finish = complete.finish_reason(),
        }
    }
    assert_ne!(
        answer.finish,
        FinishReason::Unspecified,
        "a stream ends with Complete"
    );
    Ok(answer)
}

/// Sends all requests at once.
pub async fn generate_all(door: impl Into<Door>, requests: &[GenerateRequest]) -> Vec<Answer> {
    let door = door.into();
    join_all(requests.iter().map(|r| generate(&door, r.clone())))
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

/// Sends the requests one after the other, each alone in the cluster.
pub async fn generate_each(door: impl Into<Door>, requests: &[GenerateRequest]) -> Vec<Answer> {
    let door = door.into();
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        answers.push(generate(&door, request.clone()).await.unwrap());
    }
    answers
}

/// Sixteen requests unlike each other: prompt lengths from 1 to 120, greedy and sampled, long and short.
pub fn mixed_workload(vocab: u32) -> Vec<GenerateRequest> {
    (0..16u32)
        .map(|i| {
            let length = [1, 2, 3, 5, 8, 13, 17, 21, 33, 40, 55, 64, 70, 89, 100, 120][i as usize];
            let prompt: Vec<u32> = (0..length)
                .map(|p| 3 + (p * 7919 + i * 104_729 + p * p * 31) % (vocab - 3))
                .collect();
            let mut sampling = greedy(8 + i % 9, 3);
            if i % 2 == 1 {
                sampling.temperature = Some(0.7 + 0.1 * (i % 5) as f32);
                sampling.top_p = Some(0.95);
                sampling.top_k = Some(if i % 4 == 1 { 40 } else { 0 });
                sampling.seed = Some(1_000 + u64::from(i));
            }
            request(&prompt, sampling)
        })
        .collect()
}
