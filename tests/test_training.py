"""Training: it learns, repeats itself, and goes on where it was killed."""

import copy
import dataclasses
import os

import pandas as pd
import pytest
import torch
from torch import nn

from rlprune import files, forward, networks, training
from rlprune.errors import InputError
from rlprune.files import weights_hash
from rlprune.forward import accuracy, suited, training_logits
from rlprune.lessons import Lessons
from rlprune.own import from_tensors
from rlprune.training import Training, fit

SCHEDULE = Training(epochs=3, batch_size=16, learning_rate=0.1)


def small(seed=0):
    torch.manual_seed(seed)
    return networks.VGG([8, "M", 16, "M", 16, "M"], classes=10)


def state_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_learns_digits(digits):
    network = small()
    before = accuracy(network, digits, digits.validation)
    history = fit(network, digits, SCHEDULE, progress=None)
    assert list(history["epoch"]) == [1, 2, 3]
    assert before < 30
    assert history["validation_accuracy"].iloc[-1] > 80
    assert history["loss"].is_monotonic_decreasing
    assert accuracy(network, digits, digits.validation) == history["validation_accuracy"].iloc[-1]


def test_same_seed_same_network(digits):
    a, b, c = small(), small(), small()
    fit(a, digits, SCHEDULE, seed=1, progress=None)
    fit(b, digits, SCHEDULE, seed=1, progress=None)
    fit(c, digits, SCHEDULE, seed=2, progress=None)
    assert state_equal(a, b)
    assert not state_equal(a, c)


def stop_in_second_epoch(monkeypatch, path):
    """Until undone, training into this checkpoint is interrupted once its first epoch is over."""
    real = training.one_epoch

    def stopping(*args):
        if path.exists():
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "one_epoch", stopping)


def dropping():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(128, 10))


def test_the_seed_decides_dropout_too_in_a_stopped_run_as_well(digits, tmp_path, monkeypatch):
    whole, part, again, path = dropping(), dropping(), dropping(), tmp_path / "run.pt"
    torch.manual_seed(1)
    fit(whole, digits, SCHEDULE, progress=None)
    stop_in_second_epoch(monkeypatch, path)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(part, digits, SCHEDULE, checkpoint=path, progress=None)
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), before)
    fit(again, digits, SCHEDULE, checkpoint=path, progress=None)
    assert state_equal(again, whole)


