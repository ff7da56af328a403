"""AdamW whose states, and if wanted gradients, live in low-rank subspaces of the gradients (GaLore, arXiv 2403.03507).

    optimizer = LowRankAdamW(low_rank_groups(model, rank=128), lr=1e-3)

For each matrix W with gradient G and, as D, Adam's direction for R:

    R = G·P  or  Pᵀ·G        W ← (1 - lr·weight_decay)·W - lr·scale·(D·Pᵀ  or  P·D)

P spans the top singular subspace of the gradient at the steps 0, T, 2T … (`htsr.training.lowrank.subspace`). Or R tells
only how far to go along the whole gradient (APOLLO, `htsr.training.lowrank.scaling`). Parameters without a rank get
torch.optim.AdamW's update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from htsr.errors import UsageError
from htsr.training.lowrank import sealing
from htsr.training.lowrank.groups import check_group, fill_group, told
from htsr.training.lowrank.moments import StateDtype
from htsr.training.lowrank.projection import coordinates, insist_on_finite, is_due, refuse_capture, without_autocast
from htsr.training.lowrank.released import Gradients, ReleasedGradient, release_in_backward
from htsr.training.lowrank.rounding import STATE, Rounding, settle
from htsr.training.lowrank.scaling import ScaledBy
from htsr.training.lowrank.subspace import Method, is_distributed, local, projects_right
from htsr.training.lowrank.update import Constants, Group, Pending, in_batches, noise_seed, update


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW on gradients in low-rank subspaces.

    A group with the key ``rank`` holds matrices, or stacks (E, m, n) of them, and is trained in subspaces; a group
    without is plain AdamW. All options but `gradients` and `process_group` can differ by group and are part of the
    state dict, as are step, projector (`projector`: (min(m, n), r), of a stack (E, min(m, n), r)) and moments, all
    plain tensors: it loads with ``torch.load(weights_only=True)``, and a resumed run repeats the uninterrupted one bit
    for bit.

    With exact SVD and kept moments the update is that of galore-torch's AdamW, but that weights decay before the update
    and eps is added after the bias correction, both as in torch.optim.AdamW. Wide parameters without a rank are
    those of torch.optim.AdamW, bit for bit in float32.

    A step waits for a device where a subspace is due, and at no other time. It cannot be captured in a CUDA graph.

    Parameters may be DTensors (FSDP2, tensor parallel): a gradient is gathered, one matrix at a time, when its
    projector is computed, and projected shard by shard otherwise; moments are sharded where the matrix side that they
    keep is. Under DDP every process computes the same.

    Weights in bfloat16 or float16 are updated in float32 and rounded once, as `rounding` says. Rounded to nearest, as
    torch.optim.AdamW on such weights rounds, an update below half a unit in the last place is lost at every step.
    Replicas round alike, and a resumed run rounds as the uninterrupted one.

    Args:
        params: parameters or groups, as from `low_rank_groups`; named ones, as torch takes them, have their names in
            refusals, and others their number in the order of the groups.
        lr: learning rate, as in torch.optim.AdamW.
        betas: decay rates of the two moments.
        eps: number that is added to the root of the second moment, after its bias correction.
        weight_decay: decoupled weight decay, W ← (1 - lr·weight_decay)·W.
        scale: factor of the low-rank updates, α in GaLore's paper, which takes 0.25: here no more than a factor of
            their learning rate, without that of the decay. None is 1, and √128 where `scaled_by` is ``tensor``.
        refresh_every: optimizer steps from one projector to the next, T in the paper.
        method: method of the projector: ``randomized`` subspace iteration, exact ``svd``, or, under `scaled_by`, a
            ``random`` projection, which is made of its seed at each step and not stored. None is ``random`` under
            `scaled_by`, and ``randomized`` otherwise.
        moments: what becomes of the moments at a refresh: ``keep`` them as they are (the paper) or ``rotate`` them into
            the new subspace.
        state_dtype: dtype of the moments: ``float32``, ``bfloat16``, or ``8bit`` (bitsandbytes). The projector has the
            gradient's dtype.
        seed: seed of the randomised method and of the rounding; their numbers are functions of seed, parameter and
            step, and of the number of states that were dropped before (``drops`` in each group).
        gradients: what becomes of the gradients: ``keep`` them until the caller drops them, as torch does; ``project``
            each low-rank matrix's gradient as soon as backward has it and add it up in the subspace until `step`, so
            that no full gradient outlives its matrix and gradients accumulate at the size of one moment; ``update``
            each parameter as soon as backward has its gradient, so that none is kept: one backward is one step, after
            which `step` or `zero_grad` is called. The sum of projected gradients is the projected sum, up to rounding;
            at a refresh step the subspace is that of the first backward since the last step. ``parameter.grad`` is a
            `ReleasedGradient` then: under ``project`` torch.nn.utils.clip_grad_norm_ clips it as `clip_grad_norm_`
            does, and whatever would pass over it in silence is refused (a GradScaler, DDP; under ``update`` clipping
            and accumulation, too).
        process_group: processes with copies of the model, over which the optimizer averages what ``project`` and
            ``update`` release too early for DDP: run backward on the bare module or under ``no_sync()``.
        scaled_by: None for GaLore; ``channel`` or ``tensor`` for APOLLO: the update is the whole gradient times Adam's
            ‖D‖/‖R‖ of each channel (APOLLO) or of the matrix (APOLLO-Mini). What None stands for in `method` and
            `scale` is the paper's (the authors' code has the square of our scale, 1 and 128); the rank, which each
            group names, is there a quarter of the smaller side or 256, and for ``tensor`` 1. Norms are of each matrix
            of a stack. `gradients` are kept or used up, since the whole gradient is needed.
        rounding: what becomes of that part of a weight which bfloat16 or float16 cannot hold. ``stochastic`` draws one
            of the two neighbours, so that the expectation of the weight is what was computed, and takes no memory;
            ``kahan`` adds it to the next update (2 bytes a weight, ``compensation`` in the state); ``master`` keeps the
            weight in float32 (4 bytes, ``master``); ``nearest`` loses it. Without effect on wider weights.

    Raises:
        UsageError: an option has no meaning, a group with a rank holds anything but matrices, or gradients that
            ``project`` drops are to be scaled.
        MissingDependencyError: at the first step, bitsandbytes, which ``8bit`` needs, is not installed.

    Examples:
        A matrix of 16 × 16 has moments of 16 × 4:

        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> optimizer = htsr.LowRankAdamW(htsr.low_rank_groups(model, rank=4), lr=1e-3)
        >>> model(torch.randn(3, 1, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> W = model.layers[0].self_attn.out_proj.weight
        >>> {name: tuple(value.shape) for name, value in optimizer.state[W].items()}
        {'projector': (16, 4), 'step': (), 'exp_avg': (16, 4), 'exp_avg_sq': (16, 4)}

    Source: GaLore (arXiv 2403.03507), algorithm 2; APOLLO (arXiv 2412.05270), algorithm 1; AdamW (arXiv 1711.05101),
    algorithm 2.
    """

    _own_defaults: Group  # options of a subclass
    _hooked: set[Tensor]
    _places: dict[Tensor, tuple[Group, int]]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float | None = None,
        refresh_every: int = 200,
        method: Method | None = None,
        moments: Literal["keep", "rotate"] = "keep",
        state_dtype: StateDtype = "float32",
        seed: int = 0,
        gradients: Gradients = "keep",
        process_group: ProcessGroup | None = None,
        rounding: Rounding = "stochastic",
        scaled_by: ScaledBy | None = None,
    ) -> None:
        if gradients not in ("keep", "project", "update"):
            raise UsageError(f"unknown gradients {gradients!r}: keep, project or update")
        if process_group is not None and gradients == "keep":
            raise UsageError("process_group is for gradients='project' or 'update'; kept gradients are averaged by DDP")
        self.gradients = gradients
        self.process_group = process_group
        self._begin()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            "scale": scale,
            "refresh_every": refresh_every,
            "method": method,
            "moments": moments,
            "state_dtype": state_dtype,
            "seed": seed,
            "rounding": rounding,
            "scaled_by": scaled_by,
            "drops": 0,  # states that were dropped, see `noise_seed`
        }
        super().__init__(params, defaults | getattr(self, "_own_defaults", {}))

    def add_param_group(self, param_group: Group) -> None:
        """Add a group.

        Args:
            param_group: group as torch takes it; with the key ``rank`` all of its parameters are matrices.

        Raises:
            UsageError: an option has no meaning, or a group with a rank holds anything but matrices.
        """
        super().add_param_group(param_group)
        fill_group(self.param_groups[-1])
        check_group(self.param_groups[-1])
        self._places.clear()
        self._hook()

    @torch._disable_dynamo  # type: ignore[attr-defined,untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: function that evaluates the model again, as in torch.

        Returns:
            What the closure returns; None without one.

        Raises:
            HtsrError: a gradient has NaN or Inf where a projector is due.
            UsageError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_capture()
        pending = self._pending()
        with without_autocast(one.parameter for one in pending):
            self._check(pending)
            self._update(map(self._projected, pending))
        self._end_step()
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of at most `max_norm`; returns the norm before.

        Call it between backward and `step`. It scales what stands in ``grad``, as torch's does, and keeps nothing else.
        The norm is that of what the optimizer will use: ‖R‖_F for low-rank matrices, which is ‖G‖_F less the part
        outside the subspace, ‖G‖_F for the others and for those that are scaled, over all parameters and processes.
        ``torch.nn.utils.clip_grad_norm_`` does the same under ``gradients="project"``; under ``keep`` its norm is that
        of the whole gradients.

        Args:
            max_norm: the largest norm that is left as it is.

        Returns:
            The norm before, a scalar in float32 at least; 0 where there is no gradient.

        Raises:
            HtsrError: a gradient has NaN or Inf where a projector is due.
            UsageError: there is no moment at which all gradients are known, with ``gradients="update"``.
        """
        if self.gradients == "update":
            raise UsageError("a global norm cannot be known while updating during backward; take gradients='project'")
        kept, norms = list[Tensor](), list[Tensor]()
        pending = self._pending(steps=False)
        with without_autocast(one.parameter for one in pending):
            self._check(pending)
            for one in pending:
                R = one.R if _is_scaled(one.group) else self._projected(one, steps=False).R
                kept.append(R if isinstance(one.R, ReleasedGradient) else one.R)
                norms.append(torch.linalg.vector_norm(R, dtype=torch.promote_types(R.dtype, torch.float32)))
        if not norms:
            return torch.zeros(())
        norms = [norm.full_tensor() if is_distributed(norm) else norm for norm in norms]  # type: ignore[attr-defined]
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in kept:
            local(gradient).mul_(factor.to(gradient.device, gradient.dtype))
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those in subspaces too.

        Args:
            set_to_none: whether gradients become None, as in torch; those in a subspace are dropped in either case.
        """
        for _, parameter, _ in self._members():
            if isinstance(parameter.grad, ReleasedGradient):
                parameter.grad = None
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but keep tensors in their saved dtype; torch casts them to the parameter's.

        Args:
            state_dict: state dict of an optimizer with the same groups.
        """
        with sealing.sealed(self):
            super().load_state_dict(state_dict)
        self._places.clear()

    @torch.no_grad()
    def drop_state(self, parameter: Tensor) -> None:
        """Forget the state of a parameter that trains no more for now, as `LayerSampler` does.

        What ``kahan`` or ``master`` have kept of it is put into the weight, rounded stochastically, so that it is not
        lost on average.

        Args:
            parameter: parameter of any shape, with a state or without.
        """
        state = self.state.pop(parameter, None)
        if not state:
            return
        if any(name in state for name in STATE.values()):
            group, number = self._place(parameter)
            settle(parameter, state, noise_seed("settled", group, number, int(state["step"])))
        for group in self.param_groups:  # all, so that the number survives when groups are split or joined
            group["drops"] += 1

    def take_up(self, parameter: Tensor, released: ReleasedGradient, G: Tensor) -> None:
        """Take a full gradient into its subspace, or use it up, during backward; `ReleasedGradient` calls it.

        Args:
            parameter: parameter of the optimizer, of any shape.
            released: what stands in its ``grad``.
            G: gradient in the parameter's shape.

        Raises:
            HtsrError: the gradient has NaN or Inf where a projector is due.
            UsageError: ``update`` has had a gradient of this parameter since the last step, or there are step hooks.
        """
        if parameter.is_cuda:
            refuse_capture()
        group, index = self._place(parameter)
        one = self._one(group, parameter, index, G)
        with without_autocast([parameter]):
            if self.gradients == "project":
                first = released.spent or "projector" not in one.state  # backward of the step
                anew = first and self._is_due(one)
                R = self._coordinates(one, anew=anew, checked=False)
                released.R = R if released.spent or released.R is None else released.R.add_(R)
            else:
                if not released.spent:
                    raise UsageError(
                        "gradients='update' takes one backward a step, and this is the second since step or zero_grad "
                        "was called: take gradients='project' to accumulate gradients"
                    )
                if self._optimizer_step_pre_hooks:
                    raise UsageError("step hooks do not act on updates during backward; take gradients='project'")
                one = self._projected(one)
                released.used = torch.linalg.vector_norm(one.R if one.G is None else one.G)
                self._update([one])
        released.spent = False

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, which release gradients as this one does."""
        if self.process_group is not None:
            raise UsageError(
                "a LowRankAdamW with a process_group cannot be copied: make another and load this one's state dict"
            )
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {"gradients": self.gradients, "process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; `load_state_dict` calls it, too."""
        sealing.open_all(state["state"])
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # a state from before an option, or of torch.optim.AdamW
                group.setdefault(name, value)
        if "_places" not in self.__dict__:
            self._begin()
            self._hook()

    def _begin(self) -> None:
        self._hooked = set()
        self._places = {}

    def _place(self, parameter: Tensor) -> tuple[Group, int]:
        """The group of a parameter, and its number among all."""
        if not self._places:  # groups may have been split or loaded since the last step
            self._places = {member: (group, index) for group, member, index in self._members()}
        return self._places[parameter]

    def _members(self) -> Iterator[tuple[Group, Tensor, int]]:
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter, index
                index += 1

    def _end_step(self) -> None:
        self._places.clear()
        self._hook()

    def _hook(self) -> None:
        """Release gradients during backward; parameters that were exchanged since (FSDP) are found at the next step."""
        if self.gradients == "keep":
            return
        if self.gradients == "project" and any(map(_is_scaled, self.param_groups)):
            raise UsageError("scaled_by takes the whole gradient, which gradients='project' drops: take keep or update")
        for group, parameter, _ in self._members():
            if parameter not in self._hooked and (self.gradients == "update" or group["rank"] is not None):
                release_in_backward(parameter, self)
                self._hooked.add(parameter)

    def _pending(self, steps: bool = True) -> list[Pending]:
        """The parameters that have a gradient, which stands there as backward left it.

        `steps`: whether they are about to make a step.
        """
        constants = {id(group): Constants.of(group) for group in self.param_groups}
        found = []
        for group, parameter, index in self._members():
            G = parameter.grad
            if G is None:
                continue
            if not isinstance(G, ReleasedGradient) or not (G.spent or G.R is None):
                found.append(self._one(group, parameter, index, G, constants[id(group)], steps))
            elif steps:
                G.spent = True
        return found

    def _one(
        self,
        group: Group,
        parameter: Tensor,
        index: int,
        G: Tensor,
        constants: Constants | None = None,
        steps: bool = True,
    ) -> Pending:
        if G.is_sparse:
            raise UsageError(
                f"{told(group, parameter, index)} has a sparse gradient; make its embedding with sparse=False"
            )
        state = self.state[parameter] if steps else self.state.get(parameter, {})
        _insist_on_rank(state, group, parameter, index)
        done = int(state["step"]) if "step" in state else 0
        return Pending(parameter, state, group, constants or Constants.of(group), index, done, G)

    def _check(self, pending: list[Pending]) -> None:
        insist_on_finite(
            one
            for one in pending
            if one.group["rank"] is not None and not isinstance(one.R, ReleasedGradient) and self._is_due(one)
        )

    def _projected(self, one: Pending, steps: bool = True) -> Pending:
        """With the gradient in its subspace, averaged over the processes.

        Without `steps` the state stays as it is: the gradient may change until the step, and the new subspace with it.
        """
        G = one.R
        if _is_scaled(one.group):
            G = self._average(G)
            whole = one._replace(R=G, G=G)
            checked = not is_distributed(G) and self.gradients == "keep"
            R = self._coordinates(whole, anew=self._is_due(one), checked=checked)
            return whole._replace(R=R)
        if isinstance(G, ReleasedGradient):
            assert G.R is not None  # `_pending` passes over the others
            R, G.spent = G.R, G.spent or steps
        elif one.group["rank"] is None:
            R = G
        else:
            kept = self.gradients == "keep"
            checked = kept and not is_distributed(G)
            R = self._coordinates(one, anew=self._is_due(one), checked=checked, keeps=steps)
        R = self._average(R)
        return one if R is G else one._replace(R=R)

    def _is_due(self, one: Pending) -> bool:
        """Whether this step computes the parameter's subspace anew."""
        return is_due(one)

    def _coordinates(self, one: Pending, *, anew: bool, checked: bool, keeps: bool = True) -> Tensor:
        """What of a gradient goes into the moments of a group with a rank; see `coordinates`."""
        return coordinates(one, self._average, anew=anew, checked=checked, keeps=keeps)

    def _update(self, pending: Iterable[Pending]) -> None:
        """Make a step of these, which are projected."""
        for batch in in_batches(pending):
            update(batch)

    def _average(self, gradient: Tensor) -> Tensor:
        if self.process_group is None:
            return gradient
        torch.distributed.all_reduce(gradient, group=self.process_group)
        return gradient.div_(self.process_group.size())


def _is_scaled(group: Group) -> bool:
    return group["rank"] is not None and group["scaled_by"] is not None


def _insist_on_rank(state: dict[str, Any], group: Group, parameter: Tensor, number: int) -> None:
    """Refuse moments of another rank than the group has now; there is no telling what they are in its subspace."""
    if "exp_avg" not in state or parameter.ndim < 2:
        return
    rank = group["rank"]
    wanted = None if rank is None else min(rank, *parameter.shape[-2:])
    held = None
    if "projector" in state:  # the moments may be those of its complement
        held = state["projector"].shape[-1]
    elif "update_norm" in state:
        held = state["exp_avg"].shape[-1 if projects_right(parameter.shape) else -2]
    if held != wanted:
        raise UsageError(
            f"{told(group, parameter, number)} has moments of rank {held}, and its group now has rank {rank}: call "
            "optimizer.drop_state(parameter) for each of a group before its rank is changed"
        )
