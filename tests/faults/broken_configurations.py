"""Broken configurations: every setting of a training run, broken in every way that its type allows, and contradictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from widekernel.launch.slurm_config import SlurmConfig
from widekernel.tasks.classification.config import TrainConfig

BASE = {
    "--data.name": "digits",
    "--model.name": "slak_nano",
    "--loop.device": "cpu",
    "--data.workers": "0",
    "--schedule.epochs": "2",
    "--schedule.warmup_epochs": "1",
}
"""Settings of a run that could be trained."""


@dataclass(frozen=True)
class Leaf:
    """A setting.

    Args:
        key: dotted key
        types: types that it accepts
        nullable: whether it may be null
    """

    key: str
    types: tuple[Any, ...]
    nullable: bool


@dataclass(frozen=True)
class Broken:
    """A configuration that must be refused.

    Args:
        kind: what is wrong with it
        key: the key that the message must name
        options: options of the command line, which override those of `BASE`; `None` leaves one out
        file: contents of a configuration file
        words: what else the message must say
        opens_data: whether the mistake is in the data, which must be opened to find it
    """

    kind: str
    key: str
    options: dict[str, str | None]
    file: str | None = None
    words: tuple[str, ...] = ()
    opens_data: bool = False

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"{self.kind}: {' '.join(f'{key} {value}' for key, value in self.options.items()) or self.file}"

    def arguments(self) -> list[str]:
        """Return the arguments of the command line, without those for a file."""
        settings = {**BASE, **self.options}
        return ["train", *(part for key, value in settings.items() if value is not None for part in (key, value))]


def leaves() -> list[Leaf]:
    """Return all settings of `widekernel train`."""
    return [*_leaves_of(TrainConfig, ""), *_leaves_of(SlurmConfig, "slurm.")]


def _leaves_of(kind: type, prefix: str) -> Iterator[Leaf]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves_of(hint, f"{prefix}{field.name}.")
        else:
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            yield Leaf(f"{prefix}{field.name}", tuple(part for part in parts if part is not type(None)), type(None) in parts)


def generated() -> list[Broken]:
    """Return every setting, broken in every way that its type allows."""
    return [broken for leaf in leaves() for broken in _broken(leaf)]


def _broken(leaf: Leaf) -> Iterator[Broken]:
    key, option = leaf.key, f"--{leaf.key}"
    kinds = {get_origin(part) or part for part in leaf.types}
    yield Broken("unknown key", key, {f"{option[:-1]}": "1"}, words=("Did you mean",))
    yield Broken("unknown key in a file", f"{key}x", {}, _nested(f"{key}x", "1"), words=("unknown key",))
    if not kinds & {str, dict, tuple}:
        yield Broken("wrong type", key, {option: "[many"})
        yield Broken("a section in its place", key, {f"{option}.more": "1"})
    if kinds <= {int, float}:
        yield Broken("text for a number", key, {option: "many"})
        yield Broken("out of range", key, {option: "-1"})
    if kinds == {int}:
        yield Broken("fraction for a whole number", key, {option: "1.5"})
        yield Broken("huge", key, {option: "1e400"})
    if kinds == {float}:
        yield Broken("not a number", key, {option: ".nan"})
        yield Broken("infinite", key, {option: ".inf"})
    if kinds == {bool}:
        yield Broken("number for a choice", key, {option: "2"})
    if kinds == {Literal}:
        yield Broken("unknown choice", key, {option: "nothing"})
    if not leaf.nullable and kinds != {dict} and key != "output":
        yield Broken("null", key, {option: None}, _nested(key, "null"))
    if kinds == {tuple} and str not in leaf.types and "str" not in str(leaf.types):
        yield Broken("too few numbers", key, {option: "[0.5]"})
        yield Broken("text in a list of numbers", key, {option: "[a, b]"})
        yield Broken("out of range", key, {option: "[-1, 2]" if "mean" not in key and "std" not in key else "[-1, 2, 1]"})


def _nested(key: str, value: str) -> str:
    """Return a file that holds one setting."""
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    return value


MISSING = "/nowhere/missing.safetensors"


def contradictions() -> list[Broken]:
    """Return settings that are each valid, but not together, or not here."""

    def broken(key: str, *words: str, opens_data: bool = False, **options: str | None) -> Broken:
        named = {f"--{name.replace('__', '.')}": value for name, value in options.items()}
        return Broken("contradiction", key, named, words=words, opens_data=opens_data)

    dynamic: dict[str, Any] = {"sparsity__method": "dynamic"}
    fan_in: dict[str, Any] = {**dynamic, "sparsity__dynamic__min_fan_in": "2"}
    return [
        broken("loop.precision", "fp16", "cpu", "bf16", loop__precision="fp16"),
        broken("loop.batch_size", "even", loop__batch_size="63"),
        broken("loop.micro_batch", "does not divide", "32 or 64", loop__batch_size="64", loop__micro_batch="48"),
        broken("loop.micro_batch", "does not divide", loop__batch_size="64", loop__micro_batch="128"),
        broken("loop.micro_batch", "even", loop__batch_size="66", loop__micro_batch="33"),
        broken("loop.batch_size", "3 processes", "126 or 129", loop__batch_size="128", processes="3"),
        broken("--processes", "at most", processes="100000", loop__batch_size="100000"),
        broken("--processes", processes="0"),
        broken("--processes", processes="-1"),
        broken("schedule.warmup_epochs", "schedule.epochs (2)", schedule__warmup_epochs="2"),
        broken("schedule.warmup_steps", "schedule.steps (10)", schedule__steps="10", schedule__warmup_steps="10"),
        broken("optimizer.clip_mode", "optimizer.clip_grad", optimizer__clip_mode="agc"),
        broken("optimizer.name", "adamv", "Did you mean", optimizer__name="adamv"),
        broken("betas", "sgd", optimizer__name="sgd", optimizer__betas="[0.9, 0.99]"),
        broken("ema.warmup", "ema.decay", ema__warmup="true"),
        broken("logging.wandb_mode", "wandb_project", logging__wandb_mode="offline"),
        broken("logging.wandb_project", logging__wandb_project=""),
        broken("checkpoint.keep", "predecessor", checkpoint__keep="1"),
        broken("model.name", "'slak_tiny'", model__name="slak_tini"),
        broken("model.weights", "model.pretrained", model__pretrained="true", model__weights=MISSING),
        broken("model.args", "num_classes", model__args__num_classes="3"),
        broken("model.args", "pretrained", model__args__pretrained="true"),
        broken("model.args", "kernel_sise", model__args__kernel_sise="51"),
        broken("kernel", "50", model__args__kernel_sizes="[50, 49, 47, 13]"),
        broken("depths", model__args__depths="many"),
        broken("drop_path_rate", model__args__drop_path_rate="1.5"),
        broken("missing.safetensors", model__weights=MISSING),
        broken("model.grad_checkpointing", model__name="dla34", model__grad_checkpointing="true"),
        broken("sparsity.masks", "sparsity.method", sparsity__masks=MISSING),
        broken("missing.safetensors", **dynamic, sparsity__masks=MISSING),
        broken("sparsity.method", "model.weights", sparsity__method="semi_structured"),
        broken("ema.decay", "2:4", sparsity__method="semi_structured", model__weights=MISSING, ema__decay="0.9"),
        broken("sparsity.dynamic", "sparsity is 1.2", **dynamic, sparsity__dynamic__sparsity="1.2"),
        broken("sparsity.dynamic", "sparsity is 1.0", **dynamic, sparsity__dynamic__sparsity="1"),
        broken("sparsity.dynamic", "'snipp'", "'snip'", **dynamic, sparsity__dynamic__init="snipp"),
        broken("sparsity.dynamic", "gradients", "'gradient'", **dynamic, sparsity__dynamic__growth="gradients"),
        broken("sparsity.dynamic", "kernels", "'kernel'", **dynamic, sparsity__dynamic__block="kernels"),
        broken("sparsity.dynamic", "block", **dynamic, sparsity__dynamic__block="[4]"),
        broken("sparsity.dynamic", "block", **dynamic, sparsity__dynamic__block="[0, 4]"),
        broken("sparsity.dynamic", "layers", **dynamic, sparsity__dynamic__layers="large_kernels_only"),
        broken("sparsity.dynamic", "initial_sparsity", **dynamic, sparsity__dynamic__initial_sparsity="0.9"),
        broken("sparsity.dynamic", "min_fan_in", **fan_in, sparsity__dynamic__block="kernel"),
        broken("sparsity.dynamic", "sparsity=0.5", **dynamic, sparsity__dynamic__block="semi_structured"),
        broken("sparsity.dynamic", "rule", **fan_in, sparsity__dynamic__rule="published"),
        broken("sparsity.dynamic", "prune_schedule", **dynamic, sparsity__dynamic__prune_schedule="linear"),
        broken("sparsity.semi_structured", "tau_end", sparsity__semi_structured__tau_end="5"),
        broken("sparsity.semi_structured", "axis", sparsity__semi_structured__axis="rows"),
        broken("loop.device", "tpu", loop__device="tpu"),
        broken("loop.device", "cuda:99", loop__device="cuda:99"),
        broken("loop.device", "meta", loop__device="meta"),
        broken("augment.crop_scale", augment__crop_scale="[1.0, 0.5]"),
        broken("augment.crop_scale", augment__crop_scale="[0.1, 2]"),
        broken("augment.crop_ratio", augment__crop_ratio="[2, 1]"),
        broken("augment.hflip", augment__hflip="1.5"),
        broken("augment.auto_augment", "rand-x9", augment__auto_augment="rand-x9"),
        broken("augment.auto_augment", "nothing", augment__auto_augment="nothing"),
        broken("augment.interpolation", augment__interpolation="cubic"),
        broken("data.interpolation", data__interpolation="cubic"),
        broken("data.crop_pct", data__crop_pct="1.5"),
        broken("data.mean", "divide by 255", data__mean="[123.7, 116.3, 103.5]"),
        broken("data.std", "above 0", data__std="[0, 1, 1]"),
        broken("data.name", "'digts'", opens_data=True, data__name="digts"),
        broken("data.root", "not set", opens_data=True, data__name="folder"),
        broken("/nowhere", opens_data=True, data__name="folder", data__root="/nowhere"),
        broken("recipe", "'slak_nano_digit'", recipe="slak_nano_digit"),
        broken("nowhere.yaml", config="nowhere.yaml"),
        broken("output", "cannot be written", output="/proc/run"),
        broken("output", "cannot be written", output="/dev/null/run"),
        broken("output", output=""),
        broken("slurm.nodes", "slurm.cluster", slurm__cluster="local", slurm__nodes="2"),
        broken("slurm.processes", "slurm.gpus", slurm__processes="2"),
        broken("slurm.signal_seconds", slurm__hours="0.01", slurm__signal_seconds="100"),
        broken("slurm.sbatch", "slurm.partition", slurm__sbatch__partition="long"),
        broken("slurm.sbatch", "restarts", slurm__sbatch__requeue="true"),
        broken("--processes", "cluster job", slurm__cluster="local", processes="2"),
        Broken("file", "optimizer", {}, "optimizer: fast", words=("must hold settings",)),
        Broken("file", "'lr'", {}, "optimizer: {lr: 1, lr: 2}", words=("occurs twice", "line 1")),
        Broken("file", "YAML", {}, "optimizer: {lr: 1"),
        Broken("file", "list", {}, "- optimizer"),
    ]
