"""The baselines RMT-KD is held against: closed forms of both SVDs, and slicing that is exact at full width."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from bench.experiments import rmtkd_baselines as baselines
from bench.experiments import rmtkd_slicing as slicing
from bench.experiments.rmtkd_units import parameters

D_IN, D_OUT, ROWS, RANK = 24, 16, 400, 5


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tiny_bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval()
    _unlike_at_birth(model)
    return model


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    _unlike_at_birth(model)
    return model


@torch.no_grad()
def _unlike_at_birth(model: nn.Module) -> None:
    """Gains that differ, offsets that are not zero."""
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 7:] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


def correlated(generator: torch.Generator) -> Tensor:
    mixing = torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)
    return torch.randn(ROWS, D_IN, generator=generator, dtype=torch.float64) @ (mixing * torch.logspace(0, -2, D_IN))


def test_plain_svd_leaves_the_singular_values_it_cuts(generator: torch.Generator) -> None:
    weight = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    down, up = baselines.factors(weight, RANK)
    left_over = torch.linalg.svdvals(weight)[RANK:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(weight - up @ down), left_over)
    assert down.shape == (RANK, D_IN) and up.shape == (D_OUT, RANK)


def test_whitened_svd_is_the_projection_of_the_outputs_on_their_leading_directions(generator: torch.Generator) -> None:
    """Eckart and Young for the outputs: the best of a rank is U Uᵀ W, U of the moment W G Wᵀ of the outputs."""
    weight = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    rows = correlated(generator)
    gram = rows.T @ rows
    down, up = baselines.factors(weight, RANK, gram)
    leading = torch.linalg.eigh(weight @ gram @ weight.T).eigenvectors[:, -RANK:]
    torch.testing.assert_close(up @ down, leading @ leading.T @ weight, rtol=1e-6, atol=1e-8)
    left_over = torch.linalg.eigvalsh(weight @ gram @ weight.T)[:-RANK].sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(rows @ (weight - up @ down).T), left_over, rtol=1e-6, atol=0)
    plain_down, plain_up = baselines.factors(weight, RANK)
    assert torch.linalg.norm(rows @ (weight - plain_up @ plain_down).T) > 1.05 * left_over


def test_white_inputs_make_both_the_same(generator: torch.Generator) -> None:
    weight = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    whitened = baselines.factors(weight, RANK, 7 * torch.eye(D_IN, dtype=torch.float64))
    plain = baselines.factors(weight, RANK)
    torch.testing.assert_close(whitened[1] @ whitened[0], plain[1] @ plain[0])


@pytest.mark.parametrize("whitened", [False, True])
def test_both_halves_are_of_one_size(whitened: bool, generator: torch.Generator) -> None:
    rows = 100 * correlated(generator)
    weight = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    down, up = baselines.factors(weight, RANK, rows.T @ rows if whitened else None)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


def test_a_moment_of_low_rank_is_shifted_and_the_weight_stays_finite(generator: torch.Generator) -> None:
    weight = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    rows = correlated(generator)[:RANK]
    down, up = baselines.factors(weight, RANK, rows.T @ rows)
    want = rows @ weight.T
    torch.testing.assert_close(rows @ (up @ down).T, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_embedding_factors_are_best_for_the_tokens_that_occur(generator: torch.Generator) -> None:
    table = torch.randn(100, 12, generator=generator, dtype=torch.float64)
    counts = torch.randint(0, 50, (100,), generator=generator).square()
    weights = (counts.double() + 1).sqrt()[:, None]

    def error(found: tuple[Tensor, Tensor]) -> float:
        return float(torch.linalg.norm(weights * (table - found[0] @ found[1].T)))

    best = torch.linalg.svdvals(weights * table)[4:].square().sum().sqrt()
    assert error(baselines.embedding_factors(table, 4, counts)) == pytest.approx(float(best))
    assert error(baselines.embedding_factors(table, 4)) > 1.01 * best


def test_moments_leave_padding_out_and_the_model_as_it_was() -> None:
    model = tiny_bert().train()
    names = baselines.factorable(model)
    assert "classifier" not in names and "bert.embeddings.word_embeddings" in names
    assert "bert.embeddings.position_embeddings" not in names
    batch = batches()[0]
    found = baselines.moments(model, [batch], names)
    assert model.training and all(not module._forward_pre_hooks for module in model.modules())
    counts = torch.bincount(batch["input_ids"][batch["attention_mask"].bool()], minlength=200)
    assert torch.equal(found["bert.embeddings.word_embeddings"], counts.double())
    model.eval()
    hidden = model.bert(**batch, output_hidden_states=True).hidden_states[1][batch["attention_mask"].bool()].double()
    torch.testing.assert_close(
        found["bert.encoder.layer.1.attention.self.query"], hidden.T @ hidden, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("whitened", [False, True])
def test_svd_of_a_model_meets_its_budget_and_is_exact_where_nothing_is_cut(whitened: bool) -> None:
    model = tiny_bert()
    names = list(baselines.factorable(model))
    found = baselines.moments(model, batches(), names) if whitened else None
    total = round(0.6 * parameters(model))
    student = baselines.svd(model, names, total, found)
    assert 0.9 * total < parameters(student) <= total
    batch = batches()[0]
    changed = (student(**batch).logits - model(**batch).logits).abs().max()
    assert changed > 1e-3
    for name in names:
        module = model.get_submodule(name)
        whole = baselines.factored(module, min(module.weight.shape), None if found is None else found[name])
        rows = batch["input_ids"] if isinstance(module, nn.Embedding) else torch.randn(6, module.in_features)
        torch.testing.assert_close(whole(rows), module(rows), rtol=1e-3, atol=1e-3)


def test_ranks_share_a_budget_in_proportion() -> None:
    shapes = {"wide": (100, 400), "square": (100, 100)}
    ranks = baselines.ranks_for(shapes, 25_000)
    assert ranks == {"wide": 40, "square": 25}  # half of the harmonic sums 80 and 50
    with pytest.raises(ValueError, match="rank one take 700"):
        baselines.ranks_for(shapes, 600)


def test_slicing_a_bert_at_full_width_changes_nothing() -> None:
    model = tiny_bert()
    batch = batches()[0]
    student = slicing.slice_bert(model, batches(), 24)
    torch.testing.assert_close(student(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    narrow = slicing.slice_bert(model, batches(), 16)
    assert parameters(narrow) < parameters(student)
    assert (narrow(**batch).logits - model(**batch).logits).abs().max() > 1e-3


def test_what_lives_in_few_directions_is_sliced_without_loss() -> None:
    """Normalised rows of 24 numbers that sum to zero have 23 directions at most."""
    model = tiny_bert()
    batch = batches()[0]
    student = slicing.slice_bert(model, batches(), 23)
    torch.testing.assert_close(student(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_slicing_a_llama_at_full_width_changes_nothing(shared: bool) -> None:
    model = tiny_llama()
    batch = batches()[0]
    positions = slicing.llama_rotations(model, batches(), shared)
    student = slicing.slice_llama(model, 32, positions)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(student(**batch).logits[valid], model(**batch).logits[valid], rtol=1e-3, atol=1e-4)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    narrow = slicing.slice_llama(model, 20, positions)
    assert (narrow(**batch).logits - model(**batch).logits).abs().max() > 1e-3


def test_the_width_of_a_budget() -> None:
    model = tiny_bert()
    positions = slicing.bert_rotations(model, batches())

    def build(width: int) -> nn.Module:
        student: nn.Module = slicing.slice_bert(model, (), width, positions)
        return student

    total = parameters(build(13)) + 1
    assert slicing.width_for(build, 24, total) == 13
