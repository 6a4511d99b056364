"""Searches the flags of a script for an environment: python benchmarks/tune.py --env-id Acrobot-v1

Optuna's TPE chooses the flags, starting from the environment's preset; a trial trains one run for
each seed, its score is the mean return of their evaluations, and it is given up after a seed that
leaves it below the median of the trials before. --search says what is tried: a range is searched
on a log scale, a list as it is.

    python benchmarks/tune.py --env-id Hopper-v5 --search learning_rate=1e-4:1e-3 gamma=0.99,0.995

What is done stands in the study's file, and a search that was stopped goes on with it. At the end,
or with --table, the best trials and what share of the score's spread each flag explains. The seeds
are not those on which benchmarks/returns.py reports.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import tyro
from optuna.storages.journal import JournalFileBackend

sys.path.insert(0, str(Path(__file__).parent.parent))
from returns import run_ours, script_for


@dataclass
class Args:
    env_id: str = "Acrobot-v1"
    search: tuple[str, ...] = (
        "learning_rate=1e-4:3e-3",
        "num_steps=64,128,256,512",
        "num_minibatches=4,8,16,32",
        "update_epochs=4,8,10,16",
        "gamma=0.98,0.99,0.995,0.999",
        "gae_lambda=0.9,0.95,0.98",
        "ent_coef=0.0,0.001,0.01,0.03",
    )  # what is tried: FLAG=LOW:HIGH or FLAG=VALUE,VALUE,...
    flags: tuple[str, ...] = ()  # more flags for each run, as in "--total-timesteps=100000"
    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)  # runs of a trial; two or three mislead
    trials: int = 50  # trials in all, those of the study's file among them
    jobs: int = 1  # trials side by side
    folder: Path = Path("runs/tune")  # where studies and runs are kept
    table: bool = False  # try nothing, print the table


def searched(args: Args) -> list[list[str]]:
    """(flag, what is tried) for each flag of the search."""
    return [entry.split("=") for entry in args.search]


def suggest(trial: optuna.Trial, name: str, choices: str) -> float | int | str:
    """A value for the flag ``name``."""
    if ":" in choices:
        low, high = map(float, choices.split(":"))
        return float(f"{trial.suggest_float(name, low, high, log=True):.2g}")
    return trial.suggest_categorical(name, choices.split(","))


def score(trial: optuna.Trial, args: Args) -> float:
    """The mean over seeds of one choice of flags."""
    flags = list(args.flags)
    for name, choices in searched(args):
        flags.append(f"--{name.replace('_', '-')}={suggest(trial, name, choices)}")
    returns = []
    for done, seed in enumerate(args.seeds):
        try:
            mean, _ = run_ours(args.env_id, seed, args.folder / "runs", *flags)
        except subprocess.CalledProcessError as error:  # refused, or numbers that aren't finite
            raise optuna.TrialPruned from error
        returns.append(mean)
        trial.report(float(np.mean(returns)), done)
        if done + 1 < len(args.seeds) and trial.should_prune():
            raise optuna.TrialPruned
    trial.set_user_attr("returns", returns)
    return float(np.mean(returns))


def preset_values(args: Args) -> dict[str, float | str]:
    """The preset's values of the flags of the search, where the search has them too."""
    settings, values = vars(script_for(args.env_id).preset(args.env_id)), {}
    for name, choices in searched(args):
        if ":" in choices:
            low, high = map(float, choices.split(":"))
            values[name] = float(np.clip(settings[name], low, high))
        elif str(settings[name]) in choices.split(","):
            values[name] = str(settings[name])
    return values


def print_table(study: optuna.Study) -> None:
    trials = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    pruned = len(study.get_trials(states=[optuna.trial.TrialState.PRUNED]))
    print(f"{study.study_name}: {len(trials)} trials, and {pruned} given up")
    for trial in sorted(trials, key=lambda trial: -trial.value)[:10]:
        seeds = " ".join(f"{value:.1f}" for value in trial.user_attrs["returns"])
        flags = " ".join(f"{name}={value}" for name, value in trial.params.items())
        print(f"{trial.value:10.1f}  ({seeds})  {flags}")
    if len(trials) >= 10:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        for name, share in optuna.importance.get_param_importances(
            study, evaluator=evaluator
        ).items():
            print(f"{share:10.2f}  {name}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / f"{args.env_id.replace('/', '_')}.log"
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(file))),
        study_name=args.env_id,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    if not args.table:
        if not study.trials:
            study.enqueue_trial(preset_values(args))
        left = args.trials - sum(trial.state.is_finished() for trial in study.trials)
        if left > 0:
            study.optimize(lambda trial: score(trial, args), n_trials=left, n_jobs=args.jobs)
    print_table(study)


if __name__ == "__main__":
    main()
