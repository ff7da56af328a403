"""Which blocks of a transformer train now: layer-sampled training (LISA, OwLore alias OWS, MISA) and its relatives.

    sampler = LayerSampler(model, "owlore", scores=outliers, active=2, interval=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)    # all parameters
    sampler.attach(optimizer)                                     # after DDP, FSDP2 or accelerator.prepare
    # train as always

Every K optimizer steps γ blocks, or matrices of their size, are drawn without replacement; all others are frozen, their
gradients are gone at once, and their optimizer state is dropped, kept, or moved to host memory. Draw n is a function of
the seed, n and the probabilities alone, so all ranks draw the same blocks without a word between them. The sampler's
own state rides in the optimizer's.

Sources: LISA (arXiv 2403.17919), OwLore (arXiv 2405.18380; published as OWS in Findings of ACL 2025), Spectrum (arXiv
2406.06623), MISA (arXiv 2511.00056).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from htsr.arrays import Vector
from htsr.calibration.outliers import OWLORE_THRESHOLD
from htsr.errors import HtsrError, UsageError
from htsr.matrices.blocks import Blocks, find_blocks
from htsr.matrices.sharded import refuse_flat
from htsr.matrices.stored_tensors import clean_name
from htsr.training.sampling.coverage import Coverage, Tally
from htsr.training.sampling.draws import draws_of
from htsr.training.sampling.freezing import (
    HeldFlags,
    called_inside,
    insist_on_unused_parameters,
    is_held,
    set_up_anew,
    stop_input_gradients,
)
from htsr.training.sampling.gradient_norms import GradientNorms, after_backward, insist_on_whole_gradients
from htsr.training.sampling.members import Trainable, Unit, members_of, trainable, what_else_trains
from htsr.training.sampling.probabilities import Scores, Strategy
from htsr.training.sampling.states import FrozenState, MemberStates
from htsr.training.steps import scale_of_running_step, skipped_by_scaler

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Embedding: TypeAlias = Literal["freeze", "train", "lowrank", "sampled"]

_ATTACHED = ("_optimizers", "_parameters", "_states", "_flags", "_handles", "_stopped", "_stepped", "_placing")
_KEY = "layer_sampler"  # of the state in the optimizer's first group


class LayerSampler:
    """Draws the blocks that train, and freezes the others.

    Only parameters that are trainable when the sampler is made take part, so on a PEFT model it is the adapters that
    are sampled by block, and a block that was frozen before is left out of the draws. The optimizer must hold all of
    them, which `attach` insists on: one that took its view of the parameters while some were frozen would train nothing
    new (OptimalScale/LMFlow#726). After the first step of each interval the sampler makes sure that every drawn block
    has been updated.

    What ``embedding`` means, for the input embedding with all that comes before the first block, and for the head (one
    tensor where they are tied); the rest outside of the blocks (final norm, classifier) always trains:

    - ``freeze``, the default. The published methods train them in every step. At small vocabularies that is cheap; at
      LLaMA-3-8B (128k tokens) they are 71 % of all that LISA trains, with gradients and two Adam moments each. Nothing
      in a fine-tuning set asks for new token vectors as a rule (LoRA's default leaves them alone, too), and with a
      frozen embedding backward ends at the lowest active block instead of running through all of them.
    - ``train``: as the papers do. To be chosen for new tokens, new languages, or to repeat published numbers.
    - ``lowrank``: as ``train``; it says that the optimizer is to hold them at low rank, as `htsr.low_rank_groups` does
      with ``embeddings=True``.
    - ``sampled``: they are one more member of the draw, with the mean probability of the blocks.

    With ``unit="matrix"`` the members are the matrices of the blocks (MISA): each with its bias, adapters of one matrix
    together, norms with the first matrix of their block. As in the paper, what trains is bounded by a number of
    parameters, that of γ blocks of mean size: matrices are taken in the order in which they are drawn until the next
    does not fit. Memory is about that of γ blocks; backward runs through all blocks above the lowest drawn matrix.

    With DDP give the wrapper ``find_unused_parameters=True``: it waits for the gradients of all parameters otherwise.
    FSDP2 follows the switching of ``requires_grad`` by itself if `fully_shard` is called on each block.

    Args:
        model: any transformers encoder or decoder, wrapped or not; of a vision-language model the language model's
            blocks, of a sequence-to-sequence model those of encoder and decoder, as `find_blocks` finds them. What
            trains beside them, such as a vision tower, is named in the log.
        strategy: ``owlore`` and ``reverse`` (outliers), ``uniform`` (LISA), ``alpha``, ``erg`` and ``snr`` (all three
            by an analysis), ``increase``, ``decrease`` (with depth), ``gradient_norm`` (MISA: by the gradients that
            members have had, before clipping, for gradients that are kept, and not sharded), or the probabilities
            themselves; see `block_probabilities` and `matrix_probabilities`.
        scores: the `Outliers` or the `Analysis` that the strategy needs.
        active: number γ of blocks that train at a time, or of blocks whose parameters the drawn matrices have.
        interval: number K of optimizer steps between draws.
        top: whether the γ most probable blocks train for good, instead of sampling.
        embedding: what becomes of embedding and head, see above.
        frozen_state: what becomes of the optimizer state of a block that is frozen: ``drop`` (starts anew next time),
            ``keep`` (memory grows to that of full training), ``offload`` (to host memory).
        seed: seed of the draws.
        threshold: τ of the outlier distribution.
        blocks: name of the list of blocks to sample, or several, in place of what `find_blocks` takes.
        unit: what is drawn: a ``block``, or a ``matrix``, see above.

    Attributes:
        names: names of the members of the draw: blocks or matrices, and with ``sampled`` embedding and head at the end.
        unit: what is drawn.

    Raises:
        UsageError: an argument has no meaning for this model.
        SourceError: the model has no blocks.

    Examples:
        Of four blocks one trains at a time, and the next is drawn after two steps:

        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        >>> sampler = htsr.LayerSampler(model, "uniform", active=1, interval=2, seed=0)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> sampler.attach(optimizer)
        >>> for step in range(4):
        ...     print(sampler.active, len(optimizer.state))
        ...     model(torch.randn(3, 1, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        (0,) 0
        (0,) 12
        (2,) 0
        (2,) 12
    """

    _optimizers: tuple[torch.optim.Optimizer, ...]
    _parameters: list[list[torch.nn.Parameter]]
    _states: MemberStates
    _flags: HeldFlags
    _handles: list[Any]
    _stopped: list[Any]
    _stepped: set[int]  # optimizers since the last step
    _placing: list[Callable[[], None]]  # functions that put what is drawn on the device, and the rest elsewhere

    def __init__(
        self,
        model: torch.nn.Module,
        strategy: Strategy | Sequence[float] = "uniform",
        *,
        scores: Scores | None = None,
        active: int = 2,
        interval: int = 50,
        top: bool = False,
        embedding: Embedding = "freeze",
        frozen_state: FrozenState = "drop",
        seed: int = 0,
        threshold: float = OWLORE_THRESHOLD,
        blocks: str | Sequence[str] | None = None,
        unit: Unit = "block",
    ) -> None:
        if embedding not in get_args(Embedding) or frozen_state not in get_args(FrozenState):
            known = f"{', '.join(get_args(Embedding))}, and {', '.join(get_args(FrozenState))}"
            raise UsageError(f"embedding {embedding!r} and frozen_state {frozen_state!r} are among {known}")
        if interval < 1:
            raise UsageError(f"interval is a number of optimizer steps, not {interval}")
        if unit not in get_args(Unit):
            raise UsageError(f"unknown unit {unit!r}: block or matrix")
        self._blocks = find_blocks(model, blocks)
        self._trainable = trainable(model, self._blocks)
        self._left_out = _without_members(model, self._blocks, self._trainable)
        self._embedding = self._trainable.embedding
        extra = self._embedding if embedding == "sampled" else []
        members = members_of(model, self._blocks, self._trainable, unit, extra)
        self.names, self._members = tuple(members), list(members.values())
        by_gradients = isinstance(strategy, str) and strategy == "gradient_norm"  # with uniform draws at first
        weights: Strategy | Sequence[float] = "uniform" if by_gradients else strategy
        self._draws = draws_of(
            model, self._blocks, members, unit, (weights, scores, threshold), active=active, seed=seed, top=top
        )
        self.model, self.interval, self.top, self.unit = model, interval, top, unit
        self.embedding, self.frozen_state = embedding, frozen_state
        if by_gradients and top:
            raise UsageError("top takes the most probable for good, and those of gradient_norm change: leave one out")
        self._norms = GradientNorms(len(self.names)) if by_gradients else None
        self._expected: Vector = np.zeros(len(self.names))  # intervals to expect, where probabilities change
        self._begin()
        self._steps, self._active, self._loading = 0, self.draw(0), False
        self._tally = Tally(np.zeros(len(self.names), dtype=np.int64))

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the members that train now, ascending."""
        return self._active

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._steps

    @property
    def seed(self) -> int:
        """Seed of the draws."""
        return self._draws.seed

    @property
    def probabilities(self) -> Vector:
        """(members,) float64 probabilities with the sum 1, as they are now."""
        return self._draws.probabilities

    def draw(self, number: int) -> tuple[int, ...]:
        """The members of interval `number`, ascending: a function of seed, number and present probabilities alone.

        Args:
            number: number of the interval, counted from 0.
        """
        return self._draws.draw(number)

    @property
    def blocks(self) -> Blocks:
        """The blocks of the model, those that have been drawn and the others."""
        return self._blocks

    def drawn(self) -> list[torch.nn.Parameter]:
        """The parameters of the members that train now."""
        by_name = self._by_name()
        return [by_name[name] for index in self._active for name in self._members[index]]

    def _by_name(self) -> dict[str, torch.nn.Parameter]:
        return {clean_name(name): parameter for name, parameter in self.model.named_parameters()}

    def before_draws(self, place: Callable[[], None]) -> Callable[[], None]:
        """Have a function called whenever other members have been drawn, before they are thawed and frozen.

        Args:
            place: function that puts the parameters of `drawn` on the device where they train, and others elsewhere.

        Returns:
            A function that ends it.
        """
        self._placing.append(place)
        return partial(self._placing.remove, place)

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Begin: freeze what does not train now, and count the optimizers' steps from here on.

        Call it after the model was wrapped (DDP, FSDP2, `accelerator.prepare`) and, when resuming, at any time: the
        state that a loaded optimizer brings is taken up before as after.

        From then on frozen blocks stay frozen whoever sets ``requires_grad``, and a step raises `HtsrError` where a
        block that is to train got no gradient.

        Args:
            *optimizers: optimizers of all parameters of the model that train, also ones that accelerate has wrapped:
                one, or several with a part each (Muon for matrices, AdamW for the rest). A step is counted when each of
                them has made one. A second call with the same does nothing.

        Raises:
            UsageError: the sampler has other optimizers already, the optimizers lack parameters of the blocks, DDP
                would wait for frozen ones, FSDP1 has flattened them, sharded state is to be offloaded, or gradients
                are sharded or not kept, by which the draws go.
        """
        given = tuple(getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers)  # accelerate's wrapper
        if given and [id(one) for one in given] == [id(one) for one in self._optimizers]:
            return
        refuse_flat(self.model)
        if self._optimizers:
            raise UsageError("this sampler is attached to an optimizer already; detach it, or make another")
        by_name = self._by_name()
        parameters = [[by_name[name] for name in names] for names in self._members]
        held = {id(parameter) for one in given for group in one.param_groups for parameter in group["params"]}
        for name, members in zip(self.names, parameters, strict=True):
            if any(id(parameter) not in held for parameter in members):
                raise UsageError(
                    f"the optimizer lacks parameters of {name}: give it all of the (wrapped) model's parameters, "
                    "before anything is frozen"
                )
        insist_on_unused_parameters(self.model)
        if self._norms is not None:
            insist_on_whole_gradients(given, parameters)
        self._optimizers, self._parameters = given, parameters
        self._states = MemberStates(self.frozen_state, given, parameters)
        if self.embedding == "freeze":
            for name in self._embedding:
                self._states.drop(by_name[name])
                self._freeze(by_name[name])
            self._states.send_away(by_name[name] for name in self._embedding)
            self._stopped = stop_input_gradients(self.model)
        for optimizer in given:
            self._watch(optimizer)
        if self._norms is not None:
            own = [parameter.requires_grad_() for members in parameters for parameter in members]
            self._handles += after_backward(own, self._see_gradients)
        if _KEY in given[0].param_groups[0]:
            self.load_state_dict(given[0].param_groups[0][_KEY])
        else:
            self._apply()
        self._hold()
        shown = ", ".join(self.names) if len(self.names) < 4 else f"{self.names[0]} … {self.names[-1]}"
        kind = "blocks" if self.unit == "block" else "matrices"
        logger.info("%d of %d %s train at a time: %s", len(self._active), len(self.names), kind, shown)
        if sentence := what_else_trains(self.model, self._blocks, self._trainable):
            logger.warning(sentence)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, which stand where this one does and are attached to nothing: hooks are not copied."""
        state = self.__dict__.copy()
        for name in _ATTACHED:
            del state[name]
        if self._optimizers:
            logger.warning(
                "the copy of a LayerSampler samples nothing until it is attached: copy model, sampler and optimizer in "
                "one deepcopy, and call attach with the copied optimizer"
            )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._optimizers, self._parameters = (), []
        self._flags, self._handles, self._stopped = HeldFlags(), [], []
        self._stepped, self._placing, self._states = set(), [], MemberStates(self.frozen_state)

    def detach(self) -> None:
        """End: all that took part trains again, and the optimizers and the model are as they were before `attach`.

        State that was moved to host memory comes back. The sampler can be attached again, and goes on where it stood.
        """
        self._states.fetch(range(len(self._parameters)))
        self._states.arrive()
        for optimizer in self._optimizers:
            optimizer.param_groups[0].pop(_KEY, None)
        for handle in self._handles:
            handle.remove()
        for module in self._stopped:
            module.enable_input_require_grads()  # type: ignore[operator]
        self._flags.release()
        self._handles, self._stopped, self._optimizers, self._parameters = [], [], (), []
        self._states = MemberStates(self.frozen_state)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; also in the optimizer's state dict under ``layer_sampler`` of the first group."""
        return {
            "seed": self.seed,
            "steps": self._steps,
            "active": list(self._active),
            "counts": [int(count) for count in self._tally.counts],
            "moved": sorted(self._tally.moved),
            **({"left_out": list(self._left_out)} if self._left_out else {}),
            **({} if self._norms is None else {"norms": self._norms.state_dict(), "expected": self._expected.tolist()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stood.

        Args:
            state: what `state_dict` returned; its seed replaces the sampler's own.

        Raises:
            UsageError: the state is that of no sampler, of one with another number of members, or with other draws.
        """
        if not {"seed", "steps", "active", "counts"} <= set(state) or len(state["counts"]) != len(self.names):
            kind = "blocks" if self.unit == "block" else "matrices"
            raise UsageError(
                f"the checkpoint has no state of a sampler over {len(self.names)} {kind}: load it before the sampler "
                "is attached, and the draws begin anew"
            )
        if list(state.get("left_out", ())) != list(self._left_out):
            raise UsageError("the checkpoint has the state of a sampler that draws other blocks: freeze the same ones")
        if (self._norms is None) != ("norms" not in state):
            which = "draws by gradients" if self._norms is None else "draws otherwise"
            raise UsageError(f"the checkpoint has the state of a sampler that {which}: take its strategy")
        if self._norms is not None:
            self._norms.load_state_dict(state["norms"])
            self._expected = np.array(state["expected"], dtype=np.float64)
            self._draws.probabilities = self._norms.probabilities()
        self._draws.seed, self._steps = state["seed"], state["steps"]
        self._active = tuple(state["active"])
        begun = self._active if self._steps % self.interval else ()
        moved = set(state.get("moved", begun))  # 0.1.0 kept no such list
        self._tally = Tally(np.array(state["counts"], dtype=np.int64), moved)
        if self._optimizers:
            self._apply()

    @contextmanager
    def loading(self, steps: int) -> Iterator[None]:
        """A context in which a checkpoint is loaded into sharded parameters, after `attach`.

        torch loads the state of those parameters only that require gradients, and insists on one for each of them.

        Args:
            steps: optimizer steps that were done when the checkpoint was saved.
        """
        now, before = steps // self.interval, max(steps - 1, 0) // self.interval
        if self.frozen_state == "drop":
            known = set(self.draw(now)) & set(self.draw(before))
        else:
            known = {member for number in range(before + 1) for member in self.draw(number)}
        for index, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(index in known)
        self._loading = True  # torch makes a step without gradients, so that there is state to be filled
        try:
            yield
        finally:
            self._loading = False
            self._apply()

    def coverage(self) -> tuple[Coverage, ...]:
        """Number of intervals in which each member was updated so far, and to expect; in the order of `names`.

        Counted is what had a gradient when an optimizer made a step, drawn or not.
        """
        expected = self._expected if self._steps % self.interval == 0 else self._expected + self._draws.inclusion()
        if self._norms is None:
            expected = self._draws.inclusion() * -(-self._steps // self.interval)
        return self._tally.rows(self.names, self.probabilities, expected)

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        if getattr(optimizer, "gradients", None) != "update":  # which steps during backward, and refuses such hooks
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._before_step()))
        self._handles.append(optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(stepped)))
        self._handles.append(optimizer.register_load_state_dict_pre_hook(self._before_load))
        self._handles.append(optimizer.register_load_state_dict_post_hook(self._after_load))
        self._handles.append(optimizer.register_state_dict_pre_hook(lambda _: self._states.arrive()))

    def _before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        active = state_dict["param_groups"][0].get(_KEY, {}).get("active")
        self._states.arrive()
        return None if active is None else self._states.hold_back(optimizer, state_dict, active)

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        self._states.give_back(optimizer)
        self.load_state_dict(optimizer.param_groups[0].get(_KEY, {}))

    def _before_step(self) -> None:
        self._states.arrive()
        if not self._loading:
            self._flags.restore()
            self._flags.drop_gradients()

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._loading or skipped_by_scaler(optimizer):
            return
        self._tally.add([i for i, own in enumerate(self._parameters) if any(p.grad is not None for p in own)])
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._stepped.clear()
            self._count_step()

    def _count_step(self) -> None:
        if self._steps % self.interval == 0:
            self._insist_on_updates()
        self._steps += 1
        if self._norms is not None:
            if self._norms.has_seen:
                self._norms.note(scale_of_running_step())
            else:  # gradients that came from no backward pass
                self._see_gradients()
                self._norms.note()
        if self._steps % self.interval == 0:
            if self._norms is not None:
                self._expected = self._expected + self._draws.inclusion()
                self._norms.close()
                self._draws.probabilities = self._norms.probabilities()
            before, self._active = self._active, self.draw(self._steps // self.interval)
            self._tally.begin()
            logger.info("step %d: training %s", self._steps, ", ".join(self.names[i] for i in self._active))
            self._apply()
            set_up_anew(self.model, {name for i in set(self._active) - set(before) for name in self._members[i]})
        else:
            self._write_state()

    def _see_gradients(self) -> None:
        if self._norms is not None:
            self._norms.see(self._parameters, self._active)

    def _apply(self) -> None:
        frozen = [p for index, own in enumerate(self._parameters) if index not in self._active for p in own]
        for parameter in frozen:
            self._states.drop(parameter)  # while the weight is where its state is, of which some may go into it
        for place in self._placing:
            place()
        for parameter in frozen:
            self._freeze(parameter)
        self._states.send_away(frozen)
        for index in self._active:
            for parameter in self._parameters[index]:
                self._flags.want(parameter, True)
        self._states.fetch(self._active)
        self._write_state()

    def _freeze(self, parameter: torch.nn.Parameter) -> None:
        self._flags.want(parameter, False)
        parameter.grad = None

    def _hold(self) -> None:
        """Set all flags before the forward of the model, and a block's before that of the block and of its parts.

        The parts, since checkpointing may recompute the inside of a block without calling the block.
        """
        self._flags.hold(self.model, self._flags.wanted)
        by_name = self._by_name()
        for module, names in zip(self._blocks.modules, self._trainable.blocks, strict=True):
            parameters = [by_name[name] for name in names]
            for part in (module, *called_inside(module)):
                self._flags.hold(part, parameters)

    def _write_state(self) -> None:
        for optimizer in self._optimizers:
            optimizer.param_groups[0][_KEY] = self.state_dict()

    def _insist_on_updates(self) -> None:
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in held for parameters in self._parameters for parameter in parameters):
            raise UsageError(
                "the optimizer holds other parameters than when the sampler was attached: DeepSpeed's ZeRO and FSDP1 "
                "flatten them, and no block can be trained alone; take DDP or FSDP2"
            )
        for index in self._active:
            if index not in self._tally.moved:
                raise HtsrError(
                    f"{self.names[index]} is to train and the optimizer did not update it: it got no gradient. A "
                    "wrapper may have been made while it was frozen, or reentrant checkpointing needs "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )


def _without_members(model: torch.nn.Module, blocks: Blocks, found: Trainable) -> tuple[int, ...]:
    """Indices of the blocks in which nothing trains, said in the log.

    Raises:
        UsageError: another sampler has frozen them.
    """
    indices = tuple(index for index, names in enumerate(found.blocks) if not names)
    if not indices:
        return ()
    shown = ", ".join(blocks.names[index] for index in indices)
    if is_held(model):
        raise UsageError(
            f"{blocks.names[indices[0]]} is frozen by a LayerSampler that was attached to this model, or to one that "
            "it is a copy of: detach that sampler, or call model.requires_grad_(True), before another is made"
        )
    logger.warning("left out of the draws, since nothing in them trains: %s", shown)
    return indices
