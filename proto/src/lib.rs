//! The wire contract of a Guild cluster.
//!
//! Secret of this room: the bytes that processes exchange. It holds the
//! protobuf schemas, the types generated from them and the conversions that
//! check what has come in. It uses nothing of ours and knows neither sockets
//! nor the model: a frame is well formed or it is not, here and nowhere else.

#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all)]
mod generated {
    pub mod inference {
        pub mod v1 {
            tonic::include_proto!("guild.inference.v1");
        }
    }
    pub mod cluster {
        pub mod v1 {
            tonic::include_proto!("guild.cluster.v1");
        }
    }
    pub mod experts {
        pub mod v1 {
            tonic::include_proto!("guild.experts.v1");
        }
    }
    pub mod pages {
        pub mod v1 {
            tonic::include_proto!("guild.pages.v1");
        }
    }
}

pub mod crc;
pub mod frame;
pub mod limits;

/// What a client of Guild calls.
pub mod inference {
    /// Version 1, the only one.
    pub mod v1 {
        pub use crate::generated::inference::v1::*;
    }
}

/// How nodes join the coordinator and learn what they hold.
pub mod cluster {
    /// Version 1, the only one.
    pub mod v1 {
        pub use crate::generated::cluster::v1::*;
    }
}

/// Rows to slots and back.
pub mod experts {
    /// Version 1, the only one.
    pub mod v1 {
        pub use crate::generated::experts::v1::*;
    }
}

/// Pages of the KV cache, from one attention node to another.
pub mod pages {
    /// Version 1, the only one.
    pub mod v1 {
        pub use crate::generated::pages::v1::*;
    }
}

/// Descriptors of all services, encoded as a `FileDescriptorSet`, for gRPC
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/guild_descriptors.bin"));
