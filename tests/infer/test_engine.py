"""Every answer of a busy engine is the one that its request gets alone, whatever other requests run."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from octavo.errors import AdapterError, UsageError
from octavo.infer.generate import complete
from octavo.infer.requests import Limits, QueueFullError, Request, Stats, Stream, Token
from octavo.infer.sample import Sampling

if TYPE_CHECKING:
    from tests.infer.conftest import Family

VOCAB_SIZE, CONTEXT = 258, 48
PROMPTS = [
    tuple(torch.randint(1, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (1, 2, 3, 7, 11, 16, 30, 41)
]
LONG = PROMPTS[-2]
GREEDY = Sampling(temperature=0.0, max_new_tokens=14)
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=1.0, top_p=0.9, max_new_tokens=9, seed=3),
    Sampling(temperature=2.0, top_k=40, top_p=1.0, max_new_tokens=17, seed=4),
    Sampling(temperature=0.0, repetition_penalty=1.5, max_new_tokens=12),
    Sampling(temperature=0.7, repetition_penalty=1.2, max_new_tokens=1),
]
MIXED = [Request(prompt, SAMPLINGS[number % 5]) for number, prompt in enumerate([*PROMPTS, *PROMPTS[:5]])]


def ended(stats: Stats) -> int:
    return stats.finished_total + stats.cancelled_total + stats.failed_total


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_every_answer_is_that_of_its_request_alone(family: Family, scheme: str) -> None:
    engine = family.engine(Limits(slots=3, max_len=CONTEXT, chunk=4), family.model(scheme))
    streams = [engine.submit(request) for request in MIXED]
    family.run_out(engine)
    expected = [family.alone(request, scheme) for request in MIXED]
    assert [family.answer(stream) for stream in streams] == expected
    assert len({answer.token_ids for answer in expected}) == len(expected)
    stats = engine.stats()
    assert (stats.requests_total, stats.finished_total) == (len(MIXED), len(MIXED))
    assert stats.prompt_tokens_total == sum(len(request.prompt) for request in MIXED)
    assert stats.generated_tokens_total == sum(len(answer.token_ids) for answer in expected)
    assert (stats.cache_tokens_used, stats.running, stats.waiting) == (0, 0, 0)


@pytest.mark.parametrize("chunk", range(1, 12))
def test_the_chunk_size_changes_the_number_of_steps_only(family: Family, chunk: int) -> None:
    prompt = PROMPTS[4]
    engine = family.engine(Limits(slots=2, max_len=CONTEXT, chunk=chunk))
    stream = engine.submit(Request(prompt, GREEDY))
    while stream.first_token is None:
        engine.step()
    assert engine.stats().steps_total == -(-len(prompt) // chunk)
    family.run_out(engine)
    assert family.answer(stream) == family.alone(Request(prompt, GREEDY))


def test_requests_join_during_prefill_and_decode_of_others(family: Family) -> None:
    engine = family.engine(Limits(slots=4, max_len=CONTEXT, chunk=5))
    requests = [Request(LONG, GREEDY), *MIXED[:6]]
    streams = []
    for request in requests:
        streams.append(engine.submit(request))
        for _ in range(3):
            engine.step()
    family.run_out(engine)
    assert [family.answer(stream) for stream in streams] == [family.alone(request) for request in requests]


@pytest.mark.parametrize("gone", [gone for n in range(1, 6) for gone in combinations(range(5), n)], ids=str)
def test_cancelled_requests_do_not_change_the_others(llama: Family, gone: tuple[int, ...]) -> None:
    """0, 1 and 2 run, 3 is in prefill, 4 waits."""
    engine = llama.engine(Limits(slots=4, max_len=CONTEXT, chunk=8))
    requests = [Request(prompt, GREEDY) for prompt in (*PROMPTS[1:4], LONG, PROMPTS[4])]
    streams = [engine.submit(request) for request in requests]
    for _ in range(3):
        engine.step()
    before = engine.stats()
    assert (before.running, before.waiting) == (4, 1)
    for number in gone:
        streams[number].cancel()
    engine.step()
    stats = engine.stats()
    admitted = 3 in gone and 4 not in gone  # only one is in prefill at a time
    assert (stats.cancelled_total, stats.running) == (len(gone), len({0, 1, 2, 3} - {*gone}) + admitted)
    llama.run_out(engine)
    for number, (request, stream) in enumerate(zip(requests, streams, strict=True)):
        actual, expected = llama.answer(stream), llama.alone(request)
        if number in gone:
            assert actual.finish_reason == "cancelled"
            assert actual.token_ids == expected.token_ids[: (4, 4, 3, 0, 0)[number]]
        else:
            assert actual == expected
    assert ended(engine.stats()) == 5
    assert engine.stats().cache_tokens_used == 0


def test_a_request_cancelled_before_its_first_step_gets_no_slot(llama: Family) -> None:
    engine = llama.engine(Limits(slots=1, max_len=CONTEXT))
    streams = [engine.submit(Request(LONG, GREEDY)) for _ in range(2)]
    for stream in streams:
        stream.cancel()
    engine.step()
    assert [llama.answer(stream).finish_reason for stream in streams] == ["cancelled"] * 2
    assert engine.stats().prompt_tokens_total == 0
    assert streams[0].first_token is None


def test_a_cancellation_after_the_end_has_no_effect(llama: Family) -> None:
    engine = llama.engine(Limits(slots=1, max_len=CONTEXT))
    stream = engine.submit(MIXED[0])
    llama.run_out(engine)
    stream.cancel()
    engine.step()
    assert llama.answer(stream) == llama.alone(MIXED[0])
    assert engine.stats().cancelled_total == 0


def test_stop_strings_stop_ids_and_full_contexts_end_answers_as_alone(family: Family) -> None:
    alone = family.alone(Request(PROMPTS[3], SAMPLINGS[2]))
    stop = alone.text[3:5]
    stop_id = next(token for n, token in enumerate(alone.token_ids) if n > 3 and token < VOCAB_SIZE)
    requests = [
        Request(PROMPTS[3], Sampling(temperature=2.0, top_k=40, top_p=1.0, max_new_tokens=17, seed=4, stop=(stop,))),
        Request(PROMPTS[3], SAMPLINGS[2]),
        Request(PROMPTS[-1], Sampling(temperature=0.0, max_new_tokens=500)),
        Request(PROMPTS[-1] + PROMPTS[2] + PROMPTS[1] + (9,), Sampling(temperature=0.0, max_new_tokens=500)),
        MIXED[0],
    ]
    engine = family.engine(Limits(slots=2, max_len=CONTEXT, chunk=6), stop_ids=[stop_id])
    streams = [engine.submit(request) for request in requests]
    family.run_out(engine)
    actual = [family.answer(stream) for stream in streams]
    assert actual == [family.alone(request, stop_ids=(stop_id,)) for request in requests]
    assert [answer.finish_reason for answer in actual] == ["stop", "stop", "length", "length", "length"]
    assert stop not in actual[0].text
    assert actual[1].token_ids[-1] == stop_id
    assert [len(answer.token_ids) for answer in actual[2:4]] == [CONTEXT - 41, 1]


def test_max_len_of_a_slot_ends_an_answer_too(llama: Family) -> None:
    engine = llama.engine(Limits(slots=2, max_len=20, chunk=6))
    assert engine.context == 20
    stream = engine.submit(Request(PROMPTS[4], SAMPLINGS[2]))
    llama.run_out(engine)
    actual = llama.answer(stream)
    assert actual.token_ids == llama.alone(Request(PROMPTS[4], SAMPLINGS[2])).token_ids[:9]
    assert actual.finish_reason == "length"
    with pytest.raises(UsageError, match="prompt has 30 tokens"):
        engine.submit(Request(LONG, GREEDY))
    assert llama.engine(Limits(slots=1, max_len=10_000)).context == CONTEXT


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2", "gemma3"], indirect=True)
def test_log_probabilities_are_those_of_transformers(family: Family, chunk: int) -> None:
    # Logits are about 10 in float32; sums in another order differ by up to 2e-5 here.
    close = partial(torch.testing.assert_close, rtol=0.0, atol=1e-4)
    requests = [
        Request(PROMPTS[4], GREEDY, logprobs=5, prompt_logprobs=True),
        Request(PROMPTS[3], SAMPLINGS[3], logprobs=0, prompt_logprobs=True),
        Request(PROMPTS[3], SAMPLINGS[2], logprobs=VOCAB_SIZE),
        Request(PROMPTS[5], SAMPLINGS[2], prompt_logprobs=True),
    ]
    engine = family.engine(Limits(slots=3, max_len=CONTEXT, chunk=chunk))
    streams = [engine.submit(request) for request in requests]
    family.run_out(engine)
    for request, stream in zip(requests, streams, strict=True):
        tokens = list(stream)
        ids = torch.tensor([*request.prompt, *(token.token_id for token in tokens)])
        assert tuple(ids[len(request.prompt) :].tolist()) == family.alone(request).token_ids
        with torch.no_grad():
            scores = family.reference(ids[None, :-1]).logits[0, :, :VOCAB_SIZE].log_softmax(-1)
        all_tokens = [*stream.prompt, *tokens] if request.prompt_logprobs else [None] * len(request.prompt) + tokens
        assert len(all_tokens) == len(ids)
        for position, (token, row) in enumerate(zip(all_tokens[1:], scores, strict=True), 1):
            if token is None:
                continue
            top = request.logprobs if position >= len(request.prompt) else request.logprobs or 0
            assert token.token_id == ids[position]
            if top is None:
                assert (token.logprob, token.top) == (None, ())
                continue
            assert token.logprob is not None
            close(torch.tensor(token.logprob), row[token.token_id])
            assert len(token.top) == top
            close(torch.tensor([score for _, score in token.top]), row.topk(top).values)
            named = row[torch.tensor([number for number, _ in token.top], dtype=torch.long)]
            close(named, row.topk(top).values)
        if request.prompt_logprobs:
            assert (stream.prompt[0].token_id, stream.prompt[0].logprob) == (request.prompt[0], None)
            assert [token.text for token in stream.prompt] == [family.tokenizer.decode([i]) for i in request.prompt]


def test_the_common_start_of_two_prompts_is_computed_once(family: Family) -> None:
    engine = family.engine(Limits(slots=3, max_len=CONTEXT, chunk=8))
    first = Request(LONG, GREEDY)
    followers = [
        Request(LONG, GREEDY),  # all but its last token, which is computed for its logits
        Request((*LONG[:20], 5, 6, 7), GREEDY),
        Request((*LONG, *family.alone(first).token_ids[:10], 7), GREEDY),  # continues the answer, as in a conversation
        Request(LONG, GREEDY, prompt_logprobs=True),  # needs all of its logits
        Request((LONG[0] + 1, *LONG[1:]), GREEDY),
    ]
    reused = []
    for request in (first, *followers):
        before = engine.stats()
        stream = engine.submit(request)
        family.run_out(engine)
        reused.append(engine.stats().reused_tokens_total - before.reused_tokens_total)
        assert family.answer(stream) == family.alone(request)
        assert engine.stats().prompt_tokens_total - before.prompt_tokens_total == len(request.prompt)
        engine.submit(Request(LONG[:20], Sampling(temperature=0.0, max_new_tokens=1)))  # occupies slot 0
        engine.submit(Request(LONG, GREEDY))
        family.run_out(engine)
    assert reused == [0, 29, 20, 30, 0, 0]  # decode computed the answer, with other bits than prefill


def test_a_prompt_is_copied_from_a_running_request(family: Family) -> None:
    engine = family.engine(Limits(slots=3, max_len=CONTEXT, chunk=8))
    requests = [Request(LONG, GREEDY), Request((*LONG[:25], 3), GREEDY), Request(LONG, SAMPLINGS[2])]
    streams = [engine.submit(request) for request in requests]
    family.run_out(engine)
    assert engine.stats().reused_tokens_total == 25 + 29
    assert [family.answer(stream) for stream in streams] == [family.alone(request) for request in requests]


def test_requests_beyond_the_queue_are_refused(llama: Family) -> None:
    engine = llama.engine(Limits(slots=1, max_len=CONTEXT, queue=2))
    engine.submit(MIXED[0])
    engine.step()
    streams = [engine.submit(MIXED[n]) for n in (1, 2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit(MIXED[3])
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(MIXED[n]) for n in (1, 2)]
    assert engine.stats().requests_total == 3
    engine.submit(MIXED[3])


@pytest.mark.parametrize("logprobs", [None, 2])
def test_the_next_step_is_launched_before_tokens_are_emitted(
    family: Family, monkeypatch: pytest.MonkeyPatch, logprobs: int | None
) -> None:
    """But not if the logits of the last step are still needed for log-probabilities."""
    engine = family.engine(Limits(slots=2, max_len=CONTEXT))
    engine.scheduler.decoder.launches_ahead = True
    streams = [engine.submit(Request(prompt, GREEDY, logprobs=logprobs)) for prompt in PROMPTS[:2]]
    launch, received = engine.scheduler.decoder.launch, [0, 0]
    early = []  # at each launch, generated tokens that were not emitted yet

    def watched(tokens: list[int], adapter_ids: list[int]) -> None:
        for number, stream in enumerate(streams):
            received[number] += len(stream.ready())
        early.append(engine.scheduler.running[0].generated - received[0])
        launch(tokens, adapter_ids)

    monkeypatch.setattr(engine.scheduler.decoder, "launch", watched)
    family.run_out(engine)
    assert set(early[1:]) == ({1} if logprobs is None else {0})
    assert [received[n] + len(stream.ready()) for n, stream in enumerate(streams)] == [GREEDY.max_new_tokens] * 2
    assert len(early) == GREEDY.max_new_tokens - 1  # no unnecessary step


def test_an_answer_that_ends_during_a_launched_step_is_complete_as_are_the_others(family: Family) -> None:
    """A stop string is found when the token is emitted; the result of the launched step is discarded for it."""
    alone = family.alone(MIXED[2])
    stop = next(alone.text[n : n + 2] for n in range(2, len(alone.text) - 2) if alone.text[n : n + 2].strip())
    requests = [MIXED[0], Request(MIXED[2].prompt, replace(MIXED[2].sampling, stop=(stop,))), MIXED[5], MIXED[9]]
    engine = family.engine(Limits(slots=3, max_len=CONTEXT, chunk=64))
    engine.scheduler.decoder.launches_ahead = True
    streams = [engine.submit(request) for request in requests]
    family.run_out(engine)
    assert [family.answer(stream) for stream in streams] == [family.alone(request) for request in requests]
    assert family.alone(requests[1]).finish_reason == "stop"
    assert (engine.stats().running, engine.stats().cache_tokens_used) == (0, 0)


def test_a_request_submitted_during_a_launched_step_is_prefilled_in_the_next(family: Family) -> None:
    engine = family.engine(Limits(slots=2, max_len=CONTEXT))
    engine.scheduler.decoder.launches_ahead = True
    engine.submit(Request(PROMPTS[3], Sampling(temperature=0.0, max_new_tokens=30)))
    for _ in range(3):
        engine.step()
    late = engine.submit(Request(PROMPTS[4], GREEDY))
    for _ in range(2):  # the first one ends the launched step
        engine.step()
    assert late.first_token is not None
    family.run_out(engine)
    assert family.answer(late) == family.alone(late.request)


def test_an_answer_that_ended_during_a_launched_step_cannot_be_cancelled(family: Family) -> None:
    alone = family.alone(Request(PROMPTS[2], GREEDY))
    engine = family.engine(Limits(slots=2, max_len=CONTEXT))
    engine.scheduler.decoder.launches_ahead = True
    stop = next(alone.text[n : n + 2] for n in range(2, len(alone.text) - 2) if alone.text[n : n + 2].strip())
    stream = engine.submit(Request(PROMPTS[2], replace(GREEDY, stop=(stop,))))
    other = engine.submit(Request(PROMPTS[3], GREEDY))
    tokens: list[Token] = []
    while not tokens or tokens[-1].finish_reason is None:
        engine.step()
        tokens += stream.ready()
    assert engine.scheduler._in_flight
    stream.cancel()
    family.run_out(engine)
    assert not stream.ready()
    assert tokens[-1].finish_reason == "stop"
    assert (engine.stats().cancelled_total, engine.stats().finished_total) == (0, 2)
    assert family.answer(other) == family.alone(other.request)


def test_without_a_queue_free_slots_still_accept_requests(llama: Family) -> None:
    engine = llama.engine(Limits(slots=2, max_len=CONTEXT, queue=0))
    streams = [engine.submit(MIXED[n]) for n in (0, 1)]
    for _ in range(2):
        with pytest.raises(QueueFullError):
            engine.submit(MIXED[2])
        engine.step()
    llama.run_out(engine)
    streams.append(engine.submit(MIXED[2]))
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(MIXED[n]) for n in range(3)]


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (Request((), GREEDY), UsageError, "prompt is empty"),
        (Request((5,) * CONTEXT, GREEDY), UsageError, "48 tokens; the model's context holds 48"),
        (Request((5, VOCAB_SIZE), GREEDY), UsageError, "no token 258"),
        (Request((-1,), GREEDY), UsageError, "no token -1"),
        (Request((5,), GREEDY, logprobs=VOCAB_SIZE + 1), UsageError, "259 .*log-probabilities"),
        (Request((5,), GREEDY, logprobs=-1), UsageError, "-1 .*log-probabilities"),
        (Request((5,), Sampling(seed=2**64)), UsageError, "seed"),
        (Request((5,), Sampling(seed=-(2**63) - 1)), UsageError, "seed"),
        (Request((5,), GREEDY, adapter="none"), AdapterError, "no adapter 'none' here.\nThere are: base"),
    ],
)
def test_an_invalid_request_is_refused_at_once(
    llama: Family, request_: Request, error: type[Exception], match: str
) -> None:
    engine = llama.engine(Limits(slots=2, max_len=CONTEXT))
    with pytest.raises(error, match=match):
        engine.submit(request_)
    assert engine.stats().requests_total == 0
    for seed in (-(2**63), 2**64 - 1):
        engine.submit(Request((5,), Sampling(seed=seed, max_new_tokens=1)))
    llama.run_out(engine)


def test_a_request_whose_token_cannot_be_sampled_fails_alone(llama: Family) -> None:
    engine = llama.engine(Limits(slots=3, max_len=CONTEXT))
    broken = Request(PROMPTS[2], Sampling(repetition_penalty=1e-300))  # its logits become infinite
    streams = [engine.submit(request) for request in (MIXED[0], broken, MIXED[2])]
    llama.run_out(engine)
    assert llama.answer(streams[1]).finish_reason == "error"
    assert "repetition penalty" in streams[1].error
    assert [llama.answer(streams[n]) for n in (0, 2)] == [llama.alone(MIXED[n]) for n in (0, 2)]
    assert (engine.stats().failed_total, ended(engine.stats())) == (1, 3)


def alive() -> dict[int, int]:
    """The storages of all tensors, with their sizes."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def test_serving_more_requests_needs_no_more_memory(llama: Family) -> None:
    engine = llama.engine(Limits(slots=3, max_len=CONTEXT, chunk=8))
    streams: list[Stream] = []

    def serve(count: int) -> int:
        for number in range(count):
            request = MIXED[number % len(MIXED)]
            streams.append(engine.submit(Request(request.prompt, request.sampling, logprobs=2, prompt_logprobs=True)))
        streams[-1].cancel()
        llama.run_out(engine)
        return sum(alive().values())

    assert serve(50) == serve(3)


def test_an_idle_step_does_nothing(llama: Family) -> None:
    engine = llama.engine(Limits(slots=1, max_len=CONTEXT))
    engine.step()
    assert engine.stats().running == engine.stats().requests_total == 0
    model = llama.model().train()
    assert not llama.engine(Limits(slots=1, max_len=CONTEXT), model).model.training
    assert complete(model, llama.tokenizer, MIXED[0].prompt, GREEDY) == llama.alone(MIXED[0])
