"""Names of ms-swift and of Transformers become settings, each with one line of notice.

In come values by any name, out go values by the names of settings: first one by one (`rename`), for a file and for
flags alike, then those that depend on each other (`combine`). What is not known stays, for `build` to refuse.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sftcore.config.legacy import COMMANDS, Names, is_true
from sftcore.config.pairs import read_pairs
from sftcore.config.training_arguments import convert, read_training_arguments
from sftcore.errors import ConfigError

Values = dict[str, Any]


def old_names(command: str) -> set[str]:
    """Returns the names that a configuration takes besides its settings; reads Transformers' source for `train`."""
    names = COMMANDS[command].all() if command in COMMANDS else set()
    return names | set(read_training_arguments()) if command == "TrainConfig" else names


def rename(command: str, settings: Mapping[str, Any], values: Mapping[str, Any]) -> Values:
    """Returns values with old names replaced by those of settings, one by one.

    Args:
        command: The name of the configuration.
        settings: Its settings by name.
        values: Values by any name.

    Raises:
        ConfigError: A name is of a feature that is to come, is refused, or says what another one says too.
    """
    if command not in COMMANDS:
        return dict(values)
    names = COMMANDS[command]
    found: Values = {}
    origins: dict[str, str] = {}
    for name, value in values.items():
        for new, given in _renamed(names, settings, name, value).items():
            if new in found:
                raise ConfigError(
                    f"--{origins[new]} and --{name} say the same (--{new}); leave one of them out"
                )
            found[new], origins[new] = given, name
    return found


def _renamed(names: Names, settings: Mapping[str, Any], name: str, value: Any) -> Values:
    """Returns what one name and its value are now; nothing where nothing is needed."""
    if name in settings and name not in names.combined:
        return {name: _value(names, name, name, value)}
    is_old = name in names.all()
    if is_old and value is None:
        return {}
    if name in names.renamed:
        new = names.renamed[name]
        _need(settings, new, name)
        now = _value(names, new, None, value)
        _note(f"--{name} is now --{new}" + (f" {_shown(now)}" if now != value else ""))
        return {new: now}
    if name in names.converted:
        converted = names.converted[name](value)
        for new in converted:
            _need(settings, new, name)
        now = " ".join(f"--{new} {_shown(given)}" for new, given in converted.items())
        _note(f"--{name} {_shown(value)} " + (f"is now {now}" if now else "needs nothing here"))
        return converted
    if name in names.needless:
        _note(f"--{name} is not needed: {names.needless[name]}")
        return {}
    if name in names.not_yet:
        feature, idle = names.not_yet[name]
        if str(value).lower() not in {str(each).lower() for each in idle}:
            raise ConfigError(f"--{name} is not available yet: {feature}; leave it out")
        return {}
    if name in names.refused:
        known = read_training_arguments()
        if name not in known or convert(known[name], value) != known[name].default:
            raise ConfigError(f"--{name} is not taken: {names.refused[name]}; leave it out")
        return {}
    return {name: value}


def _need(settings: Mapping[str, Any], new: str, old: str) -> None:
    # a flag may also stand for an argument of Transformers' Trainer
    if new not in settings and new not in read_training_arguments():
        raise ConfigError(f"--{old} is not available yet: it is --{new} here; leave it out")


def _value(names: Names, setting: str, shown: str | None, value: Any) -> Any:
    """Returns a value by its present name; says so where `shown` names the setting."""
    table = {old.lower(): new for old, new in names.values.get(setting, {}).items()}
    if not table:
        return value
    items = value if isinstance(value, list) else [value]
    now = [table.get(str(item).lower(), item) for item in items]
    if now == items:
        return value
    if shown:
        became = "needs nothing here" if now == [None] else f"is now {_shown(now)}"
        _note(f"--{shown} {_shown(value)} {became}")
    return now if isinstance(value, list) else now[0]


