"""Measure speed, side by side in one run, and write study/bench.md; about half an hour.

Within a section the rows take turns, so that a slow minute hits all of them alike.
"""

import argparse
import os
import platform
import sys
from pathlib import Path

import conversion
import evaluation
import labs
import limit
import memory
import pandas as pd
import parts
import precision
import pretraining
import startup
import torch

from mocolayers.runtime import atomic_write, autocast_type, keep_freed_memory

OUT = Path(__file__).resolve().parents[2] / "study" / "bench.md"


def against(side: int, repeats: int, count: int, **changes) -> pd.DataFrame:
    """The other loops; imported late, because only they need what `requirements.txt` here asks for."""
    from against import table

    return table(side, repeats, count, **changes)


USED = "bf16" if autocast_type("auto", pretraining.CPU) else "fp32"  # what "auto" means on this processor
SECTIONS = {
    f"Pretraining at the lesson recipe, 28 px gray, {USED}": lambda args: pretraining.table(
        28, 1, 10 * args.repeats, 2
    ),
    f"Pretraining at the lesson recipe, 28 px colour, {USED}": lambda args: pretraining.table(
        28, 3, 10 * args.repeats, 2
    ),
    f"How near the encoders are to the processor's limit, {USED}": lambda args: limit.table(4 * args.repeats),
    f"Keeping the memory of freed tensors, {USED}": lambda args: memory.table(4 * args.repeats),
    f"Against other loops: ResNet-10 width 16, 28 px, batch 128, {USED}": lambda args: against(
        28, args.repeats, args.count
    ),
    f"Against other loops: ResNet-10 width 16, 64 px, batch 128, {USED}": lambda args: against(
        64, args.repeats, args.count
    ),
    f"Against other loops: ResNet-18 width 16, 128 px, batch 128, {USED}": lambda args: against(
        128, args.repeats, 2, layout="resnet18", stem="imagenet"
    ),
    f"Against other loops: ResNet-18 width 64, 128 px, batch 32, {USED}": lambda args: against(
        128, args.repeats, 2, layout="resnet18", width=64, batch=32, stem="imagenet"
    ),
    f"Against other loops: ResNet-50 width 64, 128 px, batch 16, {USED}": lambda args: against(
        128, args.repeats, 1, layout="resnet50", width=64, batch=16, stem="imagenet"
    ),
    f"Cost of a longer queue, another batch, and more stages, {USED}": lambda args: parts.step_table(
        4 * args.repeats, 2
    ),
    "Cost of what a step does besides the encoder": lambda args: parts.part_table(args.repeats),
    "Linear evaluation of a pretrained encoder, 1,500 chest phantoms": lambda args: evaluation.linear_table(),
    "Distances between models": lambda args: evaluation.distance_table(),
    "Start-up": lambda args: startup.table(args.repeats),
    "Unchanged results: fp32 and bf16 pretraining, linear evaluation": lambda args: precision.table(),
    "Labs: from a move of a slider to the picture": lambda args: labs.table(args.repeats),
    "Conversion of made-up X-rays, 256 px to 28 px, two processes": lambda args: conversion.table(args.images),
}
HEAD = (
    "# Speed\n\nMade by `make bench`: medians over rounds in turn, ratios within a round; each section is one run. "
    "Every loop keeps the memory of freed tensors, also those of others, which do not do that by themselves.\n\n"
)
EXAMPLES = """examples:
  python tests/benchmarks/bench.py
  python tests/benchmarks/bench.py --only labs --repeats 3     # print one section, write nothing
  python tests/benchmarks/bench.py --only labs --write        # measure one section again"""


def main() -> None:
    args = arguments().parse_args()
    chosen = {title: table for title, table in SECTIONS.items() if args.only.lower() in title.lower()}
    if not chosen:
        sys.exit(f"error: no section is called {args.only!r}; the sections are: {'; '.join(SECTIONS)}")
    every = len(chosen) == len(SECTIONS)
    found = {} if every else written()
    keep_freed_memory()  # as every run does on a processor; so the loops of others have it, too
    for title, table in chosen.items():
        found[title] = markdown(table(args))
        print(f"\n## {title}\n\n{found[title]}\n", flush=True)
        if every or args.write:  # after each, so that an error in the next one loses nothing
            write(found)


def write(found: dict[str, str]) -> None:
    """Put the sections into the file, in their order."""
    parts = [HEAD + machine(), *(f"## {title}\n\n{found[title]}" for title in SECTIONS if title in found)]
    atomic_write(OUT, lambda path: path.write_text("\n\n".join(parts) + "\n", encoding="utf-8"))
    print(f"{OUT} is written")


def written() -> dict[str, str]:
    """The sections of the file as it is, by title."""
    text = OUT.read_text(encoding="utf-8") if OUT.is_file() else ""
    return {title: body.strip() for title, _, body in (part.partition("\n") for part in text.split("\n## ")[1:])}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all rows (5)")
    parser.add_argument("--count", type=int, default=4, help="steps per round against other loops (4)")
    parser.add_argument("--images", type=int, default=20_000, help="X-rays to convert (20,000)")
    parser.add_argument("--only", default="", help="print the sections whose title holds this word, and write nothing")
    parser.add_argument("--write", action="store_true", help="with --only, replace these sections in the file")
    return parser


def machine() -> str:
    """One line on what the numbers were measured on."""
    names = [line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def cpuinfo() -> list[str]:
    place = Path("/proc/cpuinfo")
    return place.read_text().splitlines() if place.is_file() else []


def markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)])


if __name__ == "__main__":
    main()
