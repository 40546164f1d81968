"""
Print a script that completes `qtuning` in a shell; it takes what is installed now, and nothing is imported at a TAB.

```bash
qtuning completion bash > ~/.local/share/bash-completion/completions/qtuning
qtuning completion zsh > ~/.zfunc/_qtuning
```
"""

import argparse
from collections.abc import Sequence

from ..cli import COMMANDS, EPILOG

FILES = {"config", "dataset_name", "model_name_or_path", "output_dir", "run", "runs", "adapter"}


def main(argv: Sequence[str]) -> int:
    """`qtuning completion`; raises an `ImportError` if shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise ImportError("completion needs shtab, which is not installed: pip install shtab.") from None
    parser = argparse.ArgumentParser(
        prog="qtuning completion", description=(__doc__ or "").strip().split("\n")[0], epilog=EPILOG
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    options = parser.parse_args(list(argv))
    print(shtab.complete(make_parser(), shell=options.shell))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of `qtuning` with the options of those commands that have many."""
    import shtab

    from . import eval as evaluate
    from . import merge, recipes, score, sft

    parser = argparse.ArgumentParser(prog="qtuning")
    commands = parser.add_subparsers()
    full = {"sft": sft, "score": score, "eval": evaluate, "merge": merge, "recipes": recipes}
    for name, help_line in COMMANDS.items():
        if name in full:
            own = full[name].make_parser()
            for action in own._actions:
                if action.dest in FILES:
                    action.complete = shtab.FILE
            commands.add_parser(name, parents=[own], add_help=False, help=help_line)
        else:
            commands.add_parser(name, help=help_line)
    return parser