def test_a_teacher_teaches_in_evaluation_mode_and_keeps_its_own(digits, trained):
    schedule = dataclasses.replace(SCHEDULE, epochs=1, distillation=0.5)
    expected, network, training_teacher = small(), small(), copy.deepcopy(trained).train()
    training_teacher.features[1].eval()
    modes = [module.training for module in training_teacher.modules()]
    fit(expected, digits, schedule, teacher=trained, progress=None)
    fit(network, digits, schedule, teacher=training_teacher, progress=None)
    assert state_equal(expected, network)
    assert state_equal(training_teacher, trained)
    assert [module.training for module in training_teacher.modules()] == modes


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_stopped_run_ends_as_if_never_stopped(digits, tmp_path, monkeypatch, average):
    whole, part, schedule = small(), small(), dataclasses.replace(SCHEDULE, average=average)
    expected = fit(whole, digits, schedule, progress=None)
    path = tmp_path / "run.pt"
    stop_in_second_epoch(monkeypatch, path)
    with pytest.raises(KeyboardInterrupt):
        fit(part, digits, schedule, checkpoint=path, progress=None)
    monkeypatch.undo()
    with pytest.raises(InputError, match="belongs to another run"):  # or it would end with the weights of this one
        fit(small(seed=9), digits, schedule, checkpoint=path, progress=None)
    fresh = small()
    history = fit(fresh, digits, schedule, checkpoint=path, progress=None)
    assert state_equal(whole, fresh)
    numbers = ["epoch", "loss", "train_accuracy", "validation_accuracy"]
    pd.testing.assert_frame_equal(history[numbers], expected[numbers])
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_the_network_ends_with_the_average_of_its_steps(digits, monkeypatch):
    last, averaged = small(), small()
    steps, schedule = [], dataclasses.replace(SCHEDULE, epochs=1, average=0.8)
    fit(last, digits, dataclasses.replace(schedule, average=0.0), progress=None)
    sgd = training.sgd

    def watched(network, training):
        optimizer = sgd(network, training)
        optimizer.register_step_post_hook(lambda *_: steps.append(networks_state(network)))
        return optimizer

    def networks_state(network):
        return {name: tensor.clone() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}

    monkeypatch.setattr(training, "sgd", watched)
    history = fit(averaged, digits, schedule, progress=None)
    found, at_last = averaged.state_dict(), last.state_dict()
    for name, expected in steps[0].items():
        for state in steps[1:]:
            expected = 0.8 * expected + 0.2 * state[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(steps[-1][name], at_last[name])  # it learns as it would without
        assert not torch.equal(found[name], at_last[name])
    assert history["validation_accuracy"].iloc[-1] == accuracy(averaged, digits, digits.validation)


def test_foreign_and_broken_checkpoints_are_one_sentence(digits, tmp_path):
    path = tmp_path / "run.pt"
    fit(small(), digits, dataclasses.replace(SCHEDULE, epochs=1), checkpoint=path, progress=None)
    with pytest.raises(InputError, match="belongs to another run"):
        fit(small(), digits, SCHEDULE, checkpoint=path, progress=None)
    with pytest.raises(InputError, match="belongs to another run"):
        fit(networks.VGG([8, "M"], 10), digits, dataclasses.replace(SCHEDULE, epochs=1), checkpoint=path, progress=None)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="is cut off"):
        fit(small(), digits, SCHEDULE, checkpoint=path, progress=None)


def test_a_checkpoint_and_lessons_are_of_one_way_to_show_images(digits, trained, tmp_path):
    mirrored, path = dataclasses.replace(digits, flip=True), tmp_path / "run.pt"
    schedule = dataclasses.replace(SCHEDULE, epochs=1, distillation=0.5)
    alone, second = small(), small()
    fit(alone, mirrored, schedule, teacher=trained, progress=None)
    fit(small(), digits, schedule, teacher=trained, lessons=tmp_path, checkpoint=path, progress=None)
    with pytest.raises(InputError, match="belongs to another run"):
        fit(small(), mirrored, schedule, teacher=trained, checkpoint=path, progress=None)
    fit(second, mirrored, schedule, teacher=trained, lessons=tmp_path, progress=None)
    assert state_equal(alone, second)


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"run": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="no checkpoint of rlprune"):
        files.read_checkpoint(tmp_path / "evil.pt", "x")


def test_distillation_pulls_towards_the_teacher(digits, trained):
    schedule = Training(epochs=1, batch_size=64, learning_rate=0.02, label_smoothing=0.0)
    images = digits.normalise(digits.validation.images)
    target = trained(images).softmax(1)
    distance = {}
    for share in (0.0, 0.9):
        network = small()
        fit(network, digits, dataclasses.replace(schedule, distillation=share), teacher=trained, progress=None)
        distance[share] = (network(images).softmax(1) - target).abs().sum(1).mean().item()
    assert distance[0.9] < distance[0.0]


