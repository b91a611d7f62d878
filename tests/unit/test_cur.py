"""The mathematics of selection and whitening, on plain tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curlora import CurloraConfig, cur
from curlora.names import SELECTION_RULES


def matrix(d=12, k=10, seed=0, dtype=torch.float64):
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SAMPLING = tuple(rule for rule in SELECTION_RULES if rule != "activation")


@given(
    rule=st.sampled_from(SAMPLING),
    d=st.integers(4, 12),
    k=st.integers(4, 12),
    rank=st.integers(1, 4),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_selection_is_distinct_in_range_and_repeatable(rule, d, k, rank, seed):
    first = cur.select(matrix(d, k, seed), rank, rule, seed=seed, key="a.b")
    again = cur.select(matrix(d, k, seed), rank, rule, seed=seed, key="a.b")
    assert len(set(first.indices.tolist())) == rank
    assert set(first.indices.tolist()) <= set(range(k))
    assert torch.equal(first.indices, again.indices)


@pytest.mark.parametrize("rule", SAMPLING)
def test_zero_vectors_are_never_selected(rule):
    a = matrix(20, 12)
    a[:, [0, 3, 5, 7, 11]] = 0
    for seed in range(20):
        chosen = cur.select(a, 7, rule, seed=seed).indices.tolist()
        assert sorted(chosen) == [1, 2, 4, 6, 8, 9, 10]


@pytest.mark.parametrize("rule", SAMPLING)
def test_selection_avoids_the_previous_indices_and_keeps_them_first(rule):
    previous = torch.tensor([1, 4, 9])
    factor = cur.select(matrix(), 4, rule, previous=previous)
    assert factor.indices[:3].tolist() == [1, 4, 9]
    assert len(set(factor.indices.tolist())) == 7


def test_too_few_nonzero_vectors_is_an_error_that_counts_them():
    a = matrix()
    a[:, 3:] = 0
    with pytest.raises(cur.SelectionError, match="3 non-zero, unused vectors are left of 10, 4 are needed"):
        cur.select(a, 4)


def test_a_matrix_without_well_conditioned_columns_is_an_error():
    a = torch.ones(6, 5, dtype=torch.float64)  # every pair of columns is parallel
    with pytest.raises(cur.SelectionError, match="condition number"):
        cur.select(a, 2)


def test_a_badly_conditioned_draw_is_drawn_again():
    a = matrix(12, 10)
    a[:, :4] = a[:, :1] * (1 + 1e-9)  # four parallel columns among ten
    for seed in range(30):
        factor = cur.select(a, 3, "uniform", seed=seed)
        assert factor.condition <= cur.MAX_CONDITION
        assert len(set(factor.indices.tolist()) & {0, 1, 2, 3}) <= 1


def test_seed_and_name_change_the_draw_but_global_random_state_does_not():
    a = matrix(64, 64)
    torch.manual_seed(1)
    reference = cur.select(a, 8, seed=0, key="layer.0").indices
    torch.manual_seed(2)
    assert torch.equal(reference, cur.select(a, 8, seed=0, key="layer.0").indices)
    assert not torch.equal(reference, cur.select(a, 8, seed=1, key="layer.0").indices)
    assert not torch.equal(reference, cur.select(a, 8, seed=0, key="layer.1").indices)


def test_the_draw_is_the_same_on_every_platform_and_version():
    """Pinned: adapters of one seed must not change silently; hashing and torch's CPU generator are stable."""
    drawn = cur.select(matrix(8, 40), 5, "uniform", seed=3, key="model.layers.0.q_proj")
    assert drawn.indices.tolist() == [12, 39, 9, 14, 23]


