"""The check before a training: do this pair, this data set and this recipe work together?"""

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
from yolo_kd.engine.checks_before import check_unlabeled_images, fitting, pair_problems, read_dataset
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
    """Check everything that a training with these options depends on, without training.

    A mistake that would stop the training becomes a finding; everything that does not depend on it is still checked.
    Nothing is written, except that Ultralytics may download a data set or a model given by name.

    Args:
        options: The options of `yolo-kd train`.

    Returns:
        The report, whose verdict is whether to start.

    Raises:
        ConfigError: If the options name no teacher, or a run to resume.
    """
    if options.resume is not None:
        raise ConfigError("check is for a training that has not begun: leave out resume.")
    if options.teacher is None or options.kd == NO_RECIPE:
        raise ConfigError("check needs a teacher: add teacher=<checkpoint>.")
    lenient = optional_train() if options.pooled else nullcontext()
    with nothing_written() as trace, restricted_loading(options.trust_checkpoints), lenient:
        return _Check(options, trace).run()


class _Check:
    """One pass through all checks; each step uses what the earlier ones could load."""

    def __init__(self, options: TrainOptions, trace: Trace):
        self.options = options
        self.trace = trace
        self.keys: dict[str, Any] = {**options.ultralytics, "model": options.student}
        kd = options.kd if isinstance(options.kd, str) else "inline"
        command = {"teacher": options.teacher, "student": options.student, "data": self.keys.get("data"), "kd": kd}
        self.report = Report(command)

    def run(self) -> Report:
        report, keys, unlabeled = self.report, self.keys, self.options.pooled
        versions = {"yolo_kd": __version__, "ultralytics": ultralytics_version, "torch": torch.__version__}
        report.facts["versions"] = versions
        self.attempt("setup", check_torchvision)
        self.choose_device()
        show("the data set")
        data = self.attempt("data", read_dataset, keys.get("data"), keys.get("split") or "val", unlabeled)
        sets = check_dataset(report, self.trace, data, keys, unlabeled) if data else {}
        show("the models")
        plan, detectors = self.load(data)
        describe_files(report, detectors)
        if plan is not None:
            describe_levels(report, plan, detectors)
        fits, classes = False, None
        if plan is not None and data is not None and len(detectors) == 2:
            problems, warnings = pair_problems(plan, detectors["teacher"], detectors["student"], data, keys)
            for level, sentences in (("error", problems), ("warning", warnings)):
                for text in sentences:
                    report.add(level, "pair", text)
            fits = not problems
            classes = self.attempt("pair", self.match_classes, plan, detectors["teacher"], data)
        if data is not None and "val" in sets and detectors:
            show("both models on validation images")
            self.attempt(
                "quality", check_quality, report, detectors, sets["val"], data, keys, self.trace.folder, classes
            )
        setup = Setup(plan, detectors.get("teacher"))
        if plan is not None and plan.unlabeled is not None and data is not None and "teacher" in detectors and sets:
            show("the unlabeled images")
            images = self.attempt("unlabeled", check_unlabeled_images, plan, data, keys, self.warn)
            if images is not None:
                setup = Setup(plan, detectors["teacher"], *images)
                self.attempt("unlabeled", check_unlabeled, report, setup, sets, keys, classes)
            fits = fits and images is not None
        if fits and plan is not None and classes is not None and len(sets) == 2:
            show("gradients and cost of the terms")
            self.attempt("terms", self.check_terms, setup, detectors["student"], classes)
        reported = {finding.text for finding in report.findings}
        for text in dict.fromkeys(self.trace.warnings):
            if text not in reported:
                report.add("note", "ultralytics", text[:300])
        report.facts = plain(report.facts)
        return report

    def choose_device(self) -> None:
        """Replace a device that does not exist by the CPU, so that the other checks can run."""
        given = self.keys.get("device")
        try:
            select_device(devices_of(self.keys)[0], verbose=False)
        except Exception:  # Ultralytics and torch raise many kinds of errors for a wrong name or number
            count = torch.cuda.device_count()
            gpus = f"{count or 'no'} GPU{'s' * (count != 1)}"
            text = f"device={given} does not exist: torch {torch.__version__} finds {gpus}."
            self.report.add("error", "setup", text, "Use device=cpu, or check the driver. The rest ran on the CPU.")
            self.keys["device"] = "cpu"

    def load(self, data: dict[str, Any] | None) -> tuple[Plan | None, dict[str, LoadedDetector]]:
        """Return the plan, None if it has mistakes, and those of teacher and student that can be loaded."""
        options = self.options
        plan, teacher = self.attempt("files", make_plan, options) or (None, None)
        build: dict[str, Any] = {"trust": options.trust_checkpoints}
        if data is not None:
            build |= fitting(data, self.keys)
        if plan is not None and teacher is None:
            teacher = self.attempt("files", load_detector, plan.teacher, role="teacher", **build)
        student = self.attempt("files", load_detector, options.student or "", role="student", **build)
        return plan, {role: d for role, d in (("teacher", teacher), ("student", student)) if d is not None}

    def match_classes(self, plan: Plan, teacher: LoadedDetector, data: dict[str, Any]) -> ClassMap:
        """Match the classes of both models and show the result."""
        classes, _ = match_classes(plan.choice, plan.recipe, teacher, data, self.keys)
        self.report.facts["class_map"] = classes.to_dict()
        if not classes.is_identity:
            self.report.tables["classes of student and teacher"] = classes.rows()
        return classes

    def check_terms(self, setup: Setup, student: LoadedDetector, classes: ClassMap) -> None:
        """Measure the terms that this pair supports."""
        plan, teacher = setup.plan, setup.teacher
        assert plan is not None
        assert teacher is not None
        terms = usable_terms(self.report, plan, student.model, teacher.model, classes)
        if any(term.weight for term in terms):
            plan = replace(plan, recipe=replace(plan.recipe, terms=terms))
            check_terms(self.report, replace(setup, plan=plan), self.keys, self.trace.folder)

    def warn(self, sentence: str) -> None:
        """Report a warning about unlabeled images."""
        self.report.add("warning", "unlabeled", sentence)

    def attempt(self, topic: str, work: Callable[..., T], *arguments: Any, **keys: Any) -> T | None:
        """Return the result of a step, or None after reporting the error that would stop the training."""
        try:
            return work(*arguments, **keys)
        except YoloKDError as error:
            for line in str(error).splitlines():
                self.report.add("error", topic, line)
        except Exception as error:  # from Ultralytics, which raises many kinds
            text = " ".join(str(error).split())[:400]
            self.report.add("error", topic, f"training would stop here: {type(error).__name__}: {text}")
        return None


def show(step: str) -> None:
    """Show the current step to the waiting user."""
    print(f"checking {step} ...", file=sys.stderr, flush=True)