def test_the_loss_of_distillation():
    # (1 − d) · cross entropy with smoothed labels + d · T² · KL(teacher ‖ network), Hinton et al. 2015
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(6, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    schedule = Training(distillation=0.3, temperature=4.0, label_smoothing=0.2)
    smooth = 0.8 * nn.functional.one_hot(labels, 5) + 0.2 / 5
    hard = -(smooth * logits.log_softmax(1)).sum(1).mean()
    p, q = (teacher / 4).softmax(1), (logits / 4).softmax(1)
    soft = (p * (p.log() - q.log())).sum(1).mean()
    found = training._loss(logits, labels, schedule, teacher)
    assert found.item() == pytest.approx((0.7 * hard + 0.3 * 16 * soft).item(), rel=1e-5)


def test_lessons_are_learned_from_once_and_teach_the_same(digits, trained, tmp_path):
    schedule = dataclasses.replace(SCHEDULE, distillation=0.5)
    alone, first, second, other = small(), small(), small(), small()
    expected = fit(alone, digits, schedule, teacher=trained, progress=None)
    asked = []
    watch = trained.register_forward_hook(lambda *_: asked.append(1))
    fit(first, digits, schedule, teacher=trained, lessons=tmp_path, progress=None)
    steps, looks = len(digits.train) // schedule.batch_size, 1  # whether it is a teacher for these images
    assert len(asked) == steps * schedule.epochs + looks
    history = fit(second, digits, schedule, teacher=trained, lessons=tmp_path, progress=None)
    assert len(asked) == steps * schedule.epochs + 2 * looks, "the second network asked the teacher again"
    assert state_equal(alone, first)
    assert state_equal(alone, second)
    assert list(history["loss"]) == list(expected["loss"])
    # another seed shows other crops, another teacher says something else: neither may find these lessons
    fit(other, digits, schedule, seed=1, teacher=trained, lessons=tmp_path, progress=None)
    assert len(asked) == 2 * steps * schedule.epochs + 3 * looks
    watch.remove()
    files_before = set(tmp_path.iterdir())
    fit(small(), digits, schedule, teacher=small(1).eval(), lessons=tmp_path, progress=None)
    assert len(set(tmp_path.iterdir()) - files_before) == schedule.epochs


def test_lessons_prepared_in_any_order_are_those_that_a_network_learns_from(digits, trained, tmp_path):
    schedule = dataclasses.replace(SCHEDULE, epochs=2, distillation=0.5)
    alone, pupil = small(), small()
    fit(alone, digits, schedule, teacher=trained, lessons=tmp_path / "asked", progress=None)
    run = (trained, digits, schedule.batch_size, 0)
    for epoch in (2, 1):
        Lessons(*run, tmp_path / "prepared").prepare(epoch)
    asked, prepared = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("asked", "prepared"))
    assert asked == prepared
    assert len(asked) == schedule.epochs
    called = []
    watch = trained.register_forward_hook(lambda *_: called.append(1))
    Lessons(*run, tmp_path / "prepared").prepare(2)
    assert not called, "a file that was there was made again"
    fit(pupil, digits, schedule, teacher=trained, lessons=tmp_path / "prepared", progress=None)
    watch.remove()
    assert len(called) == 1  # whether it is a teacher for these images
    assert state_equal(alone, pupil)


def test_a_stopped_run_takes_up_its_lessons_in_the_middle(digits, trained, tmp_path, monkeypatch):
    schedule = dataclasses.replace(SCHEDULE, distillation=0.5)
    whole, part = small(), small()
    fit(whole, digits, schedule, teacher=trained, lessons=tmp_path / "lessons", progress=None)
    real, path = training.one_epoch, tmp_path / "run.pt"

    def stop_in_third(*args):
        if path.exists() and len(torch.load(path)["history"]) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "one_epoch", stop_in_third)
    run = {"teacher": trained, "lessons": tmp_path / "lessons", "checkpoint": path, "progress": None}
    with pytest.raises(KeyboardInterrupt):
        fit(part, digits, schedule, **run)
    monkeypatch.undo()
    again = small()
    with pytest.raises(InputError, match="belongs to another run"):
        fit(again, digits, schedule, **{**run, "teacher": small(1)})
    fit(again, digits, schedule, **run)
    assert state_equal(whole, again)


