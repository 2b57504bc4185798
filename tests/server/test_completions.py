"""POST /v1/completions: OpenAI's shapes, and what harnesses read log-probabilities from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

Open = Callable[..., Any]

PATH = "/v1/completions"


def events(answer: Any) -> list[Any]:
    """The documents of a stream, which ends with [DONE] and holds nothing but data lines."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_an_answer_has_the_shape_of_openais(setting: Any) -> None:
    answer = setting.ask(PATH, model="tiny", prompt="the king", max_tokens=4, temperature=0)
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "b" * 64,
        "choices": [{"index": 0, "text": "the king" * 2, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
    }


def test_what_was_asked_reaches_the_engine(setting: Any) -> None:
    setting.ask(
        PATH, model="queen", prompt="the king", max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, stop=["x", "y"],
        seed=11, repetition_penalty=1.5, logprobs=3, user="somebody", nonsense=[1],
    )  # fmt: skip
    (request,) = setting.engine.seen
    assert (request.adapter, request.logprobs, request.prompt_logprobs) == ("queen", 3, False)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 11)
    assert (sampling.stop, sampling.repetition_penalty, sampling.max_new_tokens) == (("x", "y"), 1.5, 5)


def test_defaults_are_openais(setting: Any) -> None:
    setting.ask(PATH, model="tiny", prompt="the king", temperature=None, stop=None)
    sampling = setting.engine.seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (1.0, 1.0, 0, 16)


def test_json_has_no_whole_numbers_of_its_own(setting: Any) -> None:
    answer = setting.ask(PATH, prompt=[5.0, 6], max_tokens=3.0, n=1.0, seed=7.0, temperature=1)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert setting.engine.seen[0].prompt == (5, 6)
    assert all(type(number) is int for number in setting.engine.seen[0].prompt)


def test_without_a_seed_two_answers_are_drawn_differently(setting: Any) -> None:
    setting.ask(PATH, prompt="the")
    setting.ask(PATH, prompt="the")
    assert len({request.sampling.seed for request in setting.engine.seen}) == 2


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_seed_of_64_bits_is_one_that_the_engine_takes(setting: Any, seed: int) -> None:
    setting.ask(PATH, prompt="the", seed=seed, n=2)
    assert all(0 <= request.sampling.seed < 2**63 for request in setting.engine.seen)


def test_a_control_tokens_string_in_a_prompt_stays_text(setting: Any) -> None:
    setting.ask(PATH, prompt="<|im_end|>")
    assert 2 not in setting.engine.seen[0].prompt


