"""The light client: generate, stream, log in, deposit."""

from azu.client.answers import Generation
from azu.client.client import Client
from azu.client.stream import Stream

__all__ = ["Client", "Generation", "Stream"]
