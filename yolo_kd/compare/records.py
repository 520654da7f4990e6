"""The records of a comparison, and how they are read from and written to JSON.

Three kinds of file hold records: `summary.json` (`Summary`), the state file next to each run folder (`RunState`), and
the results of each evaluated checkpoint (`Evaluation`). A record is immutable. Its JSON has one key per attribute; a
number that is not finite becomes null.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

METRICS = ("mAP50-95", "mAP50", "precision", "recall")
MAIN = METRICS[0]
Group = Literal["classes", "sizes"]
GROUPS: tuple[Group, ...] = ("classes", "sizes")
Status = Literal["waiting", "running", "finished", "failed"]


class Record(BaseModel):
    """Base class: immutable, and no attribute beyond those that the class declares."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """Return the text of a JSON file."""
        return json.dumps(json.loads(self.model_dump_json()), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If the text is not JSON or not such a record. The message is the middle of a sentence.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


class Spread(Record):
    """One metric of one arm over its seeds.

    Attributes:
        n: Number of seeds.
        mean: Mean, None without any seed.
        sd: Sample standard deviation, None below two seeds.
    """

    n: int = 0
    mean: float | None = None
    sd: float | None = None


class Paired(Spread):
    """Differences between an arm and the reference, seed by seed, in the unit of the metric.

    Attributes:
        n: Number of pairs.
        mean: Mean difference, None without pairs.
        sd: Standard deviation of the differences, None below two pairs.
        seeds: Seeds that both arms finished.
        differences: Arm minus reference, in the order of `seeds`.
        dropped: Seeds that only one of the two finished. They are left out.
        low: Lower end of the 95 % t interval of the mean, None below two pairs.
        high: Upper end of that interval.
        p_t: Two-sided p of the paired t test, None below two pairs and where all differences are equal.
        p_exact: Two-sided p of the sign-flip permutation test of the mean, None without pairs.
        p_smallest: The smallest p that this test can reach with this number of pairs.
        p_holm: `p_t` after Holm's correction for the number of arms, None without `p_t` and for the reference.
    """

    seeds: tuple[int, ...] = ()
    differences: tuple[float, ...] = ()
    dropped: tuple[int, ...] = ()
    low: float | None = None
    high: float | None = None
    p_t: float | None = None
    p_exact: float | None = None
    p_smallest: float | None = None
    p_holm: float | None = None

    @property
    def flat(self) -> bool:
        """True if several seeds gave exactly the same difference, so that they carry no information about chance."""
        return self.n > 1 and self.sd == 0


class GroupScore(Spread):
    """mAP50-95 of an arm for one class or one object size, over its seeds.

    Attributes:
        difference: Mean paired difference to the reference, None without pairs.
        low: Lower end of its 95 % t interval.
        high: Upper end of that interval.
        pairs: Number of pairs.
        objects: Number of labeled objects of this size, None for a class.
    """

    difference: float | None
    low: float | None
    high: float | None
    pairs: int
    objects: int | None = None


class Verdict(Record):
    """What the paired runs of an arm prove about mAP50-95.

    Attributes:
        word: Result of `statistics.judge` on the headline split.
        words: Result on each split.
        sentence: The verdict on the headline split as a sentence.
        by_split: The sentence for each split.
    """

    word: str
    words: dict[str, str]
    sentence: str
    by_split: dict[str, str]


class SizeScore(Record):
    """mAP50-95 of one checkpoint for one object size, None where no object has that size, and the number of objects."""

    ap: float | None
    objects: int


class SplitResult(Record):
    """Metrics of one checkpoint on one split, all between 0 and 1.

    Attributes:
        metrics: The metrics of `METRICS` by name.
        classes: mAP50-95 by class name, None where a class has no object.
        sizes: mAP50-95 by object size.
    """

    images: int
    metrics: dict[str, float]
    classes: dict[str, float | None]
    sizes: dict[str, SizeScore]

    def group(self, kind: Group) -> dict[str, float | None]:
        """Return mAP50-95 by class or by object size."""
        return self.classes if kind == "classes" else {size: score.ap for size, score in self.sizes.items()}


class Evaluation(Record):
    """What one checkpoint is worth; kept in a file so that it is computed once.

    Attributes:
        key: Hash of the checkpoint and the settings, which names the file.
        gflops: Billions of floating point operations per image.
        splits: Metrics by split.
    """

    key: str
    sha256: str
    parameters: int
    gflops: float
    splits: dict[str, SplitResult]


class AuditRow(Record):
    """What one term did on the first batch, None for a number that is missing or not finite.

    Attributes:
        value: Its loss.
        gradient: Norm of its gradient into the student's neck.
        share: That norm, divided by the norm of the task loss's gradient.
    """

    term: str
    value: float | None
    gradient: float | None
    share: float | None


class Attempt(Record):
    """One start of a training.

    Attributes:
        resumed: Whether it continued from a checkpoint.
        started: Local time of the start.
        jobs: Trainings at a time in that comparison.
        seconds: How long the process lasted, None while it runs and where it was stopped.
        exit_code: Its exit code, negative for a signal.
    """

    command: str
    resumed: bool
    started: str
    jobs: int
    versions: dict[str, str]
    seconds: float | None = None
    exit_code: int | None = None


class Identity(Record):
    """What must not change between two starts of a run.

    Attributes:
        trainer: `yolo_kd`, or `distill_model` for Ultralytics' own trainer.
        files: SHA-256 of the files that the keys name.
        recipe: Content of the recipe, None without one.
    """

    keys: dict[str, Any]
    trainer: str
    files: dict[str, str]
    recipe: dict[str, Any] | None = None


class RunState(Record):
    """State of one run, kept in `<run folder>.json`.

    Attributes:
        status: `waiting`, `running`, `finished` or `failed`.
        error: For a failed run, how it ended and the last lines of its log.
        attempts: All starts so far.
        identity: What must stay the same.
    """

    arm: str
    seed: int
    status: Status
    error: str
    attempts: tuple[Attempt, ...]
    identity: Identity


class TeacherSummary(Evaluation):
    """One teacher: its evaluation, and what the summary adds.

    Attributes:
        path: Its checkpoint.
        latency_ms: Milliseconds per image of the exported model, None if it was not measured.
    """

    path: str
    latency_ms: float | None


class ArmSummary(Record):
    """One arm over all its seeds.

    Attributes:
        kind: `alone`, `distilled` or `distill_model`.
        about: How it trains, in a few words.
        differs: Keys in which it differs from the other arms, apart from recipe and teacher.
        runs: Number of runs that finished and were evaluated.
        failed: Number of runs that failed.
        parameters: Number of parameters of its student, None without a finished run.
        gflops: Billions of floating point operations per image.
        latency_ms: Milliseconds per image of the exported student.
        audit: Its terms on the first batch.
        metrics: Mean and standard deviation by split and metric.
        difference: Paired differences to the reference by split and metric.
        gap_closed: Share of the distance between reference and teacher that it covers, by split; None without a gap.
        classes: mAP50-95 by split and class.
        sizes: mAP50-95 by split and object size.
        seconds: Training time.
        time_ratio: Its training time over the reference's, mean over paired seeds.
        verdict: The verdict, None for the reference.
    """

    name: str
    kind: str
    about: str
    differs: dict[str, Any]
    runs: int
    failed: int
    parameters: int | None
    gflops: float | None
    latency_ms: float | None
    audit: tuple[AuditRow, ...]
    metrics: dict[str, dict[str, Spread]]
    difference: dict[str, dict[str, Paired]]
    gap_closed: dict[str, float | None]
    classes: dict[str, dict[str, GroupScore]]
    sizes: dict[str, dict[str, GroupScore]]
    seconds: Spread
    time_ratio: float | None
    verdict: Verdict | None = None

    def group(self, kind: Group, split: str) -> dict[str, GroupScore]:
        """Return mAP50-95 on a split by class or by object size."""
        return (self.classes if kind == "classes" else self.sizes)[split]


class RunSummary(RunState):
    """One run: its state and its results.

    Attributes:
        epochs: Epochs that were trained.
        seconds: Training time of all epochs, None before the first.
        continued: How often it was interrupted and continued.
        checkpoint: The checkpoint that was evaluated.
        sha256: Its hash, None if it was not evaluated.
        splits: Its metrics by split.
        curve: (epoch, mAP50-95 on val) after each epoch.
        terms: Weighted loss of each distillation term after each epoch.
    """

    epochs: int
    seconds: float | None
    continued: int
    checkpoint: str
    sha256: str | None
    splits: dict[str, SplitResult]
    curve: tuple[tuple[float, float | None], ...]
    terms: dict[str, tuple[float | None, ...]]

    @property
    def name(self) -> str:
        """Name in messages and in the report."""
        return run_name(self.arm, self.seed)


class Commands(Record):
    """Commands that repeat the whole comparison, or one training alone by the run's name."""

    comparison: str
    runs: dict[str, str]


