"""The light client: generate, stream, log in, deposit."""

from azu.client.client import Client
from azu.client.stream import Generation, Stream

__all__ = ["Client", "Generation", "Stream"]
