"""The command line, `python -m mocolayers COMMAND`; `--help` lists the commands."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

from mocolayers.notebook import series
from mocolayers.recipe import ARMS, EVALUATIONS, PRESETS, PRETRAINED_ARMS, Recipe, preset
from mocolayers.runtime import DatasetError, RunError

EXAMPLES = {
    "pretrain": """  python -m mocolayers pretrain --dataset pneumoniamnist --arm mse
  python -m mocolayers pretrain --dataset nih --arm barlow --seed 3 --set lr=0.03 steps=1000
  python -m mocolayers pretrain --dataset nih --arm mse --preset paper --dry-run
  python -m mocolayers pretrain --dataset retina --preset paper --init resnet50.pth
  torchrun --nproc-per-node 2 -m mocolayers pretrain --dataset nih --arm mse""",
    "finetune": """  python -m mocolayers finetune --dataset pneumoniamnist --arm mse --fraction 0.01 0.1
  python -m mocolayers finetune --dataset pneumoniamnist --arm mse --mode linear
  torchrun --nproc-per-node 2 -m mocolayers finetune --dataset nih --arm mse --fraction 0.01""",
    "tune": """  python -m mocolayers tune
  python -m mocolayers tune --dataset breast_histology --out tables""",
    "results": """  python -m mocolayers results
  python -m mocolayers results --dataset mine --seed 10 11 12 --jobs 2 --out tables
  python -m mocolayers results --set steps=600 --arm moco mse --out study/tables/long
  python -m mocolayers results --only-write""",
    "again": """  python -m mocolayers again
  python -m mocolayers again --set steps=600 --arm moco mse mse-standardized --cells 8 --out study/tables/long""",
    "status": """  python -m mocolayers status
  python -m mocolayers status --seed 10 11 --runs-dir runs""",
    "as-released": """  python -m mocolayers as-released
  python -m mocolayers as-released --dataset breast_histology --seed 10 11 12 --arm mse barlow --out tables
  python -m mocolayers as-released --dataset retina --preset smoke --seed 0 --out tables""",
}
# Options that leave the rows of a table as they are; any other makes other tables, or a part of them.
HARMLESS = {"command", "run", "out", "runs_dir", "jobs", "cells", "skip_analyses", "only_write"}
STAGE_ARMS = [arm for arm in PRETRAINED_ARMS if arm != "moco"]
REAL = ["pneumoniamnist", "breast_histology", "nih_finding", "retina"]
RESULTS = series.HOME / "study" / "tables"
TUNING = ["pneumoniamnist", "breast_histology", "nih_finding"]
CONTROLLED = ["breast_histology", "retina"]
FRESH = [10, 11, 12, 13, 14]


def main(words: list[str] | None = None) -> int:
    """Run one command; an error a person can mend becomes one line and exit code 1."""
    args = build_parser().parse_args(words)
    try:
        _spare_results(args)
        with _together(args):
            return args.run(args)
    except (DatasetError, RunError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _spare_results(args: argparse.Namespace) -> None:
    """Refuse to write other tables, or a part of them, over those that README and notebooks are made from."""
    out = getattr(args, "out", None)
    if out is None or out.resolve() != RESULTS or getattr(args, "only_write", False):
        return
    whole = vars(build_parser().parse_args([args.command]))
    for name, value in vars(args).items():
        if name not in HARMLESS and value != whole[name]:
            raise ValueError(
                f"{RESULTS} holds what `{args.command}` makes without --{name}; choose another folder: --out FOLDER"
            )


def _together(args: argparse.Namespace):
    """Join the other processes where torchrun started this one; loading torch is left to the commands that train."""
    if args.run not in (run_pretrain, run_finetune):
        return contextlib.nullcontext()
    from mocolayers.training.distributed import processes

    return processes(args.device)


def build_parser() -> argparse.ArgumentParser:
    """The parser with its commands."""
    parser = argparse.ArgumentParser(prog="python -m mocolayers", description="MoCo with intermediate-layer losses")
    commands = parser.add_subparsers(dest="command", required=True)
    series_text = "execute the notebook series with papermill"
    command = commands.add_parser("series", help=series_text, description=series_text)
    series.add_arguments(command)
    command.set_defaults(run=series.main)

    command = _add(commands, "pretrain", "pretrain one arm on one data set; a killed run is resumed", run_pretrain)
    _about_a_run(command)
    command.add_argument(
        "--dry-run", action="store_true", help="train two steps in memory: speed, memory, and time of the whole run"
    )

    command = _add(commands, "finetune", "judge a pretrained arm at label fractions", run_finetune)
    _about_a_run(command)
    command.add_argument(
        "--mode", choices=("linear", "finetune"), default="finetune", help="what is trained (finetune)"
    )
    command.add_argument("--fraction", nargs="+", type=float, help="label fractions in (0, 1]; default: the preset's")
    command.add_argument("--subset", type=int, default=0, help="number of the label subset within the seed (0)")

    command = _add(commands, "tune", "the same number of trials for every arm, judged on validation", run_tune)
    _about_a_grid(command, TUNING)
    _about_tables(command)

    command = _add(commands, "results", "run the whole grid, then write results/ and the README's table", run_results)
    _about_a_grid(command, REAL)
    _about_seeds(command)
    command.add_argument("--skip-analyses", action="store_true", help="no probing, similarity and output distances")
    command.add_argument("--only-write", action="store_true", help="train nothing: README from results/*.csv as it is")
    _about_tables(command)

    text = "train a random part of the grid from nothing, and write how far it lies from the table"
    command = _add(commands, "again", text, run_again)
    _about_a_grid(command, REAL)
    _about_seeds(command)
    command.add_argument("--cells", type=int, default=24, help="how many arms on a data set from a seed (24)")
    _about_tables(command)
    command.set_defaults(runs_dir=Path("runs") / "again")  # where no run of the table stands

    command = _add(commands, "status", "how much of the grid is done, and when it may end", run_status)
    _about_a_grid(command, REAL)
    _about_seeds(command)

    text = "do what the released code does beside the sound way, then write study/tables/as_released.csv"
    command = _add(commands, "as-released", text, run_as_released)
    command.add_argument("--dataset", nargs="+", default=CONTROLLED, help=f"data sets ({' '.join(CONTROLLED)})")
    command.add_argument("--seed", nargs="+", type=int, default=FRESH[:4], help="seeds (10 11 12 13)")
    command.add_argument("--arm", nargs="+", choices=STAGE_ARMS, default=["mse"], help="compared with MoCo (mse)")
    command.add_argument("--preset", choices=PRESETS, default="lesson", help="size of the runs (lesson)")
    command.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (runs)")
    _about_tables(command)
    return parser


def _add(commands, name: str, text: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"examples:\n{EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _about_a_grid(command: argparse.ArgumentParser, datasets: list[str]) -> None:
    command.add_argument("--dataset", nargs="+", default=datasets, help=f"prepared data sets ({' '.join(datasets)})")
    command.add_argument("--preset", choices=PRESETS, default="lesson", help="size of the runs (lesson)")
    command.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (runs)")
    command.add_argument("--jobs", type=int, help="processes (one per core)")


def _about_tables(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables (results)")


def _about_seeds(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", nargs="+", type=int, default=FRESH, help=f"seeds ({' '.join(map(str, FRESH))})")
    command.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS), help="arms (all)")
    command.add_argument("--settings", type=_folder, default=RESULTS, help="folder with what tuning chose (results)")
    _about_fields(command)


def _folder(word: str) -> Path:
    return Path(word).resolve()


def _about_fields(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of the recipe")


def _about_a_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", default="auto", help="prepared data set (auto)")
    command.add_argument("--arm", choices=ARMS, default="moco", help="what is trained (moco)")
    command.add_argument("--preset", choices=PRESETS, default="lesson", help="size of the run (lesson)")
    command.add_argument("--seed", type=int, default=0, help="seed (0)")
    command.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (runs)")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    _about_fields(command)
    command.add_argument("--tuned", action="store_true", help="the arm's settings and the precision of the results")
    command.add_argument("--init", type=Path, help="start from these weights of a ResNet: .pth or .safetensors")
    command.add_argument("--compile", action="store_true", help="torch.compile the encoders, for long runs on a GPU")


def run_pretrain(args: argparse.Namespace) -> int:
    """Pretrain, or find that it is done, and say where the run is."""
    if args.dry_run:
        return run_dry(args)
    run, _ = _pretrained(args)
    _say(f"{run.folder}: {run.recipe.arm} on {run.recipe.dataset}, seed {run.recipe.seed}")
    return 0


def run_dry(args: argparse.Namespace) -> int:
    """Try the recipe on this machine and say what it would take."""
    from mocolayers.training.dry_run import try_steps

    recipe, data = _chosen(args)
    if not recipe.steps:
        raise ValueError(f"the arm {recipe.arm!r} is not pretrained: there is nothing to try")
    _say(try_steps(recipe, data, args.device, args.init))
    return 0


def run_finetune(args: argparse.Namespace) -> int:
    """Pretrain if need be, judge, and print one line per label fraction."""
    from mocolayers.evaluation.judge import evaluate

    run, data = _pretrained(args)
    plan = EVALUATIONS[args.preset]
    for fraction in args.fraction or plan.fractions:
        row = evaluate(run, data, args.mode, fraction, args.subset, plan, args.device)
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        _say(f"{args.mode} {fraction:g} ({row['labels']} labels): AUC {row['auc']:.3f}, 95% interval {interval}")
    return 0


def run_tune(args: argparse.Namespace) -> int:
    """Try all settings and write the table of trials and the choice."""
    from study import tuning
    from study.run import tune

    trials = tune(args.dataset, args.preset, args.runs_dir, args.jobs)
    for arm, changes in tuning.write_settings(trials, args.out).items():
        print(f"{arm}: {changes or 'as in the preset'}")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Count what stands in the folder of runs."""
    from study.run import status

    print(status(_cells(args)))
    return 0


