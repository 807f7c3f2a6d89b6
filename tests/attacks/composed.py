"""Keeps what Hydra composes of the user's own files: most trials compose the same, which is half of their time.

For the process from which trials are forked. A config is kept in the folder that ATTACK_COMPOSED names, under all that
it depends on: where it is composed, from which folders, and of which overrides.
"""

import hashlib
import os
import pickle
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl

_compose = ConfigLoaderImpl._load_configuration_impl


def _compose_once(self, config_name, overrides, run_mode, *rest, **options):
    places = [(path.provider, path.path) for path in self.config_search_path.get_path()]
    dependencies = [os.getcwd(), places, config_name, [*overrides], run_mode.name, rest, sorted(options.items())]
    key = hashlib.sha256(repr(dependencies).encode("utf-8", "surrogatepass")).hexdigest()
    kept = Path(os.environ["ATTACK_COMPOSED"], key)
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    config = _compose(self, config_name, overrides, run_mode, *rest, **options)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_bytes(pickle.dumps(config))
    part.rename(kept)
    return config


ConfigLoaderImpl._load_configuration_impl = _compose_once
