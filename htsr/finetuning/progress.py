"""What a run says while it goes on: sentences, a passing line on how far something is, and a line of training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Voice:
    """How a run speaks.

    Attributes:
        say: function that is told a sentence.
        show: function that is told how far something is, again and again: each word takes the place of the one before;
            None where nobody wants to know.
    """

    say: Say
    show: Say | None = None

    def stage(self, what: str, of: str) -> Callable[..., None]:
        """A function that is told how much of a stage is done, and shows it with the time left.

        Args:
            what: what is done in the stage.
            of: what is counted.

        Returns:
            The function of the number done, the number of all, and optionally the finished share of the work, which is
            else that of the numbers.

        Examples:
            >>> from htsr.finetuning.progress import Voice
            >>> shown = []
            >>> told = Voice(print, shown.append).stage("asking", "questions")
            >>> told(20, 20)
            >>> shown
            ['asking: 20/20 questions, 0:00 left']
        """
        started = time.monotonic()

        def told(done: int, total: int, fraction: float | None = None) -> None:
            if self.show is not None:
                share = done / total if fraction is None else fraction
                left = f", {clock((time.monotonic() - started) * (1 - share) / share)} left" if share > 0 else ""
                self.show(f"{what}: {done}/{total} {of}{left}")

        return told


def clock(seconds: float) -> str:
    """A time in `seconds` as people read it.

    Examples:
        >>> from htsr.finetuning.progress import clock
        >>> clock(7.4), clock(61), clock(7325)
        ('0:07', '1:01', '2:02:05')
    """
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class LastLog(TrainerCallback):
    """The loss of the last step is logged, too: a run of fewer steps than ``logging_steps`` has a course as well."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log at the last step, where steps are logged at all.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.
        """
        if state.global_step >= state.max_steps and args.logging_strategy == "steps":
            control.should_log = True


class TrainingLines(TrainerCallback):
    """One short line for each log of the loss; the Trainer writes all it logs, twenty keys with TRL's own.

    What is left out goes on to trackers and to ``trainer_state.json``, and to the log of htsr at the level INFO.

    Args:
        voice: voice of the run.
    """

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        self._started = self._logged = 0.0
        self._first = self._last = 0
        self._tokens: float | None = None
        self._evaluated: list[float] = []
        self._evaluating = 0.0
        self._ended = False

    def add_evaluation(self, loss: float) -> None:
        """Take note of the `loss` of a batch of held-out records."""
        self._evaluated.append(loss)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far an evaluation is; before training say the loss of the first batch at once.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks, its loader of held-out records among it.
        """
        done, loader = len(self._evaluated), kwargs["eval_dataloader"]
        if not done or not state.is_world_process_zero or not has_length(loader):
            return
        batches = len(loader)
        if done == 1:
            self._evaluating = time.monotonic()
            if state.global_step == 0 and batches > 1:
                self.voice.say(f"before training  loss {self._evaluated[0]:.4g} of the first held-out batch")
        elif self.voice.show is not None and not args.disable_tqdm:
            spent = time.monotonic() - self._evaluating
            left = clock(spent / (done - 1) * (batches - done))
            mean = sum(self._evaluated) / done
            self.voice.show(f"evaluating: {done}/{batches} batches, loss {mean:.4g}, {left} left")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an evaluation.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.
        """
        self._evaluated.clear()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count the time.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.
        """
        self._started = self._logged = time.monotonic()
        self._first = self._last = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the end.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.
        """
        self._ended = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out of the time what came before the first step.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.
        """
        if state.global_step == self._first:
            self._started = self._logged = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far the training is.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            kwargs: what else the Trainer passes to callbacks.
        """
        if self.voice.show is not None and not args.disable_tqdm:
            self.voice.show(f"training: {state.global_step}/{state.max_steps} steps, {self._left(state)} left")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Say the line.

        Args:
            args: arguments of the Trainer.
            state: state of the Trainer.
            control: control of the Trainer.
            logs: what is logged.
            kwargs: what else the Trainer passes to callbacks.
        """
        if logs is None or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.voice.say(self._line(logs, state))
        elif "eval_loss" in logs:
            step = f"step {state.global_step}/{state.max_steps}"
            when = "after training" if self._ended else step if state.global_step else "before training"
            self.voice.say(f"{when}  evaluation loss {logs['eval_loss']:.4g}")
        logger.info("step %d: %s", state.global_step, logs)

    def _line(self, logs: dict[str, Any], state: Any) -> str:
        now, step = time.monotonic(), state.global_step
        parts = [f"step {step}/{state.max_steps}", f"epoch {logs.get('epoch', 0):.2f}", f"loss {logs['loss']:.4g}"]
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.2e}")
        if "grad_norm" in logs:
            parts.append(f"gradient norm {logs['grad_norm']:.3g}")
        if step > self._last:
            seconds = (now - self._logged) / (step - self._last)
            parts.append(f"{seconds:.2f} s/step")
            tokens = logs.get("num_tokens")
            if tokens is not None and self._tokens is not None and now > self._logged:
                parts.append(f"{(tokens - self._tokens) / (now - self._logged):,.0f} tokens/s")
            self._tokens = tokens
            parts.append(f"{self._left(state)} left")
        self._logged, self._last = now, step
        return "  ".join(parts)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        spent = time.monotonic() - self._started
        return clock(spent / done * (state.max_steps - state.global_step)) if done else "?"