def combine(command: str, settings: Mapping[str, Any], values: Mapping[str, Any]) -> Values:
    """Returns values with the old names that depend on other settings replaced, and Transformers' gathered.

    Args:
        command: The name of the configuration.
        settings: Its settings by name.
        values: Values as `rename` gives them.

    Raises:
        ConfigError: They do not go together.
    """
    if command not in COMMANDS:
        return dict(values)
    found = dict(values)
    for name in [name for name in found if name in COMMANDS[command].combined]:
        if found[name] is None:
            del found[name]
    for step in _STEPS:
        step(found)
    if command == "TrainConfig":
        _gather(settings, found)
    return found


def _model_type(values: Values) -> None:
    if "model_type" not in values:
        return
    name = values.pop("model_type")
    if values.get("model") or values.get("adapters"):
        _note("--model_type is not needed: the files of the model say it")
    else:
        _note("--model_type is now --model")
        values["model"] = name


def _sampling(values: Values) -> None:
    if "do_sample" not in values:
        return
    value = is_true(values.pop("do_sample"))
    if not value and str(values.get("temperature", 0)) not in ("0", "0.0"):
        raise ConfigError("--do_sample false is --temperature 0 here; leave one of them out")
    if not value or "temperature" not in values:
        values["temperature"] = 0.3 if value else 0.0
        shown = f"--temperature {values['temperature']:g}"
        _note(f"--do_sample {str(value).lower()} is now {shown}")
    else:
        _note("--do_sample is not needed: --temperature says it")


def _freezing(values: Values) -> None:
    given = values.get("freeze_parameters")
    word = given[0] if isinstance(given, list) and len(given) == 1 else given
    if given is None or isinstance(word, list) or not re.fullmatch(r"[\d.]+", str(word)):
        return
    del values["freeze_parameters"]
    if not float(str(word)):
        _note("--freeze_parameters 0 needs nothing here")
        return
    _note(f"--freeze_parameters {word} is now --freeze_parameters_ratio {word}")
    values["freeze_parameters_ratio"] = word


def _datasets(values: Values) -> None:
    """Own files, rows drawn and rows mixed in: all of it stands in the names of data sets now."""
    for old, new in {
        "custom_train_dataset_path": "dataset",
        "custom_val_dataset_path": "val_dataset",
    }.items():
        files = words(values.pop(old, []))
        if files:
            values[new] = words(values.get(new) or []) + files
            _note(f"--{old} is now --{new} {_shown(values[new])}")
    for old, new in {
        "train_dataset_sample": "dataset",
        "val_dataset_sample": "val_dataset",
    }.items():
        number = _number(old, values.pop(old, -1))
        if number < 0:
            continue
        names = words(values.get(new) or [])
        if not names:
            raise ConfigError(f"--{old} has no effect without --{new}")
        open_names = [name for name in names if "#" not in name]
        parts = iter(_parts(number, len(open_names)))
        values[new] = [name if "#" in name else f"{name}#{next(parts)}" for name in names]
        _note(f"--{old} is now #N at a data set: --{new} {_shown(values[new])}")
    _mixed_in(values)
    number = _number("self_cognition_sample", values.pop("self_cognition_sample", 0))
    if number > 0:
        values["dataset"] = [*words(values.get("dataset") or []), f"self-cognition#{number}"]
        _note(f"--self_cognition_sample is now --dataset {_shown(values['dataset'])}")


