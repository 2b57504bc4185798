"""The models that `--model` can name, and the errors for everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from octavo.errors import ModelError, UsageError
from octavo.store import resolve
from octavo.store.contents import stored_scheme
from octavo.store.resolve import HUB_PATTERNS, open_source
from octavo.store.sources import FolderSource


def test_a_folder_is_opened_without_reading_its_weights(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").write_bytes(b"")
    source = open_source(str(llama_folder))
    assert source.config["architectures"] == ["LlamaForCausalLM"]


def test_a_path_in_the_home_folder_is_expanded(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama_folder.parent))
    assert open_source(f"~/{llama_folder.name}").names()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty"),
        (["notes.txt"], r"no config\.json"),
        (["pytorch_model.bin"], r"no config\.json(.|\n)*EleutherAI/gpt-j-6B"),
        (["b c.gguf"], r"--model '.*/b c\.gguf'\."),
        (["a.gguf", "b.gguf", "README.md"], r"--model .*/a\.gguf \(or another of the 2\)"),
    ],
)
def test_the_error_of_a_folder_without_a_config_depends_on_its_content(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "model", ["no-such-model", "./no/such", "/no/such", "a/b/c", "~/no-such", "~nobody/x", "no.gguf"]
)
def test_an_unknown_model_name_is_a_usage_error(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="There is no"):
        open_source(model)


def test_a_file_that_is_not_a_model_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UsageError, match="neither"):
        open_source(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("model", ["octavo-tests/no-such-model", "not a/valid id"])
def test_the_error_of_a_failed_download_names_the_hub_id(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=model) as caught:
        open_source(model)
    assert "HF_TOKEN" in caught.value.hint


class Hub:
    """A substitute for huggingface_hub that serves a folder and records the requests."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.downloads: list[object] = []
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.file)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot)

    def file(self, repo: str, file: str, *, revision: str | None) -> str:
        self.downloads.append((repo, file, revision))
        return str(self.folder / file)

    def snapshot(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.downloads.append((repo, allow_patterns, revision))
        return str(self.folder)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_hub_id_is_fetched_with_its_revision_and_pickles_only_if_allowed(
    allowed: bool, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(llama_folder, monkeypatch)
    source = open_source("owner/name", revision="abc", allow_pickle=allowed)
    assert isinstance(source, FolderSource)
    assert source.allow_pickle is allowed
    patterns = [*HUB_PATTERNS, "*.bin"] if allowed else HUB_PATTERNS
    assert hub.downloads == [("owner/name", "config.json", "abc"), ("owner/name", patterns, "abc")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "BloomForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"hidden_size": -4}, "hidden_size is -4"),
    ],
)
def test_weights_of_an_unsupported_model_are_not_downloaded(
    change: dict[str, object], message: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, **change}))
    hub = Hub(llama_folder, monkeypatch)
    with pytest.raises(ModelError, match=message):
        open_source("owner/name")
    assert hub.downloads == [("owner/name", "config.json", None)]
    with pytest.raises(ModelError, match=message):
        open_source(str(llama_folder))


def test_the_error_of_a_missing_model_names_the_folder_and_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
    for error, message in (
        (RepositoryNotFoundError("no", response=response), "There is no folder models/mine here, and no such model"),
        (RemoteEntryNotFoundError("no", response=response), r"has no config\.json(.|\n)*\.gguf"),
    ):

        def download(*_: object, error: Exception = error, **__: object) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        with pytest.raises(ModelError, match=message):
            open_source("models/mine")


def test_without_weights_only_the_config_is_downloaded(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[object] = []

    def download(repo: str, file: str, *, revision: str | None) -> str:
        downloads.extend((repo, file, revision))
        return str(llama_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("weights"))
    source = open_source("owner/name", revision="abc", weights=False)
    assert downloads == ["owner/name", "config.json", "abc"]
    assert source.config == json.loads((llama_folder / "config.json").read_text())
    assert not source.names()
    assert not source.files
    for lacking in (lambda: source.tensor("x"), source.tokenizer):
        with pytest.raises(ModelError, match="was not read"):
            lacking()
    # A local folder is opened with its weights.
    assert open_source(str(llama_folder), weights=False).names()


@pytest.mark.parametrize("shards", [None, 0, 1])
def test_without_weights_a_folder_needs_its_config_alone(shards: int | None, llama_folder: Path) -> None:
    """Neither an index without its files nor one of two files is an error: the model can be planned."""
    (llama_folder / "model.safetensors").rename(llama_folder / "model-00001-of-00002.safetensors")
    if shards is not None:
        files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    if not shards:
        (llama_folder / "model-00001-of-00002.safetensors").unlink()
    source = open_source(str(llama_folder), weights=False)
    assert source.config == json.loads((llama_folder / "config.json").read_text())
    assert not source.names()
    with pytest.raises(ModelError, match=r"holds no weights|lacks"):
        open_source(str(llama_folder)).names()


def test_without_weights_the_config_of_nf4_names_the_scheme(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    config = json.loads((llama_folder / "config.json").read_text())
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (llama_folder / "config.json").write_text(json.dumps({**config, "quantization_config": nf4}))
    assert stored_scheme(open_source(str(llama_folder), weights=False)).name == "nf4"


@pytest.mark.parametrize("model", ["octavo-tests/no-such-model", "not a/valid id"])
def test_the_error_of_a_config_that_cannot_be_fetched_names_it(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=model):
        open_source(model, weights=False)


def test_no_code_is_downloaded_from_the_hub() -> None:
    assert not [pattern for pattern in HUB_PATTERNS if pattern.endswith((".py", "*", ".bin", ".pt", ".pkl"))]


def test_a_folder_called_smollm2_has_precedence_over_the_built_in_model(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "open_smollm2", lambda *, say: pytest.fail("the built-in one"))
    monkeypatch.chdir(llama_folder.parent)
    llama_folder.rename("smollm2")
    assert open_source("smollm2").names()


@pytest.mark.parametrize("named", ["owner/a name", "", None, 3])
def test_the_error_of_an_adapter_given_as_a_model_shows_its_use(named: object, llama_folder: Path) -> None:
    """Also next to a config.json, which some trainers write too."""
    for path in llama_folder.glob("*.safetensors"):
        path.rename(path.with_name("adapter_model.safetensors"))
    (llama_folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    for _ in range(2):
        with pytest.raises(ModelError, match="is an adapter, not a model") as caught:
            open_source(str(llama_folder))
        base = "'owner/a name'" if named == "owner/a name" else "BASE"
        assert f"--model {base} --adapter {llama_folder}" in caught.value.hint
        (llama_folder / "config.json").unlink(missing_ok=True)


def test_the_error_of_a_trainers_folder_names_its_newest_checkpoint(llama_folder: Path, tmp_path: Path) -> None:
    for step in (9, 1000, 80):
        shutil.copytree(llama_folder, tmp_path / "out" / f"checkpoint-{step}")
    with pytest.raises(ModelError, match="checkpoints of a Trainer") as caught:
        open_source(str(tmp_path / "out"))
    assert caught.value.hint.endswith("checkpoint-1000")


def test_the_error_of_a_weight_file_without_tensors_names_it(llama_folder: Path) -> None:
    for path in llama_folder.glob("*.safetensors"):
        save_file({}, path)
    with pytest.raises(ModelError, match=r"model\.safetensors holds no tensor"):
        open_source(str(llama_folder)).names()
