"""One node at a time is started again, and the next one only when it is back."""

from azu.cluster.restarts import RestartTurn

NAMES = {"a1": "ada", "b1": "ben"}


def test_one_node_has_the_turn_until_it_is_back_under_another_id() -> None:
    turn = RestartTurn()

    assert turn.take("a1", NAMES, 0)
    assert not turn.take("b1", NAMES, 1)
    assert turn.take("a1", NAMES, 2)
    assert not turn.take("b1", {"b1": "ben"}, 3)  # it was stopped
    assert turn.take("b1", {"a2": "ada", "b1": "ben"}, 4)  # it is back
    assert not turn.take("a2", {"a2": "ada", "b1": "ben"}, 5)


def test_a_node_that_does_not_come_back_holds_up_the_others_for_a_while_only() -> None:
    turn = RestartTurn(patience_s=180)
    assert turn.take("a1", NAMES, 0)
    assert turn.take("a1", NAMES, 100)

    assert not turn.take("b1", {"b1": "ben"}, 280)
    assert turn.take("b1", {"b1": "ben"}, 281)


def test_two_nodes_of_one_name_take_turns_too() -> None:
    turn, names = RestartTurn(), {"a1": "ada", "a2": "ada", "b1": "ben"}

    assert turn.take("a1", names, 0)
    # Another node of the name looks as if the first were back: it waits for the next turn, not for ever.
    assert turn.take("b1", names, 1)
