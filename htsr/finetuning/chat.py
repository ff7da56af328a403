"""Talking with a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from htsr.calibration.adapted import is_adapter_alone, load_adapted, load_adapted_tokenizer
from htsr.calibration.loading import load_model, load_tokenizer
from htsr.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass
class Chat:
    """A conversation with a model; one without a chat template goes on with each text, and remembers none.

    Attributes:
        model: causal language model.
        tokenizer: tokenizer of the model.
        turns: turns so far, of a model with a chat template; a system turn may be the first.
        options: arguments of transformers' ``generate``, as max_new_tokens, do_sample or temperature.
    """

    model: torch.nn.Module
    tokenizer: Any
    turns: list[dict[str, str]] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_template(self) -> bool:
        """Whether the model is one of turns, rather than of texts that it goes on with."""
        return self.tokenizer.chat_template is not None

    def answer(self, text: str, tell: Callable[[str], None] = lambda _: None) -> str:
        """What the model answers to `text`.

        Args:
            text: turn of the user, or beginning of the text.
            tell: function that is told each piece of the answer as it comes.

        Raises:
            UsageError: the text leaves no room for an answer, or is empty.
        """
        import torch
        from transformers import TextStreamer

        class Told(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                tell(text)

        if not text.strip():
            raise UsageError("there is nothing to answer: the text is empty")
        turns = [*self.turns, {"role": "user", "content": text}]
        given = self._fitting(turns, text)
        streamer = Told(self.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[no-untyped-call]
        generate: Any = self.model.generate
        with torch.no_grad():
            whole = generate(**given, streamer=streamer, **{**self._ends(), **self.options})
        new = whole[0, given["input_ids"].shape[1] :]
        answered = str(self.tokenizer.decode(new, skip_special_tokens=True))
        if self.has_template:
            self.turns = [*turns, {"role": "assistant", "content": answered}]
        return answered

    def _fitting(self, turns: list[dict[str, str]], text: str) -> Any:
        """Tokens of `turns`, or of a `text`, of which the oldest turns are left out until an answer has room."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
        room = int(self.options.get("max_new_tokens", 0))
        turns = list(turns)
        while True:
            if self.has_template:
                given = self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            else:
                given = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            size = given["input_ids"].shape[1]
            if most is None or size + room <= most:
                return given.to(self.model.device)
            first = int(turns[0]["role"] == "system")
            if not self.has_template or len(turns) - first < 3:
                raise UsageError(
                    f"{size} tokens and an answer of {room} are more than the {most} that the model reads: ask for a "
                    "shorter answer by --max-tokens, or say less"
                )
            del turns[first : first + 2]

    def _ends(self) -> dict[str, Any]:
        """The tokens that end an answer: those of the model's configuration, and the tokenizer's own."""
        said = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        ends = {*(said if isinstance(said, list) else [said]), self.tokenizer.eos_token_id} - {None}
        return {"pad_token_id": self.tokenizer.pad_token_id, **({"eos_token_id": sorted(ends)} if ends else {})}


def open_chat(
    name: str,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Chat:
    """A conversation with the model in a folder, or with an adapter on its base.

    Args:
        name: folder, hub id or .gguf file of a model, or folder of an adapter that names its base.
        revision: branch, tag or commit of a hub id.
        device: device to run on.
        system: turn of the system, with which the conversation begins.
        options: arguments of transformers' ``generate``.

    Raises:
        SourceError: it cannot be loaded, or is an adapter that names no base.
        UsageError: there is a turn of the system, and no chat template to write it.
    """
    if is_adapter_alone(name):
        model, tokenizer = load_adapted(name, causal=True), load_adapted_tokenizer(name)
    else:
        model, tokenizer = load_model(name, revision=revision, causal=True), load_tokenizer(name, revision=revision)
    if system is not None and tokenizer.chat_template is None:
        raise UsageError(f"--system: {name} has no chat template, and writes no turn of a system")
    turns = [] if system is None else [{"role": "system", "content": system}]
    return Chat(model.to(device).eval(), tokenizer, turns, dict(options or {}))
