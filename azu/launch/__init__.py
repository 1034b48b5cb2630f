"""The processes of a network on this machine: Redis, devnet, treasury and Ray nodes, and who watches them."""
