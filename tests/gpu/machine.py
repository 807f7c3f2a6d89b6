"""Writes the GPU, its driver, and the versions of Python and packages: python tests/gpu/machine.py FILE.

Then loads the GPU's libraries once, which takes long from a cold disk and would count as the first test's time.
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("triton", "numpy", "torchao", "safetensors", "hydra-core", "transformers", "peft", "timm")


def read_versions():
    """Returns the versions of Python and the packages; torch's includes its build, such as +cpu."""
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


def load_libraries():
    """Runs a matrix product, attention, batch norm and an LSTM once on the GPU, forward and backward."""
    x = torch.randn(8, 16, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        hidden = torch.nn.Linear(64, 64, device="cuda")(x)
    attended = torch.nn.functional.scaled_dot_product_attention(x, x, hidden.float())
    normed = torch.nn.BatchNorm1d(16, device="cuda")(attended)
    output, _ = torch.nn.LSTM(64, 64, device="cuda")(normed)
    output.sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    facts = read_gpu() | {"platform": platform.platform()} | read_versions()
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=1))
    if torch.cuda.is_available():
        load_libraries()
