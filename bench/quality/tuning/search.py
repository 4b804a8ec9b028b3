"""Search for eta0, window and lambdas of a checkpoint: which settings does the judge like best?

It lies in ``bench``, not in ``train``, since training must never see the judge; the command is
``hcma-fast train tune-alignment`` all the same. Layouts are those of the held-out split "val".

There is no second objective for other checkpoints: the aligner's own losses fall with every larger
step along their gradient, so a search on them answers "the largest eta0", whatever the images look
like.

Which score a search maximises is part of its plan; the scorer gives all of them. Shares of boxes
recognised say little where nearly all of them are: then the judge's confidence tells settings apart
that no box flips between.

Every setting is tried on the same layouts and seeds (paired), in chunks, so that optuna can prune a
hopeless one early. The best one was picked for its score, which flatters it: it is compared with
no alignment once more, on layouts that the search never saw, and only this comparison counts.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from hcma_fast.bench.quality.tuning.records import (
    WORST,
    Comparison,
    Plan,
    Readings,
    Scores,
    TrialRecord,
    TuningReport,
    Verdict,
    compare,
)
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import BackendError, DivergenceError, InputError, UsageError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

Progress = Callable[[str, int, int], None]
#: trials before TPE models the scores, and before the median of earlier ones prunes
_RANDOM_TRIALS, _UNPRUNED_TRIALS = 6, 4


class Scorer(Protocol):
    """What the search asks: how good are the images of some layouts under some settings?"""

    def __call__(self, settings: AlignmentSettings, start: int, stop: int) -> Readings:
        """Each score of the layouts start .. stop-1, the larger the better; NaN: there is none.

        Raises:
            DivergenceError: the settings give no image.
        """

    def forget(self) -> None:
        """The setting at hand is finished: drop what was kept to go on with it."""


def check_installed() -> None:
    """Raises BackendError where optuna or matplotlib is missing."""
    for name in ("optuna", "matplotlib"):
        if find_spec(name) is None:
            raise BackendError(
                "tune-alignment needs a package that is not installed",
                value=name,
                remedy='Run pip install "hcma-fast[train]".',
            )


def search(
    score: Scorer,
    plan: Plan,
    folder: Path,
    *,
    trials: int = 20,
    timeout: float | None = None,
    progress: Progress = lambda label, done, total: None,
) -> TuningReport:
    """Try settings until ``trials`` are finished, counting those of earlier runs in ``folder``.

    Args:
        folder: keeps the study; a killed search goes on where it was and proposes what it would
            have proposed. Use one per plan and model.
        timeout: no trial starts after so many seconds; the one that runs is finished.
        progress: called with (label, layouts done, layouts of this trial).

    Raises:
        BackendError: optuna is missing.
        InputError: the study in ``folder`` is damaged.
        UsageError: eta0's range is empty, or no layout has a score.
    """
    check_installed()
    from optuna.trial import TrialState

    low, high = plan.eta0_range
    if not 0 < low < high < float("inf") or trials < 1:
        raise UsageError(
            "eta0's range must be two positive numbers, the smaller one first, and trials >= 1",
            value=(low, high, trials),
            remedy="Write --eta0-range 1 100; no alignment (0) is always tried.",
        )
    started = time.monotonic()
    study = _open(folder / "study.sqlite")
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        # its process was killed: the same state proposes it again
        study.tell(trial.number, state=TrialState.FAIL)
    switched_off = plan.base.model_copy(update={"eta0": 0.0})
    off = _kept(study, "off", lambda: _score(score, switched_off, 0, plan, "off", progress))
    off_scores = off[plan.score]
    compare(off_scores, off_scores)  # is there anything to judge?
    while (number := len(_finished(study))) < trials:
        if timeout is not None and time.monotonic() - started > timeout:
            break
        _try_one(study, score, plan, number, progress)
    records = [_record(0, "off", switched_off, off_scores, off_scores)]
    for number, trial in enumerate(_finished(study), 1):
        records.append(_recorded(number, trial, plan, off_scores))
    ranked = sorted(
        (r for r in records if r.state == "complete"),
        key=lambda r: (-_value(r), r.eta0, r.number),
    )
    if not ranked:
        return _report(plan, records, [], None, None)
    chosen = _settings_of(ranked[0], plan)
    first, last = plan.count, plan.count + plan.confirm

    def confirm(settings: AlignmentSettings) -> Readings:
        return _score(score, settings, first, plan, "confirm", progress, last)

    fresh_off = _kept(study, "fresh off", lambda: confirm(switched_off))
    # kept by settings: more trials may find another winner
    fresh = _kept(study, chosen.model_dump_json(), lambda: confirm(chosen))
    return _report(plan, records, ranked, fresh, fresh_off)


def _open(path: Path) -> Study:
    import optuna

    # each trial would be a line on stderr, beside our own progress
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)

    def connect() -> sqlite3.Connection:
        # a trial is a dozen small commits: with WAL a kill loses none, and none waits for the disk
        # (only a power cut may lose some)
        connection = sqlite3.connect(path, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    pruner = optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS)
    try:
        storage = optuna.storages.RDBStorage(
            # the creator takes any path; in an URL some characters mean something
            "sqlite:///study.sqlite",
            engine_kwargs={"creator": connect},
        )
        return optuna.create_study(
            storage=storage,
            study_name="alignment",
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
    except Exception as error:  # sqlalchemy and alembic raise many kinds
        raise InputError(
            f"the study of this search cannot be opened ({type(error).__name__})",
            value=str(path),
            remedy="Delete the file to start the search again, or choose another --work.",
        ) from error


def _kept(study: Study, name: str, compute: Callable[[], Readings]) -> Readings:
    """Scores from the study, computed and stored when it has none."""
    kept = study.user_attrs.get("scores", {})
    if name not in kept:
        readings = {which: _to_json(scores) for which, scores in compute().items()}
        kept = {**kept, name: readings}
        study.set_user_attr("scores", kept)
    return {which: _from_json(scores) for which, scores in kept[name].items()}


def _score(
    score: Scorer,
    settings: AlignmentSettings,
    start: int,
    plan: Plan,
    label: str,
    progress: Progress,
    stop: int | None = None,
) -> Readings:
    stop = plan.count if stop is None else stop
    parts = []
    for first in range(start, stop, plan.chunk):
        parts.append(score(settings, first, min(first + plan.chunk, stop)))
        progress(label, min(first + plan.chunk, stop) - start, stop - start)
    score.forget()
    return {which: np.concatenate([part[which] for part in parts]) for which in parts[0]}


def _finished(study: Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])


def _try_one(study: Study, score: Scorer, plan: Plan, number: int, progress: Progress) -> None:
    """Propose the setting number ``number`` (from 0), score it, and tell the study."""
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    # a seed per trial: a resumed search must not draw the first trials' numbers again
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    study.sampler = TPESampler(n_startup_trials=_RANDOM_TRIALS, seed=seed)
    own = _parameters(plan)
    if number == 0 and own and not study.get_trials(states=[TrialState.WAITING]):
        # the checkpoint's own settings go first: they are what the winner replaces
        study.enqueue_trial(own)
    trial = study.ask()
    settings = _propose(trial, plan)
    trial.set_user_attr("settings", settings.model_dump(mode="json"))
    scores: list[float] = []
    for start in range(0, plan.count, plan.chunk):
        stop = min(start + plan.chunk, plan.count)
        try:
            scores += score(settings, start, stop)[plan.score].tolist()
        except DivergenceError:
            trial.set_user_attr("diverged", True)
            # the worst score, so that the sampler keeps away
            study.tell(trial, WORST[plan.score])
            score.forget()
            return
        progress(f"trial {number + 1}, eta0 {settings.eta0:g}", stop, plan.count)
        trial.set_user_attr("scores", _to_json(np.array(scores)))
        so_far = np.array(scores)
        if stop < plan.count and not np.isnan(so_far).all():
            trial.report(float(np.nanmean(so_far)), stop)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                score.forget()
                return
    study.tell(trial, float(np.nanmean(scores)))
    score.forget()


def _propose(trial: Trial, plan: Plan) -> AlignmentSettings:
    """Settings of a trial, rounded to what is written.

    Only the balance of the lambdas is searched: their common factor is eta0's (Eq. 8), or nothing
    when the gradient is normalized.
    """
    eta0 = trial.suggest_float("eta0", *plan.eta0_range, log=True)
    start = trial.suggest_float("window_start", 0, 0.5)
    end = trial.suggest_float("window_end", 0.5, 1)
    local = round(2 * trial.suggest_float("local_share", 0, 1), 2)
    return plan.base.model_copy(
        update={
            "eta0": float(f"{eta0:.3g}"),
            "window": (round(start, 2), round(end, 2)),
            "lambda_global": round(2 - local, 2),
            "lambda_local": local,
        }
    )


def _parameters(plan: Plan) -> dict[str, float] | None:
    """The checkpoint's own settings as a proposal; None where they lie outside of the search."""
    base, (low, high) = plan.base, plan.eta0_range
    total = base.lambda_global + base.lambda_local
    eta0 = base.eta0 if base.normalized else base.eta0 * total / 2
    start, end = base.window
    if not total or not low <= eta0 <= high or start > 0.5 or end < 0.5:
        return None
    share = base.lambda_local / total
    return {"eta0": eta0, "window_start": start, "window_end": end, "local_share": share}