class Summary(Record):
    """The result of a comparison, which the page, the Markdown text and the tables are made from.

    `summary.json` holds it as plain JSON with these keys. Metrics and differences are fractions (0.013 is 1.3 points),
    times are seconds, latencies are milliseconds. For example,
    `summary["arms"][1]["difference"]["test"]["mAP50-95"]["mean"]` is the mean paired difference of the second arm.

    Attributes:
        verdict: The sentence at the top.
        verdicts: The sentence of each arm, best arm first.
        ranking: Names of the arms without the reference, best first.
        metric: The metric of the verdicts.
        headline_split: The split of the verdicts: test, or val where the data has no test split.
        splits: All splits.
        reference: Name of the arm that the others are compared with.
        seeds: Seeds of each arm.
        jobs: Trainings at a time.
        evaluation: Data set and keys of the evaluation.
        teachers: The teachers that could be evaluated.
        arms: All arms, in the order of the command.
        runs: All runs, seed by seed.
        notes: What a reader has to know, a sentence each.
        problems: What failed. The first line of each is a sentence, the lines after it are from the log.
        commands: Commands that repeat it.
    """

    verdict: str
    verdicts: tuple[str, ...]
    ranking: tuple[str, ...]
    metric: str
    headline_split: str
    splits: tuple[str, ...]
    reference: str
    seeds: tuple[int, ...]
    jobs: int
    evaluation: dict[str, Any]
    teachers: tuple[TeacherSummary, ...]
    arms: tuple[ArmSummary, ...]
    runs: tuple[RunSummary, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    commands: Commands
    versions: dict[str, str]

    @property
    def others(self) -> tuple[ArmSummary, ...]:
        """All arms but the reference."""
        return tuple(arm for arm in self.arms if arm.name != self.reference)

    @property
    def by_reference(self) -> tuple[ArmSummary, ...]:
        """All arms, the reference first."""
        return tuple(sorted(self.arms, key=lambda arm: arm.name != self.reference))


def run_name(arm: str, seed: int) -> str:
    """Return the name of a run in messages and in the report."""
    return f"{arm} seed {seed}"
