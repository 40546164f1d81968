"""Q-Tuning for TRL: joint sample and token pruning for supervised fine-tuning (arXiv 2509.23873)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import QTuningSFTConfig
    from .records.samples import load_record
    from .report.plots import plot_eu_plane
    from .trainer import QTuningSFTTrainer

__version__ = version("qtuning-trl")

__all__ = ["QTuningSFTConfig", "QTuningSFTTrainer", "load_record", "plot_eu_plane"]

_MODULES = {
    "QTuningSFTConfig": ".config",
    "QTuningSFTTrainer": ".trainer",
    "load_record": ".records.samples",
    "plot_eu_plane": ".report.plots",
}


def __getattr__(name: str) -> Any:
    # Only when they are asked for, since importing torch and TRL takes seconds and `qtuning --help` needs neither.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
