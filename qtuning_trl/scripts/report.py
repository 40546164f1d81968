"""
Show what runs, or a scored data set, kept and dropped, in one HTML file. A run may still be going, or have crashed.
"""

import argparse
from collections.abc import Sequence
from os.path import expanduser

from ..cli import EPILOG
from ..report.report import DEFAULT_NAME, write_report


def main(argv: Sequence[str]) -> int:
    """`qtuning report`: write the report and say where it is; raises what [`write_report`] raises."""
    parser = argparse.ArgumentParser(prog="qtuning report", description=(__doc__ or "").strip(), epilog=EPILOG)
    parser.add_argument(
        "runs",
        type=expanduser,
        nargs="+",
        metavar="RUN",
        help="output_dir of a run, or what `qtuning score` wrote; several are laid side by side",
    )
    parser.add_argument(
        "--output", type=expanduser, metavar="FILE", help=f"the HTML file (default: {DEFAULT_NAME} in the first RUN)"
    )
    parser.add_argument(
        "--color_by",
        metavar="COLUMN",
        help="colour points by `quadrant` (default), the runs' `group_column` or a column of the scored file",
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="the model that scored the file: its name or folder")
    parser.add_argument("--png", action="store_true", help="write the main pictures as PNG, too")
    options = parser.parse_args(list(argv))
    files = write_report(options.runs, options.output, options.color_by, options.png, options.tokenizer)
    print("\n".join(map(str, files)))
    return 0
