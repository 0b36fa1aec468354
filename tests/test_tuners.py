"""Tuners: what they train, and that what they save is plain."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from sftcore.config import InferConfig, MergeConfig, TrainConfig
from sftcore.errors import ConfigError
from sftcore.export import merge
from sftcore.infer.generate import Chat
from sftcore.train.parameters import parameter_groups
from sftcore.tuners import (
    apply_tuner,
    check_engine,
    describe_parameters,
    learning_rate_factors,
)
from tiny_runs import make_model
from training import config_of, losses
from tuned import logits_of, tune

PROJECTIONS = "(q|k|v|o|gate|up|down)_proj"
LORA = rf"layers\.\d\.\w+\.{PROJECTIONS}\.lora_[AB]\.default\.weight$"
# settings, and the names of all parameters that they train
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({}, LORA),
    "rslora-gaussian": ({"use_rslora": True, "init_weights": "gaussian"}, LORA),
    "dora": ({"use_dora": True}, LORA[:-1].replace("lora_[AB]", "lora_(A|B|magnitude_vector)")),
    "lora-plus": ({"lorap_lr_ratio": 4.0}, LORA),
    "pissa": ({"init_weights": "pissa", "learning_rate": 3e-3}, LORA),
    "pissa-niter": (
        {"init_weights": "pissa_niter_2", "use_rslora": True, "learning_rate": 3e-3},
        LORA,
    ),
    "olora": ({"init_weights": "olora", "learning_rate": 3e-3}, LORA),
    "norms": ({"target_modules": ["q_proj", "LN"]}, r"q_proj\.lora_|norm\.modules_to_save"),
    "embedding-whole": (
        {"target_modules": ["v_proj"], "modules_to_save": ["EMBEDDING"]},
        r"v_proj\.lora_|embed_tokens\.modules_to_save|lm_head\.modules_to_save",
    ),
    "embedding-lora": (
        {"target_modules": ["EMBEDDING", "q_proj"]},
        r"q_proj\.lora_|lora_embedding",
    ),
    "adalora": ({"tuner_type": "adalora"}, r"_proj\.lora_[ABE]\.default$"),
    "sora": ({"tuner_type": "sora"}, r"lora_A.*weight$|lora_B.*(original|gate)$"),
    "ia3": ({"tuner_type": "ia3"}, r"_proj\.ia3_l\.default$"),
    "vera": ({"tuner_type": "vera", "vera_rank": 16}, r"_proj\.vera_lambda_[bd]\.default$"),
    "oft": ({"tuner_type": "oft", "oft_block_size": 8}, r"_proj\.oft_R\.default\.weight$"),
    "boft": ({"tuner_type": "boft"}, r"_proj\.boft_[Rs]\.default$"),
    "loha": ({"tuner_type": "loha"}, r"_proj\.hada_w\d_[ab]\.default$"),
    "lokr": ({"tuner_type": "lokr"}, r"_proj\.lokr_"),
    "hra": ({"tuner_type": "hra"}, r"_proj\.hra_u\.default$"),
    "miss": ({"tuner_type": "miss"}, r"_proj\.miss_block\.default$"),
    "fourierft": (
        {"tuner_type": "fourierft", "fourier_n_frequency": 64, "fourier_scaling": 30.0},
        r"_proj\.fourierft_spectrum\.default$",
    ),
    "full": ({"tuner_type": "full"}, r"."),
    "freeze": (
        {"tuner_type": "freeze", "trainable_parameters": ["model.layers.1."]},
        r"layers\.1\.",
    ),
    "freeze-ratio": (
        {
            "tuner_type": "freeze",
            "freeze_parameters_ratio": 0.96,
            "freeze_parameters_regex": "mlp",
        },
        r"layers\.1\.(self_attn|input|post)|^model\.norm",
    ),
}


@pytest.fixture(scope="module")
def rows(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows, so that a few steps learn them."""
    file = tmp_path_factory.mktemp("few") / "rows.jsonl"
    file.write_text("\n".join(rows.read_text(encoding="utf-8").splitlines()[:4]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), shared_data / "tokenizers" / "minimind")


