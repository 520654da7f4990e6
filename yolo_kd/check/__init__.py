"""The check before a training: will this pair work, on this data, with this recipe?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from ultralytics import __version__ as ultralytics_version
from ultralytics.utils.torch_utils import select_device

from yolo_kd._version import __version__
from yolo_kd.check.dataset import check_dataset
from yolo_kd.check.dryrun import Trace, nothing_written
from yolo_kd.check.models import check_quality, describe_files, describe_levels, devices_of
from yolo_kd.check.report import Report, plain
from yolo_kd.check.terms import check_terms, usable_terms
from yolo_kd.check.unlabeled import check_unlabeled
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.command_line import NO_RECIPE
from yolo_kd.config.train_options import TrainOptions
from yolo_kd.engine.checks_before import check_unlabeled_images, pair_problems, read_dataset
from yolo_kd.engine.class_resolution import match_classes
from yolo_kd.engine.plan import Plan, make_plan
from yolo_kd.engine.setup import Setup
from yolo_kd.environment import check_torchvision
from yolo_kd.errors import ConfigError, YoloKDError
from yolo_kd.safe_loading.checkpoint import LoadedDetector, load_detector
from yolo_kd.safe_loading.dataset import optional_train
from yolo_kd.safe_loading.restricted import restricted_loading

__all__ = ["Report", "check"]

T = TypeVar("T")


def check(options: TrainOptions) -> Report:
    """Look at everything that a training with these options depends on, and train nothing.

    A mistake that would stop the training becomes a finding, and everything that does not depend on it is looked at all
    the same. Nothing is written, but a data set or a model that Ultralytics can download by its name is downloaded.

    Args:
        options: What `yolo-kd train` would be asked to do.

    Returns:
        The report; its verdict says whether to start.

    Raises:
        ConfigError: If the options name no teacher, or a run to resume.
    """
    if options.resume is not None:
        raise ConfigError("check looks at a training that has not begun: leave out resume.")
    if options.teacher is None or options.kd == NO_RECIPE:
        raise ConfigError("check needs a teacher: add teacher=<checkpoint>.")
    lenient = optional_train() if options.pooled else nullcontext()
    with nothing_written() as trace, restricted_loading(options.trust_checkpoints), lenient:
        return _Check(options, trace).run()


class _Check:
    """One pass through all checks; each step goes on with what the earlier ones could load."""

    def __init__(self, options: TrainOptions, trace: Trace):
        self.options = options
        self.trace = trace
        self.keys: dict[str, Any] = {**options.ultralytics, "model": options.student}
        kd = options.kd if isinstance(options.kd, str) else "inline"
        self.report = Report(
            {"teacher": options.teacher, "student": options.student, "data": self.keys.get("data"), "kd": kd}
        )

    def run(self) -> Report:
        report, keys = self.report, self.keys
        report.facts["versions"] = {
            "yolo_kd": __version__,
            "ultralytics": ultralytics_version,
            "torch": torch.__version__,
        }
        self.attempt("setup", check_torchvision)
        self.choose_device()
        self.say("the data set")
        data = self.attempt("data", self.read_dataset)
        sets = check_dataset(report, self.trace, data, keys, self.options.pooled) if data else {}
        self.say("the models")
        plan, detectors = self.load(data)
        describe_files(report, detectors)
        if plan is not None:
            describe_levels(report, plan, detectors)
        fits, classes = False, None
        if plan is not None and data is not None and len(detectors) == 2:
            problems, warnings = pair_problems(plan, detectors["teacher"], detectors["student"], data, keys)
            for text in problems:
                report.add("error", "pair", text)
            for text in warnings:
                report.add("warning", "pair", text)
            fits = not problems
            classes = self.attempt("pair", lambda: self.classes(plan, detectors["teacher"], data))
        if data is not None and "val" in sets and detectors:
            self.say("both models on validation images")
            self.guarded(
                "quality", lambda: check_quality(report, detectors, sets["val"], data, keys, self.trace.folder, classes)
            )
        setup = Setup(plan, detectors.get("teacher"))
        if plan is not None and plan.unlabeled is not None and data is not None and "teacher" in detectors and sets:
            self.say("the unlabeled images")
            images = self.attempt("pool", lambda: check_unlabeled_images(plan, data, keys, self.warn))
            if images is not None:
                setup = Setup(plan, detectors["teacher"], *images)
                self.guarded("pool", lambda: check_unlabeled(report, setup, sets, keys, classes))
            fits = fits and images is not None
        if fits and plan is not None and classes is not None and len(sets) == 2:
            self.say("gradients and cost of the terms")
            self.guarded("terms", lambda: self.terms(setup, detectors["student"], classes))
        known = {finding.text for finding in report.findings}
        for text in dict.fromkeys(self.trace.warnings):
            if text not in known:
                report.add("note", "ultralytics", text[:300])
        report.facts = plain(report.facts)
        return report

    def read_dataset(self) -> dict[str, Any]:
        """Read the data YAML, which needs no training images where there is a pool."""
        keys = self.keys
        return read_dataset(keys.get("data"), keys.get("split") or "val", train_optional=self.options.pooled)

    def choose_device(self) -> None:
        """Fall back to the processor where a GPU was asked for that is not there, so that the rest can be looked at."""
        given = self.keys.get("device")
        try:
            select_device(devices_of(self.keys)[0], verbose=False)
        except Exception:  # a wrong name or number raises whatever Ultralytics or torch make of it
            seen = torch.cuda.device_count()
            text = f"device={given} is not here: torch {torch.__version__} sees {seen or 'no'} GPU{'s' * (seen != 1)}."
            self.report.add("error", "setup", text, "Use device=cpu, or look at the driver. The rest ran on the CPU.")
            self.keys["device"] = "cpu"

    def load(self, data: dict[str, Any] | None) -> tuple[Plan | None, dict[str, LoadedDetector]]:
        """Load teacher and student, as far as they can be loaded."""
        options = self.options
        made = self.attempt("files", lambda: make_plan(options))
        plan, teacher = made or (None, None)
        build: dict[str, Any] = {"trust": options.trust_checkpoints}
        if data is not None:
            build |= {"nc": 1 if self.keys.get("single_cls") else data["nc"], "channels": data["channels"]}
        detectors = {}
        if plan is not None and teacher is None:
            teacher = self.attempt("files", lambda: load_detector(plan.teacher, role="teacher", **build))
        if teacher is not None:
            detectors["teacher"] = teacher
        student = self.attempt("files", lambda: load_detector(options.student or "", role="student", **build))
        if student is not None:
            detectors["student"] = student
        return plan, detectors

    def classes(self, plan: Plan, teacher: LoadedDetector, data: dict[str, Any]) -> ClassMap:
        """Show which class is which."""
        classes, _ = match_classes(plan.choice, plan.recipe, teacher, data, self.keys)
        self.report.facts["class_map"] = classes.to_dict()
        if not classes.is_identity:
            self.report.tables["classes of student and teacher"] = classes.rows()
        return classes

    def terms(self, setup: Setup, student: LoadedDetector, classes: ClassMap) -> None:
        """Measure the terms that this pair can serve."""
        plan, teacher = setup.plan, setup.teacher
        assert plan is not None
        assert teacher is not None
        terms = usable_terms(self.report, plan, student.model, teacher.model, classes)
        if any(term.weight for term in terms):
            plan = replace(plan, recipe=replace(plan.recipe, terms=terms))
            check_terms(self.report, replace(setup, plan=plan), self.keys, self.trace.folder)

    def warn(self, sentence: str) -> None:
        """Report a warning about unlabeled images."""
        self.report.add("warning", "pool", sentence)

    def attempt(self, topic: str, work: Callable[[], T]) -> T | None:
        """Return what a step returns, or None after its error was noted."""
        try:
            return work()
        except YoloKDError as error:
            for line in str(error).splitlines():
                self.report.add("error", topic, line)
            return None

    def guarded(self, topic: str, work: Callable[[], None]) -> None:
        """Run a step that goes through Ultralytics, whose errors would stop a training as well."""
        try:
            self.attempt(topic, work)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            self.report.add("error", topic, f"training would stop here: {type(error).__name__}: {text}")

    @staticmethod
    def say(what: str) -> None:
        """Tell a person who waits what is being looked at."""
        print(f"checking {what} ...", file=sys.stderr, flush=True)
