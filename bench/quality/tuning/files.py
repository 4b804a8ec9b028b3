"""What a search leaves behind: the trials as CSV and Markdown, and the curves as a plot."""

from __future__ import annotations

import csv
import io

from hcma_fast.bench.quality.tuning.records import Comparison, ScoreName, TrialRecord, TuningReport
from hcma_fast.bench.shared.plots import figure_png, new_figure

_COLUMNS = (
    *("number", "state", "eta0", "window_start", "window_end", "lambda_global", "lambda_local"),
    *("scored_by", "images", "score", "off", "difference", "low", "high"),
)
_AXIS: dict[ScoreName, str] = {
    "recognised": "large boxes recognised, minus off",
    "confidence": "log-probability of the category, minus off",
}

_SCORES = {
    "recognised": "Large boxes that the judge recognises",
    "confidence": "The judge's log-probability of what was asked for (0 is best, at least log 0.01 "
    "a box), mean over an image's boxes",
}
_VERDICTS = {
    "better": "It beats no alignment: the interval is above 0.",
    "undecided": "Undecided: it scores higher than no alignment, but the interval holds 0.",
    "not better": "No setting beats no alignment: the best one does not on fresh layouts.",
}


def _shown(value: float, name: ScoreName, *, sign: bool = False) -> str:
    """A score for people: a share in percent, a log-probability (nats) as it is."""
    shape = ("+" if sign else "") + (".1%" if name == "recognised" else ".3f")
    return format(value, shape)


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
        settings = (trial.eta0, *trial.window, trial.lambda_global, trial.lambda_local)
        writer.writerow([trial.number, trial.state, *settings, report.plan.score, *scores])
    return text.getvalue()


def tuning_table(found: TuningReport) -> str:
    """The report in Markdown: all trials, then the best one and what it is worth."""
    plan = found.plan
    name = plan.score
    mode = ", normalized" if plan.base.normalized else ""
    lines = [
        f"{_SCORES[name]}, mean over images; {plan.count} val layouts{mode}; difference to off on "
        "the same images (95% interval)",
        "",
        "| trial | eta0 | window | lambda global, local | images | score | difference | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for trial in found.trials:
        weights = f"{trial.lambda_global:g}, {trial.lambda_local:g}"
        cells = [str(trial.number), f"{trial.eta0:g}", "{:g} to {:g}".format(*trial.window)]
        shown = trial.comparison
        value = (str(shown.images), _shown(shown.score, name)) if shown else ("", "")
        cells += [weights, *value, _gain(shown, name) if shown and trial.number else ""]
        cells.append(trial.state)
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    if found.settings is None or found.confirmation is None:
        return "\n".join([*lines, "No setting beats no alignment: all trials diverged."])
    tied = f" (tied with {', '.join(map(str, found.tied))}; smallest eta0)" if found.tied else ""
    lines.append(
        f"Best: trial {found.best}{tied}. On fresh layouts {_compared(found.confirmation, name)}."
    )
    if found.recognised is not None:
        boxes = _compared(found.recognised, "recognised")
        lines.append(f"Large boxes recognised there: {boxes}.")
    lines.append(_VERDICTS[found.verdict])
    return "\n".join(lines)


def _compared(found: Comparison, name: ScoreName) -> str:
    score, off = (_shown(value, name) for value in (found.score, found.off))
    return f"({found.images} images) {score}, off {off}, difference {_gain(found, name)}"


def _gain(comparison: Comparison, name: ScoreName) -> str:
    gain, low, high = (
        _shown(value, name, sign=True) for value in (comparison.difference, *comparison.interval)
    )
    return f"{gain} ({low} to {high})"


def plot_png(report: TuningReport) -> bytes:
    """Difference to no alignment against eta0, window and number of the trial, as a PNG.

    Paired differences, for pruned trials saw fewer layouts; bars are their 95% intervals.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

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
    # the labels of a logarithmic axis that spans less than two decades would lie on each other
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter(NullFormatter())
    complete = [trial for trial in tried if trial.state == "complete"]
    history = [max(_interval(t)[1] for t in complete[: i + 1]) for i in range(len(complete))]
    axes[3].step([t.number for t in complete], history, where="post", color="tab:orange")
    name = report.plan.score
    axes[0].set_ylabel(_AXIS[name])
    figure.suptitle(
        f"{report.plan.count} layouts, off {_shown(_interval_off(report), name)}; "
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