def test_a_lesson_broken_off_is_not_kept_and_a_broken_one_is_named(digits, trained, tmp_path, monkeypatch):
    schedule = dataclasses.replace(SCHEDULE, epochs=1, distillation=0.5)
    monkeypatch.setattr(training, "_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(small(), digits, schedule, teacher=trained, lessons=tmp_path, progress=None)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    fit(small(), digits, schedule, teacher=trained, lessons=tmp_path, progress=None)
    (lesson,) = tmp_path.iterdir()
    lesson.write_bytes(lesson.read_bytes()[:1000])
    with pytest.raises(InputError, match="is cut off"):
        fit(small(), digits, schedule, teacher=trained, lessons=tmp_path, progress=None)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"epochs": 0}, "at least 1 epoch"),
        ({"learning_rate": -1.0}, "learning rate above 0"),
        ({"distillation": 2.0}, "distillation must lie in"),
        ({"average": 1.0}, "average, the decay of a moving average, must lie in"),
        ({"epoch": 3}, "Unknown training parameter 'epoch'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"label_smoothing": 1.5}, "label_smoothing in"),
        ({"weight_decay": -1}, "weight_decay must be at least 0"),
        ({"temperature": 0}, "temperature above 0"),
    ],
)
def test_bad_schedule(values, fault):
    with pytest.raises(InputError, match=fault):
        Training.of(values)


def test_training_that_diverges_is_named_and_leaves_no_checkpoint(digits, tmp_path):
    schedule = dataclasses.replace(SCHEDULE, learning_rate=1e30)
    with pytest.raises(InputError, match="Training has diverged .* in epoch 1.: lower learning_rate"):
        fit(network := small(), digits, schedule, checkpoint=tmp_path / "c.pt", progress=None)
    assert not list(tmp_path.iterdir())
    assert not network.training


def test_what_makes_no_sense_is_named_before_the_first_step(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "one_epoch", lambda *args: pytest.fail("trained for nothing"))
    imitating = dataclasses.replace(SCHEDULE, distillation=0.5)
    with pytest.raises(InputError, match=r"The teacher has outputs \(5,\) and the network \(10,\)"):
        fit(small(), digits, imitating, teacher=networks.VGG([8, "M"], classes=5), progress=None)
    with pytest.raises(InputError, match="The teacher cannot process the images"):
        fit(small(), digits, imitating, teacher=nn.Linear(3, 10), progress=None)
    with pytest.raises(InputError, match="training must be a Training, or a dict of its values, not None"):
        fit(small(), digits, None, progress=None)
    with pytest.raises(InputError, match="Unknown training parameter 'epoch'"):
        fit(small(), digits, {"epoch": 1}, progress=None)
    with pytest.raises(InputError, match="is a folder: name a file"):
        fit(small(), digits, SCHEDULE, checkpoint=tmp_path, progress=None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written .*: name another file"):
        fit(small(), digits, SCHEDULE, checkpoint=tmp_path / "file" / "c.pt", progress=None)
    broken = small()
    broken.classifier.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="The network's outputs are not finite numbers"):
        fit(broken, digits, SCHEDULE, progress=None)


def test_statistics_that_are_not_finite_are_training_that_diverged():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network.register_buffer("mask", torch.tensor([0.0, -torch.inf]))  # of the network's own
    training.check_loss(1.0, 1, network)
    network[1].running_var[2] = torch.inf
    with pytest.raises(InputError, match="Training has diverged"):
        training.check_loss(1.0, 1, network)


def test_weight_decay_is_on_weights_alone():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = training.sgd(network, Training(learning_rate=0.5, momentum=0.0, weight_decay=0.1))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        share = 0.95 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter.detach(), share * before[name])


@pytest.mark.parametrize(("momentum", "steps"), [(0.9, [1.9, 2.71]), (0.0, [1, 1])])
def test_momentum_is_nesterovs(momentum, steps):
    layer = nn.Linear(1, 1, bias=False)
    optimizer = training.sgd(layer, Training(learning_rate=1.0, momentum=momentum, weight_decay=0))
    for step in steps:  # g + m·v after v ← m·v + g; without looking ahead 1 and 1.9
        before = layer.weight.item()
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        assert before - layer.weight.item() == pytest.approx(step)


