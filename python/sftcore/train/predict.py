"""Answers that the model in training gives: to evaluation rows, to be scored, and to prompts, to be looked at.

A row is asked with the tokens that stand before its last trained span, which is what inference makes of the same
conversation, and what it trains there is the reference. Ranks share the questions and each knows all answers.
Random numbers are put back, so a run with answers trains as one without.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftcore.config import TrainConfig
from sftcore.data import BatchLoader, Encoder
from sftcore.data.prompts import Message, read_prompts, user_message
from sftcore.errors import ConfigError
from sftcore.models.generation import generate_answers, generation_config
from sftcore.train.examples import single_examples
from sftcore.train.loaders import say
from sftcore.train.metrics import TextScores

if TYPE_CHECKING:
    from sftcore.train.distributed.engine import Engine

PREDICTIONS = "predictions"
GENERATIONS_FILE = "generations.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the model is asked.

    Attributes:
        prompt: Token ids, with the generation prompt at their end.
        reference: The answer that the row has; None where there is none to compare with.
        place: The file and line of the row; None for a prompt of the user.
    """

    prompt: list[int]
    reference: str | None = None
    place: tuple[str, int] | None = None


class Predictor:
    """Answers the same questions at each evaluation."""

    def __init__(
        self, config: TrainConfig, loader: BatchLoader, engine: Engine, folder: Path
    ) -> None:
        """Reads the questions.

        Args:
            config: The settings of the run.
            loader: Gives the evaluation rows, from their start.
            engine: Knows the other ranks.
            folder: The run folder.

        Raises:
            ConfigError: No evaluation row has a question, or a package is missing.
            FileNotFoundError: A file of prompts is missing.
            RowError: A file of prompts is wrong.
        """
        self.config = config
        self.encoder = loader.encoder
        self.engine = engine
        self.folder = folder
        self.generation = generation_config(self.encoder, config)
        self.samples = read_samples(config.sample_prompts, self.encoder)
        if config.num_sample_generations is not None:
            self.samples = self.samples[: config.num_sample_generations]
        wanted = 0 if config.sample_prompts else config.num_sample_generations or 0
        if config.predict_with_generate:
            predicted = loader.num_rows if config.predict_rows == -1 else config.predict_rows
            wanted = max(wanted, predicted)
        rows = read_questions(loader, wanted, engine) if wanted else []
        if wanted and not rows:
            raise ConfigError(
                "no evaluation row has a question before what it trains, so there is nothing to answer; leave out "
                "--predict_with_generate, and pass --sample_prompts in place of --num_sample_generations"
            )
        if not config.sample_prompts:
            self.samples = rows[: config.num_sample_generations or 0]
        self.rows = rows[:predicted] if config.predict_with_generate else []
        self.scores = TextScores([row.reference or "" for row in self.rows]) if self.rows else None
        if self.rows and engine.world.is_first:
            say(self._describe(loader))

    def _describe(self, loader: BatchLoader) -> str:
        assert self.scores is not None
        more = ""
        if len(self.rows) < loader.num_rows:
            more = f" of {loader.num_rows:,} (--predict_rows)"
        return (
            f"predictions: {len(self.rows):,}{more} evaluation rows are answered at each evaluation, with up to "
            f"{self.config.max_new_tokens:,} tokens each; BLEU by sacrebleu's {self.scores.tokenizer} tokenizer"
        )

    def answer(self, model: Any, step: int) -> dict[str, float]:
        """Answers all questions, writes and shows the answers, and returns the scores, if there are any.

        Args:
            model: In evaluation mode.
            step: The optimizer steps so far.
        """
        # samples that are evaluation rows are the first of them
        own = self.samples if self.config.sample_prompts else self.samples[len(self.rows) :]
        answers = self._answers(model, [*self.rows, *own])
        of_rows = answers[: len(self.rows)]
        of_samples = answers[len(self.rows) :] if self.config.sample_prompts else answers
        if self.engine.world.is_first:
            self._show_samples(of_samples[: len(self.samples)], step)
        if self.scores is None:
            return {}
        references = [row.reference or "" for row in self.rows]
        by_row = [
            self.scores.of_row(answer, reference)
            for answer, reference in zip(of_rows, references, strict=True)
        ]
        if self.engine.world.is_first:
            self._write_predictions(of_rows, by_row, step)
        return self.scores.of_all(of_rows, references, by_row)

    def _answers(self, model: Any, questions: list[Question]) -> list[str]:
        """Returns the answers to all questions; each rank generates its share of them."""
        config, world = self.config, self.engine.world
        ranks = world.data_size
        numbers = list(range(world.data_rank, len(questions), ranks))
        # where weights are shared among ranks, all of them generate equally often
        share = numbers + [0] * (-(-len(questions) // ranks) - len(numbers))
        found = generate_answers(
            model,
            [questions[number].prompt for number in share],
            self.generation,
            batch_size=config.per_device_eval_batch_size or config.per_device_train_batch_size,
            seed=config.seed,
        )
        texts = [self.encoder.decode(ids).strip() for ids in found]
        own = list(zip(numbers, texts, strict=False))
        return [text for _, text in sorted(self.engine.gather_objects(own))]

    def _write_predictions(
        self, answers: list[str], scores: list[dict[str, float]], step: int
    ) -> None:
        folder = self.folder / PREDICTIONS
        folder.mkdir(exist_ok=True)
        lines = []
        for row, answer, score in zip(self.rows, answers, scores, strict=True):
            path, line = row.place or (None, None)
            lines.append(
                {
                    "path": path,
                    "line": line,
                    "prompt": self._text(row),
                    "reference": row.reference,
                    "prediction": answer,
                    **score,
                }
            )
        _write_lines(folder / f"step-{step}.jsonl", lines)

    def _show_samples(self, answers: list[str], step: int) -> None:
        if not answers:
            return
        path = self.folder / GENERATIONS_FILE
        before = []
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                before = [json.loads(line) for line in file]
        lines = []
        for sample, answer in zip(self.samples, answers, strict=True):
            given = {} if sample.reference is None else {"reference": sample.reference}
            prompt = self._text(sample)
            lines.append({"step": step, "prompt": prompt, **given, "generation": answer})
            asked = " ".join(self.encoder.decode(sample.prompt).split())
            say(f"step {step}, … {asked[-200:]}\n  → {_short(answer, 600)}")
        # a run that goes on from a checkpoint comes to the same step again
        _write_lines(path, [line for line in before if line["step"] < step] + lines)

    def _text(self, question: Question) -> str:
        return self.encoder.decode(question.prompt, skip_special_tokens=False)


def read_samples(prompts: list[str], encoder: Encoder) -> list[Question]:
    """Returns the prompts of a user, those in files among them.

    Raises:
        FileNotFoundError: A `.txt` or `.jsonl` file is missing.
        RowError: A file of prompts is wrong.
    """
    conversations: list[list[Message]] = []
    for prompt in prompts:
        if prompt.endswith((".txt", ".jsonl")):
            conversations += read_prompts(Path(prompt))
        else:
            conversations.append([user_message(prompt)])
    return [Question(prompt=_encode(messages, encoder)) for messages in conversations]


def _encode(messages: list[Message], encoder: Encoder) -> list[int]:
    ids: list[int]
    if not encoder.has_chat_template and len(messages) == 1:
        # a model without a template goes on with the text
        ids = encoder.tokenize(str(messages[0]["content"]), add_special_tokens=True).tolist()
    else:
        ids = encoder.encode_prompt(messages).tolist()
    return ids


def read_questions(loader: BatchLoader, num_rows: int, engine: Engine) -> list[Question]:
    """Returns the questions of the first evaluation rows, in their order, the same on every rank.

    Rows that train from their first token on, as plain texts do, have none.

    Args:
        loader: Of evaluation rows.
        num_rows: How many of them are looked at.
        engine: Knows the other ranks.
    """
    order: list[int] = []
    num_steps = 0
    for rows in loader.plan(0):
        num_steps += 1
        order += rows
        if len(order) >= num_rows:
            break
    wanted = set(order[:num_rows])
    found: list[tuple[int, Question]] = []
    loader.set_epoch(0)
    for step, batch in enumerate(loader, start=1):
        for row, example in single_examples(batch):
            if row in wanted and (question := _question(loader, row, example)):
                found.append((row, question))
        if step == num_steps:
            break
    loader.set_epoch(0)
    by_row = dict(engine.gather_objects(found))
    return [by_row[row] for row in order if row in by_row]


def _question(loader: BatchLoader, row: int, example: dict[str, Any]) -> Question | None:
    ids, labels = example["input_ids"][0].tolist(), example["labels"][0].tolist()
    trained = [place for place, label in enumerate(labels) if label != -100]
    if not trained:
        return None
    end = trained[-1] + 1
    start = end
    while start and labels[start - 1] != -100:
        start -= 1
    if not start:
        return None
    path, line = loader.place(row)
    return Question(
        prompt=ids[:start],
        reference=loader.encoder.decode(ids[start:end]).strip(),
        place=(str(path), line),
    )


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _short(text: str, limit: int) -> str:
    """Returns a text on one line, with its middle left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 2 :]}"
