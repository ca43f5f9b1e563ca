"""`Memory`: what a model has read, as something to keep, to go on with and to ask."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titans.data.tokenizer import TextEncoder
from titans.errors import UserError
from titans.inference.checkpoint import load_checkpoint
from titans.inference.fingerprint import model_fingerprint, tokenizer_fingerprint
from titans.inference.generate import Sampling, continue_text
from titans.inference.memory_file import (
    Header,
    MemoryFile,
    Reading,
    Source,
    locked,
    read_memory,
    write_memory,
)
from titans.inference.shipped import SHIPPED, resolved
from titans.inference.stream import Stream
from titans.inference.text import cut
from titans.models import TitansCache, TitansForCausalLM
from titans.models.state import Leaf, leaves, map_leaves

_LOGITS = "logits"


class Memory:
    """One stream of text through a model, with its tokenizer, and a file to keep it in.

        memory = Memory.new("runs/mac")
        memory.read("Some text. ")
        memory.save("notes.memory")
        Memory.load("notes.memory").ask("What was it about?")

    Attributes:
        stream: the engine; `stream.tokens_read`, `stream.cache`.
        sources: what was read, in order.
        reading: where an unfinished `titans memorize` stands, else None.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sources: tuple[Source, ...] = (),
        reading: Reading | None = None,
        model_path: str = "",
    ) -> None:
        if not isinstance(stream.model, TitansForCausalLM):
            raise UserError(f"model: expected a Titans model, got {type(stream.model).__name__}")
        self.stream = stream
        self.tokenizer = tokenizer
        self.sources = sources
        self.reading = reading
        self.model_path = model_path
        self.encode = TextEncoder(tokenizer)
        # Once: the weights do not change while a memory reads.
        self._fingerprints = model_fingerprint(stream.model), tokenizer_fingerprint(tokenizer)

    @classmethod
    def new(
        cls,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
        piece: int | None = None,
    ) -> Memory:
        """A memory that has read nothing.

        Args:
            model: a checkpoint, the output folder of a training run, the name of a shipped checkpoint, or a
                model in evaluation mode.
            tokenizer: the model's; None only where `model` is a path, which holds it.
            device: where a checkpoint is loaded to; None for a GPU where there is one.
            piece: tokens per forward pass: speed and memory, not the answer.
        """
        if not isinstance(model, str | Path):
            if tokenizer is None:
                raise UserError("tokenizer: expected the model's tokenizer, got None")
            return cls(Stream(model, piece=piece), tokenizer, model_path=str(model.name_or_path))
        loaded = load_checkpoint(model, device=device)
        stream = Stream(loaded.model, piece=piece)
        # A shipped checkpoint by its name: another installation has it elsewhere.
        shipped = loaded.folder.parent == SHIPPED
        model_path = loaded.folder.name if shipped else os.path.abspath(loaded.folder)
        return cls(stream, tokenizer or loaded.tokenizer, model_path=model_path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
        piece: int | None = None,
    ) -> Memory:
        """The memory saved at `path`. Arguments as for `new`; model None: where the file says it was.

        Raises:
            UserError: the file is damaged, of another format, or of another model or tokenizer.
        """
        file = read_memory(Path(path))
        if model is None:
            model = file.header.model_path
            if not resolved(model).is_dir():
                raise UserError(f"{path}: its model is no longer at {model or 'a path'}: name it")
        memory = cls.new(model, tokenizer, device=device, piece=piece)
        memory.restore(file, Path(path))
        return memory

    @property
    def state_bytes(self) -> int:
        """Size of the state: constant, however much is read."""
        return self.stream.state_bytes

    def read(self, text: str, name: str = "text") -> None:
        """Read `text`; a call goes on where the one before ended, as if the texts were one.

        Texts are cut at the ends of calls and at those of `cut`: there, a tokenizer may make other tokens
        than it would of the whole. An interrupt leaves the memory as it was before the call.
        """
        data = text.encode()
        stream = self._after(text)
        source = Source(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        self.stream, self.sources = stream, (*self.sources, source)

    def ask(self, question: str, **sampling: int | float | bool) -> str:
        """What the model says after `question`; `sampling` are the fields of `Sampling`.

        The memory reads neither the question nor the answer: asking changes nothing.
        """
        return "".join(self.answer(question, Sampling(**sampling)))  # type: ignore[arg-type]

    def answer(self, question: str, sampling: Sampling) -> Iterator[str]:
        """Like `ask`, in pieces as soon as they are certain; an empty question continues the text."""
        yield from continue_text(self._after(question), self.tokenizer, sampling)

    def start(self) -> Tensor:
        """Token ids before everything else: <bos> where the tokenizer has one and nothing was read yet."""
        bos = self.tokenizer.bos_token_id
        first = [] if bos is None or self.stream.tokens_read else [int(bos)]
        return torch.tensor(first, dtype=torch.int64)

    def save(self, path: str | Path) -> int:
        """Write the memory file `path`, whole or not at all; its size in bytes."""
        with locked(Path(path)):
            return self.write(Path(path))

    def write(self, path: Path) -> int:
        """`save` for who holds `locked(path)` already."""
        model, tokenizer = self._fingerprints
        header = Header(
            model=model,
            model_path=self.model_path,
            tokenizer=tokenizer,
            variant=self.stream.model.config.variant,
            dtype=str(self.stream.model.dtype).removeprefix("torch."),
            tokens_read=self.stream.tokens_read,
            sources=self.sources,
            reading=self.reading,
        )
        return write_memory(path, header, self._tensors())

    def restore(self, file: MemoryFile, path: Path) -> None:
        """Become the memory in `file`, which was read from `path`."""
        model, tokenizer = self._fingerprints
        for what, expected, got in (
            ("model", file.header.model, model),
            ("tokenizer", file.header.tokenizer, tokenizer),
        ):
            if expected != got:
                raise UserError(
                    f"{path}: made with another {what}: expected fingerprint {expected[:12]}, "
                    f"the {what} at hand has {got[:12]}"
                )
        self.stream = _stream_of(file, path, self.stream)
        self.sources, self.reading = file.header.sources, file.header.reading

    def _after(self, text: str) -> Stream:
        """A fork of the stream that has read `text`."""
        stream = self.stream.fork()
        parts = [torch.from_numpy(ids.astype("int64")) for part in cut(text) for ids in self.encode([part])]
        ids = torch.cat([self.start(), *parts]) if parts else torch.empty(0)
        if len(ids):
            stream.read(ids)
        return stream

    def _tensors(self) -> dict[str, Tensor]:
        """The state as tensors by name; counts as numbers of no dimension."""
        if self.stream.logits is None:
            return {}
        found = leaves(self.stream.cache.states)
        tensors = {name: torch.as_tensor(leaf) for name, leaf in found.items()}
        for name in found:
            # At the start of a chunk the anchor is of no meaning: it is not kept.
            if ".anchor." in name and not tensors[_position_of(name)].any():
                del tensors[name]
        return {**tensors, _LOGITS: self.stream.logits}


def _position_of(anchor: str) -> str:
    return f"{anchor.rpartition('.anchor.')[0]}.position"


@torch.inference_mode()
def _stream_of(file: MemoryFile, path: Path, new: Stream) -> Stream:
    """A stream that goes on from a file: the model says what its state is made of, the file the numbers."""
    if not file.tensors:
        return Stream(new.model, piece=new.piece)
    model = new.model
    tensors = {name: tensor.to(model.device) for name, tensor in file.tensors.items()}

    def saved(name: str, leaf: Leaf) -> Leaf:
        if name not in tensors and ".anchor." in name:
            return tensors[name.replace(".anchor.", ".weights.")]
        if isinstance(leaf, int):
            return int(tensors[name])
        found = tensors[name]
        sizes = zip(found.shape, leaf.shape, strict=True)
        if any(
            size != expected for size, expected in sizes if expected
        ):  # 0: a window before the first token
            raise ValueError(f"{name} has shape {list(found.shape)}, expected {list(leaf.shape)}")
        return found

    cache = TitansCache()
    try:
        initial = [block.mixer.initial_state(1) for block in model.model.layers]
        cache.states = map_leaves(initial, saved)
        logits = tensors[_LOGITS]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: the state does not fit the model: {error}") from error
    cache.seen, cache.variant = file.header.tokens_read, model.config.variant
    return Stream(model, cache, logits=logits, piece=new.piece)