def _settings(preset_name: str, folder: Path = RESULTS) -> dict:
    """What tuning chose; that of `results/` was tuned for the lesson preset, others are run as they are."""
    from study.tuning import read_settings

    return read_settings(folder) if preset_name == "lesson" or folder != RESULTS else {}


def _cells(args: argparse.Namespace) -> list:
    """The grid that the arguments describe: each arm with its settings, and with what `--set` changes in all."""
    from study.run import grid

    settings, changes = _settings(args.preset, args.settings), _changes(args.set)
    settings = {arm: settings.get(arm, {}) | changes for arm in args.arm}
    return grid(args.dataset, args.arm, args.seed, settings, preset_name=args.preset, runs_dir=args.runs_dir)


def run_results(args: argparse.Namespace) -> int:
    """The grid behind the README, and the README's section made from its table."""
    from study import report
    from study.run import sweep, write_tables

    if args.only_write and args.out.resolve() != RESULTS:
        raise ValueError(f"--only-write makes README.md from the tables in {RESULTS}; leave --out away")
    if not args.only_write:
        write_tables(sweep(_cells(args), args.jobs, not args.skip_analyses), args.out)
    if args.out.resolve() != RESULTS:
        print(f"tables in {args.out} are written; README.md shows those of {RESULTS}")
        return 0
    report.write_readme(RESULTS / "low_label.csv", series.HOME / "README.md")
    print(f"tables and figures in {RESULTS} and the results in README.md are written")
    return 0


