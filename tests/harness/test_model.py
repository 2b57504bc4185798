"""harness/model.py against lm-eval's own class for transformers, on the same tiny models in float32."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from tests.conftest import WORDS
from tests.harness.conftest import open_lm

from octavo.errors import UsageError
from octavo.harness import model
from octavo.harness.model import OctavoLM
from octavo.reporting import Report

CONTEXT = 128  # of the tiny models
LONG = " ".join(random.Random(1).choice(WORDS) for _ in range(300))


def instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def theirs(folder: Path, **options: Any) -> Any:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, **options)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gptj"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[OctavoLM, Any]:
    """(octavo's, lm-eval's) of one model."""
    return open_lm(folder), theirs(folder)


CHOICES = [
    ("the king spoke", " to the queen"),
    ("the king spoke", " of"),
    ("the king spoke", " my"),  # differs in its last token alone: one row with the last
    ("the king spoke ", "to"),  # the space belongs to the answer
    ("", "the storm"),
    ("", "<|im_end|>king"),  # begins with the token that it would be predicted from
    ("<|im_start|>user\nthe king<|im_end|>\n", "the queen é\N{GRINNING FACE}"),
    (LONG, " york"),  # longer than the context: its beginning is lost
    ("where", f" {LONG}"[:300]),
]


def test_log_likelihoods_equal_those_of_lm_eval(models: tuple[OctavoLM, Any]) -> None:
    requests = instances("loglikelihood", CHOICES)
    ours, expected = (one.loglikelihood(requests, disable_tqdm=True) for one in models)
    # float32: sums of up to some hundred logarithms, each right to 1e-6 or so
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_recognized(models: tuple[OctavoLM, Any]) -> None:
    def greedy(prompts: list[tuple[str, str]]) -> list[bool]:
        requests = instances("loglikelihood", prompts)
        ours, expected = ([hit for _, hit in one.loglikelihood(requests, disable_tqdm=True)] for one in models)
        assert ours == expected
        return ours

    words = [models[0].tokenizer.decode([token]) for token in range(3, 300)]
    alone = [(prompt, word) for prompt in ("the", "king of", "where is") for word in words]
    hits = [one for one, hit in zip(alone, greedy(alone), strict=True) if hit]
    assert hits
    assert not all(greedy([(prompt, word + " york") for prompt, word in hits]))


TEXTS = [("the king spoke to the queen",), (LONG,), ("é \N{GRINNING FACE}\n\n",), ("x",), ("",), (LONG[:400],)]


def test_rolling_log_likelihoods_equal_those_of_lm_eval_over_several_windows(models: tuple[OctavoLM, Any]) -> None:
    requests = instances("loglikelihood_rolling", TEXTS)
    ours, expected = (one.loglikelihood_rolling(requests, disable_tqdm=True) for one in models)
    assert len(models[0].tok_encode(LONG)) > 2 * CONTEXT
    assert ours == pytest.approx(expected, rel=1e-5)


PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("the king", {"until": ["\n"], "max_gen_toks": 12}),
    ("the queen spoke", {"until": [" s", "o"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
    ("my lord", {"max_new_tokens": 9}),
    ("<|im_start|>user\nthe storm<|im_end|>\n", {"until": "k", "max_gen_toks": 24}),
    (LONG, {"until": [], "max_gen_toks": 10}),
    ("where is", {"until": ["<|endoftext|>"], "max_gen_toks": 100, "temperature": 0.0}),
]
FREE = {"max_gen_toks": 30}


def test_generated_answers_equal_those_of_lm_eval(models: tuple[OctavoLM, Any]) -> None:
    ours, expected = (one.generate_until(instances("generate_until", PROMPTS), disable_tqdm=True) for one in models)
    assert ours == expected
    assert len({len(answer) for answer in ours}) > 1


def test_an_answer_ends_at_a_control_token_that_is_a_stop_string(tiny_llama: Path, tmp_path: Path) -> None:
    """The token does not occur in decoded text. The model is changed to generate it at the start of an answer."""
    plain = open_lm(tiny_llama)
    prompts = ["the king", "where is", "my lord of york"]
    with torch.no_grad():
        likeliest = int(plain.model(torch.tensor([plain.tok_encode(prompts[0])]))[0, -1].argmax())
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][1] = 1.001 * tensors["lm_head.weight"][likeliest]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours, expected = open_lm(folder), theirs(folder)
    bound = {"max_gen_toks": 30, "until": ["<|im_start|>"]}
    requests = instances("generate_until", [(prompt, options) for prompt in prompts for options in (bound, FREE)])
    answers = ours.generate_until(requests)
    assert answers == expected.generate_until(requests, disable_tqdm=True)
    assert any(answers[::2][n] != answers[1::2][n] for n in range(len(prompts)))


def test_the_batch_size_changes_no_answer(folder: Path, models: tuple[OctavoLM, Any]) -> None:
    alone = open_lm(folder, batch=1)
    for kind, arguments in (("loglikelihood", CHOICES), ("loglikelihood_rolling", TEXTS), ("generate_until", PROMPTS)):
        one, many = (getattr(lm, kind)(instances(kind, arguments)) for lm in (alone, models[0]))
        if kind == "generate_until":
            assert one == many
        else:
            flat = [[value[0] if isinstance(value, tuple) else value for value in values] for values in (one, many)]
            assert flat[0] == pytest.approx(flat[1], rel=1e-5)


def test_logits_are_computed_in_chunks(models: tuple[OctavoLM, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = instances("loglikelihood_rolling", TEXTS)
    whole = models[0].loglikelihood_rolling(requests)
    seen: list[int] = []
    models[0].model.head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr(model, "CHUNK_BYTES", 8 * 300 * 7)
    assert models[0].loglikelihood_rolling(requests) == pytest.approx(whole, rel=1e-6)
    assert max(seen) == 7


def test_samples_differ_from_each_other_and_are_reproducible(models: tuple[OctavoLM, Any]) -> None:
    requests = instances(
        "generate_until", [("the king", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8})] * 4
    )
    first, second = (models[0].generate_until(requests) for _ in range(2))
    assert first == second
    assert len(set(first)) == 4


def test_every_text_has_one_bos_token(beginning: Path) -> None:
    ours, reference = open_lm(beginning), theirs(beginning)
    assert ours.tok_encode("the king") == reference.tok_encode("the king")
    assert ours.tok_encode("the king")[0] == ours.prefix_token_id == reference.prefix_token_id == 1
    assert ours.tok_encode("<|im_start|>the") == reference.tok_encode("<|im_start|>the")
    for kind, arguments in (("loglikelihood", CHOICES[:5]), ("generate_until", PROMPTS[:4])):
        requests = instances(kind, arguments)
        actual, expected = (getattr(one, kind)(requests, disable_tqdm=True) for one in (ours, reference))
        if kind == "generate_until":
            assert actual == expected
        else:
            assert [nats for nats, _ in actual] == pytest.approx([nats for nats, _ in expected], rel=1e-5)


def test_a_whole_text_is_scored_after_one_bos_token(beginning: Path) -> None:
    """lm-eval's class for transformers scores a second one without add_bos_token=False; its API clients do not."""
    requests = instances("loglikelihood_rolling", TEXTS[:2])
    actual = open_lm(beginning).loglikelihood_rolling(requests)
    bare = theirs(beginning)
    bare.add_bos_token = False
    assert actual == pytest.approx(bare.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5)
    assert actual != pytest.approx(theirs(beginning).loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-3)


