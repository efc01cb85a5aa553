"""The peers that elizasql is held to: each in a process and an environment of its own; see ../README.md."""
