"""Making the units of a plan: what earlier runs finished is read back, processes share the rest, enough is enough."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from d4c_onnx.dead_leaves import dead_leaves
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.progress import Ahead, OnAhead, OnStep
from d4c_onnx.synthesis.early_stop import InputStatistics
from d4c_onnx.synthesis.estimate import units_ahead
from d4c_onnx.synthesis.guide import Guide, build_guide
from d4c_onnx.synthesis.loop import optimize_unit
from d4c_onnx.synthesis.param import Images, start_images
from d4c_onnx.synthesis.process_group import ProcessGroup
from d4c_onnx.synthesis.task import Plan
from d4c_onnx.synthesis.units import MadeUnit, Unit, UnitStore


def make_units(
    loaded: LoadedModel,
    plan: Plan,
    store: UnitStore,
    group: ProcessGroup,
    on_step: OnStep,
    on_ahead: OnAhead | None = None,
) -> list[MadeUnit]:
    """Every unit of a plan; none of a control.

    In a group every process makes its share, and the first one reads them all; the others return none. Once another
    batch changes too little for calibration to notice, what is left of the calibration images is skipped; held-out
    ones are made.

    Args:
        on_ahead: told before the first step how long it will take.

    Raises:
        RecipeError: the method or the recipe asks for what the tower does not have.
    """
    if plan.method is None:
        return []
    guide = build_guide(loaded, plan.method, plan.config, plan.nouns, plan.device, plan.precision)
    maker = _Maker(loaded, plan, store, guide, on_step)
    if on_ahead is not None:
        on_ahead(maker.ahead(group.size))
    if group.size > 1:
        for unit in plan.units:
            if group.owns(unit.number):
                maker.make(unit)
        group.barrier()
    if group.rank:
        return []
    made = _until_enough(maker) if plan.config.early_stop_tolerance else [maker.make(unit) for unit in plan.units]
    steps = plan.total * plan.config.steps
    on_step("synthesize", steps, steps, {"images": sum(len(one.unit) for one in made)})
    return made


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes single units, each from a seed of its own."""

    loaded: LoadedModel
    plan: Plan
    store: UnitStore
    guide: Guide
    on_step: OnStep

    def make(self, unit: Unit, skipped: int = 0) -> MadeUnit:
        """Make a unit, or read it back where that has been done.

        Args:
            skipped: images that need not be made, for the progress.
        """
        if (made := self.store.load(unit)) is not None:
            return made
        start, labels, generator = self._begin(unit)
        checkpoint, report = self.store.checkpoint(unit), self._reporter(unit, skipped)
        images, losses = optimize_unit(start, labels, self.guide, self.plan.config, generator, checkpoint, report)
        self.store.save(unit, images.numpy(), losses)
        return MadeUnit(unit, images.numpy(), losses)

    def ahead(self, processes: int) -> Ahead:
        """What is left to do, by a step of the first batch of it."""
        config, units = self.plan.config, [unit for unit in self.plan.units if not self.store.finished(unit)]
        if not units:
            return Ahead(config.method, 0, 0, 0.0)
        start, labels, _ = self._begin(units[0])
        found = units_ahead(config, units, start, labels, self.guide, processes)
        self.guide.hooks.clear()
        return found

    def _begin(self, unit: Unit) -> tuple[Images, torch.Tensor, torch.Generator]:
        """What a unit starts from: images, the labels that they are made for, and the generator of all that follows."""
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + unit.number)
        mean, std = (value.to(plan.device) for value in self.loaded.normalization())
        shape = (len(unit), 3, *self.loaded.preprocess.size)
        start = start_images(self.guide.method.image, shape, mean, std, generator, self._pictures(unit))
        return start, torch.from_numpy(plan.labels[unit.start : unit.stop]).to(plan.device), generator

    def _pictures(self, unit: Unit) -> torch.Tensor | None:
        """What the unit's images start from, float32 [N, 3, H, W] in 0..1, where that is not noise."""
        if self.guide.method.start == "noise":
            return None
        return torch.from_numpy(dead_leaves(len(unit), self.loaded.preprocess.size, self.plan.seed, unit.start))

    def _reporter(self, unit: Unit, skipped: int) -> Callable[[int, dict[str, float]], None]:
        """Progress in images times steps; shown are the finished images, image steps a second, and the loss terms."""
        # counted by their files: those in front of this unit may be another process's, and not made yet
        before = sum(len(other) for other in self.plan.units if self.store.finished(other))
        steps, total = self.plan.config.steps, self.plan.total
        begun = time.perf_counter()
        passes = 0

        def report(step: int, shown: dict[str, float]) -> None:
            nonlocal passes
            passes += 1  # of this process: a resumed unit's first step is not 1
            rate = passes * len(unit) / (time.perf_counter() - begun)
            done = before + (len(unit) if step == steps else 0)
            values = {"images": done, "image steps/s": rate, **shown}
            self.on_step("synthesize", (before + skipped) * steps + len(unit) * step, total * steps, values)

        return report


def _until_enough(maker: _Maker) -> list[MadeUnit]:
    """Units in order, without the calibration images that would change too little."""
    plan, guide = maker.plan, maker.guide
    statistics = InputStatistics(guide.tower)
    made: list[MadeUnit] = []
    change, skipped = float("inf"), 0
    for unit in plan.units:
        enough = change < (plan.config.early_stop_tolerance or 0)
        if enough and not unit.held_out:
            skipped += len(unit)
            continue
        made.append(maker.make(unit, skipped))
        if not enough and not unit.held_out:
            change = statistics.update(guide.encode, torch.from_numpy(made[-1].images).to(plan.device))
            guide.hooks.clear()
    return made
