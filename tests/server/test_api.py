# SPDX-License-Identifier: Apache-2.0
"""The API by its official client, on tiny models: every text against `generate` alone."""

import json
import re

import httpx
import pytest
import torch
from byte_tokenizers import HOSTILE, chatml
from conftest import tiny_arm, tiny_llama

from trl_parm.evaluation.decoding import prompt_ids


openai = pytest.importorskip("openai", reason="needs the extra `dev`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")

from server.running import (  # noqa: E402
    ESCAPES,
    OBJECTIVES,
    Twin,
    arguments,
    events,
    running,
    save_models,
    save_on,
    wait_until,
)


ALPHAS = [{"helpful": 1.0, "brief": 0.0}, {"helpful": 0.25, "brief": 0.75}, {"helpful": 0.0, "brief": 1.0}]
needs_escapes = pytest.mark.skipif(not ESCAPES, reason="this transformers can't read control tokens as text")
KEYS = ["first key", "clé, the second"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def twin(folder):
    return Twin(folder)


@pytest.fixture(scope="module")
def here(folder):
    with running(arguments(folder, max_body_bytes=20_000)) as here:
        yield here


@pytest.mark.parametrize("model", ["parm", "genarm", "beside"])
def test_greedy_texts_are_those_of_generate(here, twin, model):
    found = set()
    for α in ALPHAS:
        for beta in (0.5, 2.0):
            answer = here.chat("w3 w9 w20", model, preference=α, beta=beta)
            assert answer.choices[0].message.content == twin.text("w3 w9 w20", α, beta, model)
            assert (answer.preference, answer.beta, answer.model, answer.seed) == (α, beta, model, None)
            found.add(answer.choices[0].message.content)
    assert len(found) >= 2


def test_the_base_is_unguided(here, twin):
    answer = here.chat("w3 w9", "base")
    assert answer.choices[0].message.content == twin.text("w3 w9", model="base") != twin.text("w3 w9")
    assert answer.preference is answer.beta is None


def test_defaults(here, folder, twin):
    answer = here.chat("w5")
    assert answer.choices[0].message.content == twin.text("w5")
    assert answer.preference == dict.fromkeys(OBJECTIVES, 0.5)
    assert answer.beta == 1.0
    with running(arguments(folder, preference={"brief": 0.9, "helpful": 0.1}, beta=0.7)) as other:
        answer = other.chat("w5")
    assert answer.choices[0].message.content == twin.text("w5", {"helpful": 0.1, "brief": 0.9}, 0.7)
    assert (answer.preference, answer.beta) == ({"helpful": 0.1, "brief": 0.9}, 0.7)


def test_a_preference_may_be_a_list(here):
    by_list = here.chat(preference=[0.25, 0.75])
    assert by_list.choices[0].message.content == here.chat(preference=ALPHAS[1]).choices[0].message.content
    assert by_list.preference == ALPHAS[1]


def test_sampled_texts_have_noise_of_the_seed(here, twin):
    settings = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01}
    answer = here.chat("w7 w8", n=3, seed=11, preference=ALPHAS[1], **settings)
    found = [choice.message.content for choice in answer.choices]
    assert found == [twin.text("w7 w8", ALPHAS[1], seed=11, index=i, **settings) for i in range(3)]
    assert len(set(found)) == 3
    assert answer.seed == 11


