"""The evaluator: recovered candidates, alive rewards, equal masks measured once."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
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
    assert not evaluate.recover(network, images)
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
    assert torch.equal(network.features[0].weight, slim.features[0].weight)
    kept = evaluate.Evaluator(trained, groups, digits, ridge=0).candidate(masks)
    assert torch.equal(kept.classifier.weight, slim.classifier.weight)


@pytest.mark.parametrize(("images", "bias"), [(300, True), (300, False), (12, True)])
def test_refit_is_ridge_regression(images, bias):
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4, bias=bias)).eval()
    batch = torch.randn(images, 3, 4, 4, generator=generator)
    target = torch.randn(images, 4, generator=generator)
    with evaluate.half_precision("cpu"):
        features = network[:3](batch).double().detach().numpy()
    assert evaluate.recover(network, batch, target, ridge=0.1)
    centred = features - features.mean(0) if bias else features
    expected = Ridge(alpha=0.1 * (centred**2).sum() / 20, fit_intercept=bias).fit(features, target.double().numpy())
    assert np.allclose(network[3].weight.detach().numpy(), expected.coef_, atol=1e-4)
    if bias:
        assert np.allclose(network[3].bias.detach().numpy(), expected.intercept_, atol=1e-4)


def test_refit_leaves_a_network_without_a_last_linear_layer_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = network[0].weight.clone()
    assert not evaluate.recover(network, torch.randn(8, 3, 4, 4), torch.randn(8, 4))
    assert torch.equal(network[0].weight, before)


@pytest.mark.parametrize("rest", [1, 2])  # a batch norm takes no single image, and 250 are a batch
def test_a_few_images_beyond_a_batch_count_like_all_others(rest, monkeypatch):
    monkeypatch.setenv("RLPRUNE_PRECISION", "float32")  # bfloat16 rounds by as much as an image left out would change
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    images = torch.randn(250 + rest, 3, 32, 32)
    images[250:] += 20
    assert evaluate.recover(network, images, torch.randn(250 + rest, 4))
    features = network[1](images.flatten(1))
    whole, last = features.mean(0), features[250:].mean(0)
    assert ((network[2].running_mean - whole).abs() < 1e-3 * (last - whole).abs() + 1e-5).all()


def test_refit_leaves_a_computed_weight_alone():
    last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()
    images = torch.randn(20, 3, 8, 8)
    before = network(images)
    assert not evaluate.recover(network, images, before + 1)
    assert torch.equal(network(images), before)


def test_every_module_gets_its_own_mode_back(digits, trained):
    network = copy.deepcopy(trained).train()
    frozen = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    images = digits.normalise(digits.train.images[:20])
    evaluate.recover(network, images, evaluate.outputs(network, images))
    assert network.training
    assert not frozen.training


def test_a_label_without_an_output_is_named(digits, trained):
    few = nn.Sequential(trained, nn.Linear(10, 8)).eval()
    with pytest.raises(InputError, match="There is a label 9, but the network has outputs for 0 to 7"):
        evaluate.Evaluator(few, trace(few, digits.example), digits)


def test_refit_revives_what_recalibration_cannot(digits, trained, example):
    groups = trace(trained, example)
    masks = [masks_of(groups, 0.15, seed) for seed in range(5)]
    again = evaluate.Evaluator(trained, groups, digits)
    never = evaluate.Evaluator(trained, groups, digits, ridge=0)
    assert sum(again(m) - never(m) for m in masks) / 5 > 10


def test_validation_images_judge_and_training_images_recover(digits, trained, example):
    """What the search never may see, and what it sees for one purpose alone, is made worthless in turn."""

    def worthless(split):
        return dataclasses.replace(split, labels=(split.labels + 1) % 10)

    groups = trace(trained, example)
    masks = masks_of(groups, 0.5)
    reward = evaluate.Evaluator(trained, groups, digits, images=200)(masks)
    other = dataclasses.replace(digits, train=worthless(digits.train), test=worthless(digits.test))
    assert evaluate.Evaluator(trained, groups, other, images=200)(masks) == reward > 30
    first = dataclasses.replace(digits, validation=digits.validation[slice(0, 200)])
    assert evaluate.Evaluator(trained, groups, first)(masks) == reward
    other = dataclasses.replace(digits, validation=worthless(digits.validation))
    assert evaluate.Evaluator(trained, groups, other, images=200)(masks) < 30
    dark = dataclasses.replace(digits.train, images=torch.zeros_like(digits.train.images))
    assert evaluate.Evaluator(trained, groups, dataclasses.replace(digits, train=dark), images=200)(masks) < 30


def test_own_measure_takes_the_place_of_accuracy(trained, example, digits):
    groups = trace(trained, example)
    evaluator = evaluate.Evaluator(trained, groups, None, lambda network: sum(p.numel() for p in network.parameters()))
    masks = masks_of(groups, 0.5)
    slim = masking.slim(trained, groups, masks)
    assert evaluator(masks) == sum(p.numel() for p in slim.parameters())
    for value, words in ((float("nan"), "finite number"), ("good", "not 'good'")):
        with pytest.raises(InputError, match=words):
            evaluate.Evaluator(trained, groups, None, lambda network, value=value: value)(masks)
    with pytest.raises(InputError, match=r"evaluate\(network\) failed with ZeroDivisionError"):
        evaluate.Evaluator(trained, groups, digits, lambda network: 1 / 0)(masks)
    with pytest.raises(InputError, match="nothing to judge"):
        evaluate.Evaluator(trained, groups, None)


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


def test_the_seed_decides_dropout_in_finetuning_steps_too(digits, trained, example):
    network = nn.Sequential(trained, nn.Dropout(0.5)).eval()
    groups = trace(network, example)
    tuned = evaluate.Evaluator(network, groups, digits, finetune_steps=2)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.flatten() for p in tuned.candidate(masks_of(groups, 0.4)).parameters()]))
    assert torch.equal(*weights)


def test_a_frozen_network_cannot_be_finetuned(digits, trained, example):
    network = copy.deepcopy(trained).requires_grad_(False)
    groups = trace(network, example)
    with pytest.raises(InputError, match="No weight of the network may change"):
        evaluate.Evaluator(network, groups, digits, finetune_steps=1)
    assert evaluate.Evaluator(network, groups, digits)(masks_of(groups, 0.5)) > 10


def test_bad_options(digits, trained, example):
    groups = trace(trained, example)
    for wrong in ({"images": 0}, {"images": "all"}, {"recalibration": 2.5}, {"finetune_steps": 1.5}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be a whole number of at least"):
            evaluate.Evaluator(trained, groups, digits, **wrong)
    for wrong in ({"ridge": -1.0}, {"finetune_rate": 0.0}):
        with pytest.raises(InputError, match="no negative ridge, not .*" + next(iter(wrong))):
            evaluate.Evaluator(trained, groups, digits, **wrong)


def test_too_few_images_to_recover_on_are_named(digits, trained, example):
    with pytest.raises(InputError, match="at least 2 training images, not 1; recalibration=0 needs none"):
        evaluate.Evaluator(trained, trace(trained, example), digits, recalibration=1)


def test_a_batch_norm_that_is_not_reached_keeps_its_statistics():
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
            for norm in self.norms:
                norm.running_mean.fill_(2.0)
                norm.num_batches_tracked.fill_(7)

        def forward(self, images):
            return self.norms[0](images).mean((2, 3))

    network = Tasks().eval()
    evaluate.recover(network, torch.randn(20, 3, 4, 4))
    assert network.norms[0].running_mean.abs().max() < 1
    assert network.norms[1].running_mean.eq(2).all()
    assert network.norms[1].num_batches_tracked == 7


def test_a_layer_that_only_inherits_from_linear_is_not_fitted():
    class Cosine(nn.Linear):
        def forward(self, features):
            return 10 * nn.functional.normalize(features, dim=1) @ nn.functional.normalize(self.weight, dim=1).T

    network, images = nn.Sequential(nn.Flatten(), Cosine(12, 5, bias=False)).eval(), torch.randn(40, 3, 2, 2)
    with torch.no_grad():
        target = network(images)
        assert not evaluate.recover(network, images, target)
        assert torch.equal(network(images), target)
