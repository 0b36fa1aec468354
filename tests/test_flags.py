"""The flags of both generations of ms-swift, and those of Transformers: each is known, mapped, noted or refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftcore.cli import main
from sftcore.cli.flags import read_flags, read_more_flags
from sftcore.cli.main import _parser, _plain
from sftcore.config import InferConfig, MergeConfig, TrainConfig, build
from sftcore.config.legacy import COMMANDS, TRAIN
from sftcore.config.schema import settings_of
from sftcore.config.training_arguments import NEEDLESS, NOT_YET, REFUSED, RENAMED, convert
from sftcore.config.training_arguments import read_training_arguments as arguments_of_trainer
from sftcore.errors import ConfigError

BASE = ["--model", "m", "--dataset", "d.jsonl"]

# every flag of the two generations that is still the name of a setting
TODAY = """
model dataset val_dataset split_dataset_ratio streaming stopping_strategy shuffle_buffer_size columns template
system max_length truncation_strategy packing packing_length padding_free torch_dtype attn_impl quant_method
quant_bits target_modules target_regex modules_to_save lora_rank lora_alpha lora_dropout init_weights use_dora
use_rslora lorap_lr_ratio per_device_train_batch_size gradient_accumulation_steps num_train_epochs learning_rate
weight_decay adam_beta1 adam_beta2 lr_scheduler_type warmup_ratio max_grad_norm save_steps eval_steps
save_total_limit logging_steps use_liger_kernel neftune_noise_alpha create_checkpoint_symlink add_version
resume_from_checkpoint resume_only_model early_stop_interval model_name model_author use_hf predict_with_generate
metric_for_best_model report_to tuner_type output_dir seed data_seed max_steps optim save_only_model acc_strategy
disable_tqdm gradient_checkpointing bnb_4bit_quant_type bnb_4bit_use_double_quant lora_dtype
"""

OLD = """
model_type model_id_or_path model_revision sft_type train_type freeze_parameters additional_trainable_parameters
tuner_backend template_type add_output_dir_suffix ddp_backend dataset_seed dtype dataset_test_ratio
train_dataset_sample val_dataset_sample check_dataset_strategy custom_train_dataset_path custom_val_dataset_path
self_cognition_sample train_dataset_mix_ratio train_dataset_mix_ds use_loss_scale quantization_bit
bnb_4bit_comp_dtype lora_target_modules lora_dropout_p lora_bias_trainable lora_modules_to_save lora_lr_ratio
use_galore galore_rank galore_update_proj_gap galore_scale deepspeed fsdp fsdp_config batch_size eval_batch_size
dataloader_num_workers preprocess_num_proc lazy_tokenize use_flash_attn test_oom_error logging_dir push_to_hub
hub_model_id hub_token hub_private_repo push_hub_strategy ignore_args_error adapters dataset_num_proc
dataset_shuffle load_from_cache_file cached_dataset interleave_prob strict custom_dataset_info external_plugins
packing_num_proc packing_strategy group_by_length loss_scale enable_thinking sequence_parallel_size ignore_data_skip
"""

INFER = """
model_type model_id_or_path ckpt_dir load_dataset_config show_dataset_sample eval_human merge_lora infer_backend
stream do_sample template_type dtype sft_type use_flash_attn quantization_bit
"""


def flags(*words: str, command: str = "train", config: Any = TrainConfig) -> Any:
    """The settings that `sftcore COMMAND WORDS` gives."""
    parser, _ = _parser()
    known, unknown = parser.parse_known_args([command, *map(_plain, words)])
    known.more_flags = read_more_flags(config, unknown)
    return read_flags(config, known)


def test_every_flag_of_both_generations_is_known() -> None:
    settings = set(settings_of(TrainConfig))
    assert {name for name in TODAY.split() if name not in settings} == set()
    assert {name for name in OLD.split() if name not in TRAIN.all() | settings} == set()
    unknown = {name for name in INFER.split() if name not in COMMANDS["InferConfig"].all()}
    assert unknown == set()
    assert {"max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"} <= set(
        settings_of(InferConfig)
    )


def test_every_old_name_stands_for_a_setting_that_is_there() -> None:
    for command, config in {
        "TrainConfig": TrainConfig,
        "InferConfig": InferConfig,
        "MergeConfig": MergeConfig,
    }.items():
        settings = set(settings_of(config))
        names = COMMANDS[command]
        targets = {*names.renamed.values(), *names.values}
        for old, convert_value in names.converted.items():
            values = {"quantization_bit": "4", "loss_scale": "all", "use_loss_scale": "false"}
            targets |= set(convert_value(values.get(old, "true")))
        assert targets - settings - set(arguments_of_trainer()) == set(), command
        # an old name that is a setting would never be looked up, but for the one told apart by its value
        assert names.all() & settings <= {"freeze_parameters"}


def test_every_argument_of_the_trainer_is_a_setting_handed_on_noted_or_refused() -> None:
    transformers = pytest.importorskip("transformers")
    settings = settings_of(TrainConfig)
    known = arguments_of_trainer()
    there = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
    assert set(known) == set(there)
    handled = {}
    for name, field in there.items():
        homes = [
            kind
            for kind, names in {
                "setting": settings,
                "converted": TRAIN.converted,
                "combined": TRAIN.combined,
                "renamed": RENAMED,
                "needless": NEEDLESS,
                "refused": REFUSED,
                "not yet": NOT_YET,
            }.items()
            if name in names
        ]
        assert len(homes) <= 1 or homes[0] == "setting", (name, homes)
        handled[name] = homes[0] if homes else "handed on"
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        # whatever is handed on takes its own default, also as the word of a flag
        if handled[name] == "handed on":
            assert convert(known[name], default) == default
            if default not in (None, ""):
                assert convert(known[name], str(default)) == default
        if homes and homes[0] in ("refused", "needless", "not yet"):
            quiet = build(TrainConfig, {"model": "m", "dataset": ["d"], name: default}, origin="x")
            assert quiet.training_arguments == "{}"
    on = {name for name, home in handled.items() if home == "handed on"}
    assert {"torch_empty_cache_steps", "ddp_timeout", "full_determinism", "log_level"} <= on
    assert handled["learning_rate"] == handled["optim"] == "setting"


@pytest.mark.parametrize(
    ("words", "expected", "note"),
    [
        (["--sft_type", "full"], {"tuner_type": "full"}, "--sft_type is now --tuner_type"),
        (["--train-type=full"], {"tuner_type": "full"}, "--train_type is now --tuner_type"),
        (["--lora_target_modules", "ALL"], {"target_modules": ["all-linear"]}, "--target_modules all-linear"),
        (["--lora_target_modules", "q_proj,v_proj"], {"target_modules": ["q_proj", "v_proj"]}, "--target_modules"),
        (["--dtype", "AUTO"], {"torch_dtype": "auto"}, "--dtype is now --torch_dtype auto"),
        (["--dtype", "fp16"], {"torch_dtype": "float16"}, "--torch_dtype float16"),
        (["--torch_dtype", "bf16"], {"torch_dtype": "bfloat16"}, "--torch_dtype bf16 is now bfloat16"),
        (["--bf16", "true"], {"torch_dtype": "bfloat16"}, "--bf16 true is now --torch_dtype bfloat16"),
        (["--bf16", "false"], {"torch_dtype": "auto"}, "--bf16 false needs nothing here"),
        (["--use_flash_attn"], {"attn_impl": "flash_attention_2"}, "--attn_impl flash_attention_2"),
        (["--attn_impl", "flash_attn"], {"attn_impl": "flash_attention_2"}, "flash_attention_2"),
        (["--template_type", "AUTO"], {"template": "auto"}, "--template auto"),
        (["--truncation_strategy", "truncation_left"], {"truncation_strategy": "left"}, "is now left"),
        (["--check_dataset_strategy", "discard"], {"on_bad_row": "skip"}, "--on_bad_row skip"),
        (["--strict", "true"], {"on_bad_row": "raise"}, "--on_bad_row raise"),
        (["--batch_size", "4"], {"per_device_train_batch_size": 4}, "--per_device_train_batch_size"),
        (["--eval_batch_size", "4"], {"per_device_eval_batch_size": 4}, "--per_device_eval_batch_size"),
        (["--dataset_test_ratio", "0.2"], {"split_dataset_ratio": 0.2}, "--split_dataset_ratio"),
        (["--lora_dropout_p", "0.1"], {"lora_dropout": 0.1}, "--lora_dropout"),
        (["--custom_dataset_info", "a.json"], {"dataset_info": ["a.json"]}, "--dataset_info"),
        (["--lr_scheduler_type", "wsd"], {"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay"),
        (["--train_dataset_sample", "2000"], {"dataset": ["d.jsonl#2000"]}, "--dataset d.jsonl#2000"),
        (["--train_dataset_sample", "-1"], {"dataset": ["d.jsonl"]}, ""),
        (
            ["--custom_train_dataset_path", "x.jsonl", "z.jsonl", "--train_dataset_sample", "7"],
            {"dataset": ["d.jsonl#3", "x.jsonl#2", "z.jsonl#2"]},
            "--train_dataset_sample is now #N at a data set",
        ),
        (
            ["--custom_val_dataset_path", "y.jsonl", "a.jsonl", "--val_dataset_sample", "4"],
            {"val_dataset": ["y.jsonl#2", "a.jsonl#2"]},
            "--custom_val_dataset_path is now --val_dataset y.jsonl a.jsonl",
        ),
        (
            ["--self_cognition_sample", "500", "--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭"],
            {"dataset": ["d.jsonl", "self-cognition#500"], "model_name": ["小黄", "Xiao Huang"]},
            "--self_cognition_sample is now --dataset d.jsonl self-cognition#500",
        ),
        (
            ["--train_dataset_mix_ratio", "1", "--train_dataset_mix_ds", "ms-bench"],
            {"dataset": ["d.jsonl", "ms-bench"], "mix": [0.5, 0.5]},
            "--mix 0.5 0.5",
        ),
        (
            ["--train_dataset_mix_ratio", "2", "--train_dataset_sample", "10"],
            {"dataset": ["d.jsonl#10", "ms-bench#20"]},
            "ms-bench#20",
        ),
        (
            ["--use_galore", "true", "--galore_rank", "64", "--sft_type", "full"],
            {"optim": "galore_adamw", "optim_args": '{"rank": 64, "update_proj_gap": 50, "scale": 1.0}'},
            "--use_galore is now --optim galore_adamw",
        ),
        (
            ["--enable_thinking", "false", "--chat_template_kwargs", '{"a": 1}'],
            {"chat_template_kwargs": '{"a": 1, "enable_thinking": false}'},
            "--chat_template_kwargs",
        ),
        (["--quantization_bit", "4"], {"quant_method": "bnb", "quant_bits": 4}, "--quant_method bnb --quant_bits 4"),
        (["--freeze_parameters", "0.5", "--sft_type", "full"], {"freeze_parameters_ratio": 0.5}, "_ratio 0.5"),
        (["--lora_modules_to_save", "EMBEDDING", "LN"], {"modules_to_save": ["EMBEDDING", "LN"]}, "--modules_to_save"),
        (["--lora_lr_ratio", "16"], {"lorap_lr_ratio": 16.0}, "--lora_lr_ratio is now --lorap_lr_ratio"),
        (["--test_oom_error", "true"], {"test_oom": True}, "--test_oom_error is now --test_oom"),
        (["--acc_strategy", "sentence"], {"acc_strategy": "seq"}, "--acc_strategy sentence is now seq"),
        (["--evaluation_strategy", "epoch"], {"eval_strategy": "epoch"}, "is now --eval_strategy"),
        (["--adapters", "c"], {"resume_from_checkpoint": "c", "resume_only_model": True}, "--resume_only_model true"),
        (["--lazy_tokenize", "true"], {}, "--lazy_tokenize is not needed: rows are encoded as they are trained"),
        (["--preprocess_num_proc", "4"], {}, "threads of the data engine"),
        (["--sequence_parallel_size", "1"], {}, ""),
        (["--push_to_hub", "False"], {}, ""),
        (["--model_type", "qwen"], {"model": "m"}, "--model_type is not needed"),
        (
            ["--torch_empty_cache_steps", "5", "--ddp_timeout", "9", "--full_determinism"],
            {"training_arguments": '{"torch_empty_cache_steps": 5, "ddp_timeout": 9, "full_determinism": true}'},
            "",
        ),
        (["--loss_scale", "default"], {"train_on": "assistant"}, "--loss_scale default needs nothing here"),
        (["--loss_scale", "last_round"], {"train_on": "last"}, "--loss_scale last_round is now --train_on last"),
        (["--loss_scale", "all"], {"train_on": "all"}, "--train_on all"),
        (
            ["--loss_scale", "last_round+ignore_empty_think"],
            {"train_on": "last", "ignore_empty_think": True},
            "is now --train_on last --ignore_empty_think true",
        ),
        (["--use_loss_scale", "false"], {}, "--use_loss_scale false needs nothing here"),
        (["--resume_from_checkpoint", "true"], {"resume_from_checkpoint": "last"}, "true is now last"),
        (["--resume_from_checkpoint", "False"], {"resume_from_checkpoint": None}, "False needs nothing here"),
        (["--quant_bits", "8"], {"weight_bits": 8}, ""),
        (["--no_cuda", "true"], {"training_arguments": '{"use_cpu": true}'}, "--use_cpu true"),
    ],
)  # fmt: skip
def test_an_old_flag_is_its_setting_with_a_line_of_notice(
    words: list[str],
    expected: dict[str, Any],
    note: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = flags(*BASE, *words)
    assert {name: getattr(config, name) for name in expected} == expected
    notes = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in notes)
    assert len(notes) == len(set(notes))
    assert bool(notes) == bool(note)
    assert note in "\n".join(notes)
    # what stands in the folder of a run is of today, and says nothing when it is taken back
    assert build(TrainConfig, config.to_dict(), origin="args.yaml") == config
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--push_to_hub", "true"], "--push_to_hub is not available yet: sending models to a hub"),
        (["--use_cache", "true"], "--use_cache is not taken: a cache of keys and values"),
        (["--auto_find_batch_size"], "--auto_find_batch_size is not taken: the plan of a run"),
        (["--sft_type", "lora", "--tuner_type", "full"], "--tuner_type and --sft_type say the same (--tuner_type)"),
        (["--sft_typ", "lora"], "unknown flag --sft_typ; did you mean --sft_type?"),
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--torch_empty_cache_step", "1"], "did you mean --torch_empty_cache_steps?"),
        (["--torch_empty_cache_steps", "many"], "--torch_empty_cache_steps is 'many'; expected int or None"),
        (["--log_level", "3", "stray"], "--log_level is ['3', 'stray']; expected str"),
        (["--sft_type", "longlora"], "command line: tuner_type is 'longlora'; expected lora, "),
        (["--training_arguments", '{"seed": 1}'], "--training_arguments seed is a setting; pass --seed"),
        (["--training_arguments", "sed=1"], "--training_arguments sed is no argument of TrainingArguments"),
        (["--training_arguments", "use_cache=true"], "--training_arguments use_cache has no effect: a cache"),
        (["--loss_scale", "react"], "--loss_scale react is not taken: weights by rules for parts of an answer"),
        (["--loss_scale", "all+hermes"], "--loss_scale hermes is not taken"),
        (["--use_loss_scale"], '("loss_scale": 2.0 or "loss": false beside the content of a message)'),
        (["--loss_scale", "all", "--train_on", "last"], "--train_on and --loss_scale say the same"),
        (["--galore_rank", "4"], "--galore_rank has no effect without --use_galore true"),
        (["--val_dataset_sample", "4"], "--val_dataset_sample has no effect without --val_dataset"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", *BASE, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note")]
    assert errors[0].startswith("error: ")
    assert text in errors[0]


def test_a_stray_word_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "stray", *BASE]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown word stray",
        "see sftcore train --help",
    ]


def test_a_file_takes_old_names_and_flags_stand_before_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_id_or_path: m\ncustom_train_dataset_path: [a.jsonl, b.jsonl]\nsft_type: full\n"
        "torch_empty_cache_steps: 3\nddp_timeout: 10\nself_cognition_sample: null\n"
    )
    words = ["--tuner_type", "lora", "--train_dataset_sample", "4", "--ddp_timeout", "20"]
    config = flags("--config", str(file), *words)
    assert (config.model, config.tuner_type) == ("m", "lora")
    assert config.dataset == ["a.jsonl#2", "b.jsonl#2"]
    assert json.loads(config.training_arguments) == {
        "torch_empty_cache_steps": 3,
        "ddp_timeout": 20,
    }
    assert "note: --sft_type is now --tuner_type\n" in capsys.readouterr().err
    values = {"model_id_or_path": "m", "dataset": "d", "sft_type": "full", "adam_epsilon": "1e-6"}
    built = build(TrainConfig, values, origin="code")
    assert (built.model, built.tuner_type, built.adam_epsilon) == ("m", "full", 1e-6)


def test_a_bare_true_in_a_file_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for written, meant in {"true": "last", "false": None, "auto": "auto", "null": None}.items():
        file.write_text(f"model: m\ndataset: d\nresume_from_checkpoint: {written}\n")
        assert flags("--config", str(file)).resume_from_checkpoint == meant


def test_inference_and_merging_take_old_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def infer(*words: str) -> InferConfig:
        return flags(*words, command="infer", config=InferConfig)

    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    for folder, names in {
        adapter: ["config.json", "adapter_config.json"],
        whole: ["config.json"],
    }.items():
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    config = infer("--ckpt_dir", str(adapter), "--do_sample", "true", "--stream", "--top_k", "20")
    assert (config.adapters, config.model) == (str(adapter), None)
    assert (config.temperature, config.top_k) == (0.3, 20)
    config = infer("--ckpt_dir", str(whole), "--infer_backend", "pt", "--do_sample", "false")
    assert (config.adapters, config.model, config.temperature) == (None, str(whole), 0.0)
    config = infer("--model", "m", "--quantization_bit", "4", "--bnb_4bit_quant_type", "fp4")
    assert (config.weight_bits, config.bnb_4bit_quant_type) == (4, "fp4")
    assert infer("--model", "m", "--quant_bits", "0").weight_bits is None
    with pytest.raises(ConfigError, match="--bnb_4bit_quant_type has no effect without"):
        infer("--model", "m", "--quant_bits", "8", "--bnb_4bit_quant_type", "fp4")
    config = infer("--model_type", "smollm2-135m", "--custom_val_dataset_path", "q.jsonl")
    assert (config.model, config.prompts) == ("smollm2-135m", "q.jsonl")
    for words in (["--infer_backend", "vllm"], ["--load_dataset_config", "true"]):
        with pytest.raises(ConfigError, match=f"{words[0]} is not available yet"):
            infer("--model", "m", *words)
    with pytest.raises(ConfigError, match="--do_sample false is --temperature 0 here"):
        infer("--model", "m", "--do_sample", "false", "--temperature", "0.7")
    merged = flags("--ckpt_dir", "c", "--merge_lora", "true", command="merge", config=MergeConfig)
    assert merged.adapters == "c"
    capsys.readouterr()
    main(["merge-lora", "--ckpt_dir", str(tmp_path / "none"), "--device_map", "cpu"])
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "note: --ckpt_dir is now --adapters"
    assert shown[-1].startswith("error: --adapters ")


def test_no_flag_loads_torch_or_transformers() -> None:
    code = (
        "import sys\nfrom sftcore.cli import main\n"
        "assert main(['train', '--model', 'm', '--dataset', 'd', '--torch_empty_cache_steps', 'x']) == 2\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--torch_empty_cache_steps 50" in " ".join(result.stdout.split())
