"""OpenAI's Python client with a server in a separate process, which serves a model and an adapter."""

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
    """A running server: its URL, a client, and the folders of the model, the adapter and loadable adapters."""

    url: str
    client: OpenAI
    model: Path
    adapter: Path
    adapters_folder: Path

    def post(self, path: str, **body: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, plays: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained for a few steps, enough to change the output."""
    out = tmp_path_factory.mktemp("run")
    process = forks.octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data",
        plays / "test", "--out", out, "--steps", 8, "--batch-size", 2, "--seq-len", 32, "--rank", 4, "--lr", 0.05,
        "--scheme", "none", "--dtype", "float32", "--sample-tokens", 1, "--keep", "last",
    )  # fmt: skip
    _, err = process.communicate()
    assert process.returncode == 0, err
    return out / "adapter"


@pytest.fixture(scope="module")
def server(tiny_llama: Path, adapter: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters_folder = tmp_path_factory.mktemp("adapters")
    process = forks.octavo(
        "serve", "--model", tiny_llama, "--adapter", f"king={adapter}", "--port", 0,
        "--scheme", "none", "--dtype", "float32", "--max-model-len", 128, "--slots", 4, "--queue", 4,
        "--adapters-from", adapters_folder, "--json", environment={"OCTAVO_API_KEY": KEY},
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    address = json.loads(line)
    assert address["models"] == ["llama", "king"]
    with OpenAI(base_url=f"{address['url']}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield Server(address["url"], client, tiny_llama, adapter, adapters_folder)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    process.close()
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def transformers_model(tiny_llama: Path) -> Any:
    """The same model in transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def test_list_models(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["llama", "king"]
    assert server.client.models.retrieve("king").id == "king"


def test_a_greedy_completion_equals_transformers(server: Server, transformers_model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    ids = tokenizer("the king", return_tensors="pt")["input_ids"]
    expected = transformers_model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    response = server.client.completions.create(
        model="llama", prompt="the king", max_tokens=8, temperature=0, logprobs=1
    )
    assert response.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert response.usage is not None
    assert response.usage.completion_tokens == len(expected)


def test_echoed_logprobs_equal_transformers(server: Server, transformers_model: Any) -> None:
    """With the request of lm-eval's local-completions."""
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    ids = tokenizer("the king spoke to the queen")["input_ids"]
    with torch.no_grad():
        scores = transformers_model(torch.tensor([ids])).logits[0].log_softmax(-1)
    response = server.client.completions.create(
        model="llama", prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    logprobs = response.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    server_logprobs: list[Any] = logprobs.token_logprobs or []
    assert server_logprobs[0] is None
    expected = [float(scores[position, number]) for position, number in enumerate(ids[1:])]
    assert server_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)  # float32, sums of 32 terms
    for position, (logprob, top) in enumerate(zip(server_logprobs[1:], logprobs.top_logprobs[1:], strict=True)):
        likeliest = int(scores[position].argmax())
        number = ids[position + 1] if position + 1 < len(ids) else likeliest
        assert (logprob == max(top.values())) is (number == likeliest)


def test_a_stream_equals_the_whole_response(server: Server) -> None:
    parameters: dict[str, Any] = {"model": "king", "prompt": "the king", "max_tokens": 12, "temperature": 0}
    response = server.client.completions.create(**parameters)
    chunks = list(server.client.completions.create(**parameters, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == response.choices[0].text
    assert chunks[-1].usage == response.usage


def test_a_seed_is_reproducible_and_n_choices_differ(server: Server) -> None:
    parameters: dict[str, Any] = {"model": "llama", "prompt": "the", "max_tokens": 12, "seed": 5, "n": 3}
    first = server.client.completions.create(**parameters)
    again = server.client.completions.create(**parameters)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3


def test_chat_with_and_without_streaming(server: Server) -> None:
    parameters: dict[str, Any] = {"model": "llama", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    response = server.client.chat.completions.create(**parameters, logprobs=True, top_logprobs=2)
    choice = response.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in choice.logprobs.content), (
        "greedy decoding takes the likeliest token"
    )
    chunks = list(server.client.chat.completions.create(**parameters, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_the_adapter_changes_the_output_and_the_fingerprint(server: Server) -> None:
    responses = {
        name: server.client.completions.create(model=name, prompt="the king", max_tokens=12, temperature=0)
        for name in ("llama", "king")
    }
    assert responses["llama"].choices[0].text != responses["king"].choices[0].text
    assert responses["king"].system_fingerprint == sha256_of(server.adapter / "adapter_model.safetensors")
    assert responses["llama"].system_fingerprint not in (None, "", responses["king"].system_fingerprint)


def test_errors_raise_the_clients_exceptions(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="hamlet"):
        server.client.completions.create(model="hamlet", prompt="the")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client.completions.create(model="llama", prompt="the", temperature=3)
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_closing_a_stream_frees_its_slot(server: Server) -> None:
    parameters: dict[str, Any] = {"model": "llama", "prompt": "the", "max_tokens": 120, "logprobs": 5}
    for _ in range(12):  # more than slots and queue together
        with server.client.completions.create(**parameters, stream=True) as stream:
            next(iter(stream))
    assert server.client.completions.create(model="llama", prompt="the", max_tokens=2).usage


def test_load_and_unload_while_another_adapter_generates(server: Server) -> None:
    """An adapter is loaded, unloaded, and loaded under the same name with other weights: hash and output change."""
    shutil.copytree(server.adapter, server.adapters_folder / "one")
    shutil.copytree(server.adapter, server.adapters_folder / "two")
    file = server.adapters_folder / "two" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: -2 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}, file)
    (file.parent / "octavo.json").unlink()  # it has the hash of the original tensors
    parameters: dict[str, Any] = {"prompt": "the king", "max_tokens": 12, "temperature": 0}
    alone = server.client.completions.create(model="king", **{**parameters, "max_tokens": 120})
    with server.client.completions.create(model="king", **{**parameters, "max_tokens": 120}, stream=True) as stream:
        text = next(iter(stream)).choices[0].text
        address = {}
        for folder in ("one", "two"):
            loaded = server.post("/v1/load_lora_adapter", lora_name="new", lora_path=folder)
            assert loaded.status_code == 200, loaded.text
            assert [model.id for model in server.client.models.list()] == ["llama", "king", "new"]
            address[folder] = server.client.completions.create(model="new", **parameters)
            removed = server.post("/v1/unload_lora_adapter", lora_name="new")
            assert removed.status_code == 200, removed.text
            assert [model.id for model in server.client.models.list()] == ["llama", "king"]
            with pytest.raises(openai.NotFoundError):
                server.client.completions.create(model="new", **parameters)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == alone.choices[0].text
    for folder, response in address.items():
        assert response.system_fingerprint == sha256_of(server.adapters_folder / folder / "adapter_model.safetensors")
    assert (
        address["one"].choices[0].text == server.client.completions.create(model="king", **parameters).choices[0].text
    )
    assert address["two"].choices[0].text != address["one"].choices[0].text


def test_an_adapter_that_does_not_match_is_rejected(server: Server) -> None:
    shutil.copytree(server.adapter, server.adapters_folder / "odd")
    file = server.adapters_folder / "odd" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}, file)
    (file.parent / "octavo.json").unlink()  # it has the hash of the original tensors
    before = server.client.completions.create(model="king", prompt="the king", max_tokens=8, temperature=0)
    for folder, expected in (("odd", "layers.7"), ("../king", "is not inside the folder"), ("none", "no folder")):
        response = server.post("/v1/load_lora_adapter", lora_name="odd", lora_path=folder)
        assert response.status_code in (400, 404)
        assert expected in response.json()["error"]["message"]
        assert str(server.adapters_folder) not in response.text
    assert [model.id for model in server.client.models.list()] == ["llama", "king"]
    after = server.client.completions.create(model="king", prompt="the king", max_tokens=8, temperature=0)
    assert after.choices[0].text == before.choices[0].text
