"""Frozen blocks in host memory that visit the device one after the other: `htsr.stream_frozen`.

    sampler = LayerSampler(model, active=2)                  # a model in host memory
    htsr.stream_frozen(model, sampler, device="cuda")
    optimizer = LowRankAdamW(low_rank_groups(model, rank=128))
    sampler.attach(optimizer)
    # train as always

Before the forward of a block its parameters point into a buffer on the device, and after it to host memory again; the
next block is copied meanwhile. Backward asks for the weights that it needs in the same way (`saved`). Parameters that
train, and all outside of the blocks, lie on the device. At rest every parameter holds its value, so whoever reads the
model (``state_dict``, ``save_pretrained``, `htsr.analyze`) finds it whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from htsr.errors import UsageError
from htsr.matrices.sharded import refuse_flat
from htsr.training.streaming.block import StreamedBlock, resident
from htsr.training.streaming.calls import Hook, Interruptible
from htsr.training.streaming.homes import Where, are_mapped
from htsr.training.streaming.saved import end_contexts, saved_weights
from htsr.training.streaming.slots import Slots

if TYPE_CHECKING:
    from htsr.matrices.blocks import Blocks
    from htsr.training.sampling.sampler import LayerSampler

logger = logging.getLogger(__name__)


def stream_frozen(
    model: nn.Module, sampler: LayerSampler, *, device: torch.device | str | None = None, where: Where = "host"
) -> Streaming:
    """Keep the frozen blocks of a layer-sampled model in host memory, and stream them through two buffers on a device.

    The model comes in host memory, and with its block's weights alone on the device trains as if it were there as a
    whole: the same losses and weights, bit for bit. On the device are the parameters that train, all that is outside
    of the blocks, and two buffers of the size of the largest block.

    Weights that others set count from the next call on of the model or of a part that has the blocks, not of a block
    by itself.

    A copy of the model (deepcopy, AveragedModel, torch.save) is as any other model: what was in host memory is there
    until the copy is moved, ``copy.to(device)``. Second derivatives (``create_graph=True``) cannot be had: torch
    raises its error on a variable that has been modified by an inplace operation.

    Args:
        model: model in host memory, not wrapped (DDP and FSDP keep weights elsewhere).
        sampler: sampler of its blocks, attached to an optimizer or not yet.
        device: device that computes; by default this process's accelerator, or the CPU where there is none.
        where: where frozen weights live: in ``host`` memory, or on ``disk``, in the files of the checkpoint from which
            transformers has just loaded the model (in their own dtype, else they are in host memory, which the log
            says). What training changes of them lives in host memory, and the files stay as they are.

    Returns:
        The `Streaming`, which works until its `stop` is called, kept or not.

    Raises:
        UsageError: the model's weights cannot be moved one block at a time, `where` has no meaning, or the sampler
            draws matrices.

    Examples:
        >>> import htsr, torch
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=32)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        >>> sampler = htsr.LayerSampler(model, "uniform", active=1, interval=2, seed=0)
        >>> streaming = htsr.stream_frozen(model, sampler, device="cpu")
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> sampler.attach(optimizer)
        >>> for step in range(3):
        ...     model(torch.randn(3, 1, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sampler.active, streaming.streamed
        ((2,), (0, 1, 3))
    """
    _insist_on_blocks(sampler)
    streaming = Streaming(model, sampler.blocks, device, where)
    streaming.follow(sampler)
    return streaming


def _insist_on_blocks(sampler: LayerSampler) -> None:
    if sampler.unit == "matrix":
        raise UsageError("blocks are streamed whole, and unit='matrix' trains parts of all: take 'block'")


class Streaming:
    """The blocks of a model that visit the device to compute; all of them until `follow` is called.

    Args:
        model: model in host memory, not wrapped.
        blocks: its blocks.
        device: device that computes; by default this process's accelerator, or the CPU where there is none.
        where: where frozen weights live, see `stream_frozen`.

    Raises:
        UsageError: the model's weights cannot be moved one block at a time.
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, device: torch.device | str | None = None, where: Where = "host"
    ) -> None:
        if where not in get_args(Where):
            raise UsageError(f"frozen weights live in one of {', '.join(get_args(Where))}, not in {where!r}")
        _check(model)
        if not {id(module) for module in blocks.modules} <= {id(module) for module in model.modules()}:
            raise UsageError("the blocks are those of another model than is streamed")
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.model, self.device = model, torch.empty(0, device=device).device  # with its index
        stays = resident(model, blocks.modules)
        inside = (p for module in blocks.modules for p in module.parameters() if id(p) not in stays)
        if where == "disk" and not are_mapped(inside):
            logger.warning(
                "weights that are to live on disk are in host memory: transformers maps files of safetensors when it "
                "is asked for the dtype that they have"
            )
        self._blocks = [
            StreamedBlock(name, module, stays, self.device, where)
            for name, module in zip(blocks.names, blocks.modules, strict=True)
        ]
        self._sampler: LayerSampler | None = None
        self._ends: list[Callable[[], None]] = []
        self._slots = Slots({i: block.home for i, block in enumerate(self._blocks)}, self.device)
        members = {id(module) for module in blocks.modules}
        self._handles: list[Any] = [
            module.register_forward_pre_hook(Hook(self._begin), prepend=True)
            for module in model.modules()  # PEFT's generate, for one, calls not the model but the one that it wraps
            if id(module) not in members and any(id(part) in members for part in module.modules())
        ]
        for index, block in enumerate(self._blocks):
            for part in block.module.modules():  # checkpointing may compute the inside of a block again without it
                self._handles.append(Interruptible(part, self._come_home))
                enter, leave = Hook(self._enter, index), Hook(self._leave, index)
                self._handles.append(part.register_forward_pre_hook(enter))
                self._handles.append(part.register_forward_hook(leave, always_call=True))
        model.to(self.device)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the blocks that have weights in host memory, ascending."""
        return tuple(i for i, block in enumerate(self._blocks) if block.away)

    def follow(self, sampler: LayerSampler) -> None:
        """Keep on the device what a sampler has drawn, from now on.

        Args:
            sampler: sampler of the same model.

        Raises:
            UsageError: it is that of another model, or draws matrices.
        """
        _insist_on_blocks(sampler)
        if not {id(p) for p in sampler.drawn()} <= {id(p) for p in self.model.parameters()}:
            raise UsageError("the sampler is that of another model than is streamed")
        self._sampler = sampler
        self._ends.append(sampler.before_draws(self._settle))
        self._settle()

    def stop(self) -> None:
        """End: the model is in host memory as it came, with what it has learned, and as any other. Once is enough."""
        if not self._handles:
            return
        self._sampler = None
        self._settle()
        for handle in self._handles:
            handle.remove()
        for end in self._ends:
            end()
        for block in self._blocks:
            block.free()
        self._blocks, self._handles, self._ends = [], [], []
        self._slots = Slots({}, self.device)  # a graph that is yet to run backward keeps the buffers as it needs them
        self.model.to("cpu")

    def _settle(self) -> None:
        """Let go what does not train any more, and take to the device what does."""
        trains = {id(parameter) for parameter in self._sampler.drawn()} if self._sampler is not None else set()
        self._slots.expect([])
        for block in self._blocks:  # memory is given back before more is taken
            block.let_go(trains)
        for block in self._blocks:
            block.take(trains)
        self._slots.expect(list(self.streamed))

    def _begin(self) -> None:
        """Begin a pass: trust no buffer, as weights may have been set since."""
        if torch.compiler.is_compiling():
            _refuse_compiled()
        self._come_home()
        self._slots.forget()

    def _come_home(self) -> None:
        """Undo what an interrupt has left of calls that are no more."""
        for block in self._blocks:
            if block.begun:
                block.begun.clear()
                with torch.no_grad(), torch.inference_mode(False):
                    block.go_home()
        end_contexts(self._slots)

    def _enter(self, index: int) -> None:
        if torch.compiler.is_compiling():
            _refuse_compiled()
        block = self._blocks[index]
        block.begun.append(None)
        if not block.away:
            return
        if len(block.begun) == 1:
            self._bring(block, index)
        if (context := saved_weights(self._slots)) is not None:  # checkpointing may have put its own on top
            context.__enter__()
            block.begun[-1] = context

    def _bring(self, block: StreamedBlock, index: int) -> None:
        if torch.is_grad_enabled() and any(block.parameters[i].requires_grad for i in block.away):
            raise UsageError(
                f"{block.name} is in host memory and would get gradients: attach the sampler before training begins, "
                "or stop the streaming"
            )
        with torch.no_grad(), torch.inference_mode(False):
            if block.adopt():
                self._slots.forget()
            block.visit(self._slots.fetch(index))

    def _leave(self, index: int) -> None:
        block = self._blocks[index]
        if not block.begun:  # another hook raised before it was entered
            return
        if (context := block.begun.pop()) is not None:
            context.__exit__()
        if not block.begun:
            with torch.no_grad(), torch.inference_mode(False):
                block.go_home()


def _check(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be moved one block at a time."""
    refuse_flat(model)
    wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    if wrapped or getattr(model, "hf_device_map", None) or any(_is_compiled(part) for part in model.modules()):
        raise UsageError(
            "frozen weights are streamed for one process and one device, into the model itself: not into one that is "
            "wrapped (DDP), compiled, or spread by device_map"
        )
    hooks = (hook for part in model.modules() for hook in part._forward_pre_hooks.values())
    if any(isinstance(hook, Hook) and hook.acts for hook in hooks):
        raise UsageError("this model is streamed already: call stop() of what stream_frozen returned, then stream anew")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor or parameter.is_meta:
            kind = "on the meta device" if parameter.is_meta else type(parameter.data).__name__
            raise UsageError(f"{name} is {kind}, and what is streamed is a plain tensor in host memory")


def _is_compiled(module: nn.Module) -> bool:
    """Whether `module` is what ``torch.compile`` returns, or its ``compile`` has been called."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiled() -> None:
    """Raise outside of what is traced: an error in there only ends the tracing, and the module runs on."""
    raise UsageError("a model that is streamed cannot be compiled: its weights move, which compiled code does not see")
