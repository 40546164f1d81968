"""Q-Tuning for TRL: joint sample and token pruning for supervised fine-tuning (arXiv 2509.23873)."""

from importlib.metadata import version

from .config import QTuningSFTConfig
from .trainer import QTuningSFTTrainer

__version__ = version("qtuning-trl")

__all__ = ["QTuningSFTConfig", "QTuningSFTTrainer"]