def test_training_without_momentum(digits):
    before = small()
    fit(after := small(), digits, dataclasses.replace(SCHEDULE, epochs=1, momentum=0.0), progress=None)
    assert not state_equal(before, after)


def test_labels_beyond_the_outputs_are_found_before_training(digits):
    with pytest.raises(InputError, match="There is a label 9, but the network has outputs for 0 to 4"):
        fit(networks.VGG([8, "M"], classes=5), digits, SCHEDULE, progress=None)


class Auxiliary(nn.Module):
    """Two outputs while it is trained, as GoogLeNet and Inception have."""

    def __init__(self):
        super().__init__()
        self.body, self.beside = small(), nn.Linear(3 * 32 * 32, 10)

    def forward(self, images):
        logits = self.body(images)
        return (logits, self.beside(images.flatten(1))) if self.training else logits


def test_a_network_with_an_auxiliary_head_is_trained_by_its_first_output(digits):
    network = Auxiliary()
    aside = network.beside.weight.detach().clone()
    history = fit(network, digits, dataclasses.replace(SCHEDULE, epochs=1), progress=None)
    assert history["train_accuracy"].iloc[0] > 20
    assert torch.equal(network.beside.weight, aside)


def test_a_warm_up_of_one_step(digits):
    few = from_tensors(digits.train.images[:80], digits.train.labels[:80], validation=0.2)
    schedule = training.Training(epochs=1, batch_size=16)  # four steps, a quarter of them to warm up
    assert len(few.train) == 64
    assert len(training.fit(networks.build("resnet20"), few, schedule, progress=None)) == 1


def test_a_schedule_of_one_step_is_a_step(digits):
    few = from_tensors(digits.train.images[:20], digits.train.labels[:20], validation=0.2)
    network = small()
    before = network.state_dict()["classifier.weight"].clone()
    training.fit(network, few, training.Training(epochs=1, batch_size=16, learning_rate=0.1), progress=None)
    assert (network.state_dict()["classifier.weight"] - before).abs().max() > 1e-3  # not at the rate of a last step


def test_a_network_that_may_not_change(digits):
    with pytest.raises(InputError, match="No weight of the network may change"):
        training.fit(networks.build("resnet20").requires_grad_(False), digits, training.Training(), progress=None)


def test_half_precision_weights_have_a_hash():
    network = networks.build("resnet20")
    assert weights_hash(network.bfloat16()) != weights_hash(networks.build("resnet20"))


def test_too_few_images_for_a_batch(digits):
    with pytest.raises(InputError, match="lower batch_size"):
        fit(small(), digits, dataclasses.replace(SCHEDULE, batch_size=5000), progress=None)