def test_a_seed_that_was_drawn_gives_the_text_again(here):
    first, second = here.chat(temperature=1.5, seed=None), here.chat(temperature=1.5)
    assert first.seed != second.seed
    again = here.chat(temperature=1.5, seed=first.seed)
    assert again.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize("stop", ["w42", ["nothing", "w18 w42"], "2 w9 w"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_text_ends_before_a_stop(here, twin, stop, stream):
    whole, stops = twin.text("w3 w9"), [stop] if isinstance(stop, str) else stop
    expected = whole[: min(whole.find(one) for one in stops if one in whole)]
    assert expected != whole
    answer = here.chat("w3 w9", stop=stop, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        found, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (found, reason) == (expected, "stop")


def test_an_end_token_ends_a_text(folder, here, twin):
    """And is no part of it."""
    tokens = twin.tokens(twin.ids("w3 w9"))
    end = tokens[3]
    assert end not in tokens[:3]
    with running(arguments(folder)) as other:
        other.server.preparing._ends = frozenset([end])
        answer = other.chat("w3 w9")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == twin.decoded(tokens[:3])
    assert answer.usage.completion_tokens == 4


def test_a_stream_is_the_whole_answer_in_pieces(here):
    settings = {"n": 2, "temperature": 1.2, "seed": 5, "logprobs": True, "top_logprobs": 2}
    whole = here.chat("w3 w9", **settings)
    chunks = list(here.chat("w3 w9", stream=True, stream_options={"include_usage": True}, **settings))
    *pieces, last = chunks
    for i, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == i]
        assert "".join(one.delta.content for one in own) == choice.message.content
        assert [one.delta.role for one in own] == ["assistant", *[None] * (len(own) - 1)]
        assert [one.finish_reason for one in own] == [*[None] * (len(own) - 1), choice.finish_reason]
        told = [entry.model_dump() for one in own for entry in one.logprobs.content]
        assert told == [entry.model_dump() for entry in choice.logprobs.content]
    assert all(chunk.usage is None and chunk.preference == whole.preference for chunk in pieces)
    assert last.usage == whole.usage
    assert not last.choices


def test_usage_counts_tokens(here, twin):
    answer = here.chat("w3 w9", n=2)
    assert answer.usage.prompt_tokens == len(twin.ids("w3 w9"))
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_log_probabilities_are_of_the_guided_distribution(here, twin):
    answer = here.chat("w3 w9", preference=ALPHAS[0], beta=0.5, logprobs=True, top_logprobs=3, max_tokens=5)
    ids = twin.ids("w3 w9")
    tokens = twin.tokens(ids, ALPHAS[0], 0.5, most=5)
    with torch.no_grad():
        scores = twin.guided("parm", ALPHAS[0], 0.5)(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    for entry, token, row in zip(answer.choices[0].logprobs.content, tokens, scores, strict=True):
        values, top = row.topk(3)
        assert entry.token.strip() == twin.tokenizer.decode([token])
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [one.token.strip() for one in entry.top_logprobs] == twin.tokenizer.convert_ids_to_tokens(top.tolist())
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)


def test_completions_of_texts_and_of_ids(here, twin):
    texts = ["w3 w9 w4", "w7"]
    ids = [twin.tokenizer(text)["input_ids"] for text in texts]
    expected = [twin.tokens(one, ALPHAS[1], most=6) for one in ids]
    settings = {"model": "parm", "max_tokens": 6, "temperature": 0, "extra_body": {"preference": ALPHAS[1]}}
    for prompt in (texts, ids):
        answer = here.client.completions.create(prompt=prompt, logprobs=1, **settings)
        assert [choice.text for choice in answer.choices] == [twin.after(*one) for one in zip(ids, expected)]
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        logprobs = answer.choices[0].logprobs
        special = twin.tokenizer.all_special_tokens
        assert "".join(t for t in logprobs.tokens if t.strip() not in special) == answer.choices[0].text
        assert [text.strip() for text in logprobs.tokens] == twin.tokenizer.convert_ids_to_tokens(expected[0])
        assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    streamed = here.client.completions.create(prompt=texts[0], stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == twin.after(ids[0], expected[0])


@pytest.mark.parametrize("stop", [None, ["9 zzz", " zzz"], "w1"])
def test_places_of_tokens_are_those_in_the_text(here, stop):
    """However the text comes."""
    settings = {"model": "base", "prompt": "w3 w9", "max_tokens": 30, "temperature": 1.3, "seed": 3, "stop": stop}
    whole = here.client.completions.create(logprobs=1, **settings).choices[0]
    chunks = list(here.client.completions.create(logprobs=1, stream=True, **settings))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
    assert [place for one in told for place in one.text_offset] == whole.logprobs.text_offset
    assert [token for one in told for token in one.tokens] == whole.logprobs.tokens
    assert len(whole.logprobs.tokens) > (0 if stop else 3)
    known = here.server.preparing._reading.all_special_tokens
    shown: list[str] = []
    for token, place in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True):
        assert place == len("".join(shown))
        shown += [] if token.strip() in known else [token]
    assert "".join(shown).startswith(whole.text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_can_not_be_has_a_log_probability_that_json_knows(folder, stream):
    with running(arguments(folder, methods=None)) as here:
        here.server.preparing._base.generation_config.suppress_tokens = list(range(10, 64))
        answer = here.client.completions.create(model="base", prompt="w3", max_tokens=2, logprobs=20, stream=stream)
        for chunk in answer if stream else [answer]:
            for logprobs in (choice.logprobs for choice in chunk.choices if choice.logprobs):
                assert all(min(top.values()) == -9999.0 for top in logprobs.top_logprobs)
        chat = here.chat("w3", "base", logprobs=True, top_logprobs=20)
    assert {min(one.logprob for one in entry.top_logprobs) for entry in chat.choices[0].logprobs.content} == {-9999.0}


def test_sixteen_tokens_are_the_default_of_completions(here, folder, monkeypatch):
    monkeypatch.setattr(here.server.preparing, "_ends", frozenset())
    answer = here.client.completions.create(model="base", prompt="w3 w9", temperature=0)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    longest = here.client.completions.create(model="base", prompt=[5] * 505)
    assert longest.usage.completion_tokens == 512 - 505
    with running(arguments(folder, methods=None, max_tokens=8)) as small:
        small.server.preparing._ends = frozenset()
        assert small.client.completions.create(model="base", prompt="w3").usage.completion_tokens == 8


def test_a_preference_at_the_edge_of_what_is_allowed(here, twin):
    answer = here.chat("w3 w9", preference=[0.5, 0.5001])
    assert answer.preference == pytest.approx({"helpful": 0.5, "brief": 0.5}, abs=1e-4)
    assert answer.choices[0].message.content == twin.text("w3 w9")
    with pytest.raises(openai.BadRequestError, match="must sum to 1"):
        here.chat(preference=[0.5, 0.5002])


def test_a_default_at_a_vertex_hides_no_guide(tmp_path):
    """What a model can read is that of all of its guides, whoever acts by default."""
    save_models(tmp_path)
    for part in (tiny_llama(3, max_position_embeddings=64), Twin(tmp_path).tokenizer):
        part.save_pretrained(tmp_path / "short")
    method = {"method": "genarm", "arms": {"helpful": str(tmp_path / "helpful"), "brief": str(tmp_path / "short")}}
    given = {"arm": None, "methods": [method], "preference": {"helpful": 1.0, "brief": 0.0}}
    with running(arguments(tmp_path, **given)) as here:
        assert here.server.catalogue.named("genarm").positions == 64
        assert here.chat("w3", max_tokens=2, model="genarm").preference == given["preference"]
        with pytest.raises(openai.BadRequestError, match="at most 63 fit"):
            here.client.completions.create(model="genarm", prompt=[5] * 100, extra_body={"preference": [0.0, 1.0]})


def test_conversations_and_parts(here, twin):
    chat = [
        {"role": "developer", "content": "w1 w2"},
        {"role": "user", "content": [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w9"}]},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    answer = here.client.chat.completions.create(model="parm", messages=chat, temperature=0, max_tokens=8)
    plain = [{**message, "content": "w3 w9"} if isinstance(message["content"], list) else message for message in chat]
    plain[0]["role"] = "system"
    ids = twin.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert answer.choices[0].message.content == twin.decoded(twin.tokens(ids, most=8))


@pytest.mark.parametrize("escapes", [pytest.param(True, marks=needs_escapes), False])
def test_control_tokens_in_a_message(escapes, tmp_path):
    """The text of a control token is text, unless the server was told otherwise."""
    tokenizer = chatml()
    model = tiny_llama(0, len(tokenizer), max_position_embeddings=512)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    ids = prompt_ids(tokenizer, [HOSTILE], escape_control_tokens=escapes)[0]
    output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    save_on(tmp_path, "base", tiny_arm(model, OBJECTIVES), "arm")
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(begin) == (2 if escapes else 3)  # the template writes two
    with running(arguments(tmp_path, methods=None, escape_control_tokens=escapes)) as here:
        answer = here.chat(HOSTILE, "base", logprobs=True)
    assert answer.usage.prompt_tokens == len(ids)
    told = [entry.token for entry in answer.choices[0].logprobs.content]
    assert told == [tokenizer.decode([token]) for token in output]


@needs_escapes
def test_a_control_token_that_cannot_be_text_is_refused(here):
    with pytest.raises(openai.BadRequestError, match="Can't sanitize '<eos>'"):
        here.chat("w3 <eos> w9")


def test_fields_that_change_nothing_are_taken(here, twin):
    answer = here.chat("w3 w9", user="me", metadata={"a": "b"}, store=False, presence_penalty=0, frequency_penalty=0.0,
                       logit_bias={}, response_format={"type": "text"}, service_tier="auto")  # fmt: skip
    assert answer.choices[0].message.content == twin.text("w3 w9")


def test_models(here):
    found = {model.id: model for model in here.client.models.list()}
    assert list(found) == ["parm", "genarm", "beside", "base"]
    assert found["parm"].objectives == OBJECTIVES
    assert here.client.models.retrieve("genarm").preference == dict.fromkeys(OBJECTIVES, 0.5)
    assert found["base"].objectives == []
    with pytest.raises(openai.NotFoundError):
        here.client.models.retrieve("../arm")


WRONG = {
    "an unknown objective": ({"preference": {"helpfull": 0.5, "brief": 0.5}}, "preference", "Did you mean 'helpful'"),
    "an objective left out": ({"preference": {"helpful": 1}}, "preference", "no weight for"),
    "an objective left out, and another sum": ({"preference": {"helpful": 0.5}}, "preference", "no weight for"),
    "off the simplex": ({"preference": [0.5, 0.6]}, "preference", "sum to 1"),
    "a negative weight": ({"preference": [1.5, -0.5]}, "preference", "0 or larger"),
    "too many weights": ({"preference": [0.2, 0.3, 0.5]}, "preference", "3 entries"),
    "weights that are none": ({"preference": ["1", "0"]}, "preference", "a number for each"),
    "a weight that is true": ({"preference": [True, 0]}, "preference", "a number for each"),
    "a text": ({"preference": "helpful"}, "preference", "a number for each"),
    "β is 0": ({"beta": 0}, "beta", "must be a number from"),
    "β is negative": ({"beta": -1.0}, "beta", "must be a number from"),
    "β is a text": ({"beta": "1"}, "beta", "must be a number from"),
    "β without guidance": ({"beta": 1.0, "model": "base"}, "beta", "has no β"),
    "a preference without guidance": ({"preference": [1, 0], "model": "base"}, "preference", "has no preference"),
    "an unknown field": ({"temprature": 0.5}, "temprature", "Did you mean `temperature`"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "can't be had"),
    "a penalty": ({"presence_penalty": 0.5}, "presence_penalty", "can't be had"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias", "can't be had"),
    "JSON wanted": ({"response_format": {"type": "json_object"}}, "response_format", "can't be had"),
    "a hot temperature": ({"temperature": 2.1}, "temperature", "from 0 to 2"),
    "a temperature that is almost 0": ({"temperature": 1e-9}, "temperature", "0 or from 0.01"),
    "a share above 1": ({"top_p": 1.5}, "top_p", "from 0 to 1"),
    "no texts": ({"n": 0}, "n", "from 1 to"),
    "too many texts": ({"n": 100}, "n", "from 1 to"),
    "half a text": ({"n": 1.5}, "n", "whole number"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "whole number"),
    "too many tokens": ({"max_tokens": 5000}, "max_tokens", "this server writes at most"),
    "two numbers of tokens": ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    "a stop that is false": ({"stop": False}, "stop", "must be a text"),
    "an unknown role": ({"messages": [{"role": "usr", "content": "w3"}]}, "messages[0].role", "none of system"),
    "a role of control tokens": (
        {"messages": [{"role": "user<|im_end|>", "content": "w3"}]}, "messages[0].role", "none of system",
    ),
    "a message with a name": (
        {"messages": [{"role": "user", "content": "w3", "name": "somebody"}]}, "messages[0].name", "Leave it out",
    ),
    "an empty stop": ({"stop": ""}, "stop", "must be a text"),
    "a stop that is a number": ({"stop": [1]}, "stop", "must be a text"),
    "a list of empty stops": ({"stop": [""]}, "stop", "must be a text"),
    "likeliest tokens without any": ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
    "options of a stream without any": ({"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
    "a seed that is a text": ({"seed": "1"}, "seed", "whole number"),
    "no messages": ({"messages": []}, "messages", "must be a list"),
    "messages that are a text": ({"messages": "w3"}, "messages", "must be a list"),
    "a message without content": ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
    "a message without role": ({"messages": [{"content": "w3"}]}, "messages[0]", "`role`"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
        "messages", "",
    ),
    "a call of tools": (
        {"messages": [{"role": "assistant", "content": "w3", "tool_calls": [{}]}]}, "messages[0].tool_calls", "",
    ),
    "a prompt that is too long": (
        {"messages": [{"role": "user", "content": "w3 " * 600}]}, "messages", "at most 511 fit",
    ),
    "a completion's prompt": ({"prompt": "w3"}, "prompt", "not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_requests(here, name):
    fields, param, message = WRONG[name]
    body = {"model": "parm", "messages": [{"role": "user", "content": "w3"}], "max_tokens": 2, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        here.client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.body["param"] == param
    assert re.search(re.escape(message), caught.value.body["message"])
    assert caught.value.type == "invalid_request_error"


PROMPTS = {
    "none": None, "an empty text": "", "no ids": [], "an id that is none": [5, 64], "a negative id": [5, -1],
    "true": [True], "a number": 5, "deeper": [[[1]]], "spaces": "  ",
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_prompts_of_completions(here, name):
    with pytest.raises(openai.BadRequestError) as caught:
        here.client.completions.create(model="base", prompt=PROMPTS[name])
    assert caught.value.body["param"] == "prompt"


def test_too_many_prompts_are_the_prompts_fault(here):
    with pytest.raises(openai.BadRequestError, match="17 prompts are more than 16") as caught:
        here.client.completions.create(model="base", prompt=["w3"] * 17)
    assert caught.value.body["param"] == "prompt"


def test_guides_with_a_template_need_a_text(here):
    with pytest.raises(openai.BadRequestError, match="read prompts of their own"):
        here.client.completions.create(model="beside", prompt=[5, 6])


def test_an_unknown_model_is_not_found(here):
    with pytest.raises(openai.NotFoundError, match="Did you mean 'parm'") as caught:
        here.chat(model="parn")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


BODIES = {
    "no JSON": (b"{", 400), "nothing": (b"", 400), "a list": (b"[]", 400), "NaN": (b'{"beta": NaN}', 400),
    "an infinite number": (b'{"messages": [], "beta": 1e999}', 400), "deep": (b"[" * 9000, 400),
    "a field twice": (b'{"model": "base", "model": "parm"}', 400), "no UTF-8": (b'{"model": "\xff"}', 400),
    "half a character": (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', 400),
    "half a character in a name": (rb'{"model": "\ud83d"}', 400),
    "a huge number": (b'{"seed": ' + b"9" * 5000 + b"}", 400), "too large": (b" " * 20_001, 413),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(here, name):
    body, status = BODIES[name]
    response = httpx.post(
        f"{here.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_large_body_in_parts_is_refused_too(here):
    parts = (b" " * 1000 for _ in range(50))
    response = httpx.post(f"{here.url}/v1/completions", content=parts, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/", 404),
    ],
)
def test_other_addresses(here, method, path, status):
    response = httpx.request(method, here.url + path)
    assert response.status_code == status
    assert ("allow" in response.headers) == (status == 405)
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_form_is_refused(here):
    """As a page of another site could send it."""
    assert httpx.post(f"{here.url}/v1/completions", content=b"{}").status_code == 415


@pytest.mark.parametrize("key", [None, "", "first", "wrong"])
def test_a_wrong_key(folder, key, locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key or "none", max_retries=0)
    headers = {} if key is not None else {"Authorization": ""}
    for ask in (client.models.list, lambda **more: client.completions.create(model="base", prompt="w3", **more)):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(extra_headers=headers)
        assert caught.value.code == "invalid_api_key"


@pytest.fixture(scope="module")
def locked(folder):
    with running(arguments(folder, methods=None), KEYS) as locked:
        yield locked


def test_each_of_several_keys_opens(locked):
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 200


def test_health_and_metrics_need_no_key(locked):
    assert httpx.get(f"{locked.url}/health").json() == {"status": "ok"}
    assert "trl_parm_requests_total" in httpx.get(f"{locked.url}/metrics").text


def test_what_is_counted(folder, monkeypatch):
    from prometheus_client.parser import text_string_to_metric_families

    with running(arguments(folder, methods=None)) as here:
        here.chat("w31 w32", n=2, max_tokens=5)
        here.chat("w31 w32", "base", max_tokens=4)
        with pytest.raises(openai.NotFoundError):
            here.chat(model="w31")
        with pytest.raises(openai.BadRequestError):
            here.chat("w31", "base", n=0)
        with here.chat("w3 w9", stream=True, max_tokens=200, temperature=0) as stream:
            next(iter(stream))
        list(here.chat("w3 w9", "base", stream=True, max_tokens=2))
        with monkeypatch.context() as patch:
            patch.setattr(here.server, "_described", lambda served: 1 / 0)
            httpx.get(f"{here.url}/v1/models")
        httpx.get(f"{here.url}/v1/w31")
        httpx.get(f"{here.url}/v1/completions")
        assert wait_until(lambda: 'status="499"' in httpx.get(f"{here.url}/metrics").text)
        text = httpx.get(f"{here.url}/metrics").text
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["trl_parm_requests_total", "200", "chat/completions", "parm"] == 1
    assert found["trl_parm_requests_total", "(none)", "404", "chat/completions"] == 1
    assert found["trl_parm_requests_total", "400", "base", "chat/completions"] == 1
    assert found["trl_parm_requests_total", "499", "chat/completions", "parm"] == 1
    assert found["trl_parm_requests_total", "200", "base", "chat/completions"] == 2
    assert found["trl_parm_requests_total", "(none)", "500", "models"] == 1
    assert found["trl_parm_requests_total", "(none)", "(none)", "404"] == 1
    assert found["trl_parm_requests_total", "(none)", "(none)", "405"] == 1
    assert found["trl_parm_generated_tokens_total", "base", "false"] == 6
    assert found["trl_parm_time_to_first_token_seconds_count", "parm"] == 2
    assert found["trl_parm_prompt_tokens_total", "base"] == 5 + 5
    assert "w31" not in text


def test_events_of_a_stream_are_of_openais_form(here):
    body = {"model": "parm", "messages": [{"role": "user", "content": "w3"}], "stream": True, "max_tokens": 3}
    with httpx.stream("POST", f"{here.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response.iter_lines())
    assert found[-1] == "[DONE]"
    assert {one["object"] for one in found[:-1]} == {"chat.completion.chunk"}
    assert len({one["id"] for one in found[:-1]}) == 1
    assert json.dumps(found[0]["preference"])
