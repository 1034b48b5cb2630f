"""A member's code on the head finds no key, no credential of money and no way to change azu's code."""

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
import pytest

import azu
from azu.launch.unix_users import UnixUser
from tests.redteam import code
from tests.redteam.conftest import Attacked
from tests.unix_users import MONEY, RAY

pytestmark = pytest.mark.prove

PLACES = ("scheduler", "ingress", "registry", "head")


def platform_key(attacked: Attacked) -> str:
    (key,) = re.findall(r"[0-9a-f]{64}", (attacked.money_home / "devnet.key").read_text())
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize("place", PLACES)
def test_its_code_runs_in_every_process_of_ray_as_rays_user(attacked: Attacked, place: str) -> None:
    user = UnixUser.find(RAY)
    assert user is not None

    seen = attacked.act(place, "identity")

    assert seen["uid"] == user.uid
    assert 0 not in seen["groups"]


def test_it_finds_no_private_key_in_files_environments_core_dumps_or_memory(attacked: Attacked) -> None:
    folders = [
        str(attacked.home),
        str(attacked.user_homes),
        "/var/lib/azu",
        "/root",
        "/run",
        "/dev/shm",
    ]

    found = attacked.act("head", "keys_within_reach", folders)

    assert platform_key(attacked) not in found["hashes"]
    assert found["memories"] == []
    # The search works: root finds the key, and opens the memory of money's processes.
    roots = code.keys_within_reach(None, [str(attacked.user_homes)])
    assert platform_key(attacked) in roots["hashes"]
    assert set(roots["memories"]) >= set(attacked.processes_of(MONEY))


def test_it_traces_no_process_of_money_or_of_root(attacked: Attacked) -> None:
    pids = [*attacked.processes_of(MONEY), os.getpid()]
    commands = [psutil.Process(pid).cmdline()[-1:] for pid in pids]
    assert ["signer"] in commands, "the process that has the platform's key is among them"

    assert attacked.act("head", "traced", pids) == []


def test_it_reads_nothing_in_the_homes_of_money_and_of_the_operator(attacked: Attacked) -> None:
    files = [str(path) for home in (attacked.money_home, attacked.home) for path in (home, *home.rglob("*"))]
    assert len(files) > 10

    assert attacked.act("scheduler", "readable", files) == []


def test_it_changes_neither_code_nor_what_root_gave_to_ray(attacked: Attacked) -> None:
    package = Path(azu.__file__).parent
    files = [str(path) for path in (package, *package.rglob("*.py"), package.parent / "actors")]
    given = attacked.money_home.parent / "ray" / "files"
    files += [str(path) for path in (given, *given.iterdir(), given.parent)]

    assert attacked.act("scheduler", "writable", files) == []


@pytest.mark.parametrize("place", ["scheduler", "ingress"])
def test_no_redis_shows_or_changes_the_ledger_for_what_the_memory_holds(
    attacked: Attacked, place: str
) -> None:
    urls = [urlsplit(url) for url in attacked.act(place, "urls_in_memory")]
    logins = [(one.username or "", unquote(one.password or "")) for one in urls if one.scheme == "redis"]
    assert logins, "the search works"
    # Of this network alone: other tests have Redis servers on this machine.
    ports = attacked.ports_of(MONEY) | attacked.ports_of(RAY)
    assert len(ports) >= 3

    accepted = attacked.act(place, "redis_answers", sorted(ports), logins)

    assert accepted == []
