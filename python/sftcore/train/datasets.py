"""The data sets of a configuration to what the loader takes.

Names, folders, patterns and ids of hubs become files in `sftcore.data`; here they are checked against the
settings of the run that only some of them need.
"""

from __future__ import annotations

from collections.abc import Sequence

from sftcore.config import TrainConfig
from sftcore.data import DatasetSource, ModelNames, open_registry, resolve_sources
from sftcore.data.reference import parse_reference
from sftcore.errors import ConfigError


def find_sources(names: Sequence[str], config: TrainConfig) -> list[DatasetSource]:
    """Returns the sources of the data sets, with the names of the model filled in where they teach them.

    Raises:
        ConfigError: A name is unknown, or self-cognition lacks a name to teach.
    """
    registry = open_registry(config.dataset_info)
    teaching = {
        name
        for name in (*names, *config.dataset)
        if (reference := parse_reference(name)).kind == "name"
        and (entry := registry.find(reference.text)) is not None
        and entry.fill_names
    }
    for setting in ("model_name", "model_author"):
        if getattr(config, setting) and not teaching:
            raise ConfigError(f"--{setting} has no effect without --dataset self-cognition")
        if teaching.intersection(names) and not getattr(config, setting):
            raise ConfigError(
                f"--dataset self-cognition needs --{setting}, for example --model_name 小松 Sofie "
                f'--model_author 松果实验室 "Pinecone Lab"'
            )
    model_names = None
    if config.model_name and config.model_author:
        model_names = ModelNames(
            model_name=tuple(config.model_name), model_author=tuple(config.model_author)
        )
    return resolve_sources(
        names,
        dataset_info=config.dataset_info,
        columns=config.column_names,
        use_hf=config.use_hf,
        names=model_names,
    )
