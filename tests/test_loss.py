"""The chunked loss: the value and the gradients of the plain one, without the logits of a batch."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model

from sftcore.train.head import install_head_loss, plain_losses, why_not_chunked
from sftcore.train.loss import Objective, losses_of_logits

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "soft cap": transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "divided": transformers.GraniteConfig(**SIZES, logits_scaling=2.5),
    "multiplied": transformers.CohereConfig(**SIZES, logit_scale=0.3),
    "experts": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
OBJECTIVES = {
    "plain": Objective(),
    "smoothing": Objective(label_smoothing=0.1),
    "z-loss": Objective(z_loss=1e-2),
    "dft": Objective(dft=True),
    "dft and z-loss": Objective(dft=True, z_loss=1e-2),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[kind])
    # heads as initialised give nearly the same logits for all tokens
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch_of(weighted: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (3, 19), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 19, generator=generator) < 0.4, -100)
    batch = {"input_ids": ids, "labels": labels}
    if weighted:
        batch["loss_weights"] = torch.rand(3, 19, generator=generator) * 3
    return batch


def gradients(model: Any) -> dict[str, Any]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal_to_plain(
    model: Any, batch: dict[str, Any], objective: Objective, **settings: Any
) -> None:
    expected, _ = plain_losses(model, batch, objective)
    (expected.total / 7).backward()
    expected_gradients = gradients(model)
    assert expected_gradients
    install_head_loss(model, objective, **settings)
    found = model(**batch, trained_tokens=True)
    (found.loss / 7).backward()
    assert torch.allclose(found.loss, expected.total, rtol=1e-5)
    assert torch.allclose(found.losses, expected.losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.right, expected.right)
    found_gradients = gradients(model)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        largest = float(gradient.abs().max())
        assert torch.allclose(found_gradients[name], gradient, rtol=1e-5, atol=1e-5 * largest), name
    with torch.no_grad():
        assert torch.allclose(model(**batch, trained_tokens=True).loss, found.loss, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("in_forward", [True, False])
def test_a_chunked_loss_has_the_value_and_gradients_of_the_plain_one(
    kind: str, in_forward: bool
) -> None:
    model = model_of(kind)
    assert why_not_chunked(model) is None
    assert_equal_to_plain(
        model, batch_of(), Objective(), chunk_size=7, gradients_in_forward=in_forward
    )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 1000])
def test_every_objective_is_the_same_in_chunks(name: str, weighted: bool, chunk_size: int) -> None:
    assert_equal_to_plain(
        model_of("untied"), batch_of(weighted), OBJECTIVES[name], chunk_size=chunk_size
    )


@pytest.mark.parametrize("head", ["frozen", "lora", "saved"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_adapters_beside_and_on_the_head_get_their_gradients(head: str, kind: str) -> None:
    targets = ["q_proj", "down_proj", *(["lm_head"] if head == "lora" else [])]
    lora = LoraConfig(
        r=4,
        target_modules=targets,
        modules_to_save=["lm_head"] if head == "saved" else None,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model_of(kind), lora)
    assert why_not_chunked(model) is None
    assert_equal_to_plain(model, batch_of(), Objective(), chunk_size=5)


def test_the_head_never_sees_more_than_a_chunk_nor_a_token_that_is_not_trained() -> None:
    model, batch = model_of("tied"), batch_of()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape[0]))
    install_head_loss(model, Objective(), chunk_size=8)
    model(**batch, trained_tokens=True).loss.backward()
    assert max(seen) == 8
    assert sum(seen) == int((batch["labels"][:, 1:] != -100).sum())


def test_a_batch_without_trained_tokens_still_reaches_every_parameter() -> None:
    model, batch = model_of("untied"), batch_of()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    install_head_loss(model, Objective(), chunk_size=8)
    output = model(**batch, trained_tokens=True)
    output.loss.backward()
    assert float(output.loss) == 0
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_model_that_does_more_to_its_logits_is_told_apart() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(97) / 97
            return output

    torch.manual_seed(0)
    reason = why_not_chunked(Shifted(MODELS["untied"]))
    assert reason is not None
    assert "changes its logits behind the head" in reason
    experts = model_of("experts")
    experts.config.output_router_logits = True
    assert why_not_chunked(experts) == "the model adds a loss of its experts"


def test_the_objectives_are_their_formulas() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    label = torch.tensor([2])
    logs = torch.log_softmax(logits, dim=1)[0]
    plain, spread = -logs[2], -logs.mean()
    denominator = torch.log(torch.exp(logits).sum())
    expected = {
        "plain": plain,
        "smoothing": 0.9 * plain + 0.1 * spread,
        "z-loss": plain + 1e-2 * denominator**2,
        "dft": torch.exp(-plain) * plain,
        "dft and z-loss": torch.exp(-plain) * plain + 1e-2 * denominator**2,
    }
    for name, objective in OBJECTIVES.items():
        found = losses_of_logits(logits, label, torch.tensor([3.0]), objective)
        assert float(found.total) == pytest.approx(3 * float(expected[name]), rel=1e-6)
        assert float(found.losses) == pytest.approx(float(plain), rel=1e-6)
