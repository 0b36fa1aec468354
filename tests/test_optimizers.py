"""Optimizers and schedules: groups that decay what should be, curves in closed form, names that all step."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.training_args import OptimizerNames

from sftcore.config import TrainConfig
from sftcore.errors import ConfigError
from sftcore.train import train
from sftcore.train.muon import MuonAndAdamW
from sftcore.train.optimizers import choose_optimizer, has_fused
from sftcore.train.parameters import parameter_groups
from sftcore.train.schedulers import check_schedule, learning_rates, schedule_arguments
from sftcore.tuners import apply_tuner
from training import config_of, losses

STEPS, WARMUP, RATE = 40, 8, 1e-3


def settings(**given: Any) -> TrainConfig:
    return TrainConfig(model="m", dataset=["d"], **given)


def tiny(**given: Any) -> Any:
    """A random Qwen2 of two layers, which has biases, and a head of its own."""
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **given,
        )
    )


def grouped(model: Any, config: TrainConfig, **given: Any) -> dict[str, dict[str, Any]]:
    """The group of each trained parameter, by its name."""
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    groups, _ = parameter_groups(model, config, decayed=decayed, **given)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [(names[id(each)], group) for group in groups for each in group["params"]]
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    # each trained parameter stands in one group, no other in any
    assert sorted(name for name, _ in placed) == sorted(trained)
    return dict(placed)


def test_norms_and_biases_are_not_decayed_and_matrices_are() -> None:
    groups = grouped(tiny(), settings(tuner_type="full", weight_decay=0.3))
    decay = {name: group["weight_decay"] for name, group in groups.items()}
    bare = {name for name in decay if "norm" in name or name.endswith("bias")}
    assert len(bare) == 2 * 2 + 1 + 2 * 3
    assert {name for name, value in decay.items() if value == 0.0} == bare
    assert {decay[name] for name in set(decay) - bare} == {0.3}
    assert all(group["lr"] == 1e-5 for group in groups.values())


def test_a_vector_is_not_decayed_whatever_it_is_called() -> None:
    model = tiny()
    model.gate = torch.nn.Parameter(torch.ones(3))
    assert grouped(model, settings(tuner_type="full"))["gate"]["weight_decay"] == 0.0


def test_parameters_of_a_tuner_learn_at_their_own_rates() -> None:
    config = settings(learning_rate=RATE, lorap_lr_ratio=16.0)
    model = apply_tuner(tiny(), config)
    groups = grouped(model, config)
    rates = {name: group["lr"] for name, group in groups.items()}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {16 * RATE}
    assert {rate for name, rate in rates.items() if ".lora_A." in name} == {RATE}
    # the rate that is logged is that of the first group
    listed, line = parameter_groups(model, config, decayed=set(groups))
    assert listed[0]["lr"] == RATE
    assert "; 14 at 16 times the learning rate" in line


def cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


CURVES: list[tuple[str, dict[str, Any], Callable[[float, int], float]]] = [
    ("constant_with_warmup", {}, lambda progress, step: 1.0),
    ("linear", {}, lambda progress, step: 1 - progress),
    ("cosine", {}, lambda progress, step: cosine(progress)),
    ("cosine_with_min_lr", {}, lambda progress, step: 0.1 + 0.9 * cosine(progress)),
    ("cosine_with_min_lr", {"min_lr": RATE / 4}, lambda progress, step: 0.25 + 0.75 * cosine(progress)),
    ("cosine_with_restarts", {"num_cycles": 2}, lambda progress, step: cosine(2 * progress % 1)),
    ("polynomial", {"power": 2, "lr_end": RATE / 10}, lambda progress, step: 0.1 + 0.9 * (1 - progress) ** 2),
    ("inverse_sqrt", {}, lambda progress, step: math.sqrt(WARMUP / step)),
    (
        "warmup_stable_decay",
        {"decay_type": "linear", "num_decay_steps": 16},
        lambda progress, step: 1.0 if step < 24 else 1 - (step - 24) / 16,
    ),
    # a tenth of the steps where nothing is said
    ("warmup_stable_decay", {}, lambda progress, step: 1.0 if step < 36 else cosine((step - 36) / 4)),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 0.5, "decay_type": "1-sqrt"},
        lambda progress, step: 1.0 if step < 20 else 1 - math.sqrt((step - 20) / 20),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "after_warmup"), CURVES)
@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 8}, {"warmup_ratio": 0.2}, {"warmup_steps": 0.2}]
)
def test_learning_rates_follow_the_closed_form(
    kind: Any,
    arguments: dict[str, Any],
    after_warmup: Callable[[float, int], float],
    warmup: dict[str, Any],
) -> None:
    config = settings(
        learning_rate=RATE,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=json.dumps(arguments),
        **warmup,
    )
    check_schedule(config)
    expected = [
        RATE * (step / WARMUP if step < WARMUP else after_warmup((step - WARMUP) / (STEPS - WARMUP), step))
        for step in range(STEPS)
    ]  # fmt: skip
    assert learning_rates(config, STEPS) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_a_constant_rate_is_constant_and_a_measured_one_is_not_foretold() -> None:
    assert learning_rates(settings(lr_scheduler_type="constant"), 3) == [1e-4] * 3
    config = settings(lr_scheduler_type="reduce_lr_on_plateau")
    check_schedule(config)
    for better, mode in {True: "max", False: "min"}.items():
        given = schedule_arguments(config, 9, greater_is_better=better)
        assert given["lr_scheduler_kwargs"]["mode"] == mode
    with pytest.raises(ConfigError, match="is not known beforehand"):
        learning_rates(config, 9)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "--warmup_steps and --warmup_ratio exclude each other"),
        ({"warmup_steps": 2.5}, "--warmup_steps 2.5 is out of range: expected whole steps"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, "constant_with_warmup has one"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 3}, "--warmup_steps has no effect"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": "a=1"}, "--lr_scheduler_kwargs has no effect"),
        ({"lr_scheduler_kwargs": "[1]"}, "--lr_scheduler_kwargs \\[1\\] is wrong: expected a JSON object"),
        ({"lr_scheduler_kwargs": "min_lr=1"}, "min_lr is unknown to cosine; expected some of num_cycles"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": "min_lr=1,min_lr_rate=2"},
            "does not fit cosine_with_min_lr: Only one of min_lr",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": "lr_end=1"},
            "does not fit polynomial: lr_end",
        ),
        ({"optim": "schedule_free_adamw"}, "pass --lr_scheduler_type constant"),
        ({"optim": "adamw_torhc"}, "--optim adamw_torhc is unknown; .* did you mean adamw_torch\\?"),
        ({"optim": "lbfgs"}, "--optim lbfgs cannot train a language model"),
        ({"optim": "torch.optim.SparseAdam"}, "it takes sparse gradients alone"),
        ({"optim": "lomo"}, "--optim lomo is not supported, as it updates weights inside the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "is not supported"),
        ({"optim": "sgd", "adam_beta2": 0.9}, "--adam_beta2 has no effect with --optim sgd"),
        ({"optim": "adamw_torch", "optim_args": "momentun=1"}, "--optim_args momentun is unknown to adamw_torch"),
        ({"optim": "adamw_torch", "optim_args": "lr=1"}, "what --learning_rate says"),
        ({"optim": "adamw_torch", "optim_args": "beta3=1"}, "adamw_torch has 2 betas"),
        ({"optim_target_modules": ["q_proj"]}, "--optim_target_modules has no effect without --optim galore"),
        ({"neftune_noise_alpha": 0.0}, "--neftune_noise_alpha 0.0 is out of range"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_is_wrong_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config = settings(**given)
        choose_optimizer(config, "cpu")
        check_schedule(config)


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for name, command in {
        "adamw_8bit": "pip install bitsandbytes",
        "paged_lion_8bit": "pip install bitsandbytes",
        "adamw_torch_8bit": "pip install torchao",
        "galore_adamw_8bit": "pip install galore-torch bitsandbytes",
        "apollo_adamw": "pip install apollo-torch bitsandbytes",
        "schedule_free_sgd": "pip install schedulefree",
        "stable_adamw": "pip install torch-optimi",
        "grokadamw": "pip install grokadamw",
    }.items():
        config = settings(optim=name, tuner_type="full", lr_scheduler_type="constant")
        with pytest.raises(ConfigError, match=f"--optim {name} needs .* run {command}$"):
            choose_optimizer(config, "cpu")


def every_optimizer() -> list[str]:
    return [*(str(name.value) for name in OptimizerNames), "auto", "muon", "nadam", "RAdam", "adamax", "asgd",
            "torch.optim.Adam", "torch.optim.Adafactor", "adadelta", "rprop"]  # fmt: skip


@pytest.mark.parametrize("name", every_optimizer())
def test_every_name_steps_or_says_why_not(name: str) -> None:
    free = name.startswith("schedule_free")
    config = settings(
        optim=name,
        tuner_type="full",
        learning_rate=1e-2,
        weight_decay=0.0,
        lr_scheduler_type="constant" if free else "cosine",
        optim_args="rank=4" if name.startswith(("galore", "apollo")) else "{}",
    )
    try:
        choice = choose_optimizer(config, "cpu")
    except ConfigError as error:
        if "is not installed" in str(error):
            pytest.skip(str(error))
        assert "is not supported" in str(error) or "does not run here" in str(error)
        return
    model = tiny()
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    groups, _ = parameter_groups(
        model, config, decayed=decayed, projection=choice.projection, has_muon=name == "muon"
    )
    optimizer = choice.make(groups, **choice.arguments)
    ids = torch.arange(16).reshape(2, 8)
    before = [parameter.clone() for parameter in model.parameters()]
    history = []
    for _ in range(12):
        if free:
            optimizer.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss.detach()))
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    # the bias of keys has no gradient, as softmax does not see it, but for rounding
    assert sum(moved) >= len(moved) - 2
    assert history[-1] < history[0]


def test_muon_updates_hidden_matrices_and_adamw_the_rest() -> None:
    config = settings(optim="muon", tuner_type="full", learning_rate=1e-2, weight_decay=0.1)
    model = tiny()
    groups = grouped(model, config, has_muon=True)
    by_muon = {name for name, group in groups.items() if group["muon"]}
    assert by_muon == {name for name in groups if "_proj.weight" in name}
    adapter = apply_tuner(tiny(), settings())
    names = {
        name for name, group in grouped(adapter, settings(), has_muon=True).items() if group["muon"]
    }
    assert names
    assert all(".lora_" in name for name in names)

    def run(steps: int, resume_at: int | None = None) -> list[Any]:
        net = tiny()
        choice = choose_optimizer(config, "cpu")
        decayed = set(transformers.Trainer.get_decay_parameter_names(None, net))
        made = choice.make(
            parameter_groups(net, config, decayed=decayed, has_muon=True)[0], **choice.arguments
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
        for step in range(steps):
            if step == resume_at:
                state = json.loads(json.dumps(schedule.state_dict(), default=str))
                assert state["last_epoch"] == step
                saved = {"optimizer": made.state_dict(), "schedule": schedule.state_dict()}
                made = choice.make(
                    parameter_groups(net, config, decayed=decayed, has_muon=True)[0],
                    **choice.arguments,
                )
                schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
                made.load_state_dict(saved["optimizer"])
                schedule.load_state_dict(saved["schedule"])
            ids = torch.arange(16).reshape(2, 8)
            net(input_ids=ids, labels=ids).loss.backward()
            made.step()
            schedule.step()
            made.zero_grad()
        return [parameter.detach() for parameter in net.parameters()]

    whole, resumed = run(6), run(6, resume_at=3)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_a_matrix_moves_by_the_update_of_muon_alone() -> None:
    """Against torch's own Muon and AdamW, each with its own parameters."""
    matrix, vector = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(4))
    copies = [torch.nn.Parameter(each.detach().clone()) for each in (matrix, vector)]
    both = MuonAndAdamW(
        [
            {"params": [matrix], "lr": 0.1, "weight_decay": 0.2, "muon": True},
            {"params": [vector], "lr": 0.1, "weight_decay": 0.0, "muon": False},
        ],
        lr=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
    )
    alone = [
        torch.optim.Muon([copies[0]], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([copies[1]], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for _ in range(3):
        for each in (matrix, vector, *copies):
            each.grad = torch.sin(3 * each.detach())
        both.step()
        for optimizer in alone:
            optimizer.step()
    assert torch.equal(matrix, copies[0])
    assert torch.equal(vector, copies[1])


def test_arguments_reach_the_optimizer() -> None:
    config = settings(optim="sgd", optim_args="momentum=0.9,nesterov=true")
    assert choose_optimizer(config, "cpu").arguments == {
        "lr": 1e-4,
        "momentum": 0.9,
        "nesterov": True,
    }
    config = settings(optim="nadam", optim_args='{"decoupled_weight_decay": true}', adam_beta2=0.9)
    arguments = choose_optimizer(config, "cpu").arguments
    assert (arguments["betas"], arguments["decoupled_weight_decay"]) == ((0.9, 0.9), True)
    config = settings(optim="adamw_torch", optim_args="beta1=0.5", adam_epsilon=1e-6)
    arguments = choose_optimizer(config, "cpu").arguments
    assert (arguments["betas"], arguments["eps"]) == ((0.5, 0.95), 1e-6)
    fused = has_fused("cpu")
    assert choose_optimizer(settings(), "cpu").name == (
        "adamw_torch_fused" if fused else "adamw_torch"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adamw_is_fused_on_a_gpu() -> None:
    assert choose_optimizer(settings()).name == "adamw_torch_fused"


def test_galore_projects_linear_layers_but_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tuner_type="full", optim="galore_adamw")
    groups = grouped(tiny(), config, projection={"rank": 4})
    projected = {name for name, group in groups.items() if "rank" in group}
    assert projected == {name for name in groups if "_proj.weight" in name}
    config = settings(
        tuner_type="full",
        optim="galore_adamw",
        optim_target_modules=["q_proj", r".*\.1\.mlp\.up_proj"],
    )
    groups = grouped(tiny(), config, projection={"rank": 4})
    assert {name for name, group in groups.items() if "rank" in group} == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    config = settings(tuner_type="full", optim="galore_adamw", optim_target_modules=["wq"])
    with pytest.raises(
        ConfigError,
        match=r"wq is no trained linear layer .* expected all-linear or some of down_proj",
    ):
        grouped(tiny(), config, projection={"rank": 4})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: name)
    with pytest.raises(ConfigError, match="no effect with --tuner_type lora"):
        choose_optimizer(settings(optim="galore_adamw"), "cpu")


def test_the_logged_rates_of_a_run_are_those_foretold(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        model,
        rows,
        tmp_path,
        tuner_type="lora",
        lr_scheduler_type="warmup_stable_decay",
        warmup_ratio=0.0,
        warmup_steps=2,
        max_steps=8,
        gradient_accumulation_steps=1,
        logging_first_step=False,
        training_arguments='{"full_determinism": false}',
    )
    result = train(config)
    logged = [entry["learning_rate"] for entry in result["log_history"] if "learning_rate" in entry]
    assert logged == pytest.approx(learning_rates(config, 8), rel=1e-9)
    shown = capsys.readouterr().err
    assert (
        "optimizer: adamw_torch_fused; 28 matrices with weight decay 0.1, 0 parameters without"
        in shown
    )


def test_a_measured_rate_falls_where_evaluation_does_not_get_better(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    config = config_of(
        model,
        rows,
        tmp_path,
        tuner_type="lora",
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs="factor=0.5,patience=0,eps=0",
        warmup_ratio=0.0,
        split_dataset_ratio=0.1,
        # weights do not move, so no evaluation is better than the first
        learning_rate=1e-12,
        eval_steps=1,
        save_steps=4,
        max_steps=4,
        gradient_accumulation_steps=1,
    )
    rates = [entry["learning_rate"] for entry in train(config)["log_history"] if "loss" in entry]
    assert rates == pytest.approx([1e-12, 1e-12, 5e-13, 2.5e-13])


@pytest.mark.parametrize(
    "optim", ["muon", "schedule_free_adamw", "galore_adamw", "apollo_adamw", "adamw_torch_8bit"]
)
def test_a_run_with_another_optimizer_learns_and_resumes_exactly(
    model: Path, rows: Path, tmp_path: Path, optim: str
) -> None:
    package = {"muon": "torch", "schedule_free_adamw": "schedulefree", "galore_adamw": "galore_torch",
               "apollo_adamw": "apollo_torch", "adamw_torch_8bit": "torchao"}[optim]  # fmt: skip
    pytest.importorskip(package)
    if optim.startswith(("galore", "apollo")):
        pytest.importorskip("bitsandbytes")
    given: dict[str, Any] = {
        "optim": optim,
        "max_steps": 6,
        "gradient_accumulation_steps": 4,
        "save_steps": 3,
        "save_total_limit": None,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
    }
    if optim.startswith(("galore", "apollo")):
        given["optim_args"] = "rank=4,update_proj_gap=2"
    if optim.startswith("schedule_free"):
        given["lr_scheduler_type"] = "constant"
    whole = losses(train(config_of(model, rows, tmp_path / "whole", **given)))
    assert whole[-1] < whole[0]
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(
        config_of(model, rows, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **given)
    )
    assert losses(resumed)[-3:] == whole[3:]


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_noise_on_embeddings_is_in_training_alone(
    model: Path, rows: Path, tmp_path: Path, tuner: str
) -> None:
    def run(alpha: float | None) -> dict[str, Any]:
        return train(
            config_of(
                model,
                rows,
                tmp_path / f"{alpha}",
                tuner_type=tuner,
                split_dataset_ratio=0.1,
                max_steps=2,
                # weights do not move, so what differs is the noise
                learning_rate=1e-12,
                neftune_noise_alpha=alpha,
                gradient_accumulation_steps=2,
                **({"lora_dropout": 0.0} if tuner == "lora" else {}),
            )
        )

    plain, noisy = run(None), run(200.0)
    assert losses(noisy)[0] != pytest.approx(losses(plain)[0], abs=1e-4)
    assert noisy["best_metric"] == pytest.approx(plain["best_metric"], abs=1e-6)
