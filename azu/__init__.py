"""azu pools the GPUs of many owners into one network that runs large language models.

`azu.generate`, `azu.stream` and `azu.Client` use the network that runs out of AZU_HOME, or that of the last
`azu login`, with the key of the login. AZU_URL and AZU_API_KEY name others.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from azu.client import Client, Generation, Stream


__all__ = ["Client", "generate", "stream"]


def generate(prompt: str, *, model: str, max_tokens: int | None = None, **sampling: Any) -> "Generation":
    """Continue a prompt as it is; `sampling` takes OpenAI's names."""
    from azu.client import Client

    return Client().generate(prompt, model=model, max_tokens=max_tokens, **sampling)


def stream(prompt: str, *, model: str, max_tokens: int | None = None, **sampling: Any) -> "Stream":
    """Continue a prompt as it is; the text arrives in pieces."""
    from azu.client import Client

    return Client().stream(prompt, model=model, max_tokens=max_tokens, **sampling)


def __getattr__(name: str) -> Any:
    # `import azu` stays light: httpx and pydantic are imported only when the client is used.
    if name == "Client":
        from azu.client import Client

        return Client
    raise AttributeError(f"module 'azu' has no attribute {name!r}")
