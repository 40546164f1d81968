"""Warnings of the libraries that nobody who trains can act on: not shown, unless a traceback is wanted too."""

import logging
import os
import warnings

# Of transformers: names that TRL and PEFT use, deprecated in it.
DEPRECATED = r"`(is_|supports_)?gradient_checkpointing\w*` is deprecated"
# Of bitsandbytes, at each start: a faster kernel for a CPU, from another package.
LOGGED = {"bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward"}


def hush_known_warnings() -> None:
    """Leave out the warnings above, in this process. `QTUNING_TRACEBACK=1` shows them."""
    if os.environ.get("QTUNING_TRACEBACK", "0") not in ("", "0"):
        return
    warnings.filterwarnings("ignore", message=DEPRECATED, category=FutureWarning)
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_unknown)


def _is_unknown(record: logging.LogRecord) -> bool:
    return LOGGED[record.name] not in record.getMessage()
