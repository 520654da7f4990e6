"""Which components a training needs, and their order."""

from __future__ import annotations

from typing import Any

from yolo_kd.engine.component import Component
from yolo_kd.engine.components.distillation import DistillationComponent
from yolo_kd.engine.components.durability import Durability
from yolo_kd.engine.components.keep_classes import KeepClasses
from yolo_kd.engine.components.precision import Precision
from yolo_kd.engine.components.unlabeled import Unlabeled
from yolo_kd.engine.setup import Setup


def components_of(trainer: Any, setup: Setup) -> tuple[Component, ...]:
    """Return the components that a training needs, outermost first.

    `Durability` is innermost: when a training is interrupted, it saves before the others clean up.
    """
    plan = setup.plan
    components: list[Component] = [Precision(trainer, setup.speed.threads)]
    if plan is not None and plan.unlabeled is not None and setup.images is not None:
        components.append(Unlabeled(trainer, plan.unlabeled, setup.images, setup.labeled))
    if plan is not None and setup.teacher is not None:
        if plan.choice.keep_classes:
            components.append(KeepClasses(trainer, plan.choice, setup.teacher))
        components.append(DistillationComponent(trainer, plan, setup.teacher))
    return (*components, Durability(trainer))
