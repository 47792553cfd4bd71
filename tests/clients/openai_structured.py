"""The `openai` package against a running front door: outputs that have to be something.

Usage: openai_structured.py BASE_URL MODEL. Schemas, grammars, tools and responses, whole and streamed. The
model is tiny and knows nothing of any of it: what holds here, holds by the server. Prints one line per check.
"""

import json
import re
import sys
from typing import Literal

from openai import BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

base_url, model = sys.argv[1:3]
client = OpenAI(base_url=base_url, api_key="unused", timeout=120, max_retries=0)
CHAT = [{"role": "user", "content": "Speak."}]


def done(what):
    print("ok:", what, flush=True)


class Person(BaseModel):
    house: Literal["Capulet", "Montague"]
    age: int = Field(ge=0, le=99)
    proud: bool


class Toll(BaseModel):
    n: int = Field(ge=0, le=9)


def chat(**more):
    return client.chat.completions.create(model=model, messages=CHAT, **more)


for seed in range(4):
    parsed = client.chat.completions.parse(model=model, messages=CHAT, response_format=Person, max_tokens=120, temperature=1, seed=seed)
    person = parsed.choices[0].message.parsed
    assert isinstance(person, Person) and parsed.choices[0].finish_reason == "stop", parsed
done("a strict schema, parsed by the package, at temperature 1")

schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": Person.model_json_schema() | {"additionalProperties": False}}}
whole = chat(response_format=schema, max_tokens=120, temperature=0)
text, usage = "", None
for chunk in chat(response_format=schema, max_tokens=120, temperature=0, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
assert text == whole.choices[0].message.content and Person.model_validate_json(text)
assert usage.completion_tokens == whole.usage.completion_tokens and usage.prompt_tokens_details.cached_tokens >= 0
done("the same schema, streamed: the same text")

thing = chat(response_format={"type": "json_object"}, max_tokens=60, temperature=1, seed=5, logprobs=True)
assert thing.choices[0].message.content.startswith("{")
assert thing.choices[0].finish_reason != "stop" or isinstance(json.loads(thing.choices[0].message.content), dict)
done("any JSON object")

several = chat(n=3, max_tokens=8, temperature=1, seed=1, extra_body={"structured_outputs": {"regex": "[a-z]{4}-[0-9]{2}"}})
texts = [c.message.content for c in several.choices]
assert len(texts) == 3 and all(re.fullmatch("[a-z]{4}-[0-9]{2}", t) for t in texts if len(t) == 7), texts
assert all(re.fullmatch("[a-z]{0,4}-?[0-9]{0,2}", t) for t in texts), texts
for field in ({"structured_outputs": {"choice": ["to be", "not to be"]}}, {"guided_choice": ["to be", "not to be"]}):
    chosen = client.completions.create(model=model, prompt="JULIET:", max_tokens=20, temperature=1, extra_body=field)
    assert chosen.choices[0].text in ("to be", "not to be") and chosen.choices[0].finish_reason == "stop"
summed = client.completions.create(
    model=model, prompt="a", max_tokens=40, temperature=0, extra_body={"structured_outputs": {"grammar": 'start: n ("+" n){2}\nn: /[0-9]/\n'}}
)
assert re.fullmatch(r"[0-9](\+[0-9]){2}", summed.choices[0].text), summed
done("a regular expression, choices, a grammar")

tool = pydantic_function_tool(Toll, name="toll", description="d")
named = {"type": "function", "function": {"name": "toll"}}
for choice in ("required", named):
    called = chat(tools=[tool], tool_choice=choice, parallel_tool_calls=False, max_tokens=200, temperature=0)
    assert called.choices[0].finish_reason == "tool_calls" and called.choices[0].message.content is None, called
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "toll" and call.id and Toll.model_validate_json(call.function.arguments)
done("a tool that has to be called")

name, arguments, ids, reason = "", "", [], None
for chunk in chat(tools=[tool], tool_choice=named, max_tokens=200, temperature=0, stream=True):
    for choice in chunk.choices:
        reason = choice.finish_reason or reason
        assert not choice.delta.content
        for delta in choice.delta.tool_calls or []:
            assert delta.index == 0
            ids += [delta.id] if delta.id else []
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
assert (name, arguments, reason, len(ids)) == ("toll", call.function.arguments, "tool_calls", 1)
done("the same, streamed")

plain = {"type": "function", "function": {"name": "toll", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}}
free = chat(tools=[plain], max_tokens=8, temperature=0)
assert free.choices[0].message.content and not free.choices[0].message.tool_calls
turns = CHAT + [called.choices[0].message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "Done."}]
assert client.chat.completions.create(model=model, messages=turns, max_tokens=4, temperature=0).choices[0].message.content is not None
done("tools that need not be called, and what came of one")

best = client.completions.create(model=model, prompt="ROMEO:\n", n=2, best_of=4, max_tokens=6, temperature=1, seed=3, logprobs=0)
means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in best.choices]
assert len(means) == 2 and means[0] >= means[1] and best.usage.completion_tokens >= 8, means
timed = client.completions.create(model=model, prompt="ROMEO:\n", max_tokens=4, extra_body={"timings": True, "priority": -1, "timeout_ms": 60000}, user="ann")
assert 0 < timed.timings["first_token_ms"] <= timed.timings["total_ms"]
done("the best of four, timings")

response = client.responses.create(model=model, input="Speak.", instructions="Be brief.", max_output_tokens=16, temperature=0)
assert response.status in ("completed", "incomplete") and response.output_text and response.usage.output_tokens > 0
streamed, last = "", None
for event in client.responses.create(model=model, input="Speak.", instructions="Be brief.", max_output_tokens=16, temperature=0, stream=True):
    streamed += event.delta if event.type == "response.output_text.delta" else ""
    last = event
assert streamed == response.output_text == last.response.output_text and last.type == f"response.{last.response.status}"
person = client.responses.parse(model=model, input="Speak.", text_format=Person, max_output_tokens=120, temperature=1).output_parsed
assert isinstance(person, Person)
flat = {"type": "function", "name": "toll", "parameters": Toll.model_json_schema() | {"additionalProperties": False}, "strict": False}
calls = client.responses.create(model=model, input="Speak.", tools=[flat], tool_choice="required", parallel_tool_calls=False, max_output_tokens=200, temperature=0)
(item,) = calls.output
assert item.type == "function_call" and item.name == "toll" and Toll.model_validate_json(item.arguments)
after = [{"role": "user", "content": "Speak."}, item.model_dump(exclude_none=True), {"type": "function_call_output", "call_id": item.call_id, "output": "Done."}]
assert client.responses.create(model=model, input=after, max_output_tokens=4).id
done("responses: text, stream, schema, call and its result")

wrong = {
    "response_format": lambda: chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}}),
    "structured_outputs.regex": lambda: chat(extra_body={"structured_outputs": {"regex": "("}}),
    "structured_outputs.grammar": lambda: chat(extra_body={"structured_outputs": {"grammar": "start: nowhere"}}),
    "tool_choice": lambda: chat(tool_choice="required"),
    "tools": lambda: chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "wizard"}}}], tool_choice="required"),
    "store": lambda: client.responses.create(model=model, input="x", store=True),
}
for param, send in wrong.items():
    try:
        send()
    except BadRequestError as error:
        assert error.body["param"] == param and error.body["message"], (param, error.body)
    else:
        raise AssertionError(f"{param} was accepted")
done("errors name the field that is wrong")
