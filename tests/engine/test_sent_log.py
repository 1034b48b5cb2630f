"""What was sent is kept by position, within a bound, from the first row on or not at all."""

from azu.engine.sent_log import SentLog
from azu.protocol.step import Slice

_ROW = 4


def _slice(sequence_id: int, position: int, num_tokens: int) -> Slice:
    return Slice(sequence_id, position, num_tokens, (), sample=False)


def _payload(*rows: int) -> memoryview:
    return memoryview(b"".join(bytes([row]) * _ROW for row in rows))


def _log(max_rows: int = 100) -> SentLog:
    return SentLog(_ROW, max_rows * _ROW)


def test_rows_of_mixed_steps_come_back_by_sequence_and_position() -> None:
    log = _log()
    log.record([_slice(1, 0, 2), _slice(2, 0, 1)], _payload(10, 11, 20))
    log.record([_slice(2, 1, 1), _slice(1, 2, 1)], _payload(21, 12))

    assert log.num_rows([1, 2, 3]) == {1: 3, 2: 2}
    assert log.rows([_slice(2, 0, 2), _slice(1, 1, 2)]) == bytes(_payload(20, 21, 11, 12))


def test_rows_that_are_computed_again_replace_the_old_ones() -> None:
    log = _log()
    log.record([_slice(1, 0, 4)], _payload(1, 2, 3, 4))
    log.record([_slice(1, 2, 3)], _payload(7, 8, 9))

    assert log.rows([_slice(1, 0, 5)]) == bytes(_payload(1, 2, 7, 8, 9))


def test_the_sequence_that_was_begun_first_is_dropped_when_there_is_too_much() -> None:
    log = _log(max_rows=5)
    log.record([_slice(1, 0, 3)], _payload(1, 2, 3))
    log.record([_slice(2, 0, 2)], _payload(1, 2))
    log.record([_slice(2, 2, 1)], _payload(3))

    assert log.num_rows([1, 2]) == {2: 3}
    assert log.rows([_slice(1, 0, 1)]) is None


def test_a_dropped_sequence_is_not_kept_from_its_middle_on() -> None:
    log = _log(max_rows=3)
    log.record([_slice(1, 0, 4)], _payload(1, 2, 3, 4))
    log.record([_slice(1, 4, 1)], _payload(5))
    assert log.num_rows([1]) == {}

    log.record([_slice(1, 0, 2)], _payload(1, 2))
    assert log.num_rows([1]) == {1: 2}


def test_what_is_over_makes_room() -> None:
    log = _log(max_rows=4)
    log.record([_slice(1, 0, 2)], _payload(1, 2))
    log.drop([1, 99])
    log.record([_slice(2, 0, 4)], _payload(1, 2, 3, 4))

    assert log.num_rows([1, 2]) == {2: 4}
