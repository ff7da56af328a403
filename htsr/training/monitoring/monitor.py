"""The spectra of a model while it trains, in any training loop, for a small share of its time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.analysis.analyze import make_options
from htsr.analysis.trajectory_file import is_trajectory
from htsr.errors import UsageError, reason_of
from htsr.matrices.models import Filter, as_filter
from htsr.ranks import Ranks
from htsr.spectra.metrics import NUMERIC
from htsr.training.monitoring.alarms import Sign, Watch
from htsr.training.monitoring.budget import Budget
from htsr.training.monitoring.hooks import Hooks
from htsr.training.monitoring.record import Earlier, Record, is_of_a_run
from htsr.training.monitoring.rounds import Rounds
from htsr.training.trainer_log import Log

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

METRICS = ("alpha", "sigma", "trace_log", "stable_rank", "entropy", "relative")
FILE = "trajectory.jsonl"
MIN_SIZE = 50  # smaller matrices have no tail to speak of


class SpectralMonitor(Hooks):
    """Measures the weight matrices of a model while it trains, and logs and keeps what it finds.

        Trainer(model, arguments, callbacks=[htsr.SpectralMonitor(every=500)], …)   # transformers, TRL
        lightning.Trainer(callbacks=[htsr.SpectralMonitor(every=500)], …)           # Lightning

        monitor = htsr.SpectralMonitor(model, path="run/trajectory.jsonl", log=accelerator.log)   # any other loop
        …
        optimizer.step()
        monitor.step()

    Every `every` steps it measures as many matrices as fit in `share` of the seconds of training so far, those with the
    oldest numbers first. The seconds that one event leaves are saved for the next, and what took longer than
    thought is paid back; the look at the weights at the start counts as well. Weights, gradients and random numbers of
    the training are not touched.

    It logs means by role, ``spectrum/alpha/attn.q`` and so on, of the latest number of each matrix, with
    ``spectrum/age/ROLE``, how many steps old these are, ``spectrum/measured``, the share of the matrices that have a
    number, and ``spectrum/share_of_time``, what all this took of the time of training. The trajectory file has each
    matrix at each step at which it was measured, for `htsr track`.

    ``relative`` is ‖W_t - W_0‖_F / ‖W_0‖_F. No copy of W_0 is kept but a sketch of 8 KiB a matrix, in memory and
    beside the trajectory file, so that it has a standard error of 2.2 % of itself.

    A warning is logged, once for each matrix, where α lies below 2 while the evaluation loss rises, where the stable
    rank collapses, where a matrix stays like noise while most do not, and where entries are NaN or infinite; the guide
    *Monitor a training* (``reports/documentation/pages/monitor.md``) says what is known of each.

    Under transformers the values go through ``Trainer.log`` itself: the `log` of a subclass, as TRL's trainers have
    one, is passed by, and sees none of them; callbacks do.

    Processes that train together (DDP, FSDP2, DeepSpeed's ZeRO) share the matrices, one whole matrix each at a time;
    the first decides what fits, and alone writes. A resumed run goes on with its file: what was measured after the
    step where it is resumed is dropped, and a new run puts the file of an old one aside. Without that file a resumed
    run has ``relative`` against the weights that it was resumed with, in a plain loop those after its first step.

    Args:
        model: model in training, as it is before the first step, wrapped or not. For a plain loop only.
        every: optimizer steps from one event to the next.
        metrics: what is logged: fields of `htsr.LayerMetrics`, or ``relative``. The file has all.
        share: seconds of measuring for each second of training; ``float("inf")`` measures everything every time.
        path: trajectory file, .jsonl. By default it is ``trajectory.jsonl`` in the output folder of the Trainer or of
            Lightning's logger; a plain loop has none unless it is named.
        log: function of values and step that a plain loop logs with, called by the first process alone:
            ``accelerator.log``, ``wandb.log``, ``trackio.log``, ``mlflow.log_metrics`` …
        where: filter of the matrices that are monitored; by default those whose smaller side is at least 50.
        distributed: whether the processes of a group train one model. False where each trains its own, with a file of
            its own.
        **options: fields of `htsr.Options`; `bulk` is True by default, since the largest eigenvalues tell noise.

    Raises:
        UsageError: an argument has no meaning; later, when training begins, the model has no matrix, none passes the
            filter, FSDP1 has flattened the model, or the file at `path` is somebody else's.

    Examples:
        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> logged = []
        >>> share = float("inf")
        >>> monitor = htsr.SpectralMonitor(model, every=2, share=share, log=lambda values, step: logged.append(values))
        >>> for _ in range(4):
        ...     model(torch.randn(8, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     monitor.step()
        >>> [sorted(values)[:2] for values in logged]
        [['spectrum/age/other', 'spectrum/alpha/other'], ['spectrum/age/other', 'spectrum/alpha/other']]
        >>> 0 < logged[0]["spectrum/relative/other"] < logged[1]["spectrum/relative/other"]
        True

    Sources: HT-SR (Martin & Mahoney, JMLR 2021) and SETOL (arXiv 2507.17912) for the metrics; rounds, budget,
    sketches and the thresholds of warnings are ours.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        *,
        every: int = 500,
        metrics: Sequence[str] = METRICS,
        share: float = 0.01,
        path: str | os.PathLike[str] | None = None,
        log: Log | None = None,
        where: Filter | None = None,
        distributed: bool = True,
        **options: Any,
    ) -> None:
        metrics = metrics if isinstance(metrics, str) else tuple(metrics)
        _check(model, every, metrics, share)
        self.every, self.metrics, self.share = int(every), tuple(metrics), float(share)
        self._path = None if path is None else Path(path)
        if self._path is not None and not is_trajectory(self._path):
            raise UsageError(f"a trajectory is kept as .jsonl, not as {self._path.name}")
        self._own_log, self._wanted = log, as_filter(where, Filter(min_size=MIN_SIZE))
        self._options, self._distributed = {"bulk": True} | options, distributed
        make_options(**self._options)  # refuses what has no meaning
        self._rounds: Rounds | None = None
        self._steps, self._closed = 0, False
        self._log_fails = self._unknown_is_said = False
        if model is not None:
            self._look(model, 0)

    def step(self, steps: int | None = None) -> None:
        """Measure, if it is time to. Call it after each step of the optimizer, on every process.

        Args:
            steps: optimizer steps that the run has done; by default one more than at the last call.

        Raises:
            UsageError: there is no model.
            HtsrError: the trajectory file cannot be begun, or the ranks do not train one model.
        """
        if self._rounds is None:
            raise UsageError(
                "the monitor is closed, or its training has ended: make a new one"
                if self._closed
                else "the monitor of a plain loop needs its model: htsr.SpectralMonitor(model, …)"
            )
        done = self._steps + 1 if steps is None else steps
        self._take_up(self._rounds, done)
        self._steps = done
        if self._steps % self.every:
            return
        points = self._rounds.measure(self._steps)
        if not points:
            return
        if self._record is not None:
            self._record.append(points)
        values = self._rounds.values(self.metrics, self._steps)
        self._say_unknown(values)
        if self._own_log is None and self._log_of_run is not None:
            self._log_of_run(values, self._steps)
        elif self._own_log is not None and self._ranks.is_first:
            self._log(self._own_log, values)
        self._warn(self._watch.signs(points))

    def evaluated(self, loss: float) -> None:
        """Tell the monitor of a plain loop the loss of an evaluation, which bears on what α means.

        Args:
            loss: loss on data that the model does not train on.
        """
        if self._rounds is not None:
            self._warn(self._watch.evaluated(loss))

    def close(self) -> None:
        """End the monitoring, and say how many matrices were never measured for want of time."""
        rounds, self._rounds = self._rounds, None
        if rounds is None:
            return
        self._closed, self._log_of_run = True, None
        if self._record is not None:
            self._record.close()
        if rounds.unmeasured and self._ranks.is_first:
            logger.warning(
                "%d of %d matrices were not measured once: they did not fit in %g of the time of so short a training, "
                "and a larger share= measures more",
                rounds.unmeasured,
                len(rounds),
                self.share,
            )

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint of a plain loop has to hold: the number of steps, as ``steps``."""
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of a plain loop, before the first call of `step`.

        Args:
            state: what `state_dict` returned.
        """
        self._steps = state["steps"]
        self._looked_early = self._steps > 0

    def _begin(
        self, model: torch.nn.Module, steps: int, folder: str | Path | None = None, log: Log | None = None
    ) -> None:
        self._look(model, steps, folder, log)
        if self._rounds is not None:
            self._take_up(self._rounds, steps)

    def _look(
        self, model: torch.nn.Module, steps: int, folder: str | Path | None = None, log: Log | None = None
    ) -> None:
        """Look at the weights at the start, and whether there may be a file."""
        self._ranks = Ranks.running() if self._distributed else Ranks()
        options = make_options(model, **self._options)
        self._file = self._path or (None if folder is None else Path(folder) / FILE)
        self._ranks.of_first(lambda: self._file is not None and is_of_a_run(self._file))
        self._rounds = Rounds(model, self._wanted, options, Budget(self.share), self._ranks)
        self._record: Record | None = None
        self._log_of_run, self._watch, self._steps, self._ready = log, Watch(), steps, False
        self._closed = self._looked_early = False  # before the weights of the checkpoint were loaded

    def _take_up(self, rounds: Rounds, step: int) -> None:
        """When the number of steps before is known: open the file, and go on with it.

        Args:
            rounds: rounds of the run.
            step: step that the weights are of, as they are now.
        """
        if self._ready:
            return
        since = step if self._looked_early else self._steps
        if (earlier := self._ranks.of_first(lambda: self._open(rounds, since))) is not None:
            rounds.take_up(earlier.points, earlier.start)
        else:
            self._start_at(since, rounds)
        self._watch.began({name: start.stable_rank for name, start in rounds.start.items()})
        self._watch.signs(earlier.points if earlier is not None else ())  # they were said then
        self._ready = True

    def _start_at(self, step: int, rounds: Rounds) -> None:
        if self._looked_early:
            rounds.look_again()
        if self._steps and self._ranks.is_first:
            logger.warning(
                "this run is resumed at step %d without a trajectory file of it: relative is the change since step %d",
                self._steps,
                step,
            )
        self._ranks.of_first(lambda: self._keep(rounds))

    def _keep(self, rounds: Rounds) -> None:
        if self._record is not None:
            self._record.keep(rounds.start)

    def _open(self, rounds: Rounds, since: int) -> Earlier | None:
        if self._file is None:
            return None
        self._record = Record(self._file, rounds.label, rounds.options, self._steps, since, rounds.device, len(rounds))
        return self._record.earlier

    def _log(self, log: Log, values: dict[str, float]) -> None:
        """Log on the first process, which would leave the others waiting if it failed there."""
        try:
            log(values, self._steps)
        except Exception as error:
            if not self._log_fails:
                logger.warning("step %d: log failed, and the training goes on: %s", self._steps, reason_of(error))
            self._log_fails = True

    def _say_unknown(self, values: Mapping[str, float]) -> None:
        """Say once which metrics no matrix has, as where the options do not ask for them."""
        known = {key.split("/")[1] for key in values}
        unknown = [name for name in self.metrics if name not in known and name != "relative"]
        if unknown and not self._unknown_is_said and self._ranks.is_first:
            logger.warning("no matrix has a number for %s, which is not logged: see Options", ", ".join(unknown))
        self._unknown_is_said = True

    def _warn(self, signs: Sequence[Sign]) -> None:
        if self._ranks.is_first:
            for sign in signs:
                logger.warning("step %d: %s", self._steps, sign)


def _check(model: object, every: int, metrics: Sequence[str], share: float) -> None:
    if model is not None and not callable(getattr(model, "named_parameters", None)):
        raise UsageError(
            f"SpectralMonitor takes the model of a plain loop, and {type(model).__name__} is none; under a Trainer it "
            "takes nothing: Trainer(…, callbacks=[htsr.SpectralMonitor()])"
        )
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise UsageError(f"every is a number of steps, at least 1, not {every!r}")
    if isinstance(share, bool) or not isinstance(share, Real) or math.isnan(share) or share <= 0:
        raise UsageError(f"share is a part of the time of training such as 0.01, not {share!r}")
    if isinstance(metrics, str) or not all(name in (*NUMERIC, "relative") for name in metrics):
        raise UsageError(f"metrics are fields of LayerMetrics with numbers, or 'relative', not {metrics!r}")
