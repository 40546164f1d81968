"""The demo: a tiny base model and a noisy data set that come with the package, so that no hub is needed."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

# They look like names on the Hub, so that the recipe reads like any other; the training script looks them up here.
BASE_MODEL = "qtuning-trl/demo-base"
DATASET = "qtuning-trl/noisy-arithmetic"


def base_model_path() -> str:
    """Folder of the base model that ships with the package; `make_base_model.py` makes it."""
    return str(Path(__file__).parent / "base_model")


def load_demo_dataset(seed: int = 0) -> "DatasetDict":
    """The demo's data, made on the spot: a noisy `train` split, and a clean `test` split of other problems."""
    from .arithmetic import load_demo_dataset

    return load_demo_dataset(seed)