def _recorded(number: int, trial: FrozenTrial, plan: Plan, off: Scores) -> TrialRecord:
    settings = AlignmentSettings(**trial.user_attrs["settings"])
    if trial.user_attrs.get("diverged"):
        return _record(number, "diverged", settings, None, off)
    state: Literal["pruned", "complete"] = "pruned" if trial.state.name == "PRUNED" else "complete"
    return _record(number, state, settings, _from_json(trial.user_attrs["scores"]), off)


def _record(
    number: int,
    state: Literal["off", "complete", "pruned", "diverged"],
    settings: AlignmentSettings,
    scores: Scores | None,
    off: Scores,
) -> TrialRecord:
    return TrialRecord(
        number=number,
        state=state,
        eta0=settings.eta0,
        window=settings.window,
        lambda_global=settings.lambda_global,
        lambda_local=settings.lambda_local,
        comparison=None if scores is None else compare(scores, off[: len(scores)]),
    )


def _settings_of(record: TrialRecord, plan: Plan) -> AlignmentSettings:
    names = {"eta0", "window", "lambda_global", "lambda_local"}
    return plan.base.model_copy(update=record.model_dump(include=names))


def _value(record: TrialRecord) -> float:
    assert record.comparison is not None  # a finished trial has scores
    return record.comparison.score


