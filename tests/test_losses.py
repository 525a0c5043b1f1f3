# SPDX-License-Identifier: Apache-2.0
"""The loss as mathematics, against formulas written out with `math` for one number at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_parm.training.losses import (
    accuracies,
    count_labels,
    global_loss,
    objective_losses,
    pair_losses,
    tchebycheff,
    weighted,
)


MARGINS = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
LABELS = torch.tensor([[1.0, -1.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
BETA = torch.tensor([0.1, 0.5], dtype=torch.float64)


def naive_loss(z: float, beta: float, margin: float, gamma: float, epsilon: float, hinge: bool) -> float:
    def penalty(u: float) -> float:
        return max(0.0, 1 - u) if hinge else math.log(1 + math.exp(-u))

    if not z:
        return 0.0
    return (1 - epsilon) * penalty(z * beta * margin - gamma) + epsilon * penalty(-z * beta * margin - gamma)


@pytest.mark.parametrize("hinge", [False, True])
@given(
    margin=st.floats(-20, 20), z=st.sampled_from([-1.0, 0.0, 1.0]), beta=st.floats(0.01, 2), gamma=st.floats(0, 2),
    epsilon=st.floats(0, 0.49),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_pair_loss_is_the_formula(hinge, margin, z, beta, gamma, epsilon):
    losses = pair_losses(
        torch.tensor([margin], dtype=torch.float64), torch.tensor([[z]], dtype=torch.float64),
        torch.tensor([beta], dtype=torch.float64), gamma, epsilon, hinge,
    )  # fmt: skip
    assert losses.item() == pytest.approx(naive_loss(z, beta, margin, gamma, epsilon, hinge), abs=1e-12)


def test_objective_losses_are_means_over_labelled_pairs():
    losses = pair_losses(MARGINS, LABELS, BETA)
    counts = (LABELS != 0).sum(0)
    means = objective_losses(losses, counts)
    torch.testing.assert_close(means, torch.stack([losses[[0, 2], 0].mean(), losses[[0, 1], 1].mean()]))
    assert objective_losses(losses * 0, torch.zeros(2)).tolist() == [0, 0]


def test_one_preference_for_all_pairs_is_the_case_of_equal_rows():
    losses, counts = pair_losses(MARGINS, LABELS, BETA), (LABELS != 0).sum(0)
    alpha = torch.tensor([0.3, 0.7], dtype=torch.float64)
    by_pair = objective_losses(losses, counts, alpha.repeat(3, 1))
    torch.testing.assert_close(by_pair, alpha * objective_losses(losses, counts))
    rows = torch.tensor([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    expected = sum(rows[p, i] * losses[p, i] / counts[i] for p in range(3) for i in range(2))
    assert objective_losses(losses, counts, rows).sum().item() == pytest.approx(expected.item())


def test_parts_of_a_step_add_up_to_the_whole():
    """Micro-batches and ranks divide by the counts of the whole step."""
    losses, counts = pair_losses(MARGINS, LABELS, BETA), (LABELS != 0).sum(0)
    parts = objective_losses(losses[:1], counts) + objective_losses(losses[1:], counts)
    torch.testing.assert_close(parts, objective_losses(losses, counts))


@pytest.mark.parametrize("scale", [1e30, 1e-10, 1e-20, 1e-35])
def test_only_ratios_of_weights_matter(scale):
    """Also where the weights of a step add up to next to nothing; a step without any adds 0, and no NaN."""
    losses = pair_losses(MARGINS, LABELS, BETA).float()
    weights, alpha = torch.tensor([3.0, 0.0, 0.5]), torch.tensor([0.3, 0.7])

    def both(weights: torch.Tensor) -> torch.Tensor:
        margins, beta = MARGINS.float().requires_grad_(), BETA.float()
        counts = count_labels(LABELS.float(), weights)
        means = objective_losses(weighted(losses, weights), counts[:-1])
        whole = global_loss(margins, LABELS.float(), beta, alpha, counts[-1], weights)
        whole.backward()
        return torch.cat([means, whole[None], margins.grad]).detach()

    naive = [sum(w * loss for w, loss in zip([3.0, 0.0, 0.5], column)) / 3.5 for column in losses[:, :1].T.tolist()]
    torch.testing.assert_close(both(weights * scale), both(weights), rtol=1e-4, atol=1e-6)
    assert both(weights)[0].item() == pytest.approx(naive[0])
    assert both(weights * 0).tolist() == [0.0] * 6


def test_tchebycheff_is_the_largest_weighted_distance_to_the_ideal():
    losses, alpha = torch.tensor([0.9, 0.4]), torch.tensor([0.25, 0.75])
    assert tchebycheff(losses, alpha).item() == pytest.approx(max(0.25 * 0.9, 0.75 * 0.4))
    distances = losses - torch.tensor([0.1, 0.6])
    assert tchebycheff(distances, alpha).item() == pytest.approx(max(0.25 * 0.8, 0.75 * 0.2))


def test_parts_of_a_step_add_up_to_the_maximum_of_the_whole():
    whole, alpha = torch.tensor([0.3, -0.9]), torch.tensor([0.5, 0.5])
    parts = torch.tensor([[0.5, -0.1], [-0.2, -0.8]])
    assert sum(tchebycheff(part, alpha, whole).item() for part in parts) == pytest.approx(0.45)


@pytest.mark.parametrize("by_pair", [False, True])
def test_global_loss_is_the_formula(by_pair):
    alpha = torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.2, 0.8]] if by_pair else [0.3, 0.7], dtype=torch.float64)
    expected = 0.0
    for p in range(3):
        weights = alpha[p] if by_pair else alpha
        c = sum(weights[i].item() * LABELS[p, i].item() for i in range(2))
        beta = sum(weights[i].item() * BETA[i].item() for i in range(2))
        expected += abs(c) * math.log(1 + math.exp(-beta * math.copysign(1, c) * MARGINS[p].item())) / 3
    assert global_loss(MARGINS, LABELS, BETA, alpha, torch.tensor(3)).item() == pytest.approx(expected)


def test_accuracies_know_missing_labels():
    assert accuracies(MARGINS, LABELS).nan_to_num(-1).tolist() == [[1, 0], [-1, 0], [0, -1]]
