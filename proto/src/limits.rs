//! Limits of the wire, each with a name.
//!
//! They bound what a peer can make a process hold, and they agree with each
//! other: the relations are checked when this file is compiled. Both ends of
//! `guild.experts.v1` use the same values, so a frame that its sender may send
//! is a frame that its receiver may read.

/// Elements in a row, at most. DeepSeek-V3 and Kimi-K2 have 7168.
pub const MAX_WIDTH: usize = 16_384;

/// Distinct rows in one dispatch frame, at most: the tokens of one step.
pub const MAX_ROWS: usize = 16_384;

/// Slots that one dispatch frame may name.
pub const MAX_SLOTS: usize = 4_096;

/// Rows in one combine frame, at most: (slot, row) pairs of its dispatch.
pub const MAX_PAIRS: usize = 131_072;

/// Bytes of rows in one frame of either direction, at most. At width 7168 this
/// is 9,362 rows of f32: a step of 1,170 tokens whose eight experts all live on
/// one node.
pub const MAX_PAYLOAD_BYTES: usize = 256 << 20;

/// Bytes of one frame beside its rows, at most: ids, slots, indices, and the
/// text of a fault.
pub const MAX_HEADER_BYTES: usize = 1 << 20;

/// Bytes of the texts of a fault together; longer ones are cut by
/// [`ExchangeFault::bounded`](crate::experts::v1::ExchangeFault::bounded).
pub const MAX_FAULT_TEXT_BYTES: usize = 4 << 10;

/// Bytes of one encoded frame, at most: the message limit that both ends of
/// `guild.experts.v1` give to gRPC, for reading and for writing.
pub const MAX_FRAME_BYTES: usize = MAX_PAYLOAD_BYTES + MAX_HEADER_BYTES;

/// Bytes of one message of the control plane and of the front door, at most. A
/// placement of DeepSeek-V3 (58 layers of 256 experts) takes about 130 KB; a
/// response with log-probabilities of a long prompt is the largest.
pub const MAX_CONTROL_BYTES: usize = 64 << 20;

/// HTTP/2 flow-control window of one stream. The data plane has one stream on
/// a connection, so it gets as much as the connection allows it.
pub const STREAM_WINDOW_BYTES: u32 = 16 << 20;

/// HTTP/2 flow-control window of one connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Largest HTTP/2 DATA frame. The protocol's default of 16 KiB would cut a
/// micro-batch into hundreds of pieces.
pub const HTTP2_FRAME_BYTES: u32 = 1 << 20;

/// Bytes of one element of a row in [`RowFormat::F32`](crate::experts::v1::RowFormat::F32).
pub const F32_BYTES: usize = size_of::<f32>();

/// Tokens of one step that are certain to fit a frame in both directions when
/// every token goes to `top_k` slots of one node.
///
/// Steps must not be larger. Returns 0 when `width` itself is beyond
/// [`MAX_WIDTH`], or when nothing fits.
pub const fn max_step_tokens(width: usize, top_k: usize) -> usize {
    if width == 0 || width > MAX_WIDTH || top_k == 0 {
        return 0;
    }
    let by_bytes = MAX_PAYLOAD_BYTES / (width * F32_BYTES) / top_k;
    let by_pairs = MAX_PAIRS / top_k;
    let fits = if by_bytes < by_pairs {
        by_bytes
    } else {
        by_pairs
    };
    if fits < MAX_ROWS { fits } else { MAX_ROWS }
}

// A varint of a 32-bit value takes at most 5 bytes, a field key at most 1 here.
const SLOT_HEADER_BYTES: usize = 1 + 5 + (1 + 5) + (1 + 5);
// Indices are below MAX_ROWS = 2^14, so their varints take at most 2 bytes.
const INDEX_BYTES: usize = 2;
const SCALAR_FIELDS_BYTES: usize = 64;

const _: () = {
    assert!(MAX_ROWS <= 1 << (7 * INDEX_BYTES));
    assert!(
        MAX_PAIRS * INDEX_BYTES + MAX_SLOTS * SLOT_HEADER_BYTES + SCALAR_FIELDS_BYTES
            <= MAX_HEADER_BYTES,
        "the indices of a full frame must fit its header"
    );
    assert!(
        MAX_FAULT_TEXT_BYTES + SCALAR_FIELDS_BYTES <= MAX_HEADER_BYTES,
        "a fault must fit the header of a frame"
    );
    assert!(
        MAX_WIDTH * F32_BYTES <= MAX_PAYLOAD_BYTES,
        "one row of any width must fit a frame"
    );
    assert!(MAX_ROWS <= MAX_PAIRS);
    assert!(
        MAX_FRAME_BYTES <= i32::MAX as usize,
        "the length prefix of protobuf"
    );
    assert!(HTTP2_FRAME_BYTES >= 1 << 14 && HTTP2_FRAME_BYTES < 1 << 24);
    assert!(STREAM_WINDOW_BYTES >= 4 << 20 && STREAM_WINDOW_BYTES <= 16 << 20);
    assert!(CONNECTION_WINDOW_BYTES >= STREAM_WINDOW_BYTES);
    assert!(STREAM_WINDOW_BYTES >= 4 * HTTP2_FRAME_BYTES);
    assert!(
        max_step_tokens(7168, 8) >= 1024,
        "a V3 prefill chunk of 1,024 tokens fits"
    );
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_tokens_fit_by_bytes_pairs_and_rows() {
        assert_eq!(max_step_tokens(7168, 8), 1170);
        assert_eq!(max_step_tokens(64, 8), MAX_PAIRS / 8);
        assert_eq!(max_step_tokens(64, 1), MAX_ROWS);
        assert_eq!(max_step_tokens(0, 8), 0);
        assert_eq!(max_step_tokens(64, 0), 0);
        assert_eq!(max_step_tokens(MAX_WIDTH + 1, 8), 0);
        for (width, top_k) in [(7168, 8), (2048, 6), (256, 4), (MAX_WIDTH, 16)] {
            let tokens = max_step_tokens(width, top_k);
            assert!(tokens * top_k <= MAX_PAIRS);
            assert!(tokens * top_k * width * F32_BYTES <= MAX_PAYLOAD_BYTES);
        }
    }
}
