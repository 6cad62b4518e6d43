"""The evaluator: recovered candidates, alive rewards, equal masks measured once."""

import pytest
import torch
from torch import nn

from rlprune import evaluate, masking, trace
from rlprune.errors import InputError


@pytest.fixture(scope="module")
def example(digits):
    return digits.example


def masks_of(groups, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for group in groups:
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[torch.randperm(group.size, generator=generator)[: max(1, int(share * group.size))]] = True
        masks.append(mask)
    return masks


def test_recalibration_measures_mean_and_variance():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    images = torch.randn(64, 3, 8, 8) * 3 + 5
    evaluate.recalibrate(network, images, batch_size=16)
    features = network[0](images)
    assert torch.allclose(network[1].running_mean, features.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    assert torch.allclose(network[1].running_var, features.var((0, 2, 3)), rtol=0.1)
    assert network[1].momentum == 0.1  # as it was


def test_recalibration_revives_a_pruned_network(digits, trained, example):
    groups = trace(trained, example)
    alive = evaluate.Evaluator(trained, groups, digits)
    dead = evaluate.Evaluator(trained, groups, digits, recalibration=0)
    pairs = [(alive(masks), dead(masks)) for masks in (masks_of(groups, 0.5, seed) for seed in range(5))]
    gain = sum(a - d for a, d in pairs) / len(pairs)
    assert gain > 10


def test_a_candidate_is_the_slim_network_of_its_masks(digits, trained, example):
    groups = trace(trained, example)
    masks = masks_of(groups, 0.5)
    network = evaluate.Evaluator(trained, groups, digits).candidate(masks)
    slim = masking.slim(trained, groups, masks)
    assert [tuple(p.shape) for p in network.parameters()] == [tuple(p.shape) for p in slim.parameters()]
    assert torch.equal(network.classifier.weight, slim.classifier.weight)


def test_equal_masks_are_measured_once(digits, trained, example):
    groups = trace(trained, example)
    evaluator = evaluate.Evaluator(trained, groups, digits, images=100)
    first = evaluator(masks_of(groups, 0.5))
    assert evaluator(masks_of(groups, 0.5)) == first
    assert evaluator.evaluations == 1
    evaluator(masks_of(groups, 0.5, seed=1))
    assert evaluator.evaluations == 2


def test_finetune_steps_raise_the_reward_and_repeat_themselves(digits, trained, example):
    groups = trace(trained, example)
    masks = masks_of(groups, 0.4)
    plain = evaluate.Evaluator(trained, groups, digits)(masks)
    tuned = evaluate.Evaluator(trained, groups, digits, finetune_steps=20)(masks)
    assert tuned > plain
    assert evaluate.Evaluator(trained, groups, digits, finetune_steps=20)(masks) == tuned


def test_bad_options(digits, trained, example):
    with pytest.raises(InputError, match="at least 1 image"):
        evaluate.Evaluator(trained, trace(trained, example), digits, images=0)
