"""A real tokenizer that knows the control tokens of chat templates, as the models of those templates have them.

A template says little on a foreign tokenizer: its stop tokens are cut into pieces there. Which token is
the eos decides where a turn ends when several control tokens follow an answer, so that follows the
template too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sftcore.data import Encoder

# the eos of the models whose templates write one of these; each stands before those that its templates also hold
KNOWN_EOS = (
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot_id|>",
    "<|eot|>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eom|>",
    "<|EOT|>",
    "</s>",
)
# what a template writes for `eos_token` where the model's own is not known
OTHER_EOS = "<eos>"


def eos_of(source: str) -> str:
    """The eos of the model that a template is made for, as far as its source tells."""
    return next((eos for eos in KNOWN_EOS if eos in source), OTHER_EOS)


class NativeTokenizers:
    """Folders of one tokenizer, a folder for each eos.

    Attributes:
        work: Where the folders are written.
    """

    def __init__(self, shared: Path, work: Path, *templates: Path) -> None:
        """Makes the tokenizer with the control tokens of all templates in the folders `templates`.

        Args:
            shared: The shared data.
            work: An empty folder.
            templates: Folders of `.jinja` files.
        """
        self.work = work
        beside = work / "beside"
        beside.mkdir(parents=True)
        (beside / "eos.jinja").write_text(
            "<s>" + "".join((*KNOWN_EOS, OTHER_EOS)), encoding="utf-8"
        )
        tool = shared / "tools" / "native_tokenizer.py"
        source = shared / "tokenizers" / "smollm2"
        self._first = work / "native"
        subprocess.run(
            [sys.executable, tool, source, self._first, beside, *templates],
            check=True,
            capture_output=True,
        )
        self._opened: dict[str, Encoder] = {}

    def folder(self, eos: str) -> Path:
        """The folder of the tokenizer whose eos is `eos`."""
        folder = self.work / f"eos-{KNOWN_EOS.index(eos) if eos in KNOWN_EOS else 'other'}"
        if not folder.is_dir():
            folder.mkdir()
            (folder / "tokenizer.json").symlink_to(self._first / "tokenizer.json")
            name = "tokenizer_config.json"
            config = json.loads((self._first / name).read_text(encoding="utf-8"))
            config |= {"bos_token": "<s>", "eos_token": eos, "pad_token": eos}
            (folder / name).write_text(json.dumps(config), encoding="utf-8")
        return folder

    def encoder(self, source: str, template: Path) -> Encoder:
        """The encoder of a template on a tokenizer with the right eos.

        Args:
            source: What says which eos; that of the template, or of the one it was made from.
            template: The file.

        Raises:
            TemplateError: The template does not compile.
        """
        eos = eos_of(source)
        if eos not in self._opened:
            self._opened[eos] = Encoder.from_pretrained(self.folder(eos), template="chatml")
        return self._opened[eos].with_template(str(template))
