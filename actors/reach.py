"""How the control plane's actors are found: by name, so that whoever was started again is found too."""

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from actors.link import as_azu_error
from actors.placement import NAMESPACE
from azu.errors import Unavailable

REGISTRY = "registry"
# Longer than either takes from its death until it answers again.
_BACK_IN_S = 20.0
_LOOK_S = 0.2


def find(name: str) -> ActorHandle:
    """Return an actor of the control plane by name; ValueError when it is not up."""
    return ray.get_actor(name, namespace=NAMESPACE)


async def ask(
    name: str, method: str, *arguments: Any, timeout_s: float, back_in_s: float = _BACK_IN_S
) -> Any:
    """Call an actor of the control plane; one that is away is called again once it is back.

    The call must be one that may be made twice. Raises Unavailable while the actor is away.
    """
    waiting = AsyncRetrying(
        retry=retry_if_exception_type(_Away),
        stop=stop_after_delay(back_in_s),
        wait=wait_fixed(_LOOK_S),
        reraise=True,
    )
    return await waiting(_ask, name, method, arguments, timeout_s)


class _Away(Unavailable):
    """An actor is not up, or died while it was asked."""


async def _ask(name: str, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
    try:
        # A look-up asks Ray's head and blocks.
        handle = await asyncio.to_thread(find, name)
        return await asyncio.wait_for(getattr(handle, method).remote(*arguments), timeout_s)
    except (ValueError, RayActorError) as error:
        raise _Away(f"the {name} is not up") from error
    except Exception as error:
        raise as_azu_error(error, f"the {name}") from error
