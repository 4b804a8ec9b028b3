"""What a search leaves behind: the trials as a table and the curves as a plot."""

from __future__ import annotations

import csv
import io

from hcma_fast.bench.plots import figure_png, new_figure
from hcma_fast.bench.tune_records import TrialRecord, TuningReport

_COLUMNS = (
    *("number", "state", "eta0", "window_start", "window_end", "lambda_global", "lambda_local"),
    *("images", "score", "off", "difference", "low", "high"),
)


def trials_csv(report: TuningReport) -> str:
    """All trials as CSV with a header; scores are empty where a trial diverged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for trial in report.trials:
        found = trial.comparison
        scores = (
            (found.images, found.score, found.off, found.difference, *found.interval)
            if found
            else ("",) * 6
        )
        weights = (trial.lambda_global, trial.lambda_local)
        writer.writerow([trial.number, trial.state, trial.eta0, *trial.window, *weights, *scores])
    return text.getvalue()


def plot_png(report: TuningReport) -> bytes:
    """Difference to no alignment against eta0, window and number of the trial, as a PNG.

    Paired differences, for pruned trials saw fewer layouts; bars are their 95% intervals.
    """
    figure = new_figure(15, 4.2)
    axes = figure.subplots(1, 4, sharey=True)
    tried = [trial for trial in report.trials if trial.state in ("complete", "pruned")]
    readings = (
        ("eta0", [trial.eta0 for trial in tried]),
        ("window: start", [trial.window[0] for trial in tried]),
        ("window: end", [trial.window[1] for trial in tried]),
        ("trial", [float(trial.number) for trial in tried]),
    )
    for axis, (label, places) in zip(axes, readings, strict=True):
        axis.axhline(0, color="black", linewidth=1)
        for place, trial in zip(places, tried, strict=True):
            low, middle, high = _interval(trial)
            axis.errorbar(
                [place],
                [middle],
                yerr=[[middle - low], [high - middle]],
                fmt="o" if trial.state == "complete" else "x",
                color="tab:orange" if trial.number == report.best else "tab:blue",
                alpha=1.0 if trial.state == "complete" else 0.4,
            )
        axis.set_xlabel(label)
    axes[0].set_xscale("log")
    complete = [trial for trial in tried if trial.state == "complete"]
    history = [max(_interval(t)[1] for t in complete[: i + 1]) for i in range(len(complete))]
    axes[3].step([t.number for t in complete], history, where="post", color="tab:orange")
    axes[0].set_ylabel("large boxes recognised, minus off")
    figure.suptitle(
        f"{report.plan.count} layouts, off {_interval_off(report):.1%}; "
        "orange: best, crosses: pruned"
    )
    return figure_png(figure)


def _interval(trial: TrialRecord) -> tuple[float, float, float]:
    if trial.comparison is None:
        return 0.0, 0.0, 0.0
    low, high = trial.comparison.interval
    middle = trial.comparison.difference
    return min(low, middle), middle, max(high, middle)


def _interval_off(report: TuningReport) -> float:
    first = report.trials[0].comparison
    return first.off if first else 0.0
