"""Registry: the models by id, cut once for the whole network."""

from functools import partial
from pathlib import Path

from actors.links import raises_known_errors
from actors.telemetry import log_as
from azu.config import ControlConfig
from azu.models.description import AvailableModel, ModelDescription
from azu.models.slim import import_for_stages
from azu.models.status import ModelStatus, RedisModelStatus
from azu.protocol.structure import Structure


@raises_known_errors
class Registry:
    """Wraps a ModelRegistry; every call runs in a thread of its own, and none waits for a cut."""

    def __init__(self, config: ControlConfig) -> None:
        # torch is imported here: a process that only starts or calls this actor does without it.
        import_for_stages()
        from azu.cluster.deployment_store import deployed_models
        from azu.models.cuts import Cuts
        from azu.models.registry import ModelRegistry

        log_as("registry")
        self._status = RedisModelStatus(config.redis_url)
        self._models = ModelRegistry(
            config.home / "registry",
            model_roots=config.model_roots,
            status=self._status,
            max_model_bytes=config.max_model_bytes,
            offered=config.policy.models,
            free_bytes=config.policy.new_models.free_bytes,
            deployed=partial(deployed_models, config.redis_url),
        )
        self._cuts = Cuts(self._models)

    def start(self) -> None:
        """Do nothing: an answer shows that the process lives."""

    def new_bytes(self, model_id: str) -> int:
        """Return how many bytes a model has whose newest revision the network never had; 0 for others."""
        return self._models.new_bytes(model_id)

    def describe(
        self, model_id: str, revision: str | None = None, is_asked_for: bool = True
    ) -> ModelDescription:
        """Return what pricing needs, fetching config and tokenizer only."""
        return self._models.describe(model_id, revision, is_asked_for)

    def text_decoder(self, model_id: str, revision: str) -> str:
        """Return the decoder of the model's tokens as JSON; raises BrokenCheckpoint when there is none."""
        from azu.engine.tokenizer import Tokenizer

        return Tokenizer.from_files(self._models.describe(model_id, revision).files).to_json()

    def ensure_cut(self, model_id: str, revision: str) -> Structure | None:
        """Return the structure of a model, or None while it is cut; the first call for a model starts that.

        Raises what the cut raised; the call after it starts the cut again.
        """
        return self._cuts.ensure(model_id, revision)

    def start_cut(self, model_id: str) -> ModelStatus:
        """Begin to cut a model that can be cut; return its status."""
        described = self._models.describe(model_id)
        self._cuts.start(model_id, described.revision)
        return self._status.get(model_id)

    def status(self, model_id: str) -> ModelStatus:
        """Return how far the model is."""
        return self._status.get(model_id)

    def available(self) -> list[AvailableModel]:
        """Return the models that are built in or cut."""
        return self._models.available()

    def read(self, model_id: str, revision: str, shard_name: str, offset: int, size: int) -> bytes:
        """Return a chunk of a shard; large ones travel through the object store."""
        return self._models.read_shard(model_id, revision, shard_name, offset, size)

    def path(self, model_id: str, revision: str, shard_name: str) -> Path:
        """Return where the shard lies on the registry's own disk."""
        return self._models.shard_path(model_id, revision, shard_name)

    def file(self, model_id: str, revision: str, name: str) -> bytes:
        """Return a config or tokenizer file."""
        return self._models.read_file(model_id, revision, name)
