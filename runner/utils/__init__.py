"""Tools that any other program may import, without a config, an engine or a model: see README.md."""
