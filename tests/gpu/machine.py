"""Writes the GPU, its driver, and the versions of Python and packages: python tests/gpu/machine.py FILE."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("triton", "numpy", "torchao", "safetensors", "hydra-core", "transformers", "peft", "timm")


def read_versions():
    """Returns the versions of what runs; torch's own has its build, such as +cpu."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def read_gpu():
    """Returns the name, memory and driver of the first GPU."""
    if not torch.cuda.is_available():
        return {"gpu": "none"}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1), "driver": driver}


if __name__ == "__main__":
    facts = read_gpu() | {"platform": platform.platform()} | read_versions()
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=1))
