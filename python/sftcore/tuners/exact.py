"""A PEFT model whose saved adapter is plain, and which goes on from a checkpoint exactly.

Some tuners hold in memory what no plain adapter holds: gates (SoRA), ranks that may come back (AdaLoRA), a start that
was taken out of the weights (PiSSA, OLoRA). When such a model is saved, `converted` gives the plain adapter that stands
for it, and `tuner_state.safetensors` beside it holds what is in memory, bit for bit, for the run that goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModelForCausalLM
from safetensors.torch import load_file, save_file

from sftcore.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

STATE_FILE = "tuner_state.safetensors"
ADAPTER = "default"
_TRAINED = "trained:"


class ExactModel(PeftModelForCausalLM):  # type: ignore[misc, unused-ignore]
    """A model with an adapter that is converted when it is saved."""

    def converted(self, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Returns the configuration and the weights of the plain adapter that stands for `state`.

        Args:
            state: All tensors of the model by name, as they are now.
        """
        raise NotImplementedError

    def more_state(self) -> dict[str, Tensor]:
        """Returns what a run needs beside its trained parameters to go on."""
        return {}

    def load_more_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `more_state` gave."""

    def save_pretrained(self, save_directory: str, **arguments: Any) -> None:
        """Saves a plain adapter and, beside it, the state to go on from.

        Args:
            save_directory: The folder of the checkpoint.
            **arguments: As PEFT takes them; a `state_dict` stands before the model's own.
        """
        state = arguments.pop("state_dict", None) or self.state_dict()
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        kept, plain = self.peft_config[ADAPTER], self.converted(state)
        self.peft_config[ADAPTER] = plain[0]
        try:
            super().save_pretrained(save_directory, state_dict=plain[1], **arguments)
        finally:
            self.peft_config[ADAPTER] = kept
        if arguments.get("is_main_process", True):
            tensors = {_TRAINED + name: state[name] for name in trained} | self.more_state()
            tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(tensors, Path(save_directory) / STATE_FILE)

    def load_adapter(
        self, model_id: str, adapter_name: str, is_trainable: bool = False, **arguments: Any
    ) -> Any:
        """Loads an adapter; the one that is trained from the state it was saved with.

        Raises:
            ConfigError: The checkpoint has no such state, or that of another model or tuner.
        """
        if not is_trainable:
            return super().load_adapter(model_id, adapter_name, **arguments)
        path = Path(model_id) / STATE_FILE
        if not path.is_file():
            raise ConfigError(
                f"--resume_from_checkpoint {model_id} has no {STATE_FILE}; expected a checkpoint of a run with the "
                "same tuner settings"
            )
        state = load_file(path)
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        found = {name.removeprefix(_TRAINED) for name in state if name.startswith(_TRAINED)}
        if odd := sorted(found.symmetric_difference(parameters)):
            raise ConfigError(
                f"{path} does not fit this run: {odd[0]} is in one of them alone; resume with the model and the tuner "
                "settings of the checkpoint"
            )
        # first what changes frozen weights, as it is told from the parameters of a fresh start
        self.load_more_state(
            {name: value for name, value in state.items() if not name.startswith(_TRAINED)}
        )
        # an engine may hold parts of them, and takes its own of these wholes
        wholes = {name: state[_TRAINED + name] for name in parameters}
        try:
            self.load_state_dict(wholes, strict=False)
        except RuntimeError as error:
            raise ConfigError(
                f"{path} does not fit this run: {str(error).splitlines()[-1].strip()}; resume with the model and the "
                "tuner settings of the checkpoint"
            ) from error
        return None
