"""A request has the same bits alone and among others, whatever their lengths and whenever they join and leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from python_tests.generation.conftest import FRAME, make_model
from python_tests.generation.tools import make_layout, make_prompt, random_content
from speechlm_ext.generation.engine.engine import Engine
from speechlm_ext.generation.engine.rows import Decoded
from speechlm_ext.generation.engine.slots import DecodeJob
from speechlm_ext.generation.requests.prompt import Prompt
from speechlm_ext.generation.requests.request import SamplingSettings
from speechlm_ext.layout import TokenLayout
from speechlm_ext.model.lm import SpeechLMModel

TASKS = ("codec_ssl_plain_tts", "textlm", "codec_ssl_asr", "ssl_audiolm")


def requests(layout: TokenLayout, count: int) -> list[Prompt]:
    """Requests of all tasks, sampled and greedy, of many lengths; two of them with equal prompts, one with guidance."""
    rng, out = np.random.default_rng(0), []
    for n in range(count):
        task = TASKS[n % 4]
        conditions = {
            "codec_ssl_plain_tts": [random_content(layout, "text_bpe", 3 + 5 * n % 23, rng)],
            "codec_ssl_asr": [random_content(layout, "codec_ssl", 2 + 7 * n % 19, rng)],
        }.get(task, [])
        settings = SamplingSettings(greedy=n % 3 == 2, top_k=None if n % 3 == 2 else 5, seed=n)
        out.append(make_prompt(layout, task, conditions, None, settings, f"r{n}", max_new=4 + 5 * n % 17))
    out[4] = dataclasses.replace(out[0], id="r4", segments=out[4].segments)
    guided = dataclasses.replace(out[0].segments[0].settings, guidance=2.0)
    segment = dataclasses.replace(out[0].segments[0], settings=guided)
    bare = np.concatenate([out[0].frames_PS[:2], out[0].frames_PS[-1:]])
    out.append(dataclasses.replace(out[0], id="guided", segments=(segment,), unconditional_PS=bare))
    return out


def alone(model: SpeechLMModel, prompt: Prompt) -> Decoded:
    """A request in an engine of its own."""
    ((_, decoded),) = Engine(model, prompt.num_slots).run([DecodeJob(0, prompt)])
    return decoded


def among(model: SpeechLMModel, prompts: Sequence[Prompt], num_slots: int, **options) -> dict[str, Decoded]:
    """Requests that share steps: some start together, the others join one by one as steps go by."""
    engine, waiting, found = Engine(model, num_slots, **options), list(prompts), {}
    first = True
    while waiting or engine.active:
        joining: list[Prompt] = []
        while waiting and sum(p.num_slots for p in [*joining, waiting[0]]) <= engine.num_free:
            joining.append(waiting.pop(0))
            if not first and len(joining) == 1:
                break
        first = False
        if joining:
            engine.admit([DecodeJob(p.id, p) for p in joining])
        for _ in range(3):
            if engine.active:
                engine.step()
                found |= {job.key: decoded for job, decoded in engine.collect()}
    return found


def differences(found: Decoded, wanted: Decoded) -> Iterator[str]:
    """Fields that have not the same bits."""
    for field in dataclasses.fields(Decoded):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        is_same = a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else repr(a) == repr(b)
        if not is_same:
            yield field.name


@pytest.fixture(scope="module", params=["llama", "multi-scale"])
def case(request: pytest.FixtureRequest) -> tuple[SpeechLMModel, list[Prompt], list[Decoded]]:
    """A model, requests, and what each gives alone."""
    if request.param == "llama":
        layout, frame = make_layout(), None
    else:
        layout = make_layout().with_delays([0] * make_layout().num_streams)
        frame = FRAME
    model = make_model(layout, tasks=TASKS, frame=frame)
    prompts = requests(layout, 17)
    return model, prompts, [alone(model, prompt) for prompt in prompts]


@pytest.mark.parametrize(("num_slots", "cuda_graphs"), [(3, False), (8, True), (17, False)])
def test_the_same_bits_alone_and_among_others(case, num_slots: int, cuda_graphs: bool) -> None:
    """Among 2, 7 and 16 others at a time, once with padded steps."""
    model, prompts, wanted = case
    order = slice(None, None, -1 if num_slots == 8 else 1)
    found = among(model, prompts[order], num_slots, cuda_graphs=cuda_graphs)
    for prompt, one in zip(prompts, wanted, strict=True):
        assert not list(differences(found[prompt.id], one)), prompt.id
