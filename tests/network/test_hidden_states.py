"""Hidden states go from stage to stage: the memory of Pipeline and head never holds one."""

from pathlib import Path

import psutil
import pytest

from azu.launch.local_network import LocalNetwork
from azu.launch.membership import Ticket
from tests.network.actors import actors_named, ask_inside, pid_of
from tests.network.test_generation import chat_text, finished
from tests.network.user import User

pytestmark = pytest.mark.cluster

PATTERN_BYTES = 96


def keep_frames(actor: object) -> None:
    """Have a LayerActor, from inside, keep every frame that arrives, so that the test knows its bytes."""
    runner = actor._runner
    kept: list[bytes] = []
    run = runner.run

    def remembering(batch, frame):
        if frame is not None:
            kept.append(bytes(frame))
        return run(batch, frame)

    runner.run = remembering
    runner.kept_frames = kept


def kept_frames(actor: object) -> list[bytes]:
    return actor._runner.kept_frames


def memory_holds(pid: int, pattern: bytes) -> bool:
    """Search all readable and writable memory of a process, including the object store."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, permissions = line.split()[:2]
            if not permissions.startswith("rw") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            if region_holds(memory, start, end, pattern):
                return True
    return False


def region_holds(memory, start: int, end: int, pattern: bytes, step: int = 64 * 1024 * 1024) -> bool:
    tail = b""
    for offset in range(start, end, step):
        try:
            memory.seek(offset)
            content = memory.read(min(step, end - offset))
        except (OSError, ValueError, OverflowError):
            return False
        if pattern in tail + content:
            return True
        tail = content[-len(pattern) :]
    return False


@pytest.mark.prove
def test_no_hidden_state_is_in_the_pipelines_or_the_heads_memory(user: User, network: LocalNetwork) -> None:
    text = chat_text("azu/tiny-dense", "Tell me how azu works.")
    finished(user, user.submit(text, est_tokens=2).json()["job_id"])  # the model is deployed now
    stages = actors_named("layer:azu-tiny-dense")
    assert len(stages) >= 2
    for stage in stages[1:]:
        ask_inside(stage, keep_frames)

    # A long prompt too: its frames are full prefill chunks.
    long_text = text * 12
    finished(user, user.submit(text, est_tokens=20).json()["job_id"])
    finished(user, user.submit(long_text, est_tokens=2).json()["job_id"])

    frames = ask_inside(stages[1], kept_frames)
    assert len(frames) > 20
    longest = max(frames, key=len)
    assert len(longest) > 30 * 1024
    patterns = [frame[len(frame) // 2 :][:PATTERN_BYTES] for frame in (longest, frames[-1], frames[5])]
    on_head = actors_named("pipeline:azu-tiny-dense") + actors_named("scheduler") + actors_named("registry")
    head_pids = [pid_of(actor) for actor in on_head]
    # Other clusters may run on this machine, so the head's processes are found by their port.
    assert isinstance(network.ticket, Ticket)
    port = str(network.ticket.port)
    head_pids += [
        process.pid
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] in ("gcs_server", "raylet")
        and ("--head" in process.info["cmdline"] or process.info["name"] == "gcs_server")
        and port in " ".join(process.info["cmdline"])
    ]
    assert len(head_pids) >= len(on_head) + 2
    stage_pid = pid_of(stages[1])
    try:
        found_at_stage = [memory_holds(stage_pid, pattern) for pattern in patterns]
    except PermissionError:
        pytest.skip("this user may not read other processes' memory")

    assert all(found_at_stage), "the search must find what is known to be there"
    for pid in head_pids:
        assert not any(memory_holds(pid, pattern) for pattern in patterns), psutil.Process(pid).cmdline()
