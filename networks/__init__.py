"""Networks of linear layers and convolutions: what tracing tells of them, and those that a config can ask for."""
