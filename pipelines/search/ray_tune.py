"""The parts of a search that run inside Ray Tune: the searcher, the scheduler and the stopper.

Only the driver of a search imports this (importing Ray Tune takes a second). Ray Tune never restores these objects,
which would mean unpickling them: a search resumes from its trials' own records.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipelines.config.search import Range, SearchConfig
from pipelines.config.search_space import Values
from pipelines.search.trial import Trial
from pipelines.search.trial_spec import Spec

METRIC, SIGNAL, TIME = "objective", "signal", "resource"

POLL_SECONDS = 1.0  # interval at which a request to stop is looked for
LOST_TRIALS = 3  # consecutive trials whose driver failed, after which the search ends
DRIVER_SHARE = 0.0001  # of this node's own resource, so that a trial's driver takes no CPU from its workers

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run directory has everything
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a `waiting` report has no metric
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the chain's driver handles Ctrl-C
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Proposals(Searcher):
    """Proposes known settings, then those of `sampler`, and assigns one worker group per running trial.

    Args:
        count: total number of trials.
        groups: number of worker groups.
        on_end: called with (number, values) when a trial ends, for whatever reason.
    """

    def __init__(
        self,
        known: Sequence[Values],
        count: int,
        groups: int,
        sampler: Searcher | None,
        on_end: Callable[[int, Values], None],
    ):
        super().__init__(metric=METRIC, mode="max")
        self.known, self.count, self.sampler, self.on_end = list(known), count, sampler, on_end
        self.proposed: dict[str, tuple[int, Values]] = {}  # Tune's id → number, setting
        self.lost = 0  # consecutive trials whose driver failed
        self.pruned: set[str] = set()
        self._free = list(range(groups))
        self._slots: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict | str | None:
        number = len(self.proposed)
        if number >= self.count:
            return Searcher.FINISHED
        if not self._free:
            return None
        values = self.known[number] if number < len(self.known) else self._sampled(trial_id)
        if not isinstance(values, dict):
            return values
        self.proposed[trial_id] = (number + 1, values)
        self._slots[trial_id] = self._free.pop(0)
        return {"number": number + 1, "slot": self._slots[trial_id], "values": json.dumps(values)}

    def _sampled(self, trial_id: str) -> Values | str | None:
        drawn = self.sampler.suggest(trial_id) if self.sampler else Searcher.FINISHED
        if not isinstance(drawn, dict):
            return drawn
        return {path: json.loads(value) if isinstance(value, str) else value for path, value in drawn.items()}

    def _is_sampled(self, trial_id: str) -> bool:
        return self.sampler is not None and self.proposed[trial_id][0] > len(self.known)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        if METRIC in result and self._is_sampled(trial_id):
            self.sampler.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self._free.append(self._slots.pop(trial_id))
        self.lost = self.lost + 1 if error else 0
        failed = error or METRIC not in (result or {})
        if self._is_sampled(trial_id):
            final = None if failed or trial_id in self.pruned else result  # a score at a rung is not final
            self.sampler.on_trial_complete(trial_id, final, error=failed)
        self.on_end(*self.proposed[trial_id])

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a search resumes from its trials' records."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search resumes from its trials' records")

    def __getstate__(self) -> dict:
        return {}


class Halving(AsyncHyperBandScheduler):
    """ASHA (Li et al. 2020, arXiv 1810.05934) with a callback for every trial that it stops early.

    At a rung it compares trials by their signal (see `objective.Assessment`).
    """

    def __init__(self, top: int, reduction: int, on_prune: Callable[[str], None]):
        super().__init__(time_attr=TIME, max_t=top, grace_period=1, reduction_factor=reduction)
        self.top, self.on_prune = top, on_prune

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        result = result | ({METRIC: result[SIGNAL]} if SIGNAL in result else {})
        action = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP and result[TIME] < self.top:
            self.on_prune(trial.trial_id)
        return action

    def __getstate__(self) -> dict:
        return {}


class Watch(tune.Stopper):
    """Ends the search when `reason_to_stop` returns a reason, or after `LOST_TRIALS` consecutive failed drivers."""

    def __init__(self, reason_to_stop: Callable[[], str | None], proposals: Proposals):
        self.reason_to_stop, self.proposals = reason_to_stop, proposals
        self.reason: str | None = None
        self._polled = time.monotonic()

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.reason is None and time.monotonic() - self._polled > POLL_SECONDS:
            self._polled = time.monotonic()
            self.reason = self.reason_to_stop()
        return self.reason is not None or self.proposals.lost >= LOST_TRIALS

    def __getstate__(self) -> dict:
        return {}


def optuna_sampler(search: SearchConfig, known: Sequence[Values]) -> Searcher:
    """Optuna's TPE over the space; it first proposes the `known` settings of an earlier start again."""
    import optuna  # an optional dependency
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, Any] = {}
    for path, choices in search.space.items():
        if isinstance(choices, Range):
            kind = optuna.distributions.IntDistribution if choices.whole else optuna.distributions.FloatDistribution
            space[path] = kind(choices.low, choices.high, log=choices.log)
        else:
            space[path] = optuna.distributions.CategoricalDistribution([json.dumps(c) for c in choices])
    points = [_encoded(search, values) for values in known if values.keys() == search.space.keys()]
    seed = search.seed + len(points)  # the same seed would draw the known points again
    return OptunaSearch(space, metric=METRIC, mode="max", points_to_evaluate=points or None, seed=seed)


def _encoded(search: SearchConfig, values: Values) -> Values:
    return {p: v if isinstance(search.space[p], Range) else json.dumps(v) for p, v in values.items()}


def run_tune(
    spec: Spec,
    search: SearchConfig,
    groups: Sequence[Any],
    proposals: Proposals,
    scheduler: TrialScheduler | None,
    watch: Watch,
) -> None:
    """Run the trials that `proposals` suggests until the last one ends or `watch` ends the search."""
    os.environ |= ENVIRONMENT
    node = f"node:{ray.util.get_node_ip_address()}"  # Tune's scratch folder is here
    trainable = tune.with_resources(
        tune.with_parameters(TrialDriver, spec=spec, groups=list(groups)),
        PlacementGroupFactory([{"CPU": 0.0, node: DRIVER_SHARE}]),
    )
    with tempfile.TemporaryDirectory() as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=proposals,
                scheduler=scheduler,
                num_samples=proposals.count,
                reuse_actors=True,
                time_budget_s=search.time_budget,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                stop=watch,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


class TrialDriver(tune.Trainable):
    """Adapter from Ray Tune's `Trainable` to `Trial`."""

    def setup(self, config: Mapping, spec: Spec, groups: list) -> None:
        self.spec, self.groups = spec, groups
        self.reset_config(config)

    def reset_config(self, new_config: Mapping) -> bool:
        """Start the next trial in the same process."""
        group = self.groups[new_config["slot"]]
        self.trial = Trial(self.spec, new_config["number"], json.loads(new_config["values"]), group)
        return True

    def step(self) -> dict:
        return self.trial.advance()
