import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from tests.data.test_sources import GOOD, encoded, fill
from tests.engine.tiny import array_source
from tests.sessions import in_new_session
from torch.utils.data._utils import signal_handling

from widekernel.data import (
    AugmentConfig,
    BatchPlan,
    DataConfig,
    EvaluationLoader,
    EvaluationSamples,
    LabeledImages,
    LoaderOptions,
    OnImage,
    Preprocessing,
    Shard,
    TrainingLoader,
    TrainingSamples,
    open_split,
)
from widekernel.data.samples import EpochBatches
from widekernel.data.seeding import derive_seed, scoped_seed
from widekernel.errors import ConfigError, DataError

PREPROCESSING = Preprocessing(8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)


def training_loader(source, batch_size=4, workers=0, seed=1, rank=0, **division):
    samples = TrainingSamples(source, OnImage(PREPROCESSING.train_transform(AugmentConfig())), seed, LabeledImages.collate)
    return TrainingLoader(samples, LoaderOptions(workers), BatchPlan(batch_size, **division), rank)


def evaluation_samples(source):
    return EvaluationSamples(source, OnImage(PREPROCESSING.eval_transform()), LabeledImages.collate)


def test_batches_depend_on_seed_and_epoch_only():
    source = array_source(18)
    first = [batch.content.images for batch in training_loader(source).epoch(3)]
    torch.rand(7), random.random(), np.random.rand()
    second = [batch.content.images for batch in training_loader(source, workers=2).epoch(3)]
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = [batch.content.images for batch in training_loader(source).epoch(4)]
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], next(iter(training_loader(source, seed=2).epoch(3))).content.images)


