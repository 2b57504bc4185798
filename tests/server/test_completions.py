"""POST /v1/completions: OpenAI's format, and the logprobs that evaluation harnesses read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

OpenServer = Callable[..., Any]

PATH = "/v1/completions"


def events(response: Any) -> list[Any]:
    """The JSON documents of a stream, which must have data lines only and end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_the_response_has_openais_format(server: Any) -> None:
    response = server.post(PATH, model="tiny", prompt="the king", max_tokens=4, temperature=0)
    assert response.pop("id").startswith("cmpl-")
    assert isinstance(response.pop("created"), int)
    assert response == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": "b" * 64,
        "choices": [{"index": 0, "text": "the king" * 2, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
    }


def test_parameters_are_passed_to_the_engine(server: Any) -> None:
    server.post(
        PATH, model="queen", prompt="the king", max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, stop=["x", "y"],
        seed=11, repetition_penalty=1.5, logprobs=3, user="somebody", nonsense=[1],
    )  # fmt: skip
    (request,) = server.engine.submitted
    assert (request.adapter, request.logprobs, request.prompt_logprobs) == ("queen", 3, False)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 11)
    assert (sampling.stop, sampling.repetition_penalty, sampling.max_new_tokens) == (("x", "y"), 1.5, 5)


def test_defaults_are_those_of_openai(server: Any) -> None:
    server.post(PATH, model="tiny", prompt="the king", temperature=None, stop=None)
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (1.0, 1.0, 0, 16)


