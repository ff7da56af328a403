import io
import logging
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
from htsr_cli.live import Live
from htsr_cli.output import Words

from htsr.finetuning.progress import TrainingLines, Voice
from tests.transformer import llama


@pytest.fixture
def clocked(monkeypatch):
    """The time, which passes as the test says."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


@pytest.mark.parametrize("terminal", [True, False])
def test_a_passing_line_is_overwritten_on_a_terminal_and_rare_in_a_log(monkeypatch, clocked, terminal):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    live = Live(Words(quiet=False, verbose=False))
    for second in range(65):
        clocked.seconds = 100.0 + second
        live.show(f"{second} s")
    live.say("done")
    live.clear()
    if terminal:  # each word takes the place of the one before, and the sentence that of the last
        assert stderr.getvalue() == "".join(f"\r\x1b[K{second} s" for second in range(1, 65)) + "\r\x1b[Kdone\n"
    else:
        assert stderr.getvalue() == "30 s\n60 s\ndone\n"


def test_a_stage_says_the_time_that_is_left(clocked):
    shown = []
    told = Voice(print, shown.append).stage("outliers", "records")
    clocked.seconds += 30
    told(16, 64)
    told(16, 64, 0.5)  # by work, where the numbers are not it
    assert shown == ["outliers: 16/64 records, 1:30 left", "outliers: 16/64 records, 0:30 left"]


def test_the_line_of_a_log_has_the_time_of_its_own_steps(clocked):
    said, shown = [], []
    lines = TrainingLines(Voice(said.append, shown.append))
    state = SimpleNamespace(global_step=10, max_steps=40, is_world_process_zero=True)  # a run that goes on
    args = SimpleNamespace(disable_tqdm=False)
    lines.on_train_begin(args, state, None)
    clocked.seconds += 1000  # an evaluation before the first step is no part of a step
    lines.on_step_begin(args, state, None)
    for step, seconds, tokens in ((12, 4, 600), (20, 8, 1400)):
        clocked.seconds += seconds
        state.global_step = step
        lines.on_step_end(args, state, None)
        log = {"loss": 3.14159, "learning_rate": 2e-4, "grad_norm": 1.5, "entropy": 2.0, "epoch": 0.5}
        lines.on_log(args, state, None, log | {"num_tokens": tokens})
    start = "  epoch 0.50  loss 3.142  lr 2.00e-04  gradient norm 1.5  "
    assert said == [
        f"step 12/40{start}2.00 s/step  0:56 left",
        f"step 20/40{start}1.00 s/step  100 tokens/s  0:24 left",
    ]
    assert shown == ["training: 12/40 steps, 0:56 left", "training: 20/40 steps, 0:24 left"]


@pytest.mark.parametrize("verbose", [False, True])
def test_what_says_nothing_to_who_runs_a_command_is_left_out_unless_all_is_asked_for(caplog, verbose):
    theirs = logging.getLogger("transformers.trainer_utils")
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patched.setattr(logging.getLogger("transformers"), "propagate", True)
        with Words(quiet=False, verbose=verbose).of_others():
            for text in ("`is_gradient_checkpointing` is deprecated and …", "what a user should know"):
                warnings.warn(text, FutureWarning, stacklevel=1)
            theirs.warning("The tokenizer has new PAD/BOS/EOS tokens that differ: %s", {})
            theirs.warning("something else")
    assert len(warned) == 1 + verbose
    assert len(set(caplog.messages)) == 1 + verbose
    assert not theirs.filters


def test_a_tied_head_is_not_missing_from_a_checkpoint(monkeypatch):
    from torch.nn.modules.module import _IncompatibleKeys
    from transformers import trainer as theirs

    from htsr.finetuning.trainer import FinetuneTrainer

    said = []
    monkeypatch.setattr(theirs.logger, "warning", said.append)
    trainer = FinetuneTrainer.__new__(FinetuneTrainer)
    for tied in (True, False):
        trainer.model = llama(1, tie_word_embeddings=tied)
        trainer._issue_warnings_after_load(_IncompatibleKeys(["lm_head.weight"], []))
    trainer._issue_warnings_after_load(_IncompatibleKeys([], ["more.weight"]))
    assert [sentence.partition(":")[2] for sentence in said] == [" ['lm_head.weight'].", " ['more.weight']."]
