"""The handwritten digits: the split, the augmentation, the net and the figure of mistakes."""

import io
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

from runner.examples.digits import Digits, DigitsNet, HardestMistakes, margins, shift_by_a_pixel


@pytest.fixture(scope="module")
def train() -> Digits:
    return Digits("train")


@pytest.fixture(scope="module")
def validation() -> Digits:
    return Digits("validation")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small layers on one thread: more of them only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_splits_are_disjoint_and_cover_all_samples(train: Digits, validation: Digits) -> None:
    both = torch.cat((train.indices, validation.indices)).sort().values
    assert torch.equal(both, torch.arange(1797))
    assert (len(train), len(validation)) == (1437, 360)


def test_each_digit_has_the_same_share_in_both_splits(train: Digits, validation: Digits) -> None:
    in_all = torch.bincount(torch.cat((train.labels, validation.labels)))
    in_validation = torch.bincount(validation.labels, minlength=10)
    assert ((in_validation - in_all / 5).abs() <= 1).all()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_are_the_images_and_labels_of_the_data_set(split: str) -> None:
    pixels, labels = load_digits(return_X_y=True)
    dataset = Digits(split, validation_every=7)
    for position in (0, 100, len(dataset) - 1):
        sample, source = dataset[position], int(dataset.indices[position])
        assert (sample["image"].dtype, sample["label"].dtype) == (torch.float32, torch.int64)
        assert sample["image"].shape == (1, 8, 8)
        assert (sample["image"].flatten() * 16).tolist() == pixels[source].tolist()
        assert sample["label"].item() == labels[source]


def test_a_shift_moves_the_image_by_at_most_a_pixel_each_way() -> None:
    image = torch.arange(1.0, 65.0).view(1, 8, 8)
    expected = set()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = torch.zeros(8, 8)
            for row in range(max(down, 0), min(8 + down, 8)):
                for column in range(max(right, 0), min(8 + right, 8)):
                    moved[row, column] = image[0, row - down, column - right]
            expected.add(tuple(moved.flatten().tolist()))
    torch.manual_seed(0)
    assert {tuple(shift_by_a_pixel(image).flatten().tolist()) for _ in range(300)} == expected


def test_augmentation_follows_the_global_generator_and_is_off_by_default(validation: Digits) -> None:
    augmented = Digits("validation", augment=True)
    torch.manual_seed(0)
    first = [augmented[3]["image"] for _ in range(20)]
    assert any(not torch.equal(image, validation[3]["image"]) for image in first)
    torch.manual_seed(0)
    assert all(torch.equal(augmented[3]["image"], image) for image in first)
    before = torch.get_rng_state()
    assert torch.equal(validation[3]["image"], validation.images[3])
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_leaves_the_stored_images_alone(validation: Digits) -> None:
    augmented = Digits("validation", augment=True)
    for index in range(20):
        augmented[index]["image"].zero_()
    plain = Digits("validation")
    plain[0]["image"]
    assert torch.equal(augmented.images, plain.images)


def test_accuracy_is_the_fraction_of_correct_predictions(validation: Digits) -> None:
    torch.manual_seed(0)
    module = DigitsNet(width=4).eval()
    output = module(image=validation.images[:50], label=validation.labels[:50])
    right = module.logits(validation.images[:50]).argmax(1) == validation.labels[:50]
    assert output["accuracy"].item() == pytest.approx(right.sum().item() / 50)
    assert output["loss"].item() == pytest.approx(2.303, abs=0.1)


def test_dropout_acts_in_training_only(validation: Digits) -> None:
    module = DigitsNet(width=4, dropout=0.5)
    images = validation.images[:20]
    assert not torch.equal(module.logits(images), module.logits(images))
    module.eval()
    assert torch.equal(module.logits(images), module.logits(images))


@pytest.mark.usefixtures("one_thread")
def test_the_net_learns_to_classify_the_validation_digits(train: Digits, validation: Digits) -> None:
    torch.manual_seed(0)
    module = DigitsNet()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(8):
        for chosen in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            module(train.images[chosen], train.labels[chosen])["loss"].backward()
            optimizer.step()
    module.eval()
    assert module(validation.images, validation.labels)["accuracy"].item() >= 0.97


class Reader(torch.nn.Module):
    """Reads each image as the digit and with the confidence that its first two pixels say."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def logits(self, image: Tensor) -> Tensor:
        guesses, confidence = image[:, 0, 0, 0].long(), image[:, 0, 0, 1]
        return self.scale * torch.nn.functional.one_hot(guesses, 10) * confidence[:, None]


def readings(*rows: tuple[int, int, float]) -> list[dict[str, Tensor]]:
    """A dataset of (label, guess, confidence)."""
    samples = []
    for label, guess, confidence in rows:
        image = torch.zeros(1, 8, 8)
        image[0, 0, 0], image[0, 0, 1] = guess, confidence
        samples.append({"image": image, "label": torch.tensor(label)})
    return samples


def titles(figure: Figure) -> list[str]:
    return [axis.get_title().replace("\n", ", ") for axis in figure.axes if axis.images]


def test_the_figure_shows_confident_mistakes_first_then_the_least_certain() -> None:
    dataset = readings((1, 1, 9.0), (2, 7, 3.0), (3, 3, 0.5), (4, 9, 8.0))
    with torch.no_grad():
        report = HardestMistakes(count=3, columns=2)(Reader(), dataset)  # type: ignore[arg-type]
    assert report["num_mistakes"] == 2.0
    figure = report["hardest_mistakes"]
    assert titles(figure) == ["4, read as 9, 100% sure", "2, read as 7, 69% sure", "3, read as 3, 15% sure"]
    assert [axis.title.get_color() for axis in figure.axes[:3]] == ["crimson", "crimson", "black"]


def test_the_report_of_a_real_net_is_a_figure_that_saves(validation: Digits) -> None:
    torch.manual_seed(0)
    module = DigitsNet(width=4).eval()
    with torch.no_grad():
        report = HardestMistakes(count=16)(module, validation)
        accuracy = module(validation.images, validation.labels)["accuracy"].item()
    assert report["num_mistakes"] == pytest.approx((1 - accuracy) * 360, abs=1e-3)
    assert len(titles(report["hardest_mistakes"])) == 16
    png = io.BytesIO()
    report["hardest_mistakes"].savefig(png, format="png")
    assert png.getvalue().startswith(b"\x89PNG")


def test_the_report_imports_no_pyplot() -> None:
    program = (
        "import sys, torch\n"
        "from runner.examples.digits import Digits, DigitsNet, HardestMistakes\n"
        "with torch.no_grad(): HardestMistakes()(DigitsNet().eval(), Digits('validation'))\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_margins_of_wrong_predictions_are_negative() -> None:
    chances = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    expected = torch.tensor([0.5, -0.2, -0.5])
    torch.testing.assert_close(margins(chances, torch.tensor([0, 1, 0])), expected)


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_an_error_that_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    need = Digits if package == "sklearn" else HardestMistakes  # before anything is trained
    with pytest.raises(ImportError, match=rf'needs {package}, which .* pip install "exact-runner\[digits\]"'):
        need()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"split": "test"}, "one of train, validation, not 'test'"), ({"validation_every": 1}, "at least 2, not 1")],
)
def test_an_invalid_argument_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**settings)  # type: ignore[arg-type]


def test_a_figure_without_samples_or_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0, 8"):
        HardestMistakes(count=0)