def test_integral_floats_are_accepted_as_integers(server: Any) -> None:
    response = server.post(PATH, prompt=[5.0, 6], max_tokens=3.0, n=1.0, seed=7.0, temperature=1)
    assert response["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert server.engine.submitted[0].prompt == (5, 6)
    assert all(type(number) is int for number in server.engine.submitted[0].prompt)


def test_without_a_seed_each_request_gets_a_different_one(server: Any) -> None:
    server.post(PATH, prompt="the")
    server.post(PATH, prompt="the")
    assert len({request.sampling.seed for request in server.engine.submitted}) == 2


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_64_bit_seed_is_mapped_to_a_valid_one(server: Any, seed: int) -> None:
    server.post(PATH, prompt="the", seed=seed, n=2)
    assert all(0 <= request.sampling.seed < 2**63 for request in server.engine.submitted)


def test_special_token_strings_in_a_prompt_are_plain_text(server: Any) -> None:
    server.post(PATH, prompt="<|im_end|>")
    assert 2 not in server.engine.submitted[0].prompt


def test_the_four_prompt_types(server: Any) -> None:
    one, two = server.ids("the king"), server.ids(" king king")
    for prompt, expected in (
        ("the king", [one]),
        (["the king", " king king"], [one, two]),
        (one, [one]),
        ([one, two], [one, two]),
    ):
        server.engine.submitted.clear()
        response = server.post(PATH, prompt=prompt, max_tokens=2)
        assert [list(request.prompt) for request in server.engine.submitted] == expected
        texts = ["the king", " king king"][: len(expected)]
        assert [choice["text"] for choice in response["choices"]] == texts
        assert [choice["index"] for choice in response["choices"]] == list(range(len(expected)))
        assert response["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_n_choices_of_a_prompt_differ_in_the_seed_only(open_server: OpenServer) -> None:
    server = open_server(engine={"slots": 8})
    response = server.post(PATH, prompt=["the", " king"], n=3, seed=5, max_tokens=1)
    assert [choice["text"] for choice in response["choices"]] == ["the"] * 3 + [" king"] * 3
    assert [request.sampling.seed for request in server.engine.submitted] == [5, 6, 7] * 2
    assert response["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_finish_reason_is_stop_for_stop_strings_and_the_eos_token(server: Any) -> None:
    stopped = server.post(PATH, prompt="the king spoke", stop=" spoke")["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("the king", "stop")
    choice = server.post(PATH, prompt="the é king", stop=["q", "é"])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("the ", "stop")
    ended = server.post(PATH, prompt=[*server.ids("the king"), 2], logprobs=0)
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("the king", "stop")
    assert ended["usage"]["completion_tokens"] == 3
    assert ended["choices"][0]["logprobs"]["tokens"] == ["the", " king", "<|im_end|>"]


def test_logprobs_contain_tokens_top_logprobs_and_offsets(server: Any) -> None:
    prompt = "the king"
    choice = server.post(PATH, prompt=prompt, max_tokens=3, logprobs=1)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["the", " king", "the"]
    assert logprobs["text_offset"] == [0, 3, 8]
    for number, token in zip([*server.ids(prompt), server.ids(prompt)[0]], range(3), strict=True):
        logprob, top = logprobs["token_logprobs"][token], logprobs["top_logprobs"][token]
        assert logprob == (-0.25 if number % 2 == 0 else -0.5)
        assert len(top) == 1 + number % 2, "the sampled token is always included"
        assert top[logprobs["tokens"][token]] == logprob
        assert max(top.values()) == -0.25


def test_tokens_of_partial_characters_are_shown_as_bytes(server: Any) -> None:
    choice = server.post(PATH, prompt="é", max_tokens=2, logprobs=0)["choices"][0]
    assert choice["text"] == "é"
    assert choice["logprobs"]["tokens"] == [r"bytes:\xc3", r"bytes:\xa9"]


def test_a_logprob_of_minus_infinity_is_valid_json(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.infer.requests import Token

    token = Token(5, "", logprob=-float("inf"), top=((4, -0.1), (5, -float("inf"))))
    monkeypatch.setattr(server.engine, "token_with_logprobs", lambda *_: token, raising=False)
    choice = server.post(PATH, prompt="the", max_tokens=1, logprobs=2)["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]
    assert min(choice["logprobs"]["top_logprobs"][0].values()) == -9999.0


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_a_text(server: Any, max_tokens: int, stream: bool) -> None:
    """As lm-eval's local-completions: it reads the logprobs after the context, without the new token's."""
    context, continuation = server.ids("the king spoke"), server.ids(" to the queen")
    ids = [*context, *continuation]
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234}
    if stream:
        chunks = events(server.client.post(PATH, json={**body, "stream": True}))
        assert len(chunks) == 1
        choice = chunks[0]["choices"][0]
    else:
        response = server.post(PATH, **body)
        choice = response["choices"][0]
        assert response["usage"] == {
            "prompt_tokens": len(ids), "completion_tokens": max_tokens, "total_tokens": len(ids) + max_tokens
        }  # fmt: skip
    logprobs = choice["logprobs"]
    assert all(len(values) == len(ids) + max_tokens for values in logprobs.values())
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    prompt_logprobs = logprobs["token_logprobs"][len(context) : len(ids)]
    assert prompt_logprobs == [-0.25 if number % 2 == 0 else -0.5 for number in continuation]
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(prompt_logprobs, logprobs["top_logprobs"][len(context) :], strict=False)
    ]
    assert greedy == [number % 2 == 0 for number in continuation]
    generated = "the" if max_tokens else ""
    assert choice["text"] == "the king spoke to the queen" + generated
    assert choice["finish_reason"] == "length"
    edges = [*logprobs["text_offset"], len(choice["text"])]
    chunks = [choice["text"][start:end] for start, end in pairwise(edges)]
    assert chunks == logprobs["tokens"]


def test_echo_without_logprobs_returns_the_original_prompt(server: Any) -> None:
    response = server.post(PATH, prompt="the <|im_end|>  é", echo=True, max_tokens=0)
    assert response["choices"][0]["text"] == "the <|im_end|>  é"
    assert response["choices"][0]["logprobs"] is None
    assert server.engine.submitted[0].prompt_logprobs is False
    response = server.post(PATH, prompt="the king", echo=True, max_tokens=4, logprobs=0)
    assert response["choices"][0]["text"] == "the king" * 3
    assert len(response["choices"][0]["logprobs"]["tokens"]) == 6


def test_the_chunks_of_a_stream_equal_the_whole_response(open_server: OpenServer) -> None:
    server = open_server(engine={"slots": 4})
    body = {"prompt": ["the king spoke", "é"], "n": 2, "max_tokens": 5, "logprobs": 1, "seed": 3, "echo": True}
    response = server.post(PATH, **body)
    chunks = events(server.client.post(PATH, json={**body, "stream": True}))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["system_fingerprint"] == response["system_fingerprint"] for chunk in chunks)
    assert all(chunk["object"] == "text_completion" and chunk["usage"] is None for chunk in chunks)
    for choice in response["choices"]:
        choice_chunks = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in choice_chunks) == choice["text"]
        assert [chunk["finish_reason"] for chunk in choice_chunks] == [None] * (len(choice_chunks) - 1) + ["length"]
        for name, values in choice["logprobs"].items():
            assert [value for chunk in choice_chunks for value in chunk["logprobs"][name]] == values
    assert len(chunks) > 4


def test_a_stream_has_no_empty_chunks(server: Any) -> None:
    chunks = events(server.client.post(PATH, json={"prompt": "é", "max_tokens": 4, "stream": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["é", "é"]


def test_include_usage_adds_a_last_chunk(server: Any) -> None:
    body = {"prompt": "the king", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(server.client.post(PATH, json=body))
    assert all(chunk["usage"] is None for chunk in chunks)
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
def test_invalid_fields_are_rejected_by_name(server: Any, body: dict[str, Any], param: str) -> None:
    body = body if param == "prompt" else {"prompt": "the", **body}
    status, error = server.error(PATH, **body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"] or param == "prompt"
    assert server.engine.submitted == []


def test_unsupported_fields_accept_only_neutral_values(server: Any) -> None:
    _, error = server.error(PATH, prompt="the", frequency_penalty=1)
    assert error["code"] == "unsupported_parameter"
    assert "repetition_penalty" in error["message"]
    server.post(
        PATH, prompt="the", frequency_penalty=0, presence_penalty=0.0, logit_bias={}, best_of=1, suffix=None, n=1
    )


def test_nan_and_infinity_are_rejected(server: Any) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"prompt": "the", "temperature": {number}}}'
        response = server.client.post(PATH, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
    assert server.engine.submitted == []


def test_prompt_length_limits(open_server: OpenServer) -> None:
    assert open_server().post(PATH, prompt=[5] * 63, max_tokens=9)["usage"]["completion_tokens"] == 1
    narrow = open_server(max_prompt_tokens=3, max_new_tokens=4)
    status, error = narrow.error(PATH, prompt=[5] * 4)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert narrow.post(PATH, prompt=[5] * 3)["usage"]["completion_tokens"] == 4
    assert narrow.error(PATH, prompt="the", max_tokens=5)[1]["param"] == "max_tokens"


@pytest.mark.parametrize(("prompt", "max_tokens", "generated"), [(60, 4, 4), (60, 5, 4), (60, 100, 4), (63, 100, 1)])
def test_an_answer_ends_with_the_context_and_says_so(
    prompt: int, max_tokens: int, generated: int, open_server: OpenServer
) -> None:
    """max_tokens may be more than the context has left, as in clients that always send a large number."""
    body = open_server().post(PATH, prompt=[5] * prompt, max_tokens=max_tokens)
    assert body["usage"]["completion_tokens"] == generated
    assert body["choices"][0]["finish_reason"] == "length"


def test_an_answer_that_the_context_shortens_is_logged_once(
    open_server: OpenServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="octavo.server")
    server = open_server()
    server.post(PATH, prompt=[5] * 60, max_tokens=4)
    assert "finish_reason" not in caplog.text
    for _ in range(2):
        server.post(PATH, prompt=[5] * 60, max_tokens=100)
    assert caplog.text.count("A prompt of 60 tokens and max_tokens 100 are more than the context of 64 tokens") == 1


def test_an_unknown_model_is_404(server: Any) -> None:
    status, error = server.error(PATH, model="hamlet", prompt="the")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "tiny, king, queen" in error["message"]


@pytest.mark.parametrize(
    ("model", "adapter", "fingerprint"),
    [("tiny", None, "b"), ("king", "king", "c"), ("queen", "queen", "d"), (None, "king", "c")],
)
def test_model_selects_the_adapter_and_its_fingerprint(
    server: Any, model: str | None, adapter: str | None, fingerprint: str
) -> None:
    response = server.post(PATH, model=model, prompt="the")
    assert server.engine.submitted[0].adapter == adapter
    assert response["system_fingerprint"] == fingerprint * 64
    assert response["model"] == model or model is None


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions", "/prompt/"])
def test_the_fingerprint_is_of_the_adapter_at_submission(
    open_server: OpenServer, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter of a name is replaced between the request's arrival and its submission to the engine."""
    server = open_server()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"other")
    submit = server.engine.submit

    def reload_then_submit(request: Any) -> Any:
        server.engine.load_adapter("king", server.engine.read_adapter(tmp_path))
        return submit(request)

    monkeypatch.setattr(server.engine, "submit", reload_then_submit, raising=False)
    messages = [{"role": "user", "content": "the"}]
    response = server.client.post(path, json={"model": "king", "prompt": "the", "input": "the", "messages": messages})
    logprobs = response.headers.get("X-System-Fingerprint") or response.json()["system_fingerprint"]
    assert logprobs == hashlib.sha256(b"other").hexdigest()


def test_a_text_that_is_too_long_is_rejected_before_tokenization(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.server import service

    def never(*_: Any) -> list[int]:
        raise AssertionError

    longest = max(map(len, server.engine.tokenizer.get_vocab()))
    assert server.post("/tokenize", prompt="a" * 63 * longest)["count"] >= 63
    monkeypatch.setattr(service, "encode_prompt", never)
    monkeypatch.setattr(service, "encode_conversation", never)
    text = "a" * (63 * longest + 1)
    for path, param, body in (
        (PATH, "prompt", {"prompt": text}),
        ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": text}]}),
        ("/prompt/", "input", {"input": text}),
        ("/tokenize", "prompt", {"prompt": text}),
    ):
        status, error = server.error(path, **body)
        assert (status, error["param"], error["code"]) == (400, param, "context_length_exceeded")


def test_without_adapters_the_default_model_is_the_base(open_server: OpenServer) -> None:
    server = open_server(engine={"names": ()})
    assert server.post(PATH, prompt="the")["model"] == "tiny"


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\xff"}']
)
def test_a_body_that_cannot_be_parsed_has_a_clear_error(server: Any, body: bytes) -> None:
    response = server.client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "not UTF-8, or its JSON is nested too deeply" in response.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_has_one_clear_error(server: Any, prompt: Any) -> None:
    status, error = server.error(PATH, model="tiny", prompt=prompt)
    assert (status, error["param"]) == (400, "prompt")
    assert error["message"] == "`prompt` is empty: give at least one character or token to continue."