def _mixed_in(values: Values) -> None:
    given = values.pop("train_dataset_mix_ratio", 0)
    if not re.fullmatch(r"\d*\.?\d+", str(given)):
        raise ConfigError(f"--train_dataset_mix_ratio is {given!r}; expected float")
    ratio = float(given)
    others = words(values.pop("train_dataset_mix_ds", None) or ["ms-bench"])
    if ratio <= 0:
        return
    names = words(values.get("dataset") or [])
    drawn = [re.search(r"#(\d+)$", name) for name in names]
    if names and all(drawn):
        total = round(ratio * sum(int(match[1]) for match in drawn if match))
        counts = _parts(total, len(others))
        values["dataset"] = names + [
            f"{other}#{count}" for other, count in zip(others, counts, strict=True)
        ]
        _note(f"--train_dataset_mix_ratio is now --dataset {_shown(values['dataset'])}")
    elif len(names) == 1:
        values["dataset"] = names + others
        share = 1 / (1 + ratio)
        values["mix"] = [share, *[(1 - share) / len(others)] * len(others)]
        shown = " ".join(f"{each:.4g}" for each in values["mix"])
        _note(
            f"--train_dataset_mix_ratio is now --dataset {_shown(values['dataset'])} --mix {shown}"
        )
    else:
        raise ConfigError(
            "--train_dataset_mix_ratio does not say the share of each of several data sets; use --dataset ... "
            f"{' '.join(others)} --mix with a share each"
        )


def _galore(values: Values) -> None:
    given = {
        name.removeprefix("galore_"): values.pop(name)
        for name in ("galore_rank", "galore_update_proj_gap", "galore_scale", "galore_proj_type")
        if name in values
    }
    if not is_true(values.pop("use_galore", False)):
        if given:
            raise ConfigError(
                f"--galore_{next(iter(given))} has no effect without --use_galore true"
            )
        return
    optim = str(values.get("optim") or "auto")
    kind = "adafactor" if "adafactor" in optim else "adamw_8bit" if "8bit" in optim else "adamw"
    if not optim.startswith("galore"):
        values["optim"] = f"galore_{kind}"
    # the defaults of those who type this flag
    arguments = {"rank": 128, "update_proj_gap": 50, "scale": 1.0, **given}
    own = read_pairs("optim_args", _json(values.get("optim_args") or "{}"), '{"rank": 128}')
    values["optim_args"] = json.dumps({**_numbers(arguments), **own})
    _note(f"--use_galore is now --optim {values['optim']} --optim_args '{values['optim_args']}'")


def _thinking(values: Values) -> None:
    if "enable_thinking" not in values:
        return
    value = is_true(values.pop("enable_thinking"))
    text = _json(values.get("chat_template_kwargs") or "{}")
    own = read_pairs("chat_template_kwargs", text, '{"enable_thinking": false}')
    values["chat_template_kwargs"] = json.dumps({**own, "enable_thinking": value})
    _note(f"--enable_thinking is now --chat_template_kwargs '{values['chat_template_kwargs']}'")


_STEPS: tuple[Callable[[Values], None], ...] = (
    _model_type,
    _sampling,
    _freezing,
    _datasets,
    _galore,
    _thinking,
)


def _gather(settings: Mapping[str, Any], values: Values) -> None:
    """Puts arguments of Transformers' Trainer that are no settings into `training_arguments`."""
    unknown = [name for name in values if name not in settings]
    if not unknown:
        return
    known = read_training_arguments()
    own = read_pairs(
        "training_arguments", _json(values.get("training_arguments") or "{}"), '{"project": "x"}'
    )
    for name in unknown:
        if name in known:
            own[name] = convert(known[name], values.pop(name))
    if own:
        values["training_arguments"] = json.dumps(own)


def words(value: Any) -> list[str]:
    """Returns a list of words, also where commas part them or there is one."""
    items = value if isinstance(value, list | tuple) else [value]
    return [part for item in items for part in str(item).split(",") if part]


def _number(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--{name} is {value!r}; expected int") from error


def _numbers(values: Values) -> Values:
    return read_pairs("optim_args", ",".join(f"{name}={each}" for name, each in values.items()), "")


def _parts(total: int, count: int) -> list[int]:
    """Shares a number out evenly, what is left to the first ones."""
    return [total // count + (place < total % count) for place in range(count)] if count else []


def _json(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(_shown(each) for each in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _note(text: str) -> None:
    """Says once, for all ranks, what became of a name."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"note: {text}\n")
