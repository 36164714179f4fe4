"""What applications do, with the official client: openai_client.py BASE_URL KEY MODEL"""

import asyncio
import json
import sys

import openai

base, key, model = sys.argv[1:]
client = openai.OpenAI(base_url=base, api_key=key, max_retries=0)
tools = [{
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "for example: 2 * (3 + 4)"}},
            "required": ["expression"],
        },
    },
}]
question = [{"role": "user", "content": "what is 12 * (3 + 4)"}]


def refused(kind, status, call):
    try:
        call()
    except kind as why:
        assert why.status_code == status, why
        return why
    raise AssertionError(f"{kind} did not come")


assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

# A call, its result, an answer.
first = client.chat.completions.create(model=model, messages=question, tools=tools, temperature=0)
assert first.choices[0].finish_reason == "tool_calls", first
message = first.choices[0].message
call = message.tool_calls[0]
assert call.type == "function" and call.function.name == "calculator"
assert "12" in json.loads(call.function.arguments)["expression"]
history = question + [
    message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": call.id, "content": "84"},
]
second = client.chat.completions.create(model=model, messages=history, tools=tools, temperature=0)
assert "84" in second.choices[0].message.content, second
assert second.choices[0].finish_reason == "stop"
assert second.usage.prompt_tokens_details.cached_tokens > 0, second.usage
assert second.usage.total_tokens == second.usage.prompt_tokens + second.usage.completion_tokens

# The same as a stream.
stream = client.chat.completions.create(
    model=model, messages=history, tools=tools, temperature=0, stream=True, stream_options={"include_usage": True}
)
text, usage, finish = "", None, None
for chunk in stream:
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    usage = chunk.usage or usage
assert text == second.choices[0].message.content, (text, second)
assert finish == "stop" and usage.completion_tokens == second.usage.completion_tokens

# The helper that puts a stream together.
with client.chat.completions.stream(model=model, messages=question, tools=tools, temperature=0) as events:
    for event in events:
        pass
    whole = events.get_final_completion()
assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments

# A call that is demanded; log-probabilities; a stop.
choice = {"type": "function", "function": {"name": "calculator"}}
forced = client.chat.completions.create(model=model, messages=question, tools=tools, tool_choice=choice, temperature=0)
assert forced.choices[0].message.tool_calls[0].function.name == "calculator"
likely = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "hello"}], temperature=0, logprobs=True, top_logprobs=2, max_tokens=3
)
assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in likely.choices[0].logprobs.content)
full = client.completions.create(model=model, prompt="hello", max_tokens=8, temperature=0, seed=1)
assert full.object == "text_completion" and full.usage.completion_tokens <= 8

# A reader that leaves.
stream = client.chat.completions.create(model=model, messages=question, temperature=0, stream=True)
next(iter(stream))
stream.close()


async def together():
    many = openai.AsyncOpenAI(base_url=base, api_key=key)
    ask = lambda: many.chat.completions.create(model=model, messages=question, tools=tools, temperature=0)
    answers = await asyncio.gather(*(ask() for _ in range(8)))
    assert {a.choices[0].message.tool_calls[0].function.arguments for a in answers} == {call.function.arguments}
    await many.close()


asyncio.run(together())

# What is refused, and how.
why = refused(openai.NotFoundError, 404, lambda: client.chat.completions.create(model="gpt-4o", messages=question))
assert why.code == "model_not_found" and why.param == "model"
why = refused(openai.BadRequestError, 400, lambda: client.chat.completions.create(model=model, messages=question, n=2))
assert why.param == "n"
image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
why = refused(openai.BadRequestError, 400, lambda: client.chat.completions.create(model=model, messages=image))
assert why.param == "messages[0].content[0].type"
stranger = openai.OpenAI(base_url=base, api_key="wrong", max_retries=0)
refused(openai.AuthenticationError, 401, lambda: stranger.models.list())

print("all passed")
