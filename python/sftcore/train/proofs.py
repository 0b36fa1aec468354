"""What a run checked, and how near it came: one list, printed as its last lines and kept in `result.json`.

A check that did not run is in the list too, with the reason, so that nothing is believed that was not tried.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader
from sftcore.data.rows import read_rows
from sftcore.errors import SftcoreError, first_line
from sftcore.train.head import HeadLoss, after_head, causal_model, plain_losses, take_targets
from sftcore.train.inputs import InputKind, model_inputs
from sftcore.train.largest import read_batch
from sftcore.train.loss import Objective, losses_of_logits
from sftcore.tuners import coverage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sftcore.data import Encoder, StreamLoader
    from sftcore.train.distributed.engine import Engine
    from sftcore.train.open import Opened
    from sftcore.train.trainer import SftTrainer

# weights are copied while an adapter is merged into them for a moment
_MOST_BYTES_TO_MERGE = 2**30
_MOST_TOKENS = 256
_ROWS_OF_PROMPTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """Something that a run takes for granted, and whether it was checked.

    Attributes:
        name: What was compared with what.
        outcome: `proved`, `differs` or `not checked`.
        detail: The measure in words, or the reason why there is none.
        value: The measure, where it is one number.
    """

    name: str
    outcome: Literal["proved", "differs", "not checked"]
    detail: str
    value: float | None = None


def proofs_at_start(
    opened: Opened, loader: BatchLoader | StreamLoader, config: TrainConfig, engine: Engine
) -> list[Proof]:
    """Returns what is checked before the first step.

    Args:
        opened: The model, before an engine spreads it.
        loader: The training data, which stands where it stood.
        config: The settings of the run.
        engine: How the processes share the run.
    """
    name = "prompt of inference against training text"
    sets = loader.settings["dataset"] if isinstance(loader, BatchLoader) else []
    if not sets or sets[0]["columns"]:
        detail = "the keys of rows are renamed, or the data is a stream"
        prompt = Proof(name=name, outcome="not checked", detail=detail)
    else:
        paths = [Path(file) for file in sets[0]["files"]]
        prompt = prompt_proof(loader.encoder, paths, config)
    reason = opened.method.reason or _why_apart(engine)
    batch = None
    if reason is None and isinstance(loader, BatchLoader):
        device = next(opened.model.parameters()).device
        read = read_batch(loader, 0, 0)
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in read.items()}
    return [
        *opened.proofs,
        loss_proof(opened.model, batch, opened.method.kind, reason),
        prompt,
    ]


def proofs_at_end(trainer: SftTrainer) -> list[Proof]:
    """Returns what is checked after the last step."""
    reason = _why_apart(trainer.engine)
    if reason:
        return [Proof(name="merged against adapter", outcome="not checked", detail=reason)]
    return [merge_proof(trainer.model, trainer.config)]


def _why_apart(engine: Engine) -> str | None:
    if engine.name == "ddp" and engine.world.model_parallel_size == 1:
        return None
    return f"{engine.name} spreads the model or its sequences over processes"


def describe_proofs(proofs: Iterable[Proof]) -> str:
    """Returns the proofs as aligned lines for people."""
    proofs = list(proofs)
    width = max((len(proof.name) for proof in proofs), default=0)
    lines = [f"  {proof.name:<{width}}  {proof.outcome}: {proof.detail}" for proof in proofs]
    return "\n".join(["checked in this run:", *lines])


def as_dicts(proofs: Iterable[Proof]) -> list[dict[str, Any]]:
    """Returns the proofs for `result.json`."""
    return [asdict(proof) for proof in proofs]


def packing_proof(reason: str | None, distance: float | None, *, asked: bool) -> Proof:
    """Returns whether examples of one row have the logits that they have alone.

    Args:
        reason: Why they cannot share rows, if so.
        distance: The largest difference of a logit over the deviation of all.
        asked: Whether the settings ask for rows that examples share.
    """
    name = "packed against separate logits"
    if not asked:
        return Proof(name=name, outcome="not checked", detail="examples do not share rows")
    if reason:
        detail = f"{reason}; rows are padded instead"
        return Proof(name=name, outcome="differs", detail=detail, value=distance)
    detail = f"largest difference {distance:.2g} of their deviation"
    return Proof(name=name, outcome="proved", detail=detail, value=distance)


def coverage_proof(model: Any, config: TrainConfig) -> Proof:
    """Returns which share of the weight matrices is trained or has an adapter, and what is left out.

    Args:
        model: The model with its tuner.
        config: The settings of the run.
    """
    found = coverage(model)
    name = "weights trained" if config.trains_weights else "coverage of the adapter"
    return Proof(name=name, outcome="proved", detail=str(found), value=found.share)


def loss_proof(
    model: Any, batch: dict[str, Any] | None, kind: InputKind, reason: str | None
) -> Proof:
    """Compares the chunked loss with the plain one on a batch: its value, and its gradient on the hidden states.

    Args:
        model: The model with its tuner, whole on this process.
        batch: The first micro-batch, on the model's device; None where there is none to be had.
        kind: How the model wants its batches.
        reason: Why this run computes its losses another way, if it does.
    """
    name = "chunked against plain loss"
    if reason is not None or batch is None:
        detail = reason or "the data is a stream"
        return Proof(name=name, outcome="not checked", detail=detail)
    was_training = model.training
    model.eval()
    try:
        value, gradient = _compare_losses(model, _first_row(batch), kind)
    except (RuntimeError, ValueError, TypeError) as error:
        return Proof(name=name, outcome="not checked", detail=first_line(error))
    finally:
        model.train(was_training)
    exact = next(causal_model(model).parameters()).dtype == torch.float32
    near = max(value, gradient) < (1e-4 if exact else 2e-2)
    return Proof(
        name=name,
        outcome="proved" if near else "differs",
        detail=f"on the first batch the value differs by {value:.2g} and the gradient by {gradient:.2g} of itself",
        value=max(value, gradient),
    )


def _first_row(batch: dict[str, Any]) -> dict[str, Any]:
    if "cu_seqlens" in batch:
        return batch  # borders of examples belong to all of its rows
    return {
        key: part[:1] if torch.is_tensor(part) and part.dim() > 1 else part
        for key, part in batch.items()
    }


def _compare_losses(model: Any, batch: dict[str, Any], kind: InputKind) -> tuple[float, float]:
    base = causal_model(model)
    inputs = model_inputs(batch, kind)
    inputs["use_cache"] = False
    with torch.no_grad():
        expected, _ = plain_losses(model, inputs, Objective())
        rest = dict(inputs)
        targets, _ = take_targets(rest)
        hidden = base.base_model(**rest).last_hidden_state
    # the first tokens with a label, whose logits are few enough to be there at once
    places = (targets.reshape(-1) != -100).nonzero().squeeze(1)[:_MOST_TOKENS]
    some = hidden.reshape(1, -1, hidden.shape[-1])[:, places].detach()
    labels = targets.reshape(1, -1)[:, places]
    parts = [some.clone().requires_grad_() for _ in range(2)]
    chunked = HeadLoss(base, Objective(), chunk_size=7, gradients_in_forward=True)
    found = chunked(parts[0], labels, None)
    head, change = base.get_output_embeddings(), after_head(base.config)
    plain = losses_of_logits(change(head(parts[1][0])), labels[0], None, Objective())
    gradients = [
        torch.autograd.grad(losses.total, part)[0].float()
        for losses, part in zip((found, plain), parts, strict=True)
    ]
    whole = expected.losses[: len(places)]
    value = float((found.losses - whole).abs().max() / whole.abs().max().clamp(min=1e-9))
    distance = (gradients[0] - gradients[1]).abs().max()
    return value, float(distance / gradients[1].abs().max().clamp(min=1e-12))


def merge_proof(model: Any, config: TrainConfig) -> Proof:
    """Compares the logits of the adapter beside the weights with those of the adapter in them.

    The weights are put back bit for bit, as merging and taking out again would not.

    Args:
        model: The trained model, whole on this process.
        config: The settings of the run.
    """
    name = "merged against adapter"
    reason = _why_not_merged(model, config)
    if reason:
        return Proof(name=name, outcome="not checked", detail=reason)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights = {id(p): p for layer in layers for p in layer.get_base_layer().parameters()}
    size = sum(p.numel() * p.element_size() for p in weights.values())
    if size > _MOST_BYTES_TO_MERGE:
        detail = f"{size / 2**30:.1f} GiB of weights would be copied; compare after sftcore merge"
        return Proof(name=name, outcome="not checked", detail=detail)
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.shape[0], (1, 32), generator=generator).to(embedding.device)
    was_training = model.training
    model.eval()
    kept = {key: p.detach().clone() for key, p in weights.items()}
    try:
        with torch.no_grad():
            beside = model(input_ids=ids, use_cache=False).logits.float()
            model.base_model.merge_adapter()
            inside = model(input_ids=ids, use_cache=False).logits.float()
    except (RuntimeError, ValueError, TypeError) as error:
        return Proof(name=name, outcome="not checked", detail=first_line(error))
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        with torch.no_grad():
            for key, parameter in weights.items():
                parameter.copy_(kept[key])
        model.train(was_training)
    distance = float((inside - beside).abs().max() / beside.std())
    exact = embedding.dtype == torch.float32
    return Proof(
        name=name,
        outcome="proved" if distance < (1e-3 if exact else 0.25) else "differs",
        detail=f"logits differ by at most {distance:.2g} of their deviation",
        value=distance,
    )


def _why_not_merged(model: Any, config: TrainConfig) -> str | None:
    if config.trains_weights:
        return "there is no adapter"
    if config.tuner_type != "lora" or config.use_dora:
        return f"--tuner_type {config.tuner_type}{' with --use_dora' * config.use_dora} is compared by sftcore merge"
    if config.weight_bits is not None:
        return "the weights are quantized"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    both = [m for m in (head, embedding) if isinstance(m, BaseTunerLayer)]
    if len(both) > 1:
        return "the embedding shares its weight with the head, which merging parts"
    return None


def prompt_proof(encoder: Encoder, paths: Iterable[Path], config: TrainConfig) -> Proof:
    """Compares the prompt that inference would give with the beginning of the training text, on the first rows.

    Args:
        encoder: The encoder of the run.
        paths: The files of the data set.
        config: The settings of the run.
    """
    name = "prompt of inference against training text"
    compared, faults = 0, []
    try:
        for place, row in _first_rows(paths):
            question = _question(row, config.system)
            if question is None:
                continue
            prompt = encoder.encode_prompt(question).tolist()
            example = encoder.encode(row)
            ids = example.input_ids.tolist()
            trained = [n for n, is_trained in enumerate(example.loss_mask.tolist()) if is_trained]
            if not trained or len(prompt) > len(ids):
                continue
            compared += 1
            if ids[: len(prompt)] != prompt or trained[0] < len(prompt):
                faults.append(place)
    except (SftcoreError, ValueError, OSError) as error:
        return Proof(name=name, outcome="not checked", detail=first_line(error))
    if not compared:
        detail = "none of the first rows is a plain question with an answer"
        return Proof(name=name, outcome="not checked", detail=detail)
    if faults:
        detail = f"{len(faults)} of {compared} rows begin otherwise, the first at {faults[0]}"
        return Proof(name=name, outcome="differs", detail=detail, value=len(faults) / compared)
    detail = f"the same ids up to the first trained token in {compared} of {compared} rows"
    return Proof(name=name, outcome="proved", detail=detail, value=0.0)


def _first_rows(paths: Iterable[Path]) -> Iterable[tuple[str, dict[str, Any]]]:
    for path in islice(paths, 1):
        for line, row in islice(read_rows(path), _ROWS_OF_PROMPTS):
            yield f"{path}:{line}", row


def _question(row: dict[str, Any], system: str | None) -> list[dict[str, Any]] | None:
    """Returns the messages before the first answer of a row of a plain shape; None where it is of another."""
    if "tools" in row:
        return None
    messages = row.get("messages")
    if messages is None and isinstance(row.get("query"), str) and not row.get("history"):
        messages = [{"role": "user", "content": row["query"]}, {"role": "assistant"}]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return None
    roles = [message.get("role") for message in messages]
    if "assistant" not in roles or not roles.index("assistant"):
        return None
    question = messages[: roles.index("assistant")]
    if system and question[0].get("role") != "system":
        question = [{"role": "system", "content": system}, *question]
    return question
