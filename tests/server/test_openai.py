"""OpenAI's own client against a server in a process of its own, with a model and an adapter on it."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file
from tests.forks import Forks
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.store.files import sha256_of

KEY = "a-key-for-tests"
HELLO: list[Any] = [{"role": "user", "content": "the king"}]


@dataclass
class Server:
    """A running server: its address, a client of it, and the folders of its model, its adapter, and more adapters."""

    url: str
    client: OpenAI
    model: Path
    adapter: Path
    shelf: Path

    def post(self, path: str, **body: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, plays: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of some steps of training, far enough from the base to show."""
    out = tmp_path_factory.mktemp("run")
    process = forks.octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data",
        plays / "test", "--out", out, "--steps", 8, "--batch", 2, "--seq-len", 32, "--rank", 4, "--lr", 0.05,
        "--scheme", "none", "--dtype", "float32", "--sample-tokens", 1, "--keep", "last",
    )  # fmt: skip
    _, err = process.communicate()
    assert process.returncode == 0, err
    return out / "adapter"


@pytest.fixture(scope="module")
def server(tiny_llama: Path, adapter: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    shelf = tmp_path_factory.mktemp("shelf")
    process = forks.octavo(
        "serve", "--model", tiny_llama, "--adapter", f"king={adapter}", "--port", 0,
        "--scheme", "none", "--dtype", "float32", "--max-model-len", 128, "--slots", 4, "--queue", 4,
        "--adapters-from", shelf, "--json", environment={"OCTAVO_API_KEY": KEY},
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    told = json.loads(line)
    assert told["models"] == ["llama", "king"]
    with OpenAI(base_url=f"{told['url']}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield Server(told["url"], client, tiny_llama, adapter, shelf)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    process.close()
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def theirs(tiny_llama: Path) -> Any:
    """The same model of transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def test_the_models_are_listed(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["llama", "king"]
    assert server.client.models.retrieve("king").id == "king"


def test_a_greedy_completion_is_transformers(server: Server, theirs: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    ids = tokenizer("the king", return_tensors="pt")["input_ids"]
    expected = theirs.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    answer = server.client.completions.create(model="llama", prompt="the king", max_tokens=8, temperature=0, logprobs=1)
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected)


def test_echoed_logprobs_are_transformers(server: Server, theirs: Any) -> None:
    """As lm-eval's local-completions asks for them."""
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    ids = tokenizer("the king spoke to the queen")["input_ids"]
    with torch.no_grad():
        scores = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = server.client.completions.create(
        model="llama", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    read: list[Any] = logprobs.token_logprobs or []
    assert read[0] is None
    expected = [float(scores[place, number]) for place, number in enumerate(ids[1:])]
    assert read[1:-1] == pytest.approx(expected, abs=1e-4)  # float32, sums of 32 terms
    for place, (own, top) in enumerate(zip(read[1:], logprobs.top_logprobs[1:], strict=True)):
        likeliest = int(scores[place].argmax())
        number = ids[place + 1] if place + 1 < len(ids) else likeliest
        assert (own == max(top.values())) is (number == likeliest)


def test_a_stream_is_the_whole_answer(server: Server) -> None:
    asked: dict[str, Any] = {"model": "king", "prompt": "the king", "max_tokens": 12, "temperature": 0}
    whole = server.client.completions.create(**asked)
    pieces = list(server.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage


def test_a_seed_repeats_an_answer_and_n_answers_differ(server: Server) -> None:
    asked: dict[str, Any] = {"model": "llama", "prompt": "the", "max_tokens": 12, "seed": 5, "n": 3}
    first = server.client.completions.create(**asked)
    again = server.client.completions.create(**asked)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3


def test_chat_whole_and_in_pieces(server: Server) -> None:
    asked: dict[str, Any] = {"model": "llama", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in choice.logprobs.content), "it is greedy"
    pieces = list(server.client.chat.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
    assert pieces[-1].choices[0].finish_reason == choice.finish_reason


def test_the_adapter_answers_differently_and_its_hash_is_told(server: Server) -> None:
    answers = {
        name: server.client.completions.create(model=name, prompt="the king", max_tokens=12, temperature=0)
        for name in ("llama", "king")
    }
    assert answers["llama"].choices[0].text != answers["king"].choices[0].text
    assert answers["king"].system_fingerprint == sha256_of(server.adapter / "adapter_model.safetensors")
    assert answers["llama"].system_fingerprint not in (None, "", answers["king"].system_fingerprint)


def test_errors_are_those_of_the_client(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="hamlet"):
        server.client.completions.create(model="hamlet", prompt="the")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client.completions.create(model="llama", prompt="the", temperature=3)
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_a_client_that_leaves_its_stream_frees_its_slot(server: Server) -> None:
    asked: dict[str, Any] = {"model": "llama", "prompt": "the", "max_tokens": 120, "logprobs": 5}
    for _ in range(12):  # more than slots and queue hold together
        with server.client.completions.create(**asked, stream=True) as stream:
            next(iter(stream))
    assert server.client.completions.create(model="llama", prompt="the", max_tokens=2).usage


def test_adapters_come_and_go_while_another_answers(server: Server) -> None:
    """Loaded, removed, and loaded again under its name with other weights, whose hash and answers it then has."""
    shutil.copytree(server.adapter, server.shelf / "one")
    shutil.copytree(server.adapter, server.shelf / "two")
    file = server.shelf / "two" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: -2 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}, file)
    (file.parent / "octavo.json").unlink()  # with the hash of what was there
    asked: dict[str, Any] = {"prompt": "the king", "max_tokens": 12, "temperature": 0}
    alone = server.client.completions.create(model="king", **{**asked, "max_tokens": 120})
    with server.client.completions.create(model="king", **{**asked, "max_tokens": 120}, stream=True) as stream:
        text = next(iter(stream)).choices[0].text
        told = {}
        for folder in ("one", "two"):
            loaded = server.post("/v1/load_lora_adapter", lora_name="new", lora_path=folder)
            assert loaded.status_code == 200, loaded.text
            assert [model.id for model in server.client.models.list()] == ["llama", "king", "new"]
            told[folder] = server.client.completions.create(model="new", **asked)
            removed = server.post("/v1/unload_lora_adapter", lora_name="new")
            assert removed.status_code == 200, removed.text
            assert [model.id for model in server.client.models.list()] == ["llama", "king"]
            with pytest.raises(openai.NotFoundError):
                server.client.completions.create(model="new", **asked)
        assert text + "".join(piece.choices[0].text for piece in stream) == alone.choices[0].text
    for folder, answer in told.items():
        assert answer.system_fingerprint == sha256_of(server.shelf / folder / "adapter_model.safetensors")
    assert told["one"].choices[0].text == server.client.completions.create(model="king", **asked).choices[0].text
    assert told["two"].choices[0].text != told["one"].choices[0].text


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_of_it_stays(server: Server) -> None:
    shutil.copytree(server.adapter, server.shelf / "odd")
    file = server.shelf / "odd" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}, file)
    (file.parent / "octavo.json").unlink()  # with the hash of what was there
    before = server.client.completions.create(model="king", prompt="the king", max_tokens=8, temperature=0)
    for folder, said in (("odd", "layers.7"), ("../king", "is not a folder below"), ("none", "no folder")):
        refused = server.post("/v1/load_lora_adapter", lora_name="odd", lora_path=folder)
        assert refused.status_code in (400, 404)
        assert said in refused.json()["error"]["message"]
        assert str(server.shelf) not in refused.text
    assert [model.id for model in server.client.models.list()] == ["llama", "king"]
    after = server.client.completions.create(model="king", prompt="the king", max_tokens=8, temperature=0)
    assert after.choices[0].text == before.choices[0].text
