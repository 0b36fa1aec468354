"""In how many bits the frozen weights lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sftcore.config.ranges import check_effects, check_range
from sftcore.errors import ConfigError

_TUNERS = ("lora", "adalora", "sora", "ia3", "vera", "oft")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Quantization. In how many bits the frozen weights lie (QLoRA)."""

    quant_method: Literal["bnb"] | None = None
    """Quantizes the weights beside an adapter as they are loaded, with bitsandbytes (Dettmers et al. 2023)."""
    quant_bits: int | None = None
    """Bits of a weight: 4 or 8; 4 where --quant_method is given."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The values that 4 bits stand for."""
    bnb_4bit_use_double_quant: bool = True
    """Quantizes the scales of 4-bit weights too."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The dtype that 4-bit weights are multiplied in; that of --torch_dtype where not given."""

    def _check_quantization(self, tuner: Any) -> None:
        is_quantized = self.quant_method is not None
        check_effects(
            self, QuantizationConfig, {"quant_bits": (is_quantized, "--quant_method bnb")}
        )
        bits = self.quant_bits or 4
        check_range("quant_bits", bits, "4 or 8", holds=bits in (4, 8))
        four = is_quantized and bits == 4, "--quant_method bnb --quant_bits 4"
        names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
        check_effects(self, QuantizationConfig, dict.fromkeys(names, four))
        if is_quantized and tuner.tuner_type not in _TUNERS:
            raise ConfigError(
                f"--quant_method {self.quant_method} cannot be used with --tuner_type {tuner.tuner_type}; expected "
                f"one of {', '.join(_TUNERS)}, which leave quantized weights as they are"
            )
        if is_quantized and tuner.changes_base:
            raise ConfigError(
                f"--init_weights {tuner.init_weights} changes the weights, which --quant_method "
                f"{self.quant_method} then rounds; --init_weights loftq starts from quantized weights"
            )
        if tuner.init_weights == "loftq" and not four[0]:
            raise ConfigError("--init_weights loftq has no effect without " + four[1])
