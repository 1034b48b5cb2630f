"""The light client: generate, stream, log in, deposit; with an event loop and without."""

from azu.client.blocking import Client, Stream
from azu.client.client import AsyncClient
from azu.client.generation import Generation
from azu.client.stream import AsyncStream

__all__ = ["AsyncClient", "AsyncStream", "Client", "Generation", "Stream"]