def test_prompts_come_in_four_forms(setting: Any) -> None:
    one, two = setting.ids("the king"), setting.ids(" king king")
    for prompt, expected in (
        ("the king", [one]),
        (["the king", " king king"], [one, two]),
        (one, [one]),
        ([one, two], [one, two]),
    ):
        setting.engine.seen.clear()
        answer = setting.ask(PATH, prompt=prompt, max_tokens=2)
        assert [list(request.prompt) for request in setting.engine.seen] == expected
        texts = ["the king", " king king"][: len(expected)]
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_n_answers_for_each_prompt_differ_in_their_seeds_alone(opened: Open) -> None:
    setting = opened(engine={"slots": 8})
    answer = setting.ask(PATH, prompt=["the", " king"], n=3, seed=5, max_tokens=1)
    assert [choice["text"] for choice in answer["choices"]] == ["the"] * 3 + [" king"] * 3
    assert [request.sampling.seed for request in setting.engine.seen] == [5, 6, 7] * 2
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_a_stop_string_and_an_end_token_end_with_stop(setting: Any) -> None:
    stopped = setting.ask(PATH, prompt="the king spoke", stop=" spoke")["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("the king", "stop")
    whole = setting.ask(PATH, prompt="the é king", stop=["q", "é"])["choices"][0]
    assert (whole["text"], whole["finish_reason"]) == ("the ", "stop")
    ended = setting.ask(PATH, prompt=[*setting.ids("the king"), 2], logprobs=0)
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("the king", "stop")
    assert ended["usage"]["completion_tokens"] == 3
    assert ended["choices"][0]["logprobs"]["tokens"] == ["the", " king", "<|im_end|>"]


def test_logprobs_name_each_token_its_rivals_and_where_it_stands(setting: Any) -> None:
    prompt = "the king"
    choice = setting.ask(PATH, prompt=prompt, max_tokens=3, logprobs=1)["choices"][0]
    told = choice["logprobs"]
    assert told["tokens"] == ["the", " king", "the"]
    assert told["text_offset"] == [0, 3, 8]
    for number, token in zip([*setting.ids(prompt), setting.ids(prompt)[0]], range(3), strict=True):
        own, top = told["token_logprobs"][token], told["top_logprobs"][token]
        assert own == (-0.25 if number % 2 == 0 else -0.5)
        assert len(top) == 1 + number % 2, "the token itself is always among them"
        assert top[told["tokens"][token]] == own
        assert max(top.values()) == -0.25


def test_tokens_that_are_parts_of_characters_have_names_of_their_own(setting: Any) -> None:
    choice = setting.ask(PATH, prompt="é", max_tokens=2, logprobs=0)["choices"][0]
    assert choice["text"] == "é"
    assert choice["logprobs"]["tokens"] == [r"bytes:\xc3", r"bytes:\xa9"]


def test_a_logprob_of_minus_infinity_is_json(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.infer.requests import Token

    told = Token(5, "", logprob=-float("inf"), top=((4, -0.1), (5, -float("inf"))))
    monkeypatch.setattr(setting.engine, "told", lambda *_: told, raising=False)
    choice = setting.ask(PATH, prompt="the", max_tokens=1, logprobs=2)["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]
    assert min(choice["logprobs"]["top_logprobs"][0].values()) == -9999.0


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_harness_reads_how_likely_a_text_is(setting: Any, max_tokens: int, stream: bool) -> None:
    """The reading of lm-eval's local-completions: the logprobs from the context's end on, without the new token's."""
    context, continuation = setting.ids("the king spoke"), setting.ids(" to the queen")
    ids = [*context, *continuation]
    asked = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234}
    if stream:
        pieces = events(setting.client.post(PATH, json={**asked, "stream": True}))
        assert len(pieces) == 1
        choice = pieces[0]["choices"][0]
    else:
        answer = setting.ask(PATH, **asked)
        choice = answer["choices"][0]
        assert answer["usage"] == {
            "prompt_tokens": len(ids), "completion_tokens": max_tokens, "total_tokens": len(ids) + max_tokens
        }  # fmt: skip
    told = choice["logprobs"]
    assert all(len(values) == len(ids) + max_tokens for values in told.values())
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    read = told["token_logprobs"][len(context) : len(ids)]
    assert read == [-0.25 if number % 2 == 0 else -0.5 for number in continuation]
    greedy = [own == max(top.values()) for own, top in zip(read, told["top_logprobs"][len(context) :], strict=False)]
    assert greedy == [number % 2 == 0 for number in continuation]
    said = "the" if max_tokens else ""
    assert choice["text"] == "the king spoke to the queen" + said
    assert choice["finish_reason"] == "length"
    edges = [*told["text_offset"], len(choice["text"])]
    pieces = [choice["text"][start:end] for start, end in pairwise(edges)]
    assert pieces == told["tokens"]


def test_echo_without_logprobs_gives_the_prompt_back_as_it_was(setting: Any) -> None:
    answer = setting.ask(PATH, prompt="the <|im_end|>  é", echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "the <|im_end|>  é"
    assert answer["choices"][0]["logprobs"] is None
    assert setting.engine.seen[0].prompt_logprobs is False
    answer = setting.ask(PATH, prompt="the king", echo=True, max_tokens=4, logprobs=0)
    assert answer["choices"][0]["text"] == "the king" * 3
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 6


def test_a_stream_is_the_whole_answer_in_pieces(opened: Open) -> None:
    setting = opened(engine={"slots": 4})
    asked = {"prompt": ["the king spoke", "é"], "n": 2, "max_tokens": 5, "logprobs": 1, "seed": 3, "echo": True}
    whole = setting.ask(PATH, **asked)
    pieces = events(setting.client.post(PATH, json={**asked, "stream": True}))
    assert len({piece["id"] for piece in pieces}) == 1
    assert all(piece["system_fingerprint"] == whole["system_fingerprint"] for piece in pieces)
    assert all(piece["object"] == "text_completion" and piece["usage"] is None for piece in pieces)
    for choice in whole["choices"]:
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + ["length"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in own for value in piece["logprobs"][name]] == values
    assert len(pieces) > 4


def test_a_stream_sends_no_empty_pieces(setting: Any) -> None:
    pieces = events(setting.client.post(PATH, json={"prompt": "é", "max_tokens": 4, "stream": True}))
    assert [piece["choices"][0]["text"] for piece in pieces] == ["é", "é"]


def test_a_stream_tells_its_usage_at_the_end_if_asked(setting: Any) -> None:
    asked = {"prompt": "the king", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = events(setting.client.post(PATH, json=asked))
    assert all(piece["usage"] is None for piece in pieces)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["the", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [5.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": [5] * 64}, "prompt"),
        ({"prompt": "q" * 100}, "prompt"),
        ({"prompt": ["the"] * 129}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": 5}, "model"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": "2"}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "a" * 201}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"stream": 1}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -0.5}, "presence_penalty"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(setting: Any, body: dict[str, Any], param: str) -> None:
    asked = body if param == "prompt" else {"prompt": "the", **body}
    status, error = setting.refusal(PATH, **asked)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"] or param == "prompt"
    assert setting.engine.seen == []


def test_what_would_change_the_answer_is_refused_and_what_would_not_is_taken(setting: Any) -> None:
    _, error = setting.refusal(PATH, prompt="the", frequency_penalty=1)
    assert error["code"] == "unsupported_parameter"
    assert "repetition_penalty" in error["message"]
    setting.ask(
        PATH, prompt="the", frequency_penalty=0, presence_penalty=0.0, logit_bias={}, best_of=1, suffix=None, n=1
    )


def test_numbers_that_json_does_not_have_are_refused(setting: Any) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"prompt": "the", "temperature": {number}}}'
        answer = setting.client.post(PATH, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
    assert setting.engine.seen == []


def test_a_prompt_leaves_room_for_an_answer_and_the_servers_limit_may_be_narrower(opened: Open) -> None:
    assert opened().ask(PATH, prompt=[5] * 63, max_tokens=9)["usage"]["completion_tokens"] == 1
    narrow = opened(max_prompt_tokens=3, max_new_tokens=4)
    status, error = narrow.refusal(PATH, prompt=[5] * 4)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert narrow.ask(PATH, prompt=[5] * 3)["usage"]["completion_tokens"] == 4
    assert narrow.refusal(PATH, prompt="the", max_tokens=5)[1]["param"] == "max_tokens"


def test_an_unknown_model_is_404(setting: Any) -> None:
    status, error = setting.refusal(PATH, model="hamlet", prompt="the")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "tiny, king, queen" in error["message"]


@pytest.mark.parametrize(
    ("model", "adapter", "fingerprint"),
    [("tiny", None, "b"), ("king", "king", "c"), ("queen", "queen", "d"), (None, "king", "c")],
)
def test_the_model_picks_the_adapter_and_the_fingerprint_is_its_hash(
    setting: Any, model: str | None, adapter: str | None, fingerprint: str
) -> None:
    answer = setting.ask(PATH, model=model, prompt="the")
    assert setting.engine.seen[0].adapter == adapter
    assert answer["system_fingerprint"] == fingerprint * 64
    assert answer["model"] == model or model is None


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions", "/prompt/"])
def test_the_fingerprint_is_of_what_answers_and_not_of_what_the_name_meant_before(
    opened: Open, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is exchanged under its name between the request's arrival and its taking."""
    setting = opened()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"other")
    submit = setting.engine.submit

    def exchanged(request: Any) -> Any:
        setting.engine.load_adapter("king", tmp_path)
        return submit(request)

    monkeypatch.setattr(setting.engine, "submit", exchanged, raising=False)
    messages = [{"role": "user", "content": "the"}]
    answer = setting.client.post(path, json={"model": "king", "prompt": "the", "input": "the", "messages": messages})
    told = answer.headers.get("X-System-Fingerprint") or answer.json()["system_fingerprint"]
    assert told == hashlib.sha256(b"other").hexdigest()


def test_a_text_that_no_prompt_can_hold_is_refused_unread(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.server import service

    def never(*_: Any) -> list[int]:
        raise AssertionError

    longest = max(map(len, setting.engine.tokenizer.get_vocab()))
    assert setting.ask("/tokenize", prompt="a" * 63 * longest)["count"] >= 63
    monkeypatch.setattr(service, "encode_prompt", never)
    monkeypatch.setattr(service, "encode_conversation", never)
    text = "a" * (63 * longest + 1)
    for path, param, body in (
        (PATH, "prompt", {"prompt": text}),
        ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": text}]}),
        ("/prompt/", "input", {"input": text}),
        ("/tokenize", "prompt", {"prompt": text}),
    ):
        status, error = setting.refusal(path, **body)
        assert (status, error["param"], error["code"]) == (400, param, "context_length_exceeded")


def test_without_adapters_the_base_answers(opened: Open) -> None:
    setting = opened(engine={"names": ()})
    assert setting.ask(PATH, prompt="the")["model"] == "tiny"


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\xff"}']
)
def test_a_body_that_json_cannot_be_read_from_says_what_may_be_wrong(setting: Any, body: bytes) -> None:
    answer = setting.client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "no UTF-8, or its JSON is nested too deep" in answer.json()["error"]["message"]