def test_nothing_half_written_stays(tmp_path):
    def write(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(tmp_path / "file.txt", write)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_but_not_what_is_being_written(tmp_path):
    left, busy, other = (tmp_path / name for name in (".file[1].pt.7.partial", ".file[1].pt.8.partial", "file.txt"))
    for path in (left, busy, other):
        path.write_text("half")
    os.utime(left, (0, 0))
    os.utime(other, (0, 0))
    files.write_atomically(tmp_path / "file[1].pt", lambda path: path.write_text("whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [busy.name, other.name, "file[1].pt"]


def test_a_file_that_another_process_has_just_put_in_place_is_no_fault(tmp_path, monkeypatch):
    left = tmp_path / ".file.txt.7.partial"
    left.write_text("whole")
    monkeypatch.setattr(files.time, "time", lambda: left.unlink() or 0.0)  # as late as can be
    files.write_atomically(tmp_path / "file.txt", lambda path: path.write_text("whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vgg11", 9_228_362), ("vgg16", 14_724_042), ("vgg19", 20_035_018), ("resnet18", 11_173_962)],
)
def test_networks_have_the_sizes_of_the_field(name, parameters):
    network = networks.build(name)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet56", 0.86), ("resnet34", 21.3)])
def test_other_networks(name, millions):
    assert sum(p.numel() for p in networks.build(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.02)


def test_build_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b = networks.build("resnet20", seed=1), networks.build("resnet20", seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert state_equal(a, b)
    assert not state_equal(a, networks.build("resnet20", seed=2))
    with pytest.raises(InputError, match="Unknown network 'vgg12'"):
        networks.build("vgg12")


def test_a_network_that_views_is_trained_and_judged(viewing, digits):
    network = viewing()
    fit(network, digits, Training(epochs=1, batch_size=64, distillation=0.5), teacher=viewing())
    before = accuracy(network, digits, digits.test)
    assert 0 < before <= 100
    assert accuracy(network, digits.contiguous(), digits.contiguous().test) == before


@pytest.mark.parametrize(("width", "how"), [(1, {}), (4, {}), (7, {"dilation": 2}), (5, {"stride": (1, 2)}), (12, {})])
def test_narrow_strided_shortcuts_get_the_right_gradients(width, how, monkeypatch):
    # oneDNN's own gradient is wrong there, where it does not end the process: without AVX-512 below 8 channels
    monkeypatch.setenv("RLPRUNE_PRECISION", "float32")
    torch.manual_seed(0)
    shortcut = nn.Conv2d(width, 10, 1, **{"stride": 2, **how})
    network = nn.Sequential(nn.Conv2d(3, width, 1), shortcut, nn.Flatten())
    network, images = network.to(memory_format=torch.channels_last), torch.randn(32, 3, 32, 32)
    exact = copy.deepcopy(network).double()
    for _ in range(20):  # what is written past the end of memory is not noticed at once
        network.zero_grad()
        logits = training_logits(network, images.contiguous(memory_format=torch.channels_last))
        logits.square().sum().backward()
    expected = exact(images.double())
    expected.square().sum().backward()
    assert torch.allclose(logits.double(), expected, atol=1e-4)
    for one, other in zip(network.parameters(), exact.parameters(), strict=True):
        assert torch.allclose(one.grad.double(), other.grad, rtol=1e-3, atol=1e-2)
    assert shortcut.stride == exact[1].stride
    assert not shortcut._forward_pre_hooks


def test_a_pass_that_fails_leaves_strides_as_they_were(monkeypatch):
    monkeypatch.setenv("RLPRUNE_PRECISION", "float32")
    network = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.Linear(7, 2))
    with pytest.raises(RuntimeError):
        training_logits(network, torch.randn(2, 3, 8, 8))
    assert network[0].stride == (2, 2)
    assert not network[0]._forward_pre_hooks


def test_code_that_cannot_do_with_bfloat16_has_a_way_out(digits, monkeypatch):
    class Float(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

        def forward(self, images):
            made = self.conv(images).mean((2, 3))
            return self.last(torch.zeros(len(made), 4).index_add_(1, torch.arange(4), made))  # of one kind only

    monkeypatch.setattr(forward, "_cpu_has_bfloat16", lambda: True)
    with pytest.raises(InputError, match="RLPRUNE_PRECISION=float32 in the environment keeps it from bfloat16"):
        fit(Float(), digits, dataclasses.replace(SCHEDULE, epochs=1), progress=None)
    monkeypatch.setenv("RLPRUNE_PRECISION", "float32")
    assert len(fit(Float(), digits, dataclasses.replace(SCHEDULE, epochs=1), progress=None)) == 1
    monkeypatch.setenv("RLPRUNE_PRECISION", "int8")
    with pytest.raises(InputError, match="Unknown RLPRUNE_PRECISION 'int8'"):
        fit(Float(), digits, SCHEDULE, progress=None)


def test_a_buffer_of_five_dimensions_has_no_channels_last(digits):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    network.register_buffer("grid", torch.zeros(1, 1, 2, 2, 2))
    assert suited(network, digits).memory_format == torch.contiguous_format
