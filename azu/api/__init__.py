"""The HTTP contract: what requests and answers hold, shared by the server, the client and the docs."""