def _report(
    plan: Plan,
    records: list[TrialRecord],
    ranked: list[TrialRecord],
    fresh: Readings | None,
    fresh_off: Readings | None,
) -> TuningReport:
    confirmation: Comparison | None = None
    recognised: Comparison | None = None
    if fresh is not None and fresh_off is not None:
        confirmation = compare(fresh[plan.score], fresh_off[plan.score])
        hits, hits_off = fresh["recognised"], fresh_off["recognised"]
        if plan.score != "recognised" and not np.isnan(hits).all():
            recognised = compare(hits, hits_off)
    verdict: Verdict = "not better"
    if confirmation is not None and confirmation.difference > 0:
        verdict = "better" if confirmation.interval[0] > 0 else "undecided"
    return TuningReport(
        plan=plan,
        trials=records,
        best=ranked[0].number if ranked else None,
        tied=[r.number for r in ranked[1:] if _value(r) == _value(ranked[0])],
        settings=_settings_of(ranked[0], plan) if ranked else None,
        confirmation=confirmation,
        recognised=recognised,
        verdict=verdict,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _to_json(scores: Scores) -> list[Any]:
    # JSON knows no NaN
    return [None if np.isnan(value) else float(value) for value in scores]


def _from_json(values: list[Any]) -> Scores:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
