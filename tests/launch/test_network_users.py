"""Money and Ray get users of their own: none of them reads the other's files, and Ray's changes no code."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from azu.config import Settings
from azu.errors import ConfigurationError, Conflict
from azu.files import write_private
from azu.launch.network_users import NetworkUsers, network_users, ray_user
from azu.launch.processes import ProcessGroup
from azu.launch.redis_server import JOB_STORE, own_redis_url, start_stores
from azu.launch.unix_users import UnixUser
from tests.unix_users import MONEY, RAY, as_user, users_of_tests


@pytest.fixture(scope="module", autouse=True)
def _users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with users_of_tests(tmp_path_factory.mktemp("view")):
        yield


@pytest.fixture
def homes() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="azu-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "homes"


@pytest.fixture
def settings(tmp_path: Path, homes: Path) -> Settings:
    return Settings(home=tmp_path / "azu", user_homes=homes, money_user=MONEY, ray_user=RAY)


def reads(user: UnixUser | None, path: Path) -> bool:
    return as_user(user, "test", "-r", str(path)) == 0


def separate(settings: Settings) -> NetworkUsers:
    settings.home.mkdir(mode=0o700, exist_ok=True)
    users = network_users(settings, others_join=True)
    assert users.why_one == ""
    return users


@pytest.mark.prove
def test_each_user_reads_its_own_home_alone(settings: Settings) -> None:
    users = separate(settings)
    write_private(users.money_home / "tls" / "authority.key", "secret")
    operators = settings.home / "admin.json"
    write_private(operators, "secret")

    key = users.money_home / "tls" / "authority.key"
    assert reads(users.money, key)
    assert not reads(users.ray, key)
    assert not reads(users.ray, users.money_home)
    assert not reads(users.money, users.ray_home)
    assert not reads(users.ray, operators)
    assert not reads(users.money, operators)
    for home in (users.ray_home, users.ray_sessions):
        assert as_user(users.ray, "touch", str(home / "own")) == 0


def test_ray_reads_the_files_that_it_is_given_and_changes_none(settings: Settings) -> None:
    users = separate(settings)
    token = settings.home / "ray-token"
    write_private(token, "first")
    users.for_ray(token)
    write_private(token, "second")

    given = users.for_ray(token)

    assert given.read_text() == "second"
    assert reads(users.ray, given)
    assert not reads(users.money, given)
    for change in (("sh", "-c", f"echo x >> {given}"), ("rm", "-f", str(given)), ("touch", f"{given}.new")):
        assert as_user(users.ray, *change) != 0


@pytest.mark.prove
def test_the_users_stay_when_no_other_machine_can_join(settings: Settings) -> None:
    first = separate(settings)

    assert network_users(settings, others_join=False) == first
    assert settings.money_home.resolve() == first.money_home


@pytest.mark.prove
def test_money_moves_to_its_user_once(settings: Settings) -> None:
    write_private(settings.home / "redis" / "appendonly.aof", "journal")
    write_private(settings.home / "signer.json", "memory")
    write_private(settings.home / "ledger" / "head.json", "head")

    users = separate(settings)

    assert (users.money_home / "redis" / "appendonly.aof").read_text() == "journal"
    assert reads(users.money, users.money_home / "redis" / "appendonly.aof")
    assert sorted(path.name for path in settings.home.iterdir()) == ["users"]
    separate(settings)
    assert (users.money_home / "signer.json").read_text() == "memory"
    assert (users.money_home / "ledger" / "head.json").read_text() == "head"


@pytest.mark.prove
@pytest.mark.parametrize("before", ["AZU_HOME", "money"])
def test_the_store_of_jobs_moves_to_rays_user_who_replaces_none_of_its_folders(
    settings: Settings, before: str
) -> None:
    home = settings.home if before == "AZU_HOME" else separate(settings).money_home
    if before == "money":
        (home.parent / "ray" / "redis-jobs").rmdir()
    write_private(home / "redis-jobs" / "appendonly.aof", "jobs")

    users = separate(settings)

    store = users.jobs_home / "redis-jobs"
    assert (store / "appendonly.aof").read_text() == "jobs"
    assert reads(users.ray, store / "appendonly.aof")
    assert not reads(users.money, store / "appendonly.aof")
    assert not (home / "redis-jobs").exists()
    assert as_user(users.ray, "touch", str(store / "own")) == 0
    assert as_user(users.ray, "mv", str(store), f"{store}.gone") != 0
    assert settings.jobs_home.resolve() == users.jobs_home


@pytest.mark.prove
def test_each_store_runs_as_its_user_and_finds_its_data_again(settings: Settings, tmp_path: Path) -> None:
    users = separate(settings)
    uids = []
    for _ in range(2):
        with (
            ProcessGroup(tmp_path / "logs", user=users.money) as services,
            ProcessGroup(tmp_path / "logs", user=users.ray) as of_jobs,
        ):
            urls = start_stores(services, users.money_home, of_jobs, users.jobs_home, 15.0)
            with Redis.from_url(urls.jobs_owner) as jobs:
                uids.append((jobs.incr("starts"), psutil.Process(of_jobs.pid("redis-jobs")).uids().real))
            assert users.money is not None
            assert psutil.Process(services.pid("redis")).uids().real == users.money.uid

    assert users.ray is not None
    assert uids == [(1, users.ray.uid), (2, users.ray.uid)]
    # The owner's commands find its password.
    assert own_redis_url(settings.jobs_home, JOB_STORE)


@pytest.mark.prove
def test_books_in_two_places_are_refused(settings: Settings) -> None:
    users = separate(settings)
    write_private(users.money_home / "redis" / "appendonly.aof", "new")
    write_private(settings.home / "redis" / "appendonly.aof", "old")

    with pytest.raises(Conflict, match="both exist"):
        network_users(settings, others_join=True)

    assert (settings.home / "redis" / "appendonly.aof").read_text() == "old"


def test_one_user_runs_a_network_that_no_other_machine_joins(settings: Settings) -> None:
    users = network_users(settings, others_join=False)

    assert (users.money, users.ray) == (None, None)
    assert users.money_home == users.ray_home == settings.home == settings.money_home
    assert users.for_ray(settings.home / "token") == settings.home / "token"
    assert not settings.user_homes.exists()


def test_a_setting_keeps_one_user_until_money_has_its_own(settings: Settings) -> None:
    one = settings.model_copy(update={"one_user": True})
    assert "AZU_ONE_USER" in network_users(one, others_join=True).why_one

    separate(settings)

    with pytest.raises(ConfigurationError, match="AZU_ONE_USER"):
        network_users(one, others_join=True)


def test_a_user_that_could_change_azus_code_runs_nothing(settings: Settings, homes: Path) -> None:
    open_folder = homes.parent / "code"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{open_folder}")
        with pytest.raises(ConfigurationError, match=r"change azu's code.*/code"):
            ray_user(settings)


def test_a_model_folder_that_ray_cannot_read_is_named(settings: Settings, tmp_path: Path) -> None:
    closed = tmp_path / "models"
    closed.mkdir(mode=0o700)

    users = network_users(settings.model_copy(update={"model_roots": (closed,)}), others_join=True)

    assert str(closed) in users.why_one


def test_one_name_for_both_users_is_refused(settings: Settings) -> None:
    users = network_users(settings.model_copy(update={"money_user": RAY}), others_join=True)

    assert "two users" in users.why_one


def test_a_missing_user_is_created_without_a_login() -> None:
    name = f"{MONEY}-new"
    try:
        created = UnixUser.found_or_created(name)

        assert created.uid != 0
        assert UnixUser.found_or_created(name) == created
        entry = subprocess.run(["getent", "passwd", name], capture_output=True, text=True, check=True)
        assert entry.stdout.strip().endswith("nologin")
    finally:
        subprocess.run(["userdel", name], check=True)
