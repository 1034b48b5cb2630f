"""Requests that are open at once."""

from contextlib import ExitStack

import pytest

from azu.auth.places import Places
from azu.errors import RateLimited, Unavailable


def test_one_request_too_many_is_refused_until_another_has_ended() -> None:
    places = Places(most=5, most_of_one=3)
    with ExitStack() as others, ExitStack() as one:
        for _ in range(3):
            one.enter_context(places.place("one"))
        with pytest.raises(RateLimited, match="3 requests"), places.place("one"):
            pass
        others.enter_context(places.place("other"))
        others.enter_context(places.place("third"))
        with pytest.raises(Unavailable), places.place("fourth"):
            pass
        one.close()
        with places.place("one"), places.place("fourth"):
            pass
    assert not places._taken
