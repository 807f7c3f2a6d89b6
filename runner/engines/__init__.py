"""Engine: one module with its optimizer, scheduler and counters.

Engines: a dict of them.
"""

from runner.engines.engine import Engine
from runner.engines.engines import Engines
from runner.engines.forward import feed

__all__ = ["Engine", "Engines", "feed"]
