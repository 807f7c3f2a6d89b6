"""Engine: one module with all that trains it. Engines: a dict of them."""

from runner.engines.engine import Engine
from runner.engines.engines import Engines
from runner.engines.forward import feed

__all__ = ["Engine", "Engines", "feed"]
