"""In how many bits the frozen weights lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sftcore.config.ranges import check_effects, check_range
from sftcore.errors import ConfigError

_TUNERS = ("lora", "adalora", "sora", "ia3", "vera", "oft")
_FOUR_BITS = "--quant_bits 4"


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Quantization. In how many bits the frozen weights lie (QLoRA)."""

    quant_method: Literal["bnb"] | None = None
    """What quantizes the frozen weights as they are loaded: bnb, which is bitsandbytes (Dettmers et al. 2023), also
    where --quant_bits alone is given."""
    quant_bits: int | None = None
    """Bits of a frozen weight: 4 or 8, or 0 for whole weights; 4 where --quant_method alone is given. Inference takes
    over how the checkpoint was trained, unless one of these says otherwise."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The values that 4 bits stand for."""
    bnb_4bit_use_double_quant: bool = True
    """Quantizes the scales of 4-bit weights too."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype that 4-bit weights are multiplied in; that of --torch_dtype where not given."""

    @property
    def weight_bits(self) -> int | None:
        """Bits of a quantized weight; None where weights are whole."""
        if self.quant_bits is None:
            return None if self.quant_method is None else 4
        return self.quant_bits or None

    def _check_quantization(self) -> None:
        bits = self.quant_bits
        check_range("quant_bits", bits, "4, 8 or 0", holds=bits in (None, 0, 4, 8))
        if self.quant_method is not None and bits == 0:
            raise ConfigError(
                f"--quant_method {self.quant_method} has no effect with --quant_bits 0"
            )
        four = self.weight_bits == 4, _FOUR_BITS
        names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
        check_effects(self, QuantizationConfig, dict.fromkeys(names, four))

    def _check_quantized_tuner(self, tuner: Any) -> None:
        """Keeps quantized weights from a tuner that would change them."""
        bits = self.weight_bits
        if bits and tuner.tuner_type not in _TUNERS:
            raise ConfigError(
                f"--quant_bits {bits} cannot be used with --tuner_type {tuner.tuner_type}; expected one of "
                f"{', '.join(_TUNERS)}, which leave quantized weights as they are"
            )
        if bits and tuner.changes_base:
            raise ConfigError(
                f"--init_weights {tuner.init_weights} changes the weights, which --quant_bits {bits} then rounds; "
                "--init_weights loftq starts from quantized weights"
            )
        if tuner.init_weights == "loftq" and bits != 4:
            raise ConfigError(f"--init_weights loftq has no effect without {_FOUR_BITS}")
