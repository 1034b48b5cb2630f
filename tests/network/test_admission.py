"""Fifty jobs at once on nodes that hold the KV of four: no stage ever uses more memory than planned."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest
from transformers import AutoConfig

from azu.config import load_network
from azu.units import MIB
from tests.engine.families import build_lively
from tests.network.actors import actors_named, ask_inside, pid_of
from tests.network.models import VOCAB_SIZE, save_tokenizer
from tests.network.recovering import (
    Asked,
    Running,
    Streams,
    network_of,
    piece_pids,
    raylets,
    show,
    slug,
    spared,
    wait_for_waiting,
)

pytestmark = [pytest.mark.cluster, pytest.mark.prove]

NUM_JOBS = 50
PROMISED, TOKENS = 4, 128
# Memory for a part of the model, its KV and the margin, not for the whole model.
VRAM_MIB = 420
PERIOD_S = 0.05
_LOOK_EVERY = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 190 MB: its weights and KV are much larger than a process's own fluctuations."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    build_lively(config).save_pretrained(folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def running(home: Path, folder: Path) -> Iterator[Running]:
    """Two nodes; the model needs both."""
    file = spared(ada=VRAM_MIB, ben=VRAM_MIB)
    kv = file.policy.kv.model_copy(update={"promised_sequences": PROMISED, "tokens_per_sequence": TOKENS})
    # As in a network of people's machines; the test network has no margin.
    margin = load_network(None).policy.planner.margin_bytes
    planner = file.policy.planner.model_copy(update={"margin_bytes": margin})
    policy = file.policy.model_copy(update={"kv": kv, "planner": planner})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AZU_MODEL_ROOTS", str(folder.parent))
        with network_of(home, file.model_copy(update={"policy": policy})) as started:
            yield started


def resident_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def waiting_bytes() -> int:
    """Return the memory of an idle process that has imported what a piece needs."""
    wait_for_waiting()
    idle = [
        resident_bytes(child.pid)
        for raylet in raylets()
        if "--head" not in raylet.cmdline()
        for child in raylet.children()
        if child.cmdline()[0].startswith("ray::IDLE")
    ]
    return max(idle)


@contextmanager
def watched() -> Iterator[dict[int, int]]:
    """Yield the most memory of each process with a piece, sampled every 50 ms."""
    most: dict[int, int] = {}
    stop = Event()

    def watch() -> None:
        pids: set[int] = set()
        looks = 0
        while not stop.wait(PERIOD_S):
            pids = piece_pids() if looks % _LOOK_EVERY == 0 else pids
            looks += 1
            for pid in pids:
                with suppress(psutil.NoSuchProcess):
                    most[pid] = max(most.get(pid, 0), resident_bytes(pid))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def planned_bytes(actor: object) -> tuple[str, int]:
    """Return, inside a LayerActor, its node and its planned memory."""
    stage = actor._runner._spec.stage
    return stage.node_id, stage.vram_bytes


def num_waiting(pipeline: object) -> int:
    """Return, inside a Pipeline, the number of sequences that have no KV yet."""
    return pipeline._engine.num_waiting


def test_fifty_jobs_never_take_more_than_was_planned(running: Running, folder: Path) -> None:
    _, user = running
    model = str(folder)
    before = waiting_bytes()
    asked = [
        Asked(model, f"Job {index} counts: " + "one two three " * (index % 9 + 1), 24 + index % 3 * 8)
        for index in range(NUM_JOBS)
    ]

    with watched() as most:
        began_s = time.monotonic()
        streams = Streams(user, asked)
        streams.wait_until(lambda: streams.each[0].num_tokens > 0)
        (pipeline,) = actors_named(f"pipeline:{slug(model)}:")
        streams.wait_until(lambda: ask_inside(pipeline, num_waiting) > 0)
        answers = streams.answers()
        seconds = time.monotonic() - began_s

    assert [len(answer.token_ids) for answer in answers] == [one.max_tokens for one in asked]
    stages = actors_named(f"layer:{slug(model)}:")
    plans = [ask_inside(stage, planned_bytes) for stage in stages]
    taken = [most[pid_of(stage)] - before for stage in stages]
    assert len({node_id for node_id, _ in plans}) == len(stages) == 2
    for (_, planned), took in zip(plans, taken, strict=True):
        assert took <= planned <= VRAM_MIB * MIB
        show(
            f"{NUM_JOBS} jobs in {seconds:.0f} s: a stage took at most {took / MIB:.0f} MiB of "
            f"{planned / MIB:.0f} planned on a node that lends {VRAM_MIB}"
        )
