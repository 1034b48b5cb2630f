"""A stage and an expert set of the same index are never taken for each other."""

from azu.protocol.topology import ExpertSet, PieceSet, Stage, key_of, keys_of, piece_set
from tests import builders


def test_a_stage_and_an_expert_set_of_one_index_are_two_pieces() -> None:
    (stage,) = builders.topology({"a": (0, 4)}).stages
    chosen = ExpertSet(0, "b", {1: (0,)}, 1)

    assert key_of(stage) != key_of(chosen)
    assert piece_set([key_of(stage)]) == PieceSet(stages=frozenset({0}))
    assert piece_set([key_of(chosen)]) == PieceSet(expert_sets=frozenset({0}))


def test_a_loss_is_the_piece_set_its_pieces() -> None:
    loss = PieceSet(frozenset({0, 2}), frozenset({0, 5}))

    assert keys_of(loss) == {(Stage, 0), (Stage, 2), (ExpertSet, 0), (ExpertSet, 5)}
    assert piece_set(keys_of(loss)) == loss
    assert not piece_set(())
