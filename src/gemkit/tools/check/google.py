"""Reads one of Google's own checkpoints (Flax/Orbax, PyTorch .ckpt) for the rules, as gemkit loads it."""

from __future__ import annotations

from gemkit.errors import GemkitError
from gemkit.text.vocabulary import PieceType
from gemkit.tools.check.finding import fault_of
from gemkit.tools.check.subject import GOOGLE, Subject, TensorView, Tokens


def read(subject: Subject) -> None:
    """Fill in a subject from the loaded checkpoint; one that does not load is a broken file."""
    subject.kind, subject.config_file = GOOGLE, subject.path.name
    checkpoint = subject.checkpoint
    if checkpoint is None:
        subject.broken.append((subject.config_file, fault_of(subject.path, subject.refusal)))
        return
    subject.config, subject.family, subject.name = checkpoint.config, checkpoint.config.model_type, checkpoint.name
    subject.raw = checkpoint.metadata
    for key, tensor in checkpoint.tensors.items():
        read_data = lambda tensor=tensor: tensor.data  # noqa: E731
        view = TensorView(key, key, tensor.type.name, tensor.shape, subject.config_file, tensor.type, read_data)
        subject.tensors.append(view)
    try:
        vocabulary = checkpoint.vocabulary
    except GemkitError as error:
        subject.broken.append((subject.config_file, fault_of(subject.path, error)))
        return
    if vocabulary is not None:
        pieces = [piece.decode("utf-8", "replace") for piece in vocabulary.pieces]
        control = frozenset(p for p, kind in zip(pieces, vocabulary.types.tolist()) if kind == PieceType.CONTROL)
        ids = {piece: number for number, piece in enumerate(pieces)}
        subject.tokens = Tokens(f"{subject.config_file}: tokenizer.model", ids, len(pieces), control)