def messages(tiny_llama: Path, tmp_path: Path, kind: str, arguments: Sequence[tuple[Any, ...]]) -> str:
    """The messages of the report while requests run."""
    with Report(console=False, metrics=tmp_path / "said.jsonl") as report:
        getattr(open_lm(tiny_llama, report=report), kind)(instances(kind, arguments))
    return (tmp_path / "said.jsonl").read_text()


def test_an_empty_continuation_has_score_0_and_an_empty_stop_string_is_ignored(models: tuple[OctavoLM, Any]) -> None:
    """lm-eval's class for transformers raises for the first, and stops at once for the second."""
    requests = instances("loglikelihood", [("the king", ""), ("x", "")])
    assert models[0].loglikelihood(requests) == [(0.0, True)] * 2
    prompts = [("the king", {"max_gen_toks": 8, "until": until}) for until in ([""], [])]
    first, second = models[0].generate_until(instances("generate_until", prompts))
    assert first == second != ""


def test_truncated_texts_and_unsupported_options_are_reported_once(tiny_llama: Path, tmp_path: Path) -> None:
    text = messages(tiny_llama, tmp_path, "loglikelihood", CHOICES)
    assert text.count("lost the beginning") == 1
    assert "1 text did" in text
    prompts = [(LONG, {"max_gen_toks": 4, "num_beams": 2}), (LONG, {"max_gen_toks": 5, "num_beams": 2})]
    text = messages(tiny_llama, tmp_path, "generate_until", prompts)
    assert text.count("lost the beginning") == text.count("num_beams") == 1
    assert "2 prompts did" in text
    assert "lost" not in messages(tiny_llama, tmp_path, "loglikelihood_rolling", TEXTS)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("loglikelihood", ("the", f" {LONG}")), ("generate_until", ("the", {"max_gen_toks": CONTEXT}))],
)
def test_a_request_longer_than_the_context_is_an_error(
    models: tuple[OctavoLM, Any], kind: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(UsageError, match="context is 128"):
        getattr(models[0], kind)(instances(kind, [arguments]))