def settings_of(model: Path, rows: Path, output: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "tuner_type": "lora",
        "max_steps": 6,
        "save_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "warmup_ratio": 0.0,
    }
    if settings.get("tuner_type", "lora") in ("lora", "adalora", "sora"):
        given["lora_dropout"] = 0.0
    return config_of(model, rows, output, **{**given, **settings})


def load(folder: Path | str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_a_tuner_trains_what_it_names_and_saves_it_plainly(
    model: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    settings, pattern = CASES[name]
    tuned = tune(settings_of(model, rows, tmp_path / "run", **settings))
    assert tuned.losses[1] < tuned.losses[0]
    names = {name for name, _ in tuned.model.named_parameters()}
    assert tuned.trained() == {name for name in names if re.search(pattern, name)}
    # what two modules share is one parameter, and two tensors
    shared = {name for name in tuned.before if name.startswith("lm_head") or ".lm_head." in name}
    assert tuned.changed() - shared == tuned.trained() - shared
    expected = logits_of(tuned.model)
    if (tuned.checkpoint / "adapter_config.json").is_file():
        plain = peft.PeftModel.from_pretrained(load(model), tuned.checkpoint)
        torch.testing.assert_close(logits_of(plain), expected, rtol=1e-4, atol=1e-5)
        folder: Path | str = merge(
            MergeConfig(adapters=str(tuned.checkpoint), output_dir=str(tmp_path / "merged"))
        )
    else:
        folder = tuned.checkpoint
    torch.testing.assert_close(logits_of(load(folder)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        (
            {"layers_to_transform": [1], "exclude_modules": ["mlp.down_proj"]},
            r"layers\.1\.\w+\.(q|k|v|o|gate|up)_proj\.",
        ),
        ({"target_regex": r"model\.layers\.0\..*\.[kv]_proj"}, r"layers\.0\..*(k|v)_proj\."),
        ({"target_modules": ["DEFAULT"]}, r"(q|v)_proj\."),
        ({"target_modules": ["ALL"], "exclude_modules": ["mlp"]}, r"(q|k|v|o)_proj\."),
        (
            {"target_modules": ["self_attn.o_proj", "model.layers.0.mlp.up_proj"]},
            r"o_proj\.|0.*up_proj",
        ),
        (
            {"modules_to_save": ["norm"], "target_modules": ["q_proj"]},
            r"q_proj\.lora_|model\.norm\.",
        ),
        ({"init_weights": "orthogonal"}, PROJECTIONS),
    ],
)
def test_names_choose_modules(
    model: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], pattern: str
) -> None:
    tuned = apply_tuner(load(model), settings_of(model, rows, tmp_path, **settings))
    parameters = dict(tuned.named_parameters())
    adapter = {name for name in parameters if ".lora_" in name or ".modules_to_save." in name}
    assert adapter == {name for name, p in parameters.items() if p.requires_grad}
    expected = {name for name in parameters if re.search(pattern, name)}
    assert {_module(name) for name in adapter} == {_module(name) for name in expected}
    torch.testing.assert_close(logits_of(tuned), logits_of(load(model)))


def _module(name: str) -> str:
    return re.split(r"\.(lora_|base_layer|modules_to_save|original_module)", name)[0]


@pytest.mark.parametrize("name", ["adalora", "pissa-niter", "embedding-whole", "embedding-lora"])
def test_a_resumed_run_equals_the_uninterrupted_one_with_every_kind_of_state(
    model: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    whole = settings_of(model, rows, tmp_path / "whole", **CASES[name][0], save_steps=3)
    first = tune(whole)
    middle = str(tmp_path / "whole" / "checkpoint-3")
    resumed = tune(replace(whole, output_dir=str(tmp_path / "on"), resume_from_checkpoint=middle))
    assert losses(resumed.result) == losses(first.result)
    after = resumed.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in first.model.state_dict().items())


def test_a_start_that_was_taken_out_of_the_weights_is_found_again_from_another_start(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    tuned = tune(settings_of(model, rows, tmp_path, init_weights="pissa_niter_0"))
    torch.manual_seed(7)
    other = apply_tuner(load(model), settings_of(model, rows, tmp_path, init_weights="pissa"))
    other.load_adapter(str(tuned.checkpoint), "default", is_trainable=True)
    torch.testing.assert_close(logits_of(other), logits_of(tuned.model), rtol=1e-4, atol=1e-5)


def test_adalora_ends_at_its_target_rank_and_keeps_singular_vectors_orthogonal(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    runs = {}
    for weight in (0.0, 5.0):
        runs[weight] = tune(
            settings_of(
                model,
                rows,
                tmp_path / f"{weight}",
                tuner_type="adalora",
                adalora_init_r=6,
                adalora_target_r=2,
                adalora_tinit=1,
                adalora_tfinal=2,
                adalora_orth_reg_weight=weight,
                gradient_accumulation_steps=2,
                adalora_deltaT=2,
                logging_steps=1,
            )
        )
    history = [entry for entry in runs[5.0].result["log_history"] if "loss" in entry]
    ranks = [entry["adalora_mean_rank"] for entry in history]
    assert ranks[0] == 6.0
    assert ranks[-1] == pytest.approx(2.0)
    distances = []
    for weight, tuned in runs.items():
        tuned.model.peft_config["default"].orth_reg_weight = 1.0
        distances.append(tuned.model.numbers()["adalora_orth_loss"])
        config = json.loads((tuned.checkpoint / "adapter_config.json").read_text())
        assert config["orth_reg_weight"] == weight
        assert sum(sum(kept) for kept in config["rank_pattern"].values()) == 2 * 14
    assert distances[1] < 0.9 * distances[0]


def test_adalora_refuses_a_schedule_that_the_run_has_no_steps_for(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    settings = {"tuner_type": "adalora", "adalora_tinit": 4, "adalora_tfinal": 2}
    with pytest.raises(ConfigError, match="leave none of the 6 steps"):
        tune(settings_of(model, rows, tmp_path / "output", **settings))
    assert not (tmp_path / "output").exists()


def test_lora_plus_gives_b_its_own_learning_rate(model: Path, rows: Path, tmp_path: Path) -> None:
    config = settings_of(model, rows, tmp_path, lorap_lr_ratio=16.0, target_modules=["q_proj"])
    tuned = apply_tuner(load(model), config)
    factors = learning_rate_factors(tuned, config)
    assert set(factors) == {name for name, _ in tuned.named_parameters() if ".lora_B." in name}
    groups, _ = parameter_groups(tuned, config, decayed=set())
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    rate = config.effective_learning_rate
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(rate * (16 if ".lora_B." in name else 1))


def test_an_adapter_has_the_dtype_that_is_asked_for(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    for dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        base = load(model).to(torch.bfloat16)
        tuned = apply_tuner(base, settings_of(model, rows, tmp_path, lora_dtype=dtype))
        trained = [p for p in tuned.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {expected}


def test_the_table_counts_what_is_trained(model: Path, rows: Path, tmp_path: Path) -> None:
    config = settings_of(model, rows, tmp_path, target_modules=["q_proj", "LN"])
    lines = describe_parameters(apply_tuner(load(model), config)).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert cells["q_proj"] == ["2", "32", "x", "32", "1,024", "0.46%"]
    assert cells["norm"] == ["1", "32", "32", "0.01%"]
    assert cells["all"][0] == "1,184"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            "names no module of this model; expected some of down_proj",
        ),
        ({"target_modules": ["self_attn"]}, "is no linear layer or embedding of this model"),
        ({"target_modules": ["lm_head"]}, "shares its weight with model.embed_tokens"),
        ({"target_regex": "layers"}, "matches no linear layer"),
        ({"modules_to_save": ["nrm"]}, "--modules_to_save nrm names no module"),
        ({"exclude_modules": ["all"]}, "--exclude_modules all names no module"),
        ({"layers_to_transform": [2]}, "--layers_to_transform 2 is out of range"),
        ({"exclude_modules": ["self_attn"], "target_modules": ["q_proj"]}, "leaves no module"),
        ({"target_modules": ["EMBEDDING"], "use_dora": True}, "the two would have a norm each"),
        ({"tuner_type": "boft", "boft_n_butterfly_factor": 2}, "has no effect without the CUDA"),
        ({"exclude_modules": ["norm"]}, "--exclude_modules norm has no effect"),
        (
            {"target_modules": ["EMBEDDING"], "init_weights": "olora"},
            "starts no adapter on the embedding",
        ),
        ({"lora_bias": "all"}, "--lora_bias all has no effect"),
        (
            {"tuner_type": "sora", "target_modules": ["EMBEDDING"]},
            "puts no adapter on the embedding",
        ),
        ({"tuner_type": "ia3", "modules_to_save": ["EMBEDDING"]}, "shares its weight"),
        ({"tuner_type": "freeze", "freeze_parameters": ["layers.0"]}, "begins no name"),
        ({"tuner_type": "freeze", "trainable_parameters_regex": "q_prj"}, "is found in no name"),
        ({"tuner_type": "freeze", "freeze_parameters": ["model"]}, "all parameters are frozen"),
        ({"tuner_type": "freeze", "freeze_parameters_ratio": 0.1}, "nothing would be frozen"),
    ],
)
def test_a_name_that_fits_nothing_is_refused(
    model: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_tuner(load(model), settings_of(model, rows, tmp_path, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tuner_type": "full", "lora_rank": 4},
            "--lora_rank has no effect without --tuner_type lora, ",
        ),
        ({"tuner_type": "vera", "lora_rank": 4}, "--lora_rank has no effect without"),
        ({"vera_rank": 4}, "--vera_rank has no effect without --tuner_type vera"),
        ({"fourier_scaling": 4.0}, "has no effect without --tuner_type fourierft"),
        ({"sora_lambda": 4.0}, "--sora_lambda has no effect without --tuner_type sora"),
        ({"freeze_parameters": ["a"]}, "has no effect without --tuner_type full or freeze"),
        ({"tuner_type": "freeze"}, "freezes nothing yet"),
        ({"init_weights": "eva"}, "reads activations"),
        ({"init_weights": "pisa"}, "--init_weights pisa is unknown; expected one of true"),
        ({"init_weights": "pissa", "use_dora": True}, "exclude each other"),
        ({"init_weights": "orthogonal", "lora_rank": 3}, "--lora_rank 3 is odd"),
        ({"init_weights": "loftq"}, "has no effect without --quant_bits 4"),
        ({"tuner_type": "sora", "init_weights": "olora"}, "has no effect with --tuner_type sora"),
        ({"target_regex": "["}, "--target_regex [ is no regular expression"),
        ({"target_regex": "a", "target_modules": ["q_proj"]}, "exclude each other"),
        ({"tuner_type": "adalora", "adalora_target_r": 13}, "at most --adalora_init_r 12"),
        ({"quant_method": "bnb", "quant_bits": 0}, "has no effect with --quant_bits 0"),
        ({"quant_bits": 3}, "--quant_bits 3 is out of range: expected 4, 8 or 0"),
        ({"quant_method": "bnb", "quant_bits": 8, "bnb_4bit_quant_type": "fp4"}, "has no effect"),
        ({"quant_method": "bnb", "tuner_type": "full"}, "cannot be used with --tuner_type full"),
        ({"quant_method": "bnb", "init_weights": "pissa"}, "which --quant_bits 4 then rounds"),
    ],
)
def test_a_setting_without_effect_is_refused(
    model: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = {"tuner_type": "lora", **settings}
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(model, rows, tmp_path, **given)


def test_tuners_that_an_engine_cannot_train_are_refused(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    for tuner in ("adalora", "sora"):
        config = settings_of(model, rows, tmp_path, tuner_type=tuner)
        check_engine(config, "ddp")
        with pytest.raises(ConfigError, match="cannot be trained with DeepSpeed"):
            check_engine(config, "deepspeed")
    check_engine(settings_of(model, rows, tmp_path), "deepspeed")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"
)
def test_a_missing_package_is_named(model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        tune(settings_of(model, rows, tmp_path, quant_method="bnb"))


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
@pytest.mark.parametrize(
    "settings",
    [
        {"quant_bits": 4},
        {"quant_bits": 8},
        {"quant_bits": 4, "init_weights": "loftq", "target_modules": ["q_proj", "down_proj"]},
        {"quant_bits": 4, "tuner_type": "sora", "bnb_4bit_quant_type": "fp4"},
        {"quant_bits": 4, "tuner_type": "adalora"},
    ],
    ids=["4-bit", "8-bit", "loftq", "sora", "adalora"],
)
def test_an_adapter_is_trained_beside_quantized_weights(
    model: Path, rows: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    import bitsandbytes

    config = settings_of(model, rows, tmp_path, **settings)
    tuned = tune(config)
    assert tuned.losses[1] < tuned.losses[0]
    kind = bitsandbytes.nn.Linear8bitLt if config.weight_bits == 8 else bitsandbytes.nn.Linear4bit
    layer = tuned.model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.get_base_layer(), kind)
    assert tuned.changed() == tuned.trained()
    base = load_quantized(model, config)
    plain = peft.PeftModel.from_pretrained(base, tuned.checkpoint)
    torch.testing.assert_close(logits_of(plain), logits_of(tuned.model), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
def test_loftq_starts_nearer_to_the_original_weights(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    expected = logits_of(load(model))
    distances = []
    for start in ("true", "loftq"):
        config = settings_of(model, rows, tmp_path, quant_method="bnb", init_weights=start)
        tuned = apply_tuner(load_quantized(model, config), config)
        distances.append(float((logits_of(tuned) - expected).norm()))
    assert distances[1] < 0.9 * distances[0]


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
def test_inference_quantizes_the_base_as_training_did(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bitsandbytes

    tuned = tune(settings_of(model, rows, tmp_path, quant_bits=4, bnb_4bit_quant_type="fp4"))
    capsys.readouterr()

    def layer_of(**settings: Any) -> tuple[Any, Any]:
        chat = Chat(InferConfig(**settings))
        base = chat.model.get_base_model() if "adapters" in settings else chat.model
        layer = base.model.layers[0].self_attn.q_proj
        return chat, layer.get_base_layer() if "adapters" in settings else layer

    checkpoint = str(tuned.checkpoint)
    chat, layer = layer_of(adapters=checkpoint)
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_type == "fp4"
    assert "weights are loaded in 4 bits, as when" in capsys.readouterr().err
    torch.testing.assert_close(logits_of(chat.model), logits_of(tuned.model), rtol=1e-3, atol=1e-4)
    chat, layer = layer_of(adapters=checkpoint, quant_bits=0)
    assert type(layer) is torch.nn.Linear
    _, layer = layer_of(model=str(model), quant_bits=8)
    assert isinstance(layer, bitsandbytes.nn.Linear8bitLt)
    assert capsys.readouterr().err == ""


def load_quantized(model: Path, config: TrainConfig) -> Any:
    from sftcore.models import load_model
    from sftcore.models.quantization import prepare_quantized, quantization_config

    settings = quantization_config(config, torch.float32)
    return prepare_quantized(load_model(model, quantization_config=settings))
