"""Engine: one module with all that trains it. Engines: a dict of them."""

from runner.engines.engine import Engine, feed, freeze
from runner.engines.engines import Engines

__all__ = ["Engine", "Engines", "feed", "freeze"]
