"""A user's module for the tests of callbacks: a model whose score is best at step 6, and callbacks."""

SOURCE = """

class Peaks(Model):
    # an evaluated score that rises until step 6, then falls; the number of steps is a buffer
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x, y):
        if self.training:
            self.n += 1
        return super().forward(x, y) | {"score": -(self.n - 6).abs()}


class Recorder:
    # writes a line of each hook's call
    def __init__(self, path="calls.txt", fails_at=None, requests={}, only_rank=None):
        self.path, self.fails_at, self.requests, self.only_rank = path, fails_at, requests, only_rank
        self.count = torch.zeros(2)

    def record(self, view, *words):
        rank = int(os.environ.get("RANK", 0))
        with open(f"{self.path}.{rank}" if rank else self.path, "a") as file:
            print(view.step, *words, file=file)
        if [view.step, words[0]] == self.fails_at:
            raise ValueError("its own mistake")
        request = self.requests.get(f"{words[0]}@{view.step}")
        if request is not None and self.only_rank in (None, rank):
            getattr(view, "request_" + request)(*["enough"] * (request == "stop"))

    def on_start(self, view):
        self.record(view, "start", view.is_resumed, view.samples)

    def on_step(self, view):
        self.count += 1
        view.log({"mine/count": self.count[0]})
        self.record(view, "step", sorted(view.values)[:1], view.is_last)

    def on_evaluate(self, view, numbers):
        self.record(view, "evaluate", sorted(numbers))

    def on_save(self, view):
        self.record(view, "save")

    def on_end(self, view, status):
        self.record(view, "end", status)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count.copy_(state["count"])


class Misnamed:
    def on_evaluat(self, view, numbers):
        pass


class Skipped:
    # counts the steps that it sees
    def __init__(self):
        self.seen = []

    def on_step(self, view):
        self.seen.append(view.step)

    def on_end(self, view, status):
        print("seen", self.seen)
"""
RECORDER = "+callbacks.recorder={_target_: own.Recorder}"


def add_callbacks(project):
    """Adds the classes to a project's module `own`; returns the project."""
    path = project.folder / "own.py"
    path.write_text(path.read_text() + SOURCE)
    return project