def test_skipping_batches_yields_the_rest_of_the_epoch():
    loader = training_loader(array_source(18))
    whole = [batch.content.images for batch in loader.epoch(0)]
    rest = [batch.content.images for batch in loader.epoch(0, skip_steps=3)]
    assert len(rest) == 1
    assert torch.equal(whole[3], rest[0])


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, None), (1, 4), (2, 6), (2, 2), (3, None), (3, 1)])
def test_every_division_of_a_batch_has_the_same_order(world_size, micro_batch):
    whole = list(EpochBatches(50, BatchPlan(12), seed=7))
    assert [len(batch) for batch in whole] == [12] * 4
    plan = BatchPlan(12, micro_batch, world_size)
    ranks = [list(EpochBatches(50, plan, 7, rank)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {4 * plan.accumulate}
    for step, batch in enumerate(whole):
        for rank, batches in enumerate(ranks):
            for number in range(plan.accumulate):
                first = plan.first(rank, number)
                assert batches[step * plan.accumulate + number] == batch[first : first + plan.per_pass]


def test_the_order_is_that_of_earlier_versions():
    generator = torch.Generator().manual_seed(derive_seed(1, 7, 2))
    expected = torch.randperm(50, generator=generator).tolist()
    batches = EpochBatches(50, BatchPlan(12), seed=7)
    batches.epoch = 2
    assert [key for batch in batches for key in batch] == [(2, index) for index in expected[:48]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 20, 23])
def test_evaluation_yields_every_image_once(world_size, count):
    source = array_source(count)
    source.targets = list(range(count))
    seen = []
    for rank in range(world_size):
        loader = EvaluationLoader(evaluation_samples(source), 4, LoaderOptions(), Shard(rank, world_size))
        batches = list(loader)
        assert loader.most_batches - 1 <= len(batches) <= loader.most_batches
        seen += [target for batch in batches for target in batch.content.targets.tolist()]
    assert sorted(seen) == list(range(count))


def test_loading_leaves_the_global_generators_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    list(training_loader(array_source(8)).epoch(0))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_scoped_seed_restores_after_an_error():
    state = torch.get_rng_state()

    def fail():
        with scoped_seed(1, 2):
            torch.rand(1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(state, torch.get_rng_state())


def test_derived_seeds_differ():
    seeds = {derive_seed(a, b, c) for a in range(3) for b in range(10) for c in range(20)}
    assert len(seeds) == 600


def damaged_folder(tmp_path, names):
    config = fill(tmp_path, GOOD)
    for name in names:
        (tmp_path / name).write_bytes(b"damaged")
    return config


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_image_is_replaced_and_named(tmp_path, workers):
    source = open_split(damaged_folder(tmp_path, ["train/cat/1.png"]), "train")
    batches = list(training_loader(source, batch_size=5, workers=workers).epoch(0))
    assert [batch.size for batch in batches] == [5]
    assert len(batches[0].unreadable) == 1
    assert batches[0].unreadable[0].name == "cat/1.png"


def test_unreadable_evaluation_image_is_left_out_and_named(tmp_path):
    source = open_split(damaged_folder(tmp_path, ["val/cat/0.png"]), "val")
    batches = list(EvaluationLoader(evaluation_samples(source), 1, LoaderOptions(), Shard()))
    assert [(batch.size, batch.content and batch.content.targets.tolist()) for batch in batches] == [(0, None), (1, [1])]
    assert str(batches[0].unreadable[0]) == "cat/0.png: not an image of a known format"


def test_missing_file_counts_as_unreadable(tmp_path):
    source = open_split(fill(tmp_path, GOOD), "val")
    (tmp_path / "val" / "dog" / "0.png").unlink()
    sample = evaluation_samples(source)[1]
    assert sample.item is None
    assert "No such file" in sample.unreadable[0].reason


def test_nothing_readable_is_an_error(tmp_path):
    names = [f"train/{name}" for name in ("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png")]
    source = open_split(damaged_folder(tmp_path, names), "train")
    with pytest.raises(DataError, match="in a row cannot be read"):
        list(training_loader(source).epoch(0))


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [(224, (500, 300), 0.875), (383, (500, 400), 0.875), (384, (500, 300), 1.0), (448, (300, 500), 1.0)],
)
def test_default_crop(size, shape, expected):
    from PIL import Image

    preprocessing = Preprocessing.resolve(DataConfig(), {"input_size": (3, size, size)})
    assert preprocessing.crop_pct == expected
    # the left edge is white: warping keeps it, a center crop of a wide image cuts it off
    image = np.zeros((shape[1], shape[0], 3), dtype=np.uint8)
    image[:, :10] = 255
    output = preprocessing.eval_transform()(Image.fromarray(image))
    assert output.shape == (3, size, size)
    keeps_edge = bool(output[0, size // 2, 0] > 1)
    assert keeps_edge == (size >= 384)


def test_preprocessing_comes_from_config_then_model_then_imagenet():
    model = {"input_size": (3, 320, 320), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    resolved = Preprocessing.resolve(DataConfig(std=(0.9, 0.9, 0.9)), model)
    assert resolved == Preprocessing(320, (0.1, 0.2, 0.3), (0.9, 0.9, 0.9), "bicubic", 0.875)
    assert Preprocessing.resolve(DataConfig(), {}).mean == (0.485, 0.456, 0.406)
    assert resolved.overridden_by(DataConfig()) == resolved
    assert resolved.overridden_by(DataConfig(input_size=384)).crop_pct == 1.0


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1-n4", "augmix-m10", "v0", "original", "3a"])
def test_augmentation_policies_take_every_image(policy):
    transform = PREPROCESSING.train_transform(AugmentConfig(auto_augment=policy))
    source = array_source(3)
    for index in range(300):
        with scoped_seed(index):
            assert transform(source.load(index % 3)[0]).shape == (3, 8, 8)


def test_posterizing_to_zero_bits_is_black():
    from widekernel.data.preprocess import _posterize

    image = array_source(3).load(2)[0]
    assert not np.asarray(_posterize(image, 0)).any()
    assert set(np.unique(np.asarray(_posterize(image, 1)))) <= {0, 128}
    assert _posterize(image, 8) is image


def test_unknown_augmentation_policy():
    with pytest.raises(ConfigError, match=r"augment\.auto_augment is 'rnd-m9'"):
        PREPROCESSING.train_transform(AugmentConfig(auto_augment="rnd-m9"))


@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        (DataConfig, {"input_size": 0}, "data.input_size"),
        (DataConfig, {"crop_pct": 1.5}, "data.crop_pct"),
        (DataConfig, {"workers": -1}, "data.workers"),
        (DataConfig, {"std": (0.0, 1.0, 1.0)}, "data.std"),
        (DataConfig, {"interpolation": "cubic"}, "data.interpolation"),
        (DataConfig, {"max_unreadable": -1}, "data.max_unreadable"),
        (AugmentConfig, {"crop_scale": (0.9, 0.1)}, "augment.crop_scale"),
        (AugmentConfig, {"hflip": 2.0}, "augment.hflip"),
        (AugmentConfig, {"mixup": -0.1}, "augment.mixup"),
        (AugmentConfig, {"interpolation": "lanczos"}, "augment.interpolation"),
    ],
)
def test_values_out_of_range(kind, options, key):
    with pytest.raises(ConfigError, match=f"{key} .* must be"):
        kind(**options)


def test_sample_images_have_the_formats_that_the_tests_expect():
    assert encoded()[:4] == b"\x89PNG"


def run_script(body, **options):
    code = f"""
import os, signal, time
from tests.data.test_loading import array_source, training_loader

if __name__ == "__main__":
    loader = training_loader(array_source(64), workers=2)
    batches = loader.epoch(0)
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, **options)


def batches_of_two_workers():
    return training_loader(array_source(64), workers=2).epoch(0)


@pytest.mark.slow  # tests/engine/test_interrupts.py sends more signals
@pytest.mark.skipif(not hasattr(os, "fork"), reason="process groups of POSIX")
def test_workers_survive_signals_to_the_process_group():
    def load():
        batches = batches_of_two_workers()
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        next(batches)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.killpg(0, number)
            time.sleep(0.1)
        return f"{len(list(batches))} batches"

    assert in_new_session(load) == ("15 batches", 0)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="masks of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_workers_survive_signals_while_they_start(number):
    def load():
        started, said = signal_handling._set_worker_signal_handlers, []
        signal_handling._set_worker_signal_handlers = lambda: (time.sleep(1), started())
        signal.signal(number, lambda *_: said.append("signaled"))
        threading.Timer(0.4, os.killpg, (0, number)).start()
        said.append(f"{len(list(batches_of_two_workers()))} batches")
        return ", ".join(said)

    assert in_new_session(load) == ("signaled, 16 batches", 0)


class SlowToArrive:
    """A data set that is slow to unpickle, so that the workers that receive it start slowly."""

    def __getstate__(self):
        return {"seconds": 2}

    def __setstate__(self, state):
        time.sleep(state["seconds"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="masks of POSIX")
def test_spawned_workers_survive_signals_while_they_start():
    result = run_script(
        """
        import multiprocessing
        from tests.data.test_loading import SlowToArrive

        multiprocessing.set_start_method("spawn")
        loader.samples.slow = SlowToArrive()
        signal.signal(signal.SIGTERM, lambda *_: None)

        def disturb():
            while True:
                time.sleep(0.3)
                os.killpg(0, signal.SIGTERM)

        import threading
        threading.Thread(target=disturb, daemon=True).start()
        print(len(list(batches)), flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        del batches
        """,
        start_new_session=True,
    )
    assert (result.stdout, result.returncode) == ("16\n", 0), result.stderr


@pytest.mark.slow
def test_workers_end_with_their_process():
    assert run_script("next(batches); print('leaving')").returncode == 0
