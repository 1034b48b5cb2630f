"""The processes of a network on this machine: how they are started, watched and stopped."""
