"""A tuning in its folder: contexts to each other, fold after fold, and the decision."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor
from tqdm import tqdm

from scripts.checkpoint import CheckpointError, atomic_save, load_weights, read_checkpoint
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.self_test import Outcome, Tested, table
from scripts.inference.views import EVEN_SHARE
from scripts.runtime.manifest import write_manifest
from scripts.runtime.output_folder import OutputFolder, write_json
from scripts.runtime.termination import STATUS, StopRequest
from scripts.training.engine import GroupTrainer
from scripts.training.time_budget import RunningAverage, TimeBudget
from scripts.training.training_run import (
    BEST,
    LAST,
    RandomState,
    claim_folder,
    clear_folder,
    continues,
    release_folder,
)
from scripts.tuning.aligned_episodes import AlignedEpisodes
from scripts.tuning.cases import TuningCases, find_cases

logger = logging.getLogger(__name__)

REPORT = "report.json"

ALIGNING, JUDGING = 0.25, 0.1
"""Of the time, at most about so much each for bringing contexts to each other, and for a judgement."""

SPARE_SECONDS = 1.0
"""Of the time, for what is written at the end."""

LEAST_GAIN = 0.002
"""In mean Dice with an even share of the network: below it the weights stay as they were. With labels exchanged among
hippocampus scans, where there is nothing to learn, the gain was 0.001 and 0.002."""

LEAST_ERRORS = 1.3
"""The gain in standard errors of its own, at least: one case alone that gains is not believed. A stricter bound, 1.64
and 0.004, refused weights that were 0.006 better on new scans, for a fold has only its part of cases and time."""

LEAST_GAIN_ON_COPIES = 0.02
"""The same, where deformed copies of what was tuned on are judged: on other people a gain is smaller than on these."""

LEAST_GAIN_FROM_ITSELF = 0.03
"""The same, where copies are predicted from what they are copies of: weights that gained 0.022 like that lost 0.003 on
twelve new hippocampus scans, while ones that gained 0.026 on copies from another context gained 0.007."""

CHECKED = 2
"""Kept-out cases that are looked at halfway through a fold, for the gain to expect."""


class TuningRun:
    """Tunes a predictor's network on its contexts, and keeps what comes of it if it wins.

    The cases (:mod:`~scripts.tuning.cases`) are dealt out into folds. Each fold starts from the same weights, is tuned
    on the cases of the others, and is judged on its own, which it never had as targets. The weights of the folds'
    averages are averaged once more (model soups, Wortsman et al., ICML 2022): all cases have a part in them, and no
    time is spent on weights that only serve the decision. What is reported, expected Dice included, is what the folds
    had on cases kept out of them, never what the tuned weights have on the contexts they were tuned on.

    The folder gets ``model.pt`` (weights to use: tuned, or as they were), ``report.json``, ``manifest.json``, and
    while the tuning lasts ``last.pt`` to go on from.

    Args:
        folder: where it goes.
        inferer: with the predictor, whose network the trainer trains.
        trainer: one epoch of it is a fold.
        episodes: the trainer's dataset.
        budget: ends an epoch.
        average: of the network.
        minutes: of all of it, alignment and decision included.
        resume: go on with what is in the folder, and take what is finished as it is.
        overwrite: start anew where there is a run.
        settings: what else the result follows from.
    """

    def __init__(
        self,
        folder: str,
        inferer: ConfidentInferer,
        trainer: GroupTrainer,
        episodes: AlignedEpisodes,
        budget: TimeBudget,
        average: RunningAverage,
        minutes: float = 1.0,
        resume: bool = False,
        overwrite: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {minutes}")
        if inferer.predictor.task == "generation":
            raise ValueError("tuning is for segmentation: an image-to-image task has no Dice to decide by")
        self.started = time.monotonic()
        self.folder = Path(folder)
        self.inferer = inferer
        self.predictor = inferer.predictor
        self.trainer = trainer
        self.episodes = episodes
        self.budget = budget
        self.average = average
        self.minutes = float(minutes)
        self.resume = resume
        self.overwrite = overwrite
        self.settings = dict(settings or {})
        self.report: dict[str, Any] = {}
        self.stopped = False
        self._request = StopRequest()
        self._seconds: dict[str, float] = {}
        self._bar = tqdm(disable=True)

    def run(self, config: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None) -> None:
        """Tune, decide, and leave the network with the weights to use.

        Args:
            config: the configuration as run; with it and the options' values goes a manifest.
            options: see there.

        Raises:
            FileExistsError: the folder holds another run, and it is not to be replaced.
            CheckpointError: what is there was made with other contexts, weights or settings.
            ValueError: the contexts cannot be tuned on.
        """
        fingerprint = self._fingerprint()
        if self.resume and self._finished(fingerprint):
            return
        claim_folder(str(self.folder), continues(self.folder, self.resume), self.overwrite)
        try:
            with self._request:
                self._tune(fingerprint, config, options)
        finally:
            release_folder(self.folder)

    def conclude(self) -> None:
        """End the program with SIGTERM's status if that stopped the run.

        Raises:
            SystemExit: status 143.
        """
        if self.stopped:
            raise SystemExit(STATUS)

    def _fingerprint(self) -> str:
        predictor = self.predictor
        digest = hashlib.sha256()
        for name, value in predictor.network.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        facts = [digest.hexdigest(), predictor.context.fingerprint, predictor.label_values, predictor.align]
        facts.append(predictor.evidence)
        return hashlib.sha256(json.dumps([*facts, self.minutes, self.settings]).encode()).hexdigest()

    def _finished(self, fingerprint: str) -> bool:
        """Whether the folder holds the result already, which then is taken."""
        path = self.folder / REPORT
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if report["fingerprint"] != fingerprint:
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        load_weights(self.predictor.network, self.folder / BEST)
        self.predictor.forget_encoded()
        self._take(report)
        logger.info("tuned before, taken from %s", path)
        return True

    def _tune(self, fingerprint: str, config: Mapping[str, Any] | None, options: Mapping[str, Any] | None) -> None:
        network = self.predictor.network
        before = {name: value.clone() for name, value in network.state_dict().items()}
        state = self._earlier(fingerprint)
        if state is None:
            OutputFolder(self.folder).remove(self.folder / REPORT)
            clear_folder(self.folder)
        if config is not None:
            digests = zip(self.predictor.context.names, self.predictor.context.digests, strict=True)
            write_manifest(self.folder, config, options or {}, list(digests))
        cases = find_cases(self.predictor, ALIGNING * 60 * self.minutes, self.episodes.seed)
        self._note("alignment")
        if state is None:
            judged = self._judge_first(cases)
            state = {"fingerprint": fingerprint, "before": judged, "after": [], "folds": []}
            self._note("before")
            state["left"] = 60 * self.minutes - (time.monotonic() - self.started) - SPARE_SECONDS
            state["judging"] = 1.1 * self._seconds["before"] / cases.folds
        with tqdm(total=100, desc="tuning", unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as self._bar:
            for fold in range(len(state["folds"]), cases.folds):
                self._run_fold(fold, cases, before, state)
                if self.stopped:
                    return
        network.load_state_dict(_mean(state["folds"]))
        self._decide(cases, before, state)

    def _earlier(self, fingerprint: str) -> dict[str, Any] | None:
        """What a run that was cut short left."""
        path = self.folder / LAST
        if not continues(self.folder, self.resume):
            return None
        state = read_checkpoint(path)
        if not isinstance(state, dict) or state.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"{path} was tuned with other contexts, weights or settings: give another --output_dir or "
                "--overwrite true"
            )
        OutputFolder.of(path).adopt(path)
        return state

    def _judge_first(self, cases: TuningCases) -> list[dict[str, Any]]:
        """What the weights have as they are, on as many cases as there is time for."""
        until = time.monotonic() + JUDGING * 60 * self.minutes
        found: list[dict[str, Any]] = []
        for case in cases.cases:
            enough = len({one.judged_in for one in cases.cases[: len(found)]} - {None}) == cases.folds
            if case.judged_in is None or (enough and time.monotonic() > until):
                continue
            found.append(asdict(self.inferer.tested(case.tested)))
        return found

    def _run_fold(self, fold: int, cases: TuningCases, before: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        network, within = self.predictor.network, state.pop("within", None)
        tuned_in = cases.tuned_in(fold)
        self.episodes.show(tuned_in, [self.predictor.members_of(case.target) for case in tuned_in])
        self.trainer.optimizer.state.clear()
        if within is None:
            network.load_state_dict(before)
            self.average.begin()
            # each fold anew, for other work may have come to the machine
            self.budget.begin(max(0.0, state["left"] / (cases.folds - fold) - state["judging"]))
        else:
            for name, part in self._parts().items():
                part.load_state_dict(within[name])
        self.episodes.first = fold * len(self.episodes) + self.budget.done
        known = {one["name"]: Outcome(**one) for one in state["before"]}
        judged = [case for case in cases.judged_in(fold) if case.name in known]
        checked = [self.budget.share >= 0.5]

        def follow(engine: Engine) -> None:
            self._bar.update(round(100 * (fold + self.budget.share) / cases.folds) - self._bar.n)
            if self.budget.share >= 0.5 and not checked[0]:
                checked[0] = True
                self._expect(state, [self._judged(case) for case in judged[:CHECKED]])
            if self._request.made:
                within = {name: part.state_dict() for name, part in self._parts().items()}
                atomic_save(state | {"within": within}, self.folder / LAST)
                self.stopped = True
                logger.info("stopped by SIGTERM: go on with --resume true")
                engine.terminate()

        self.trainer.state.iteration = self.trainer.state.epoch = 0
        with self.trainer.add_event_handler(Events.ITERATION_COMPLETED, follow):
            self.trainer.run()
        if self.stopped:
            return
        state["folds"].append(
            {name: value.cpu().clone() for name, value in self.average.network_so_far.state_dict().items()}
        )
        began = time.monotonic()
        state["after"] += [asdict(self._judged(case)) for case in judged]
        state["judging"] = time.monotonic() - began
        state["left"] -= self.budget.spent + state["judging"]
        self._expect(state, [])
        atomic_save(state, self.folder / LAST)

    def _parts(self) -> dict[str, Any]:
        """What a fold goes on from."""
        return {
            "network": self.predictor.network,
            "optimizer": self.trainer.optimizer,
            "average": self.average,
            "budget": self.budget,
            "random": RandomState(),
        }

    def _judged(self, case: Tested) -> Outcome:
        self.predictor.forget_encoded()
        return self.inferer.tested(case, self.average.network_so_far)

    def _expect(self, state: Mapping[str, Any], more: list[Outcome]) -> None:
        """Show the gain on what was kept out so far."""
        after = [Outcome(**one) for one in state["after"]] + more
        before = {one["name"]: Outcome(**one) for one in state["before"]}
        if after:
            gain = np.mean([one.mean_dice(EVEN_SHARE) - before[one.name].mean_dice(EVEN_SHARE) for one in after])
            self._bar.set_postfix_str(f"expected gain {gain:+.3f}")

    def _decide(self, cases: TuningCases, start: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep the tuned weights if they win, else those from before; write the report."""
        self._note("tuning")
        outcomes = {when: [Outcome(**one) for one in state[when]] for when in ("before", "after")}
        summaries = {when: self.inferer.summary_of(found) for when, found in outcomes.items()}
        # copies are brought back all too well to say how much votes count for other scans
        share = {
            when: EVEN_SHARE if cases.copies else found.get("network_share", EVEN_SHARE)
            for when, found in summaries.items()
        }
        after = {one.name: one for one in outcomes["after"]}
        pairs = [
            (one.mean_dice(share["before"]), after[one.name].mean_dice(share["after"])) for one in outcomes["before"]
        ]
        gains = np.diff(pairs, axis=1)[:, 0]
        gain = float(gains.mean())
        # with one share for both it is the weights that are compared; the best share of each must not lose either
        even = np.array(
            [after[one.name].mean_dice(EVEN_SHARE) - one.mean_dice(EVEN_SHARE) for one in outcomes["before"]]
        )
        error = float(even.std(ddof=1) / len(even) ** 0.5) if len(even) > 1 else None
        least = LEAST_GAIN
        if cases.copies:
            least = LEAST_GAIN_ON_COPIES if cases.from_others else LEAST_GAIN_FROM_ITSELF
        least = max(least, LEAST_ERRORS * (error or 0.0))
        kept = gain >= 0 and float(even.mean()) >= least
        if not kept:
            self.predictor.network.load_state_dict(start)
        self.predictor.network.eval()
        self.predictor.forget_encoded()
        atomic_save(self.predictor.network.state_dict(), self.folder / BEST)
        in_use = "after" if kept else "before"
        on = "deformed copies of the contexts" if cases.copies else "contexts"
        self._seconds["total"] = round(time.monotonic() - self.started, 1)
        report = {
            "fingerprint": state["fingerprint"],
            "kept": kept,
            "judged_on": f"{on}, each kept out of the tuning that it judges",
            "dice_before": round(float(np.mean(pairs, 0)[0]), 4),
            "dice_after": round(float(np.mean(pairs, 0)[1]), 4),
            "gain": round(gain, 4),
            "gain_at_even_share": round(float(even.mean()), 4),
            "gain_standard_error": None if error is None else round(error, 4),
            "judged": len(pairs),
            "tuned_on": len({id(case) for fold in range(cases.folds) for case in cases.tuned_in(fold)}),
            "cases": {
                one.name: {
                    "before": {str(v): round(x, 4) for v, x in one.dice[share["before"]].items()},
                    "after": {str(v): round(x, 4) for v, x in after[one.name].dice[share["after"]].items()},
                }
                for one in outcomes["before"]
            },
            "self_test": None if cases.copies else summaries[in_use],
            "minutes": self.minutes,
            "seconds": self._seconds,
            "settings": self.settings,
        }
        write_json(report, self.folder / REPORT)
        (self.folder / LAST).unlink(missing_ok=True)
        self._take(report)

    def _take(self, report: dict[str, Any]) -> None:
        """Let the predictor know, and say how it went."""
        self.report = self.predictor.tuned = report
        self.predictor.share = (report["self_test"] or {}).get("network_share", EVEN_SHARE)
        words = "the tuned weights are used" if report["kept"] else "too little: the weights stay as they were"
        logger.info(
            "mean Dice %.3f before, %.3f after (%+.3f) on %d %s: %s",
            *(report[name] for name in ("dice_before", "dice_after", "gain", "judged", "judged_on")),
            words,
        )
        if report["self_test"] is not None:
            logger.info("what to expect, from contexts kept out:\n%s", table(report["self_test"]))

    def _note(self, step: str) -> None:
        """Seconds of a step that is over."""
        passed = time.monotonic() - self.started
        self._seconds[step] = round(passed - sum(self._seconds.values()), 1)


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of weights of the same network, number by number."""
    return {
        name: value if not value.is_floating_point() else torch.stack([state[name] for state in states]).mean(0)
        for name, value in states[0].items()
    }
