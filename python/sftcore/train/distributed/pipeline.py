"""Pipeline parallelism: each process of a group has a part of the layers, and micro-batches pass through all of them.

Ranks that stand side by side are the stages of one pipeline and get the same batches; the pipelines share the data, and
the same stage of each of them averages its gradients. Each rank loads, trains and saves its own layers alone.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError, SftcoreError
from sftcore.train.distributed.engine import Engine
from sftcore.train.distributed.pipeline_run import PipelineLosses, PipelineRun, WholeModel
from sftcore.train.distributed.stages import KINDS, Parts, stage_class, swap
from sftcore.train.distributed.world import World
from sftcore.train.inputs import InputKind
from sftcore.train.method import LossMethod, choose_loss

if TYPE_CHECKING:
    from sftcore.train.trainer import SftTrainer

_TOKENS_TO_TRY = 64


class PipelineEngine(Engine):
    """Stages of layers, each on a process of its own.

    Attributes:
        number: The stage of this process.
        num_stages: All of them.
        group: The ranks of this pipeline, in the order of their stages.
        ends: The ranks of its first and its last stage; None in the middle.
        parts: The modules of this stage, once the model is loaded.
    """

    name = "pipeline"
    runs_alone = False

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self.num_stages = config.pipeline_parallel_size
        self.number = world.rank % self.num_stages
        self.group: Any = None
        self.ends: Any = None
        self.parts: Parts | None = None
        self._class: Any = None
        self._dtype = torch.float32
        # a stage has its own part of the optimizer, whatever the number of pipelines
        self.state_format = f"pipeline of {self.num_stages} stages"

    def __enter__(self) -> PipelineEngine:  # noqa: PYI034
        """Makes the groups of ranks; every rank takes part in making every group."""
        super().__enter__()
        patience = datetime.timedelta(seconds=self.timeout)
        for first in range(0, self.world.size, self.num_stages):
            ranks = list(range(first, first + self.num_stages))
            group = dist.new_group(ranks, timeout=patience)
            ends = dist.new_group([ranks[0], ranks[-1]], timeout=patience)
            if self.world.rank in ranks:
                self.group = group
                if self.world.rank in (ranks[0], ranks[-1]):
                    self.ends = ends
        return self

    def meet(self, settings: Any) -> None:
        """Chooses the class of the model.

        Raises:
            ConfigError: Its layers cannot be split.
        """
        known = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING
        if settings.model_type not in KINDS or not known:
            raise ConfigError(
                f"--pipeline_parallel_size splits models of type {', '.join(KINDS)}, not {settings.model_type}; take "
                "--fsdp or --deepspeed zero3, which split any model"
            )
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
        self._class = stage_class(kind, self.num_stages, self.number)

    def check_new_tokens(self) -> None:
        """Refuses an embedding that would be made longer when the stages have parted from it."""
        raise ConfigError(
            "--new_special_tokens cannot be used with --pipeline_parallel_size: embedding and head lie on two stages, "
            "and would be made longer apart; take --fsdp, or give the tokens to the model before: a run of one step, "
            "whose merged or saved model is the next one's --model"
        )

    def load_arguments(self) -> dict[str, Any]:
        """The class that loads the layers of this stage alone."""
        return {"model_class": self._class}

    def place(self, model: Any) -> Any:
        """Takes the stage that was loaded, and tries it."""
        model = super().place(model)
        self.parts = model.parts
        self._dtype = model.dtype
        model.parts.check_passes()
        return model

    def runnable(self, model: Any) -> Any:
        """Returns what gives the logits of all stages."""
        return WholeModel(self._run_of(model))

    @contextlib.contextmanager
    def skeleton(self, model: Any) -> Iterator[None]:
        """A block in which the model has the modules of all stages, for a tuner to see all names.

        Every rank starts the adapters of all layers, so that those of its own begin as in a single process.
        """
        with model.parts.all_modules():
            yield
            model.parts.check_trained(is_adapter=not self.config.trains_weights)

    def choose_loss(self, model: Any, kind: InputKind) -> LossMethod:
        """Returns how losses come out of the last stage, which alone can try it."""
        assert self.parts is not None
        method: LossMethod | None = None
        held: list[Any] = [None]
        if self.parts.is_last:
            try:
                with _short_embedding(self.parts):
                    method = choose_loss(self.config, model, kind)
                held = [(method.objective, method.is_chunked, method.reason)]
            except ConfigError as error:
                held = [str(error)]
        run = self._run_of(model)
        dist.broadcast_object_list(held, src=run.last_rank, group=self.group)
        if isinstance(held[0], str):
            raise ConfigError(held[0])
        objective, is_chunked, reason = held[0]
        return PipelineLosses(
            objective=objective,
            kind=kind,
            is_chunked=is_chunked,
            reason=reason,
            run=run,
            local=method,
        )

    def trainer_class(self) -> type[SftTrainer]:
        """The Trainer whose steps are schedules."""
        from sftcore.train.distributed.pipeline_trainer import PipelineTrainer  # takes an engine

        return PipelineTrainer

    def describe(self) -> str | None:
        """The stages, and how long they wait for one another."""
        assert self.parts is not None
        count = self.config.accumulation_steps(self.world.data_size)
        idle = (self.num_stages - 1) / (count + self.num_stages - 1)
        line = (
            f"{self.world.size} processes: {self.world.data_size} x pipeline of {self.num_stages} stages "
            f"({self.config.pipeline_schedule}), {count} micro-batches a step, each stage idle for {idle:.0%} of it; "
            f"{self.parts.split.describe()}"
        )
        if idle > 0.5:
            line += "; raise --gradient_accumulation_steps and lower --per_device_train_batch_size to wait less"
        return line

    def check(self, trainer: SftTrainer) -> None:
        """Holds what runs to what was asked for."""
        super().check(trainer)
        if trainer.accelerator.scaler is not None:
            raise SftcoreError(
                "a pipeline does not scale losses; take --torch_dtype bfloat16 or float32"
            )

    def _run_of(self, model: Any) -> PipelineRun:
        assert self.parts is not None
        return PipelineRun(
            model,
            self.parts,
            group=self.group,
            dtype=self._dtype,
            order=self.config.pipeline_schedule,
        )


@contextlib.contextmanager
def _short_embedding(parts: Parts) -> Iterator[None]:
    """A block in which the last stage embeds a few tokens by itself, to have something to look at behind its layers."""
    head = parts.model.get_output_embeddings().weight
    width = parts.model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_TOKENS_TO_TRY, width, generator=generator)
    short = nn.Embedding.from_pretrained(weight.to(head))  # type: ignore[no-untyped-call]
    before = swap(parts.model, parts.embedding, short)
    try:
        yield
    finally:
        swap(parts.model, parts.embedding, before)
