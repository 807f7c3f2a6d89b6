"""Low-rank adapters: adapt (adds them to a module), layers (a class for each kind of layer), peft (their format)."""

from runner.utils.wrapper.lora.adapt import Adapted, add_lora
from runner.utils.wrapper.lora.layers import LoRALinear

__all__ = ["Adapted", "LoRALinear", "add_lora"]
