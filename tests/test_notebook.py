"""A notebook that composes, trains, is interrupted, resumes and plots, executed by a real kernel."""

import asyncio
import threading
import time

import pytest
from run_comparison import assert_same_run

pytestmark = pytest.mark.slow

SETTINGS = """
import runner
overrides = ["experiment=mine", "trainer.steps=30", "trainer.save_every=10", "+data.train.sleep_s=0.01"]
"""
TRAIN = """
run = runner.train(runner.compose([*overrides, "hydra.run.dir=cut"], config_dir="conf"))
print("status:", run.status, run.step)
"""
RESUME = """
assert run.status == "interrupted", run.status
run = runner.train(runner.compose([f"resume={run.folder}"]))
print("status:", run.status, run.step)
"""
PLOT = """
%matplotlib inline
import matplotlib.pyplot as plt
metrics = run.metrics()
lines = plt.plot(metrics["step"], metrics["train/loss"], ".")
"""
OWN_CLASS = """
import own
class Net(own.Model):
    pass
config = runner.compose([*overrides, "trainer.steps=2"], config_dir="conf")
config.model = {"_target_": "__main__.Net"}
second = runner.train(config)
type(second.engines()["model"].module).__name__
"""


def run_notebook(folder, sources, on_start):
    """Executes cells in a new kernel, with `on_start(kernel manager)` in a thread; returns the cells."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = nbclient.NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.create_kernel_manager()
    thread = threading.Thread(target=on_start, args=(client,))
    thread.start()
    try:
        client.execute()
    finally:
        thread.join()
    return book.cells


def text_of(cell):
    texts = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(texts)


def test_a_notebook_composes_trains_is_interrupted_resumes_and_plots(project):
    def interrupt(client):
        deadline = time.monotonic() + 100
        metrics = project.folder / "cut" / "metrics.jsonl"
        while time.monotonic() < deadline and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
            time.sleep(0.01)
        asyncio.run(client.km.interrupt_kernel())

    cells = run_notebook(project.folder, [SETTINGS, TRAIN, RESUME, PLOT, OWN_CLASS], interrupt)
    _, cut, resumed, plotted, own = cells
    assert "status: interrupted" in text_of(cut)
    assert "status: finished 30" in text_of(resumed)
    assert "30/30" in text_of(resumed)  # the progress bar
    assert any("image/png" in output.get("data", {}) for output in plotted.outputs)
    assert "'Net'" in text_of(own)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    project.run("trainer.steps=30", "trainer.save_every=10", "+data.train.sleep_s=0.01", "hydra.run.dir=whole")
    assert_same_run(project.folder / "cut", project.folder / "whole", 30)
