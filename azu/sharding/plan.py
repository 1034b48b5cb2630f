"""From a checkpoint folder to the shards it will become, before a weight is read."""

from pathlib import Path

from azu.architecture.description import Architecture
from azu.architecture.skeleton import build, named_embeddings
from azu.sharding.checkpoint import INDEX_FILE, SINGLE_FILE, read_checkpoint
from azu.sharding.layout import ShardPlan, lay_out
from azu.sharding.names import destinations, refuse_incomplete
from azu.sharding.ties import drop_tied_copies


def plan_shards(source: Path, architecture: Architecture) -> tuple[tuple[ShardPlan, ...], bool]:
    """Return the shards of a checkpoint in the order they are written, and whether its head is tied.

    Raises BrokenCheckpoint or UnsupportedModel when the checkpoint does not hold the whole model.
    """
    model = build(source)
    stored = read_checkpoint(source)
    untied = drop_tied_copies(stored, destinations(model, stored), model.all_tied_weights_keys)
    tables = {f"{name}.weight" for name, _ in named_embeddings(model)}
    tied_parameters = sum(model.get_parameter(owner).numel() for owner in untied.tied.values())
    where = SINGLE_FILE if (source / SINGLE_FILE).exists() else INDEX_FILE
    refuse_incomplete(model, stored, where)
    plans = lay_out(
        untied.tensors, untied.destinations, architecture, tied_parameters=tied_parameters, tables=tables
    )
    return plans, bool(untied.tied)