def test_inverted_probabilities_follow_equation_7():
    p = cur.probabilities(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    expected = (1 / p) / (1 / p).sum()
    assert torch.allclose(cur.inverted(p), expected)
    assert cur.inverted(torch.tensor([0.5, 0.0, 0.5]))[1] == 0


def test_inverse_prefers_small_and_importance_large_columns():
    a = matrix(16, 100)
    a[:, :50] *= 0.1
    small = dict.fromkeys(("inverse", "uniform", "importance"), 0)
    for seed in range(40):
        for rule in small:
            small[rule] += int((cur.select(a, 5, rule, seed=seed).indices < 50).sum())
    assert small["inverse"] > 190 and small["importance"] < 10 and 70 < small["uniform"] < 130


def test_sampling_follows_the_probabilities():
    p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    first = torch.tensor([int(cur.sample(p, 1, generator)) for _ in range(4000)])
    frequencies = torch.bincount(first, minlength=3) / 4000
    assert torch.allclose(frequencies.double(), p, atol=4 * math.sqrt(0.25 / 4000))


def test_leverage_finds_the_columns_that_carry_the_leading_directions():
    a = matrix(40, 30) * 1e-3
    a[:, [3, 8, 21]] += torch.linalg.qr(matrix(40, 3, seed=1)).Q
    assert sorted(cur.select(a, 3, "leverage").indices.tolist()) == [3, 8, 21]


def test_deim_interpolates_the_leading_subspace():
    """The defining property: the chosen rows of V are well conditioned, far better than a uniform draw."""
    a = matrix(60, 50) @ torch.diag(torch.logspace(0, -3, 50, dtype=torch.float64))
    vectors = cur.right_singular_vectors(a, 6, torch.Generator())
    chosen = cur.select(a, 6, "deim").indices
    assert torch.linalg.cond(vectors[chosen]) < 20
    assert int(chosen[0]) == int(vectors[:, 0].abs().argmax())


def test_randomised_singular_vectors_span_the_exact_subspace(monkeypatch):
    a = matrix(120, 90) @ torch.diag(torch.logspace(0, -4, 90, dtype=torch.float64))
    exact = cur.right_singular_vectors(a, 5, torch.Generator())
    monkeypatch.setattr(cur, "EXACT_SVD_LIMIT", 10)
    approximate = cur.right_singular_vectors(a, 5, torch.Generator().manual_seed(0))
    assert torch.linalg.svdvals(exact.t() @ approximate).min() > 0.9999


def test_activation_takes_the_quietest_allowed_indices():
    energy = torch.tensor([3.0, 1.0, 9.0, 2.0, 0.5, 7.0])
    factor = cur.select(matrix(8, 6), 2, "activation", activation=energy, previous=torch.tensor([4]))
    assert factor.indices.tolist() == [4, 1, 3]
    with pytest.raises(cur.SelectionError, match="calibrate"):
        cur.select(matrix(8, 6), 2, "activation")


@given(d=st.integers(6, 14), k=st.integers(1, 6), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_whitening_makes_the_columns_orthonormal(d, k, seed):
    c = matrix(d, k, seed)
    q = c @ cur.whitening(cur.triangle_of(c))
    assert torch.allclose(q.t() @ q, torch.eye(k, dtype=torch.float64), atol=1e-8)


def test_a_longer_triangle_begins_with_the_shorter_one():
    c = matrix(20, 9)
    assert torch.allclose(cur.triangle_of(c)[:4, :4], cur.triangle_of(c[:, :4]), atol=1e-12)


def test_squared_norms_do_not_overflow_in_half_precision():
    a = torch.full((300, 2), 60.0, dtype=torch.float16)  # 300 · 3600 > 65504
    assert torch.allclose(cur.squared_norms(a), torch.full((2,), 300 * 3600.0, dtype=torch.float64))


def test_adam_scale_moves_the_update_as_far_as_a_lora_step():
    """One sign step of size η: ‖s Q_C (η 1) Q_R‖_F = s r η must be 0.58 √(m r) η."""
    m, r = 256, 16
    assert cur.scale_factor("adam", 1.0, m, r) * r == pytest.approx(0.58 * math.sqrt(m * r))
    assert cur.scale_factor("rsqrt", 2.0, m, r) == pytest.approx(0.5)
    assert cur.scale_factor("none", 2.0, m, r) == 2.0


def test_a_line_in_the_registry_is_all_that_a_new_selection_rule_needs(monkeypatch):
    monkeypatch.setitem(SELECTION_RULES, "first", f"{__name__}:select_first")
    assert cur.select(matrix(), 3, CurloraConfig(selection="first").selection).indices.tolist() == [0, 1, 2]


def select_first(candidates, rank, generator):
    return candidates.allowed.nonzero()[:rank, 0]


@pytest.mark.parametrize("rule", ["inverse", "uniform", "importance", "leverage", "deim"])
def test_copied_vectors_are_passed_over_and_counted(rule):
    unique = matrix(24, 6)
    a = unique.repeat_interleave(50, dim=1)  # 300 columns, of which any draw of six holds copies
    factor = cur.select(a, 6, rule, seed=1)
    assert sorted(index // 50 for index in factor.indices.tolist()) == list(range(6))
    assert factor.condition < 100
    with pytest.raises(cur.SelectionError) as error:
        cur.select(a, 7, rule)
    assert error.value.possible == 6
    stacked = cur.select(a, 2, rule, previous=torch.tensor([0, 50, 100]))
    assert sorted(index // 50 for index in stacked.indices.tolist())[:3] == [0, 1, 2]
    assert len({index // 50 for index in stacked.indices.tolist()}) == 5


def test_a_resized_vocabulary_does_not_give_its_new_rows_to_the_rule_of_small_norms():
    """Transformers draws new tokens around the mean of the old ones: small, and almost alike."""
    old = torch.randn(500, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new = old.mean(dim=0) + 1e-5 * torch.randn(40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor = cur.select(torch.cat([old, new]).t(), 16, "inverse")
    assert factor.condition < 100 and sum(index >= 500 for index in factor.indices.tolist()) <= 1
