"""azu pools the GPUs of many owners into one network that runs large language models.

`azu.generate`, `azu.chat`, `azu.Client` and `azu.AsyncClient` use the network that runs out of AZU_HOME, or
that of the last `azu login`, with the key of the login. AZU_URL and AZU_API_KEY name others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from azu import errors
    from azu.api.openai import ChatChoice, TextChoice
    from azu.client import AsyncClient, AsyncStream, Client, Generation, Stream
    from azu.client.client import Messages
    from azu.client.parameters import ChatParameters, TextParameters

    __version__: str

_OF_THE_CLIENT = ("AsyncClient", "AsyncStream", "Client", "Generation", "Stream")
__all__ = [
    "AsyncClient", "AsyncStream", "Client", "Generation", "Stream", "__version__",
    "chat", "chat_stream", "errors", "generate", "stream",
]  # fmt: skip


def generate(
    prompt: "str | Sequence[int]", *, model: str, **parameters: "Unpack[TextParameters]"
) -> "Generation[TextChoice]":
    """Continue a prompt, a text or token ids, as it is."""
    return stream(prompt, model=model, **parameters).result()


def stream(
    prompt: "str | Sequence[int]", *, model: str, **parameters: "Unpack[TextParameters]"
) -> "Stream[TextChoice]":
    """Continue a prompt, a text or token ids, as it is; the text arrives in pieces."""
    from azu.client import Client

    client = Client()
    return client.stream(prompt, model=model, **parameters).with_client(client)


def chat(
    messages: "Messages", *, model: str, **parameters: "Unpack[ChatParameters]"
) -> "Generation[ChatChoice]":
    """Answer a question, or a chat, through the model's own template."""
    return chat_stream(messages, model=model, **parameters).result()


def chat_stream(
    messages: "Messages", *, model: str, **parameters: "Unpack[ChatParameters]"
) -> "Stream[ChatChoice]":
    """Answer a question, or a chat, through the model's own template; the text arrives in pieces."""
    from azu.client import Client

    client = Client()
    return client.chat_stream(messages, model=model, **parameters).with_client(client)


def __getattr__(name: str) -> Any:
    # `import azu` stays light: httpx and pydantic are imported only when the client is used.
    if name in _OF_THE_CLIENT:
        return getattr(import_module("azu.client"), name)
    if name == "errors":
        return import_module("azu.errors")
    if name == "__version__":
        return import_module("importlib.metadata").version("azu")
    raise AttributeError(f"module 'azu' has no attribute {name!r}")
