"""LongTailTask against what timm promises of a training task, and what a margin loss needs."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad
from torch import distributed, nn

from ldam_plugins import (
    ClassCounts,
    DeferredSchedule,
    LongTailTask,
    create_loss,
    fold_cosine_head,
    use_cosine_head,
)
from ldam_plugins.heads import cosine_heads
from ldam_plugins.schedules import Progress

COUNTS = ClassCounts([50, 20, 9, 1])
SMALL = "small, for what is compiled"
DISTILLED = "deit_tiny_distilled_patch16_224"


def images_and_target(size=32, number=8):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(number, 3, size, size, generator=generator)
    return images, torch.arange(number) % 4


def make_model(name="test_resnet", **options):
    torch.manual_seed(1)
    if name == SMALL:
        layers = nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
        return nn.Sequential(nn.Flatten(), *layers)
    if name == DISTILLED:
        options = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32} | options
    return timm.create_model(name, num_classes=4, **options)


def make_task(name="test_resnet", **options):
    return LongTailTask(make_model(name), COUNTS, verbose=False, **options)


def make_optimizer(task):
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)


def train(task, optimizer, begin=0, end=3):
    batch = images_and_target()
    for step in range(begin, end):
        task.train()
        task.set_progress(Progress(step, 6, 1))
        optimizer.zero_grad()
        task(*batch)["loss"].backward()
        optimizer.step()
        task.update_ema(step + 1)


def save(task, optimizer, folder):
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=str(folder), task=task
    )
    saver.save_checkpoint(2)
    return str(folder / "last.pth.tar")


@pytest.fixture
def one_process():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def same_tensors(one, other):
    assert list(one) == list(other)
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class TestHead:
    def test_a_lone_linear_layer_becomes_a_cosine_head(self):
        layer = nn.Linear(8, 4)
        task = LongTailTask(layer, COUNTS, verbose=False)
        features, target = 100 * torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 0])
        result = task(features, target)
        weight = task.get_trainable_module().weight
        cosines = F.normalize(features) @ F.normalize(weight).T
        torch.testing.assert_close(result["output"], 30 * cosines)
        shift = 30 * COUNTS.margins() * F.one_hot(target, 4)
        expected = F.cross_entropy(30 * cosines - shift, target)
        torch.testing.assert_close(result["loss"], expected)
        state = task.get_checkpoint_state()["state_dict"]
        layer.load_state_dict(state)
        assert torch.equal(layer(features).argmax(1), result["output"].argmax(1))

    def test_is_named_where_the_search_does_not_find_it(self):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        task = LongTailTask(model, COUNTS, head="1", verbose=False)
        assert list(cosine_heads(task.get_trainable_module())) == ["1"]
        plain = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        task = LongTailTask(plain, COUNTS, loss="ce", head="1", verbose=False)
        kept = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
        assert kept == {id(p) for part in (plain[0], plain[2]) for p in part.parameters()}
        with pytest.raises(ValueError, match="`head` must be one of '0', '1', got '3'"):
            LongTailTask(plain, COUNTS, loss="ce", head="3", verbose=False)

    @pytest.mark.parametrize("options", [{}, {"scale": 4.0}], ids=str)
    def test_margins_on_a_linear_head_are_taken_off_the_logits_as_they_are(self, options):
        with pytest.warns(UserWarning, match="loss LDAMLoss on a linear head") as caught:
            task = make_task(cosine_head=False, **options)
        assert caught[0].filename == __file__
        assert not cosine_heads(task.get_trainable_module())
        images, target = images_and_target()
        result = task(images, target)
        shift = options.get("scale", 1) * COUNTS.margins() * F.one_hot(target, 4)
        expected = F.cross_entropy(result["output"] - shift, target)
        torch.testing.assert_close(result["loss"], expected)
        assert task.get_task_state() == {}

    def test_one_process_warns_for_all(self, one_process, monkeypatch):
        monkeypatch.setattr(distributed, "get_rank", lambda: 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_task(cosine_head=False)

    @pytest.mark.parametrize(("options", "scale"), [({}, 30), ({"scale": 20.0}, 20)], ids=str)
    def test_other_losses_can_have_the_head(self, options, scale):
        task = make_task(loss="ce", cosine_head=True, **options)
        (head,) = cosine_heads(task.get_trainable_module()).values()
        assert head.scale == scale
        images, target = images_and_target()
        result = task(images, target)
        torch.testing.assert_close(result["loss"], F.cross_entropy(result["output"], target))
        resets(task.get_trainable_module())
        with pytest.raises(ValueError, match=rf"use_cosine_head\(model, scale={scale}\)"):
            task(images, target)

    def test_a_cosine_head_stays_or_says_what_to_do(self):
        model = use_cosine_head(make_model(), 20.0)
        head = model.fc
        given = {"loss": "ce", "verbose": False}
        task = LongTailTask(model, COUNTS, cosine_head=True, scale=20, **given)
        assert task.get_trainable_module().fc is head
        with pytest.raises(ValueError, match=r"`scale` must be 20, got 10.*fold_cosine_head"):
            LongTailTask(model, COUNTS, cosine_head=True, scale=10, **given)
        with pytest.raises(ValueError, match=r"linear head.*'fc'.*fold_cosine_head"):
            LongTailTask(model, COUNTS, cosine_head=False, **given)
        with pytest.raises(TypeError, match=r"option of 'ce' .*got 'scale'.*cosine_head=True"):
            LongTailTask(make_model(), COUNTS, scale=10, **given)

    def test_counts_are_those_of_a_ready_loss(self):
        loss = create_loss("ldam", COUNTS)
        with pytest.raises(ValueError, match=r"`class_counts` must be those of the ready loss"):
            LongTailTask(nn.Linear(3, 4), [50, 20, 9, 2], loss=loss, verbose=False)
        assert LongTailTask(nn.Linear(3, 4), COUNTS.counts, loss=loss, verbose=False)

    def test_loss_lies_where_the_model_does(self):
        task = LongTailTask(make_model(device="meta"), COUNTS, verbose=False)
        assert task.device == torch.device("cpu")
        assert task.criterion.weight.device.type == "cpu"
        task = make_task(device=torch.device("cpu"))
        assert task.device == torch.device("cpu")


def resets(model):
    model.reset_classifier(4)


def folds(model):
    fold_cosine_head(model)


def sets(model):
    model.fc = nn.Linear(model.num_features, 4)


def removes(model):
    model.reset_classifier(0)


def rescales(model):
    use_cosine_head(fold_cosine_head(model), 16.0)


WAYS = [resets, folds, sets, removes, rescales]


class TestLostHead:
    """Margins of 15 on logits that are no cosines would train something else, without a word."""

    @pytest.mark.parametrize(
        ("wrapped", "lose"),
        [("plain", lose) for lose in WAYS]
        + [(wrapped, resets) for wrapped in ("compiled", "copied", "distributed")],
    )
    def test_is_refused(self, lose, wrapped, one_process):
        task = make_task()
        if wrapped == "compiled":
            task.compile(backend="eager")
        if wrapped == "distributed":
            task.prepare_distributed()
        if wrapped == "copied":
            task = copy.deepcopy(task)
        inner = task.get_trainable_module()
        lose(getattr(inner, "module", getattr(inner, "_orig_mod", inner)))
        wanted = "`(model|scale)` must be .*head"
        with pytest.raises(ValueError, match=wanted):
            task(*images_and_target())
        with pytest.raises(ValueError, match=wanted):
            task.prepare_distributed()

    def test_of_the_model_that_was_given_under_a_compiled_task(self):
        model = make_model(SMALL)
        task = LongTailTask(model, COUNTS, verbose=False)
        compiled = torch.compile(task, backend="eager", fullgraph=True)
        compiled(*images_and_target())
        model[4] = nn.Linear(8, 4)
        with pytest.raises(RuntimeError, match=r"must be|Observed exception"):
            compiled(*images_and_target())

    def test_of_several_is_refused(self):
        task = make_task(DISTILLED)
        task(*images_and_target())
        task.get_trainable_module().head_dist = nn.Linear(24, 4)
        with pytest.raises(ValueError, match=r"must be .*'head_dist'"):
            task(*images_and_target())

    def test_a_new_one_of_the_same_scale_is_as_good(self, one_process):
        task = make_task()
        model = task.get_trainable_module()
        model.reset_classifier(4)
        use_cosine_head(model)
        task.prepare_distributed()
        images, target = images_and_target()
        result = task(images, target)
        shift = 30 * COUNTS.margins() * F.one_hot(target, 4)
        expected = F.cross_entropy(result["output"] - shift, target)
        torch.testing.assert_close(result["loss"], expected)

    def test_a_new_one_is_unknown_to_the_processes_that_share_gradients(self, one_process):
        task = make_task().prepare_distributed()
        model = task.get_trainable_module().module

        def go_on():
            model.reset_classifier(4)
            use_cosine_head(model)
            task(*images_and_target())

        with pytest.raises(ValueError, match=r"must be one .*(distributed|wrapped)"):
            go_on()

    def test_is_none_where_it_was_wrapped_or_compiled_by_itself(self):
        task = make_task()
        batch = images_and_target()
        model = task.get_trainable_module()
        with torch.no_grad():
            right = task(*batch)["loss"]
            model.fc = torch.compile(model.fc, backend="eager")
            torch.testing.assert_close(task(*batch)["loss"], right)

    def test_is_no_matter_to_a_loss_without_margins(self):
        task = make_task(loss="ce")
        task.get_trainable_module().reset_classifier(4)
        assert task(*images_and_target())["loss"].isfinite()


class TestSeveralOutputs:
    def test_are_refused_by_what_to_do(self):
        task = make_task(DISTILLED)
        task.get_trainable_module().set_distilled_training(True)
        wanted = r"`logits` must be one tensor \(N, C\), got 'tuple'.*aux_logits=False"
        with pytest.raises(TypeError, match=wanted):
            task(*images_and_target())
        task.get_trainable_module().set_distilled_training(False)
        assert task(*images_and_target())["loss"].isfinite()


class TestClipParameters:
    @pytest.mark.parametrize("loss", ["ldam", "ce"])
    @pytest.mark.parametrize(
        ("name", "heads"),
        [
            ("cifar_resnet20", ["fc"]),
            ("test_vit", ["head"]),
            ("test_convnext", ["head.fc"]),
            ("test_mambaout", ["head.fc"]),
            (DISTILLED, ["head", "head_dist"]),
        ],
    )
    def test_leave_out_the_head_and_nothing_else(self, name, heads, loss):
        task = make_task(name, loss=loss)
        model = task.get_trainable_module()
        kept = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
        left_out = {n for n, p in model.named_parameters() if id(p) not in kept}
        parts = ["weight"] if loss == "ldam" else ["weight", "bias"]
        assert left_out == {f"{head}.{part}" for head in heads for part in parts}
        assert set(task.get_clip_parameters()) == set(model.parameters())

    def test_are_the_same_when_compiled_and_distributed(self, one_process):
        task = make_task("cifar_resnet20")
        names = {id(p): n for n, p in task.get_trainable_module().named_parameters()}
        task.compile(backend="eager")
        task.prepare_distributed()
        kept = [names[id(p)] for p in task.get_clip_parameters(exclude_head=True)]
        assert kept == list(names.values())[:-1]

    def test_adaptive_clipping_reaches_the_last_layer_of_the_body(self):
        task = make_task("cifar_resnet20")
        model = task.get_trainable_module()
        for parameter in model.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.full_like(parameter, 100.0)
        clipped = task.get_clip_parameters(exclude_head=True)
        dispatch_clip_grad(clipped, 0.01, mode="agc")
        untouched = [n for n, p in model.named_parameters() if p.grad.unique().tolist() == [100.0]]
        assert untouched == ["fc.weight"]
        torch.testing.assert_close(model.layer3[2].bn2.bias.grad, torch.full((64,), 0.01))


class TestCheckpoints:
    @pytest.mark.parametrize("name", ["test_resnet", "cifar_resnet20", DISTILLED])
    def test_are_loaded_by_timm_as_the_folded_model(self, tmp_path, name):
        task = make_task(name)
        task.setup_ema(decay=0.5)
        optimizer = make_optimizer(task)
        train(task, optimizer)
        path = save(task, optimizer, tmp_path)
        images, _ = images_and_target()
        for use_ema in (False, True):
            eval_model = task.get_eval_model(ema=use_ema)
            inner = copy.deepcopy(getattr(eval_model, "module", eval_model)).eval()
            cosine = inner(images)
            right = fold_cosine_head(inner)(images)
            model = make_model(name)
            timm.models.load_checkpoint(model, path, use_ema=use_ema, strict=True)
            assert torch.equal(model.eval()(images), right)
            if name != DISTILLED:  # whose two heads a fold cannot weigh as the cosines do
                assert torch.equal(right.argmax(1), cosine.argmax(1))
        stranger = make_model(name, checkpoint_path=path)
        assert torch.equal(stranger.eval()(images), model(images))  # timm prefers the EMA
        assert same_tensors(task.get_checkpoint_state()["state_dict"], make_state(path))

    @pytest.mark.parametrize("wrapped", ["plain", "compiled", "distributed"])
    def test_resume_to_the_bit(self, tmp_path, wrapped, one_process):
        name = SMALL if wrapped == "compiled" else "test_resnet"
        task, fresh = make_task(name), make_task(name)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.add_(1)
        for each in (task, fresh):
            each.setup_ema(decay=0.5)
            if wrapped == "compiled":
                each.compile(backend="eager")
            if wrapped == "distributed":
                each.prepare_distributed()
        optimizer, other = make_optimizer(task), make_optimizer(fresh)
        train(task, optimizer)
        path = save(task, optimizer, tmp_path)
        train(task, optimizer, 3, 6)
        assert resume_task_checkpoint(fresh, path, other, log_info=False) == 3
        load_task_ema_checkpoint(fresh, path)
        train(fresh, other, 3, 6)
        assert same_tensors(task.state_dict(), fresh.state_dict())

    def test_hold_the_exact_head_in_the_state_of_the_task(self):
        task = make_task()
        train(task, make_optimizer(task))
        state = task.get_checkpoint_state()
        assert sorted(state) == ["state_dict", "task_state"]
        assert sorted(state["state_dict"]) == sorted(make_model().state_dict())
        exact = state["task_state"]["cosine_heads"]
        head = task.get_trainable_module().fc
        assert torch.equal(exact["fc.cosine_weight"], head.weight)
        assert torch.equal(exact["fc.cosine_moments"], head.cosine_moments)
        assert not torch.equal(state["state_dict"]["fc.weight"], head.weight)

    def test_without_it_give_the_class_directions(self):
        task, fresh = make_task(), make_task()
        train(task, make_optimizer(task))
        fresh.load_checkpoint_state(task.get_checkpoint_state()["state_dict"])
        images, _ = images_and_target()
        torch.testing.assert_close(
            fresh.eval().get_eval_model()(images), task.eval().get_eval_model()(images)
        )

    def test_of_the_model_itself_are_taken_too(self):
        task, fresh = make_task(), make_task()
        train(task, make_optimizer(task))
        fresh.load_checkpoint_state(task.get_eval_model().state_dict())
        assert same_tensors(fresh.get_eval_model().state_dict(), task.get_eval_model().state_dict())

    def test_go_on_without_cosines_from_the_fold(self, tmp_path):
        task, plain = make_task(), make_task(loss="ce")
        optimizer = make_optimizer(task)
        train(task, optimizer)
        resume_task_checkpoint(plain, save(task, optimizer, tmp_path), log_info=False)
        images, _ = images_and_target()
        folded = fold_cosine_head(copy.deepcopy(task.get_eval_model())).eval()
        assert torch.equal(plain.eval().get_eval_model()(images), folded(images))

    def test_of_ordinary_heads_are_not_taken_for_cosines(self):
        plain = make_task(loss="ce")
        assert sorted(plain.get_checkpoint_state()) == ["state_dict"]
        nn.init.ones_(plain.get_trainable_module().fc.bias)
        with pytest.raises(RuntimeError, match=r"`fc.bias` must be zero for a cosine head"):
            make_task().load_checkpoint_state(plain.get_checkpoint_state()["state_dict"])

    def test_of_an_average_that_is_not_there(self):
        assert make_task().get_checkpoint_state(ema=True) == {}
        with pytest.raises(RuntimeError, match="before setup_ema"):
            make_task().load_checkpoint_state({}, ema=True)


def make_state(path):
    return torch.load(path, weights_only=True)["state_dict"]


def loaded(task):
    task.load_state_dict(make_task().state_dict())


def by_hand(task):
    task.criterion.weight.fill_(7)


def rescheduled(task):
    task.schedule = DeferredSchedule("drw", start=0.5, beta=0.9)


def new_loss(task):
    task.criterion = create_loss("ldam", COUNTS)


def copied(task):
    task.criterion = copy.deepcopy(task.criterion)
    task.criterion.weight.zero_()


def moved(task):
    task.double()
    task.float()


class TestProgress:
    def test_weights_are_written_at_a_change_of_stage_only(self):
        task = make_task(schedule=DeferredSchedule("drw", start=0.5))
        writes = []
        for step in range(10):
            before = task.criterion.weight._version
            task.set_progress(Progress(step, 10, 1))
            writes.append(task.criterion.weight._version - before)
        assert writes == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        torch.testing.assert_close(task.criterion.weight, COUNTS.weights())

    @pytest.mark.parametrize("change", [loaded, by_hand, rescheduled, new_loss, copied, moved])
    def test_weights_that_were_changed_are_set_again(self, change):
        task = make_task(schedule=DeferredSchedule("drw", start=0.5))
        task.set_progress(Progress(8, 10, 1))
        change(task)
        assert task.set_progress(Progress(9, 10, 1)) == "reweighted"
        beta = task.schedule.beta
        torch.testing.assert_close(task.criterion.weight, COUNTS.weights(beta))

    def test_a_copy_and_a_pickle_go_on(self):
        task = make_task(schedule=DeferredSchedule("drw", start=0.5))
        task.set_progress(Progress(8, 10, 1))
        for other in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
            assert torch.equal(other.criterion.weight, task.criterion.weight)
            other.set_progress(Progress(0, 10, 1))
            assert torch.equal(other.criterion.weight, torch.ones(4))
            assert not torch.equal(task.criterion.weight, torch.ones(4))
            batch = images_and_target()
            task.set_progress(Progress(0, 10, 1))
            assert torch.equal(other(*batch)["loss"], task(*batch)["loss"])
            task.set_progress(Progress(8, 10, 1))


class TestTask:
    """What timm's own ClassificationTask does with the same loss."""

    def test_loss_output_and_gradients_are_those_of_timms_task(self):
        task = make_task()
        model = use_cosine_head(make_model())
        model.load_state_dict(task.get_trainable_module().state_dict())
        host = ClassificationTask(model, create_loss("ldam", COUNTS), verbose=False)
        batch = images_and_target()
        for one, other in zip(task(*batch).values(), host(*batch).values(), strict=True):
            assert torch.equal(one, other)

    def test_a_compiled_task_gives_the_same_before_and_after_the_switch(self):
        task = make_task(SMALL, schedule=DeferredSchedule("drw", start=0.5))
        batch = images_and_target()
        compiled = torch.compile(task, backend="eager", fullgraph=True)
        for step in (0, 9):
            task.set_progress(Progress(step, 10, 1))
            torch.testing.assert_close(compiled(*batch)["loss"], task(*batch)["loss"])

    def test_accumulation_shares_gradients_once(self, one_process):
        task = make_task().prepare_distributed()
        batch = images_and_target()
        with task.no_sync():
            task(*batch)["loss"].backward()
        task(*batch)["loss"].backward()
        assert all(p.grad is not None for p in task.get_trainable_module().parameters())

    def test_a_conversion_keeps_the_weights_precise(self):
        task = make_task()
        task.set_progress(Progress(9, 10, 1))
        task.to(torch.bfloat16)
        assert task.dtype == torch.bfloat16
        torch.testing.assert_close(task.criterion.weight, COUNTS.weights(), rtol=0, atol=0)
        images, target = images_and_target()
        assert task(images.bfloat16(), target)["loss"].isfinite()

    def test_an_average_that_is_compiled_follows_the_model(self):
        task = make_task(SMALL)
        task.setup_ema(decay=0.0)
        task.compile(backend="eager")
        task.compile_ema(backend="eager")
        images, _ = images_and_target()
        optimizer = make_optimizer(task)
        train(task, optimizer, 0, 2)
        current = task.eval().get_eval_model()(images)
        torch.testing.assert_close(task.get_eval_model(ema=True)(images), current)

    def test_is_told_in_the_log(self, caplog):
        with caplog.at_level("INFO", "timm.task.classification"):
            LongTailTask(nn.Linear(3, 4), COUNTS)
        assert "LongTailTask: criterion=LDAMLoss" in caplog.text
