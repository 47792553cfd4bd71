//! What a leader leaves to the next, and its bytes.

use super::StoreError;

/// Bytes of a placement that a store takes: etcd refuses requests above 1.5 MiB.
pub const MAX_PLACEMENT_BYTES: usize = 1 << 20;
/// First byte of an encoded state.
const FORMAT: u8 = 1;
/// Bytes before the placement: format, epoch, served.
const HEAD: usize = 1 + 8 + 1;

/// What a leader leaves to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Highest epoch that any leader has published or is about to.
    pub epoch: u64,
    /// A request has been served: live experts stay where they are.
    pub served: bool,
    /// The placement of that epoch in the leader's own encoding; opaque here.
    pub placement: Vec<u8>,
}

impl State {
    pub(super) fn check(&self) -> Result<(), StoreError> {
        match self.placement.len() {
            0..=MAX_PLACEMENT_BYTES => Ok(()),
            bytes => Err(StoreError::Refused {
                field: "placement",
                problem: format!("{bytes} bytes, a store takes {MAX_PLACEMENT_BYTES}"),
            }),
        }
    }

    /// `[1, epoch u64 LE, served u8, placement…]`
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.placement.len());
        bytes.push(FORMAT);
        bytes.extend_from_slice(&self.epoch.to_le_bytes());
        bytes.push(u8::from(self.served));
        bytes.extend_from_slice(&self.placement);
        bytes
    }

    /// The reverse; the error says what is wrong.
    pub(super) fn decode(bytes: &[u8]) -> Result<State, String> {
        let (head, placement) = bytes
            .split_at_checked(HEAD)
            .ok_or_else(|| format!("the state has only {} bytes", bytes.len()))?;
        let [FORMAT, epoch @ .., served @ (0 | 1)] = head else {
            return Err(format!("the state has an unknown format {}", head[0]));
        };
        let epoch = epoch.try_into().map_or(0, u64::from_le_bytes);
        Ok(State {
            epoch,
            served: *served == 1,
            placement: placement.to_vec(),
        })
    }
}
