"""The parts: each is a command whose exit status decides and whose last lines are quoted."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Part:
    """A command and what it shows."""

    name: str
    shows: str
    command: tuple[str, ...]


def azu(*arguments: str) -> tuple[str, ...]:
    """Return the command line of an azu command in this environment."""
    return (str(Path(sys.executable).with_name("azu")), *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    """Return the command line of a pytest run in this environment."""
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


PARTS = (
    *(
        Part(
            f"check {model} in {stages} stages",
            "tokens and logits stage by stage equal transformers'",
            azu("check", f"azu/{model}", "--stages", str(stages), "--json"),
        )
        for model in ("tiny-dense", "tiny-moe")
        for stages in (1, 2, 3, 6)
    ),
    Part(
        "check tiny-moe, experts apart",
        "experts spread over three holders equal the whole model",
        azu("check", "azu/tiny-moe", "--stages", "3", "--experts-apart", "3", "--json"),
    ),
    Part("demo", "a paid prompt through real stages, for a dense and a MoE model", azu("demo", "--json")),
    Part(
        "demo leaves nothing",
        "no process, port or file is left at its end or after Ctrl-C; it runs again at once",
        pytest("tests/cli/test_demo.py", "-m", "prove"),
    ),
    Part(
        "up, join, leave, down",
        "a network from the command line, with nothing left behind",
        pytest("tests/cli/test_up.py", "-m", "prove"),
    ),
    Part(
        "azu up as root",
        "money and Ray run as users of their own; killed, the network leaves no process of theirs",
        pytest("tests/cli/test_up_as_root.py", "-m", "prove"),
    ),
    Part(
        "red team",
        "a member that runs its own code in every process of Ray gains nothing of the money",
        pytest("tests/redteam", "-m", "prove", "-s"),
    ),
    Part(
        "money: rules in Redis",
        "the books are right after any history; kill -9 under load loses no acknowledged transfer",
        pytest("tests/money/ledger/test_state.py", "tests/money/ledger/test_durability.py", "-m", "prove"),
    ),
    Part(
        "money: crash points",
        "treasury and settling process killed before and after every write and send, 20 seeds each",
        pytest(
            "tests/money/treasury/test_crash_points.py", "tests/jobs/test_settling_process.py", "-m", "prove"
        ),
    ),
    Part(
        "money: hostile runs",
        "2,000 jobs whose pipelines answer anything: each ends, pays by count, and its shares sum exactly",
        pytest("tests/jobs/test_dispatch.py", "-m", "prove"),
    ),
    Part(
        "money: claims",
        "1,000 copies of one claim credit once, 1,000 bad claims credit nothing",
        pytest("tests/money/treasury/test_request_reply.py", "-m", "prove"),
    ),
    Part(
        "money: submits",
        "1,000 submits at once against a balance for 10 jobs start exactly 10, through the real ingress",
        pytest("tests/network/test_submits.py"),
    ),
    Part(
        "money: payouts",
        "50 workers, every devnet fault at random, 20 seeds: each is paid exactly once",
        pytest("tests/money/treasury/test_payouts_on_devnet.py", "-m", "prove"),
    ),
    Part(
        "money: soak",
        "8 clients act at random for 10 minutes while money's processes are killed; the audit is clean",
        pytest("tests/network/test_soak.py"),
    ),
    Part(
        "page",
        "chat with cost, network and receipts in Chromium at 1280 and 400 pixels, by key and keyboard",
        pytest("tests/network/test_page.py", "tests/deployments/test_page_in_browser.py", "-m", "prove"),
    ),
    Part(
        "metrics",
        "every Grafana panel has data in a Prometheus, from Ray's agents and from the ingress",
        pytest("tests/network/test_grafana.py", "-m", "prove", "-s"),
    ),
    Part(
        "logs",
        "one job followed by its ids through every process; no key, token or password in any log",
        pytest("tests/network/test_logs.py", "-m", "prove"),
    ),
    Part(
        "retention",
        "without retention no file has a word or a token of 100 prompts, and no middle stage ever got one",
        pytest("tests/network/test_retention.py", "-m", "prove", "-s"),
    ),
    Part(
        "azu top",
        "a live view and one sample of a busy network",
        pytest("tests/network/test_top.py", "-m", "prove", "-s"),
    ),
    Part(
        "kill matrix",
        "each piece killed in prefill, at the first, a middle and the last token, several at once: "
        "4 streams go on, identical and charged as undisturbed",
        pytest("tests/network/test_kill_matrix.py", "-m", "prove", "-s"),
    ),
    Part(
        "fault run",
        "an unexpected exception at each public method and background loop of every process: 4 streams, "
        "neighbours identical, no job in limbo, no lamport reserved",
        pytest("tests/network/test_fault_run.py", "-m", "prove", "-s"),
    ),
    Part(
        "node loss",
        "each whole node killed, each piece and node frozen and woken: 4 streams go on, identical",
        pytest("tests/network/test_node_loss.py", "-m", "prove", "-s"),
    ),
    Part(
        "slow stage",
        "a stage at a tenth of its speed, 8 busy loops, 20 minutes: 8 streams go on, no piece is replaced",
        pytest("tests/network/test_slow_stage.py", "-m", "prove", "-s"),
    ),
    Part(
        "host cut off",
        "three hosts, the link of one down for 30 s: 4 streams go on, identical",
        pytest("tests/network/test_host_cut_off.py", "-m", "prove", "-s"),
    ),
    Part(
        "control plane",
        "registry, scheduler, pipelines, ingress and treasury killed 5 times each under 4 clients: "
        "every job done, right and charged once, and no process that holds weights restarts",
        pytest("tests/network/test_control_plane.py", "-m", "prove", "-s"),
    ),
    Part(
        "Redis says no",
        "read-only, no memory, failed save, loading, frozen, tail cut, replica promoted, under 8 clients: "
        "every job right or told, audit clean, running again by itself",
        pytest("tests/network/test_redis_says_no.py", "-m", "prove", "-s"),
    ),
    Part(
        "memory of many jobs",
        "20,000 short jobs: every process's memory and Redis flat over the last half",
        pytest("tests/network/test_memory.py", "-m", "prove", "-s"),
    ),
    Part(
        "memory and leaving",
        "a node loses half its memory under 8 streams, another leaves: every stream goes on, identical",
        pytest("tests/network/test_change.py", "-m", "prove", "-s"),
    ),
    Part(
        "rolling upgrade",
        "three nodes are upgraded under a stream; one that is too old is told what to install",
        pytest("tests/network/test_rolling_upgrade.py", "-m", "prove", "-s"),
    ),
    Part(
        "state of earlier releases",
        "what each release left on disk is read: the books agree, keys open, jobs and payouts are known",
        pytest("tests/releases", "-m", "prove"),
    ),
    Part(
        "backup drill",
        "a head is killed under load; a copy of before is restored by the runbook, audited, and pays",
        pytest("tests/network/test_backup_drill.py", "-m", "prove", "-s"),
    ),
    Part(
        "runbooks",
        "each command of the runbooks in docs/operations.md runs as it stands there",
        pytest("tests/network/test_runbooks.py", "-m", "prove", "-s"),
    ),
    Part(
        "one head's load",
        "tokens per second, memory and CPU time of the head's processes under 1, 16 and 64 streams",
        pytest("tests/network/test_head_load.py", "-m", "prove", "-s"),
    ),
    Part(
        "locked packages",
        "pip finds each package of the lock files by its hash",
        pytest("tests/test_lock.py", "-m", "prove"),
    ),
    Part(
        "memory planned",
        "50 sequences on a stage with KV for four: its process never takes more than planned",
        pytest("tests/engine/test_planned_memory.py", "-m", "prove", "-s"),
    ),
    Part(
        "better places",
        "a larger node joins, another lends more: the model moves there under 4 streams, identical",
        pytest("tests/network/test_better_place.py", "-m", "prove", "-s"),
    ),
    Part(
        "more pipelines",
        "a busy model gets a second pipeline; each job goes on in its own when the scheduler dies, identical",
        pytest("tests/network/test_more_pipelines.py", "-m", "prove", "-s"),
    ),
    Part(
        "GCS restart",
        "Ray's GCS killed and started again, its tables in Redis: actors answer meanwhile, are found again",
        pytest("tests/test_gcs_restart.py", "-s"),
    ),
    Part(
        "hot experts",
        "hot experts get replicas under 4 streams; each set of experts killed in turn: all identical",
        pytest("tests/network/test_hot_experts.py", "-m", "prove", "-s"),
    ),
    Part(
        "memory admitted",
        "50 jobs at once on nodes that hold the KV of four: no stage's process takes more than was planned",
        pytest("tests/network/test_admission.py", "-m", "prove", "-s"),
    ),
    Part(
        "no node fits",
        "jobs without workers wait while Ray is asked for nodes, go on when one joins, else end with a "
        "reason and a release",
        pytest("tests/network/test_no_node_fits.py", "-m", "prove", "-s"),
    ),
    Part(
        "random kills",
        "60 kills in 15 minutes with 8 clients: every job identical, books clean",
        pytest("tests/network/test_random_kills.py", "-m", "prove", "-s"),
    ),
    Part(
        "fuzz: mutations",
        "82,000 good requests with something in them changed: no 5xx, no money moved by a refused one",
        ("env", "AZU_TEST_FUZZ_REQUESTS=82000", *pytest("tests/deployments/test_fuzz.py", "-s")),
    ),
    Part(
        "fuzz: schema",
        "schemathesis over the OpenAPI schema, 18,000 requests and more: no 5xx, answers as the schema says",
        ("env", "AZU_TEST_SCHEMA_EXAMPLES=750", *pytest("tests/deployments/test_schema.py", "-s")),
    ),
    Part(
        "hostile models",
        "206 hostile ids open no file outside the allowed folders; 20 hostile checkpoints refused by name",
        pytest("tests/models/test_hostile_ids.py", "tests/deployments/test_hostile_checkpoints.py", "-s"),
    ),
    Part(
        "clients of others",
        "LangChain's OpenAI classes work unchanged",
        pytest("tests/deployments/test_langchain.py", "-s"),
    ),
    Part(
        "damaged files",
        "nodes, network, ticket, receipt, keystore, credentials and structure files: read or refused by name",
        ("env", "AZU_TEST_FILE_MUTANTS=600", *pytest("tests/cli/test_hostile_files.py")),
    ),
    Part(
        "families",
        "every family in 3 uneven stages, every MoE family with experts over 3 holders: as transformers",
        pytest("tests/engine/test_check.py", "-s"),
    ),
    Part(
        "forms of checkpoints",
        "per-expert, fused, tied and prefix-less names in three dtypes: as transformers",
        pytest("tests/engine/test_input_forms.py"),
    ),
    Part(
        "what cannot be cut",
        "native types that are refused before anything is loaded, each with its reason",
        pytest("tests/models/test_inspection.py", "-s"),
    ),
    Part(
        "engine over the cluster",
        "six families over nodes too small for one; 24 requests at once as if alone; 100 dropped streams",
        pytest(
            "tests/network/test_families.py",
            "tests/network/test_crowd.py",
            "tests/network/test_cancel.py",
            "-s",
        ),
    ),
    Part(
        "plans, measured",
        "on two networks of unequal processes a plan gives the slower one fewer layers; both times",
        pytest("tests/planner/test_measured_split.py", "-m", "prove", "-s"),
    ),
    Part("bench", "azu beside transformers, cp and Redis in one run", azu("bench")),
    Part(
        "ray up",
        "machines reached by SSH: up, a paid prompt, down; serve deploy; nodes that come when asked for",
        pytest("tests/test_ray_up.py", "-s"),
    ),
    Part(
        "newcomer's walk",
        "the README's commands, from up to down: lenders earn what the prompt cost, to the lamport",
        pytest("tests/cli/test_walk.py", "-s"),
    ),
    Part(
        "containers",
        "the steps of the container files run in a clean directory",
        pytest("tests/test_containers.py", "-m", "prove", "-s"),
    ),
    Part(
        "encryption: on the wire",
        "three hosts answer 100 requests: a capture on their bridge finds every hidden state and the tokens "
        "with TLS off, none with TLS on",
        pytest("-s", "tests/hosts/test_encryption.py", "tests/hosts/test_namespaces.py"),
    ),
    Part(
        "encryption: who joins",
        "no node with a wrong or missing certificate or token, with a ticket used up or revoked",
        pytest("-s", "tests/hosts/test_joining.py"),
    ),
    Part(
        "encryption: its cost",
        "a frame's way between two nodes with TLS, beside the same without",
        azu("bench", "--only", "tls", "--json"),
    ),
    Part(
        "damaged frames",
        "10,000 frames damaged in flight: each refused, its sender named, every job's output as undisturbed",
        pytest("-s", "tests/engine/test_corrupted_frames.py", "-m", "prove"),
    ),
    Part(
        "a sequence owns its faults",
        "2,000 draws of parameters at the edges of float; 200 good sequences between 200 odd ones",
        pytest(
            "-s",
            "tests/engine/test_sampler.py",
            "tests/engine/test_sequence_faults.py",
            "-m",
            "prove",
        ),
    ),
    Part(
        "a request owns its faults",
        "odd requests at a network end with their reasons; no answer changes, no stage is replaced",
        pytest("-s", "tests/network/test_odd_requests.py"),
    ),
    Part(
        "pieces that lie",
        "routers, expert sets and last stages that claim what did not happen: named, 4 streams identical, "
        "no one is paid more for it",
        pytest("-s", "tests/network/test_lying_experts.py", "-m", "prove"),
    ),
    Part(
        "canary of a placement",
        "a stage that distorts hidden states is left out after the next placement's canary",
        pytest("-s", "tests/network/test_canary.py", "-m", "prove"),
    ),
    Part(
        "regular canary",
        "a stage that distorts hidden states is left out after the next one; paid where no token changes",
        pytest("-s", "tests/network/test_regular_canary.py", "-m", "prove"),
    ),
    Part(
        "mutants",
        "300 places of the pure rooms changed, one at a time: tests notice at least 90%",
        (sys.executable, "-m", "tests.prove.mutants"),
    ),
)


def the_rest() -> Part:
    """Return the part of every test marked `prove` that no other part runs."""
    named = {word for part in PARTS for word in part.command if word.startswith("tests/")}
    left_out = [f"--ignore={word.split('::')[0]}" for word in sorted(named)]
    return Part("long tests", "every other test marked `prove`", pytest("-m", "prove", *left_out))
