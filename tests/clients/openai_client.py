"""The `openai` package against a running front door: what users' programs do.

Usage: openai_client.py BASE_URL MODEL. Prints one line per check; exits non-zero at the first that fails.
"""

import sys
import threading

from openai import BadRequestError, NotFoundError, OpenAI

base_url, model = sys.argv[1:3]
client = OpenAI(base_url=base_url, api_key="unused", timeout=60, max_retries=0)
PROMPT = "ROMEO:\n"
CHAT = [{"role": "user", "content": "What say you, my lord?"}]


def done(what):
    print("ok:", what, flush=True)


assert model in [m.id for m in client.models.list().data]
assert client.models.retrieve(model).id == model
done("models")

plain = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
assert plain.object == "text_completion" and plain.choices[0].text.strip()
assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
assert plain.choices[0].finish_reason in ("stop", "length")
done("completion")

text, usage, reason = "", None, None
for chunk in client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}):
    if chunk.usage:
        usage = chunk.usage
    for choice in chunk.choices:
        text += choice.text
        reason = choice.finish_reason or reason
assert text == plain.choices[0].text, (text, plain.choices[0].text)
assert usage.completion_tokens == plain.usage.completion_tokens and reason == plain.choices[0].finish_reason
done("completion, streamed: the same text")

ids = [0, 839, 30, 203]
by_ids = client.completions.create(model=model, prompt=ids, max_tokens=8, temperature=0, logprobs=3, echo=True)
logprobs = by_ids.choices[0].logprobs
assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
assert logprobs.token_logprobs[0] is None and all(p <= 0 for p in logprobs.token_logprobs[1:])
assert len(logprobs.tokens) == len(ids) + by_ids.usage.completion_tokens
done("completion by token ids, echo, logprobs")

many = client.completions.create(model=model, prompt=[PROMPT, "JULIET:\n"], max_tokens=8, temperature=0)
assert [c.index for c in many.choices] == [0, 1]
assert many.choices[0].text == client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
done("completion of a list of prompts")

seeded = [client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0.9, top_p=0.95, seed=7).choices[0].text for _ in range(2)]
assert seeded[0] == seeded[1]
other = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0.9, top_p=0.95, seed=8).choices[0].text
assert other != seeded[0]
done("seeded sampling repeats itself")

word = plain.choices[0].text.split()[1]
stopped = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stop=[word])
assert word not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"
assert plain.choices[0].text.startswith(stopped.choices[0].text)
done("stop string")

chat = client.chat.completions.create(model=model, messages=CHAT, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2)
message = chat.choices[0].message
assert chat.object == "chat.completion" and message.role == "assistant" and message.content
content = chat.choices[0].logprobs.content
assert 0 < len(content) <= chat.usage.completion_tokens
assert all(len(c.top_logprobs) == 2 and c.logprob <= 0 for c in content)
assert content[0].top_logprobs[0].logprob == content[0].logprob
done("chat, logprobs")

text, role, usage, reason = "", None, None, None
for chunk in client.chat.completions.create(
    model=model, messages=CHAT, max_completion_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
):
    if chunk.usage:
        usage = chunk.usage
    for choice in chunk.choices:
        role = choice.delta.role or role
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
assert text == message.content and role == "assistant" and reason == chat.choices[0].finish_reason
assert usage.completion_tokens == chat.usage.completion_tokens
done("chat, streamed: the same text")

parts = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}], max_tokens=24, temperature=0
)
assert parts.choices[0].message.content == message.content
done("chat, content in parts")

for what, call in {
    "unknown model": (NotFoundError, lambda: client.completions.create(model="nobody", prompt="x")),
    "temperature": (BadRequestError, lambda: client.completions.create(model=model, prompt="x", temperature=-1)),
    "empty messages": (BadRequestError, lambda: client.chat.completions.create(model=model, messages=[])),
    "token out of vocabulary": (BadRequestError, lambda: client.completions.create(model=model, prompt=[10**6])),
}.items():
    kind, send = call
    try:
        send()
    except kind as error:
        assert error.body["message"], what
    else:
        raise AssertionError(f"{what} was accepted")
done("errors are OpenAI's")

stream = client.completions.create(model=model, prompt=PROMPT, max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True})
next(iter(stream))
stream.close()
assert client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text == plain.choices[0].text
done("a stream that is dropped leaves the server serving")

answers = [None] * 64
problems = []


def ask(i):
    try:
        answers[i] = "".join(
            c.choices[0].text for c in client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True) if c.choices
        )
    except Exception as problem:
        problems.append(problem)


threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(answers))]
for t in threads:
    t.start()
for t in threads:
    t.join()
assert not problems, problems[:3]
assert all(a == plain.choices[0].text for a in answers), answers
done("64 streams at once: the same text")
