//! The gRPC client side: one endpoint, one model.

use guild_node::channel;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{ModelInfoRequest, ModelInfoResponse};
use tonic::Code;
use tonic::transport::Channel;

use crate::failure::Failure;

/// Largest message taken from a server: prompt log-probabilities of a long
/// prompt come in one.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// A client of `guild.inference.v1` at `endpoint`.
///
/// # Errors
/// `endpoint` is malformed.
pub(crate) fn inference(endpoint: &str) -> Result<InferenceClient<Channel>, Failure> {
    let channel =
        channel::lazy(endpoint).map_err(|error| Failure::usage(format!("--endpoint: {error}")))?;
    Ok(InferenceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// What is being served there.
///
/// # Errors
/// Nothing answers, or what answers is no Guild.
pub(crate) async fn model_info(
    client: &mut InferenceClient<Channel>,
    endpoint: &str,
) -> Result<ModelInfoResponse, Failure> {
    match client.model_info(ModelInfoRequest {}).await {
        Ok(response) => Ok(response.into_inner()),
        Err(status) => {
            let unreachable = status.code() == Code::Unavailable;
            let failure = Failure::from(status);
            Err(if unreachable {
                failure.hint(format!(
                    "is a Guild serving gRPC at {endpoint}? `guild up --model DIR` starts one"
                ))
            } else {
                failure
            })
        }
    }
}
