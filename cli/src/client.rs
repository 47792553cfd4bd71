//! The gRPC client side: one endpoint, one model.

use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{ModelInfoRequest, ModelInfoResponse};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::args::Access;
use crate::failure::Failure;
use crate::security::dialer;

/// Largest message taken from a server: prompt log-probabilities of a long
/// prompt come in one.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// A client that shows a key with every call.
pub(crate) type Client = InferenceClient<InterceptedService<Channel, Bearer>>;

/// The key, if there is one.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// A client of `guild.inference.v1` at `endpoint`.
///
/// # Errors
/// `endpoint`, the key or the CA is malformed.
pub(crate) fn inference(endpoint: &str, access: &Access) -> Result<Client, Failure> {
    let channel = dialer(access, endpoint)?
        .lazy(endpoint)
        .map_err(|error| Failure::usage(format!("--endpoint: {error}")))?;
    let bearer = match &access.api_key {
        None => None,
        Some(key) => Some(format!("Bearer {key}").parse().map_err(|_| {
            Failure::usage("--api-key: a key has no blanks, line ends or letters beyond ASCII")
        })?),
    };
    Ok(InferenceClient::with_interceptor(channel, Bearer(bearer))
        .max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// What is being served there.
///
/// # Errors
/// Nothing answers, or what answers is no Guild.
pub(crate) async fn model_info(
    client: &mut Client,
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
