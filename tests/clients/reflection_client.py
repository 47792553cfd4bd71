"""A generic gRPC client: it knows an address and learns everything else by reflection.

Usage: reflection_client.py ADDRESS VOCAB CERTS/ROLE|- SERVICE... With a path it is mutual TLS, by ROLE.pem and ROLE.key there and
ca.pem beside them. Calls guild.inference.v1 where it is among the services, checks health everywhere.
"""

import pathlib
import sys

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, vocab, certificate, *expected = sys.argv[1:]
if certificate == "-":
    channel = grpc.insecure_channel(address)
else:
    stem = pathlib.Path(certificate)
    ca, key, cert = (p.read_bytes() for p in (stem.with_name("ca.pem"), stem.with_suffix(".key"), stem.with_suffix(".pem")))
    channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))
database = ProtoReflectionDescriptorDatabase(channel)
services = set(database.get_services())
missing = set(expected) - services
assert not missing, f"{address} does not list {missing}: {services}"
assert any(s.startswith("grpc.reflection.") for s in services) and "grpc.health.v1.Health" in services, services
pool = descriptor_pool.DescriptorPool(database)


def method(service, name):
    found = pool.FindServiceByName(service).FindMethodByName(name)
    request, response = GetMessageClass(found.input_type), GetMessageClass(found.output_type)
    kind = channel.unary_stream if found.server_streaming else channel.unary_unary
    return request, kind(f"/{service}/{name}", request_serializer=request.SerializeToString, response_deserializer=response.FromString)


Check, check = method("grpc.health.v1.Health", "Check")
assert check(Check(), timeout=10).status == 1, "SERVING"
print("ok: health of", address)

if "guild.inference.v1.Inference" in expected:
    Info, info = method("guild.inference.v1.Inference", "ModelInfo")
    assert info(Info(), timeout=10).vocab_size == int(vocab)
    Generate, generate = method("guild.inference.v1.Inference", "Generate")
    request = Generate()
    request.token_ids.ids.extend([5, 6, 7])
    request.sampling.max_tokens = 6
    request.sampling.ignore_eos = True
    request.sampling.logprobs = 2
    events = list(generate(request, timeout=30))
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[0] == "prompt" and kinds[-1] == "complete" and set(kinds[1:-1]) == {"chunk"}, kinds
    tokens = [t for e in events if e.WhichOneof("event") == "chunk" for t in e.chunk.token_ids]
    assert len(tokens) == 6 and events[-1].complete.usage.completion_tokens == 6
    assert all(len(p.top) == 2 for e in events for p in e.chunk.logprobs)
    print("ok: generate by reflection,", tokens)

    # Token ids alone have text where there is a tokenizer, and with it a constraint.
    bound = Generate()
    bound.token_ids.ids.extend([5, 6, 7])
    bound.sampling.max_tokens = 20
    bound.sampling.constraint.choice.texts.extend(["yes", "no"])
    bound.priority, bound.tenant, bound.timing = -1, 7, True
    events = list(generate(bound, timeout=30))
    text = "".join(e.chunk.text for e in events if e.WhichOneof("event") == "chunk")
    complete = events[-1].complete
    assert complete.finish_reason == 1 and text in ("yes", "no", ""), (text, complete)
    if text:
        assert 0 < complete.usage.timing.first_token_ms <= complete.usage.timing.total_ms, complete
    print("ok: a choice by reflection,", text or "as ids")

    broken = Generate()
    broken.CopyFrom(bound)
    broken.sampling.constraint.regex = "("
    try:
        list(generate(broken, timeout=10))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "regex" in str(dict(error.trailing_metadata())), error
    else:
        raise AssertionError("a broken regular expression was accepted")
    print("ok: a broken constraint is refused by its field")

    bad = Generate()
    bad.token_ids.ids.append(int(vocab))
    try:
        list(generate(bad, timeout=10))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        details = dict(error.trailing_metadata())
        assert "grpc-status-details-bin" in details and error.details(), error
    else:
        raise AssertionError("a token outside the vocabulary was accepted")
    print("ok: a bad request has google.rpc.Status details")