def run_again(args: argparse.Namespace) -> int:
    """A random part of the grid once more, its table, and what it says."""
    from study import again, report
    from study.run import write_tables

    committed = report.read_table(args.out / "low_label.csv")
    if committed.empty:
        raise ValueError(f"{args.out / 'low_label.csv'} is missing: there is nothing to compare with")
    table = again.run_again(again.draw(_cells(args), args.cells), committed, args.jobs)
    write_tables({"again": table}, args.out)
    print(again.apart(table, committed).round(4).to_string(index=False))
    return 0


def run_as_released(args: argparse.Namespace) -> int:
    """The controls, their table, and what it says."""
    from study import as_released

    table = as_released.controls(args.dataset, args.seed, tuple(args.arm), args.preset, args.runs_dir)
    as_released.write_table(table, args.out / "as_released.csv")
    print(as_released.summary(table).round(3).to_string(index=False))
    return 0


def _say(line: str) -> None:
    from mocolayers.method.collectives import rank

    if rank() == 0:
        print(line, flush=True)


def _chosen(args: argparse.Namespace):
    """The recipe that the arguments describe, and its data."""
    from mocolayers.data.prepared import load
    from mocolayers.training.distributed import from_first
    from mocolayers.training.runs import initial_weights

    name = from_first(lambda: load(args.dataset).name)  # one process makes what is missing, the others find it
    data, changes = load(name), _changes(args.set)
    if args.init:
        changes["init"] = initial_weights(args.init)[1]
    if args.tuned:
        from study.tuning import changed

        return changed(args.preset, args.arm, data, args.seed, _settings(args.preset).get(args.arm, {}) | changes), data
    return preset(args.preset, args.arm, data, args.seed, **changes), data


def _pretrained(args: argparse.Namespace):
    from mocolayers.training.pretrain import pretrain

    recipe, data = _chosen(args)
    return pretrain(recipe, data, args.runs_dir, args.device, init=args.init, compiled=args.compile), data


def _changes(words: list[str]) -> dict[str, float | int | str]:
    """Fields of a recipe by the type that they have there."""
    kinds, changes = {field.name: field.type for field in dataclasses.fields(Recipe)}, {}
    for word in words:
        name, _, value = word.partition("=")
        kind = kinds.get(name, str)
        try:
            changes[name] = kind(value) if value and kind in (int, float, str) else None
        except ValueError:
            changes[name] = None
        if changes[name] is None:
            raise ValueError(f"--set {word}: write FIELD=VALUE, for example lr=0.03 batch=64 layout=resnet18")
    return changes


if __name__ == "__main__":
    sys.exit(main())
