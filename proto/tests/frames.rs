//! The wire as bytes: one golden frame of each kind, and every way in which a
//! frame can be wrong.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use guild_proto::{
    cluster::v1::{Placement, PlacementNode, PlacementState, RegisterRequest, Role, Slot},
    experts::v1::{CombineFrame, DispatchFrame, ExchangeFault, FaultCode, RowFormat, SlotRows},
    frame::{Combine, Dispatch, FrameError},
    inference::v1::{GenerateRequest, SamplingParams, TokenIds, generate_request::Input},
    limits::{MAX_FAULT_TEXT_BYTES, MAX_PAIRS, MAX_SLOTS, MAX_WIDTH},
};
use prost::Message;

fn wire(rows: &[f32]) -> Bytes {
    rows.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn dispatch() -> DispatchFrame {
    DispatchFrame {
        id: 7,
        epoch: 3,
        deadline_ms: 250,
        format: RowFormat::F32.into(),
        width: 2,
        rows: wire(&[1.0, -2.0, 0.5, f32::MAX]),
        slots: vec![
            SlotRows {
                slot: 5,
                row_index: vec![0, 1],
            },
            SlotRows {
                slot: 300,
                row_index: vec![1],
            },
        ],
        crc: 0,
    }
}

fn combine() -> CombineFrame {
    CombineFrame {
        id: 7,
        epoch: 3,
        format: RowFormat::F32.into(),
        width: 2,
        rows: wire(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ..CombineFrame::default()
    }
}

fn hex(message: &impl Message) -> String {
    message
        .encode_to_vec()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[test]
fn golden_dispatch() {
    assert_eq!(
        hex(&dispatch().sealed()),
        "0807100318fa012001280232100000803f000000c00000003fffff7f7f3a060805120200013a0608ac0212010145c81387f5"
    );
}

#[test]
fn golden_combine() {
    assert_eq!(
        hex(&combine().sealed()),
        "08071003180120022a180000803f0000004000004040000080400000a0400000c04035522817e7"
    );
}

#[test]
fn golden_refusal() {
    let fault = ExchangeFault::bounded(FaultCode::UnknownEpoch, "e0", "no epoch 3");
    assert_eq!(
        hex(&CombineFrame::refusal(7, 3, fault)),
        "0807100335508a8ccd3a120801120a6e6f2065706f636820331a026530"
    );
}

#[test]
fn golden_control_plane() {
    let register = RegisterRequest {
        role: Role::Expert.into(),
        name: "e0".into(),
        address: "127.0.0.1:7100".into(),
        model_digest: "d1".into(),
        numerics_class: "c1".into(),
        capacity_bytes: 1 << 30,
        newest_epoch: 4,
        incarnation: 9,
        ..Default::default()
    };
    assert_eq!(
        hex(&register),
        "0802120265301a0e3132372e302e302e313a37313030220264312a02633130808080800438044009"
    );
    let placement = Placement {
        epoch: 4,
        state: PlacementState::Active.into(),
        nodes: vec![PlacementNode {
            node_id: 1,
            name: "e0".into(),
            address: "a".into(),
            slots: vec![Slot {
                layer: 3,
                expert: 255,
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    assert_eq!(
        hex(&placement),
        "080410021a100801120265301a01612205080310ff01"
    );
}

#[test]
fn golden_generate() {
    let request = GenerateRequest {
        request_id: "r".into(),
        model: String::new(),
        input: Some(Input::TokenIds(TokenIds { ids: vec![1, 300] })),
        sampling: Some(SamplingParams {
            max_tokens: Some(8),
            temperature: Some(0.0),
            seed: Some(1),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    assert_eq!(hex(&request), "0a017222050a0301ac022a09080815000000002801");
}

#[test]
fn dispatch_round_trip() {
    let frame = DispatchFrame::decode(dispatch().sealed().encode_to_vec().as_slice()).unwrap();
    let dispatch = Dispatch::try_from(frame).unwrap();
    assert_eq!((dispatch.id, dispatch.epoch), (7, 3));
    assert_eq!(dispatch.deadline_ms, Some(250));
    assert_eq!(
        (dispatch.width, dispatch.num_rows, dispatch.pairs()),
        (2, 2, 3)
    );
    assert_eq!(dispatch.rows, wire(&[1.0, -2.0, 0.5, f32::MAX]));
}

#[test]
fn rows_are_slices_of_the_message() {
    let message = Bytes::from(dispatch().sealed().encode_to_vec());
    let range = message.as_ptr_range();
    let frame = DispatchFrame::decode(message.clone()).unwrap();
    assert!(range.contains(&frame.rows.as_ptr()), "rows were copied");
}

#[test]
fn empty_frames_are_well_formed() {
    let mut frame = dispatch();
    frame.rows = Bytes::new();
    frame.slots.clear();
    frame.deadline_ms = 0;
    let dispatch = Dispatch::try_from(frame.sealed()).unwrap();
    assert_eq!((dispatch.num_rows, dispatch.pairs()), (0, 0));
    assert_eq!(dispatch.deadline_ms, None);
    let mut frame = combine();
    frame.rows = Bytes::new();
    let rows = Combine::try_from(frame.sealed()).unwrap().outcome.unwrap();
    assert_eq!(rows.num_rows, 0);
}

/// Every field is under the checksum: a change of any one is found.
#[test]
fn any_changed_field_of_a_dispatch_is_found() {
    let sealed = dispatch().sealed();
    let changes: Vec<fn(&mut DispatchFrame)> = vec![
        |f| f.id += 1,
        |f| f.epoch += 1,
        |f| f.deadline_ms += 1,
        |f| f.format += 1,
        |f| f.width = 1,
        |f| f.rows = wire(&[1.0, -2.0, 0.5, f32::MIN]),
        |f| f.rows = wire(&[1.0, -2.0]),
        |f| f.slots[0].slot += 1,
        |f| f.slots[0].row_index[1] = 0,
        |f| f.slots.truncate(1),
        |f| f.slots.swap(0, 1),
        |f| {
            let index = f.slots[0].row_index.pop().unwrap();
            f.slots[1].row_index.insert(0, index);
        },
        |f| f.crc ^= 1,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut frame = sealed.clone();
        change(&mut frame);
        let error = Dispatch::try_from(frame).unwrap_err();
        assert!(matches!(error, FrameError::Checksum { .. }), "{i}: {error}");
        assert_eq!(error.code(), FaultCode::Checksum);
    }
}

#[test]
fn any_flipped_bit_of_a_combine_is_found() {
    let sealed = combine().sealed();
    let bytes = sealed.encode_to_vec();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        // Not every flip leaves a protobuf message; those that do must be seen.
        if let Ok(frame) = CombineFrame::decode(bad.as_slice()) {
            assert!(Combine::try_from(frame).is_err(), "bit {bit}");
        }
    }
}

#[test]
fn every_fault_field_is_under_the_checksum() {
    let fault = ExchangeFault::bounded(FaultCode::UnknownSlot, "e0", "slot 9");
    let sealed = CombineFrame::refusal(1, 2, fault.clone());
    let combine = Combine::try_from(sealed.clone()).unwrap();
    assert_eq!(combine.outcome, Err(fault));
    let changes: Vec<fn(&mut CombineFrame)> = vec![
        |f| f.fault.as_mut().unwrap().code = 4,
        |f| f.fault.as_mut().unwrap().message.push('!'),
        |f| f.fault.as_mut().unwrap().node.clear(),
        |f| f.fault = None,
    ];
    for change in changes {
        let mut frame = sealed.clone();
        change(&mut frame);
        assert!(Combine::try_from(frame).is_err());
    }
}

#[test]
fn malformed_dispatches_are_named() {
    let malformed = |change: fn(&mut DispatchFrame), expect: &str| {
        let mut frame = dispatch();
        change(&mut frame);
        let error = Dispatch::try_from(frame.sealed()).unwrap_err();
        assert_eq!(error.code(), FaultCode::Malformed);
        assert!(error.to_string().starts_with(expect), "{error}");
    };
    malformed(|f| f.format = 0, "format: 0");
    malformed(|f| f.format = 9, "format: 9");
    malformed(|f| f.width = 0, "width: 0");
    malformed(|f| f.width = MAX_WIDTH as u32 + 1, "width: 16385");
    malformed(|f| f.width = u32::MAX, "width:");
    malformed(|f| f.width = 3, "rows: 16 bytes");
    malformed(|f| f.rows = Bytes::from_static(&[0; 9]), "rows: 9 bytes");
    malformed(
        |f| f.slots[1].row_index[0] = 2,
        "slots: slot 300 names row 2",
    );
    malformed(|f| f.slots[0].row_index[0] = u32::MAX, "slots: slot 5");
    malformed(
        |f| f.slots = vec![SlotRows::default(); MAX_SLOTS + 1],
        "slots: 4097 is more than the limit of 4096",
    );
    malformed(
        |f| f.slots[0].row_index = vec![0; MAX_PAIRS],
        "rows to return: 131073",
    );
    malformed(
        |f| {
            f.width = MAX_WIDTH as u32;
            f.rows = wire(&vec![0.0; MAX_WIDTH]);
            f.slots[0].row_index = vec![0; 4096];
            f.slots[1].row_index = vec![0];
        },
        "bytes of rows to return",
    );
}

#[test]
fn malformed_combines_are_named() {
    let malformed = |change: fn(&mut CombineFrame), expect: &str| {
        let mut frame = combine();
        change(&mut frame);
        let error = Combine::try_from(frame.sealed()).unwrap_err();
        assert_eq!(error.code(), FaultCode::Malformed);
        assert!(error.to_string().starts_with(expect), "{error}");
    };
    malformed(|f| f.format = 0, "format: 0");
    malformed(|f| f.width = 0, "width: 0");
    malformed(|f| f.width = 5, "rows: 24 bytes");
    malformed(|f| f.fault = Some(ExchangeFault::default()), "fault:");
}

#[test]
fn fault_texts_are_bounded_at_a_character() {
    let long = "é".repeat(MAX_FAULT_TEXT_BYTES);
    let fault = ExchangeFault::bounded(FaultCode::Internal, &long, &long);
    assert!(fault.message.len() + fault.node.len() <= MAX_FAULT_TEXT_BYTES);
    assert!(!fault.message.is_empty() && !fault.node.is_empty());
    assert!(fault.message.chars().all(|c| c == 'é'));
}

#[test]
fn the_descriptor_set_names_every_service() {
    let set = prost_types::FileDescriptorSet::decode(guild_proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut services: Vec<String> = set
        .file
        .iter()
        .flat_map(|file| {
            file.service
                .iter()
                .map(|service| format!("{}.{}", file.package(), service.name()))
        })
        .collect();
    services.sort();
    assert_eq!(
        services,
        [
            "guild.cluster.v1.Cluster",
            "guild.experts.v1.Experts",
            "guild.inference.v1.Inference",
            "guild.pages.v1.Pages",
        ]
    );
}
