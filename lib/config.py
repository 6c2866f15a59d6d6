"""Configuration: one validated, frozen record per job, from a TOML file and `--set` on the command line.

It knows names, types and defaults. It does not know what a path points to: that is checked where it is opened.
"""

import argparse
import json
import re
import secrets
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from lib.errors import UsageError, nearest
from lib.windows import Windows

Share = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]
"""A limit: a whole number counts, a number with a point (0.0 to 1.0) is a fraction."""


PrecisionChoice = Literal["auto", "fp32", "bf16"]

TrainPrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]

Truncation = Literal["head", "tail", "head_tail"]

EngineChoice = Literal["auto", "torch", "openvino"]

TokenPooling = Literal["first", "mean", "max"]
Trackers = Annotated[
    tuple[Literal["mlflow", "tensorboard"], ...],
    BeforeValidator(lambda found: (found,) if isinstance(found, str) else found),
]
"""One name or several."""

CREDENTIALS = re.compile(r"(?<=://)[^/\s\"']*@")
"""user:password@ in a URL; an @ behind the host, as in a path, is none."""


class Section(BaseModel):
    """A frozen record that refuses unknown keys; the text under each field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a model's folder may make this process do besides reading numbers."""

    pickle: bool = False
    code: bool = False


TRUST_NOTHING = Trust()


def raise_if_code_was_refused(folder: str, error: Exception) -> None:
    """Raise `UsageError` if what transformers raised says that the folder's own code would have to be run."""
    if "trust_remote_code" in str(error):
        raise UsageError(
            f"{folder}: asks for Python code of its own to be run, and none of it was run. If you have read that code and trust it:"
            " --set model.trust_remote_code=true"
        ) from None


class InputSection(Section):
    """What is scored."""

    path: str
    """the archive: a folder, a glob or one file of Parquet, on any fsspec URL (s3://bucket/folder, /data/archive)"""
    text_column: str | tuple[str, str] = "text"
    """the text's column; a.b for a nested one; ["first", "second"] for sentence pairs"""
    key_columns: tuple[str, ...] = ()
    """columns copied to the output; with none, `shard` and `row` are added"""
    rows: str | None = None
    """a folder of dead letters: score only the rows that they name, into an output.path of its own"""
    deleted: Literal["keep", "remove"] = "keep"
    """predictions of shards that are not in the archive any more: keep or remove them (needs the whole root as input.path)"""


class ModelSection(Section):
    """The classifier."""

    path: str
    """a checkpoint of jobs.train, or any Hugging Face sequence-classification folder with safetensors weights"""
    max_length: int | None = Field(default=None, ge=4)
    """tokens kept of each text, special ones included; default: the checkpoint's, else the most the model can take"""
    precision: PrecisionChoice = "auto"
    """auto: bf16 where the GPU or processor computes in it, else fp32"""
    engine: EngineChoice = "auto"
    """what runs the forward pass; auto: openvino on processors where it is installed and scores rightly, else torch"""
    allow_pickle: bool = False
    """take pytorch_model.bin weights where there are no safetensors ones: only from a source you trust"""
    trust_remote_code: bool = False
    """run the Python files of the model's folder, on every node: only from a source you trust"""

    @property
    def trust(self) -> Trust:
        """What of the folder may be unpickled or run."""
        return Trust(pickle=self.allow_pickle, code=self.trust_remote_code)


class ScoreOutputSection(Section):
    """Where predictions go and what they hold."""

    path: str
    """the folder of all versions and runs"""
    prefix: str = Field(default="", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$|^$")
    """put before the names of the columns that scoring adds"""
    probabilities: bool = False
    """add every class's probability, in label order"""
    embedding: Literal["float16", "float32"] | None = None
    """add each text's vector, pooled from the encoder's last layer; with it model.path may be a plain encoder, too"""
    embedding_pooling: TokenPooling | None = None
    """of the tokens of a text; default: what the checkpoint's own head reads, mean without one"""
    keep_stale_hours: float = Field(default=168, ge=0)
    """objects of changed or removed shards leave the manifest at once, and the storage after so many hours"""
    single_writer: bool = False
    """a promise that no two runs ever write here at once, for a store without atomic conditional writes"""
    dead_letter_text: bool = False
    """add the texts of rows with an error to the dead letters: texts may be personal, so they are left out otherwise"""


class PlanningSection(Section):
    """How the archive is cut into work."""

    chunk_mb: float = Field(default=64, gt=0, le=512)
    """text in one chunk, in MB: the unit of reading, writing and retrying; 2 on CPUs, so that a chunk takes seconds"""


class LimitsSection(Section):
    """When a run that finished its work is still not published."""

    max_bad_rows: Share = 0.01
    """rows with an error that a run may add: a count, or a fraction of the rows not published yet"""
    max_bad_shards: Share = 0.01
    """shards that cannot be read: a count, or a fraction of the shards not published yet"""
    accept: tuple[str, ...] = ()
    """identities of shards (12 hex digits, named by the report) to publish in spite of their errors"""
    stall_seconds: float = Field(default=300, gt=0)
    """no micro-batch finished for so long ends the run as incomplete"""
    hang_seconds: float = Field(default=120, gt=0)
    """an actor that finishes no micro-batch for so long while it has work is ended, and its work tried again"""
    max_probes: int = Field(default=400, ge=0)
    """attempts to find the rows of one chunk that kill the process that scores them"""
    budget: float | None = Field(default=None, gt=0)
    """what one run may cost, in the currency of the prices in [forecast]: when it is spent the run ends, what is finished is kept, and
    nothing is published; with forecast.gpu_hour=1 it is GPU hours"""


class DriftSection(Section):
    """Whether new rows look like those of an earlier run."""

    baseline: str = "last"
    """last: the published run of this version; or the id of one of its runs, or a path to a run.json of any version"""
    max_psi: float | None = Field(default=None, gt=0)
    """a population stability index over it, of labels, scores, text lengths or errors, keeps the run from being published; 0.1 is a
    small shift, 0.25 a large one; default: only reported"""


class ScoreResources(Section):
    """What the cluster gives."""

    num_actors: int | None = Field(default=None, ge=1)
    """predictor actors; default: one for each GPU, without GPUs one for each node"""
    token_budget: int | None = Field(default=None, ge=1)
    """tokens, padding included, in one forward pass; default: on a GPU found by timing; on CPUs 512 with openvino, 4,096 with torch"""


Price = Annotated[float, Field(ge=0)]


class ForecastSection(Section):
    """What computing costs, for jobs.score and jobs.plan, and what jobs.plan forecasts for. Nothing of it decides a score."""

    gpu_hour: Price | None = None
    """price of one GPU for an hour, in any currency"""
    cpu_hour: Price | None = None
    """price of one CPU for an hour"""
    node_hour: Price | None = None
    """price of one node for an hour, beside that of its CPUs and GPUs, if these have one of their own"""
    gpus: int | None = Field(default=None, ge=0)
    """jobs.plan: of the cluster to forecast for; default: that of the cluster at hand, and none if cpus or nodes are given"""
    cpus: int | None = Field(default=None, ge=1)
    """jobs.plan: of the cluster to forecast for, all nodes together; default: 8 for each GPU and at least 8 for each node"""
    nodes: int | None = Field(default=None, ge=1)
    """jobs.plan: of the cluster to forecast for; default: one for each 8 GPUs, without GPUs one"""
    device: str | None = None
    """jobs.plan: take the speed of this GPU or processor, by a part of its name as run.json has it (H100)"""
    tokens_per_second: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """jobs.plan: speed of one GPU, without GPUs of one CPU; or a table {H100 = 400000, A10G = 60000}, see device; default: what earlier
    runs below output.path reached, else measured here"""
    measure_seconds: float = Field(default=3, ge=0)
    """jobs.plan: how long to measure, if no earlier run says how fast it is; 0: do not"""
    sample_rows: int | None = Field(default=None, ge=1)
    """jobs.plan: read so many rows to know how many tokens there are; default: 0.1% of the rows to score, 1,024 to 65,536"""

    @property
    def describes_cluster(self) -> bool:
        """Whether it says what to forecast for."""
        return any(number is not None for number in (self.gpus, self.cpus, self.nodes))

    @property
    def has_price(self) -> bool:
        """Whether anything costs something."""
        return any(price is not None for price in (self.gpu_hour, self.cpu_hour, self.node_hour))


class ScoreConfig(Section):
    """Everything `jobs.score` and `jobs.plan` can be told."""

    input: InputSection
    model: ModelSection
    output: ScoreOutputSection
    planning: PlanningSection = PlanningSection()
    limits: LimitsSection = LimitsSection()
    drift: DriftSection = DriftSection()
    resources: ScoreResources = ScoreResources()
    forecast: ForecastSection = ForecastSection()

    @model_validator(mode="after")
    def check_budget(self) -> "ScoreConfig":
        """A budget needs a price."""
        if self.limits.budget is not None and not self.forecast.has_price:
            raise ValueError(
                f"limits.budget = {self.limits.budget:g}, but nothing has a price: set forecast.gpu_hour (1 makes it GPU hours),"
                " forecast.cpu_hour or forecast.node_hour"
            )
        return self


class LabelledSection(Section):
    """How labelled rows are read."""

    text_column: str | tuple[str, str] = "text"
    """the text's column in all labelled sets; ["first", "second"] for sentence pairs"""
    label_column: str = "label"
    """the label's column in all labelled sets: strings, whole numbers, or lists of them for multi-label"""
    regression: bool = False
    """the label is a number to predict, not the name of a class"""
    weight_column: str | None = None
    """a column of the training rows with a number from 0: how much each counts in the loss; default: all the same"""


class TrainSection(LabelledSection):
    """The labelled rows to learn from."""

    path: str | None = None
    """labelled Parquet: a folder, a glob or one file, on any fsspec URL; required, unless there are tasks"""


class TaskSection(LabelledSection):
    """One of several labelled sets that share an encoder, with a head of its own."""

    path: str
    """labelled Parquet to learn from"""
    valid: str | None = None
    """labelled Parquet that chooses the best checkpoint; default: a part of the training rows, see valid.fraction"""
    test: str | None = None
    """labelled Parquet that the result is measured on; none: no test metrics"""


class TasksSection(Section):
    """Several labelled sets that share one encoder, by name: each gets a head, and columns that begin with its name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], TaskSection] = Field(init=False)

    @property
    def named(self) -> dict[str, TaskSection]:
        """The tasks in the order in which they were given; none: there is one, in the sections train, valid and test."""
        return dict(self.__pydantic_extra__)


class SamplingSection(Section):
    """How often several tasks' rows are seen."""

    temperature: float = Field(default=1.0, ge=1)
    """1: every row once an epoch; higher: small sets oftener, large ones more seldom, by their sizes to the power of 1 / temperature"""


class ValidSection(Section):
    """The rows that choose the best checkpoint."""

    path: str | None = None
    """labelled Parquet; default: a part of the training rows, see fraction"""
    fraction: float = Field(default=0.1, ge=0, lt=1)
    """of the training rows, by class, if no path is given; 0: none is set aside, all are learned from, and nothing is chosen by them"""


class TestSection(Section):
    """The rows that the result is measured on."""

    path: str | None = None
    """labelled Parquet; none: no test metrics"""


class DataSection(Section):
    """What is checked before anything is learned."""

    duplicates: Literal["keep", "drop", "refuse"] = "keep"
    """training rows whose text is in another set, too: kept with a warning, left out, or refused where they are over 0.1% of that set"""
    label_noise: bool = False
    """list training rows whose label looks wrong in the report, for one label a row; costs a forward pass over the training rows"""


class TrainModelSection(Section):
    """What is fine-tuned."""

    base: str
    """a pretrained encoder or classifier: a Hugging Face folder with safetensors weights, on any fsspec URL"""
    max_length: int = Field(default=128, ge=4)
    """tokens kept of each text, special ones included; scoring uses the same"""
    truncation: Truncation = "head"
    """which part of a longer text is kept; head_tail: a quarter at the beginning, the rest at the end; scoring uses the same"""
    window_stride: int | None = Field(default=None, ge=0)
    """score a longer text in windows of max_length, neighbours sharing so many tokens; default: its truncation is all that is seen"""
    window_pooling: Literal["mean", "max"] = "mean"
    """of the windows' answers (logits)"""
    max_windows: int = Field(default=8, ge=1)
    """of one text; what lies behind them is cut off"""
    precision: TrainPrecisionChoice = "auto"
    """of the forward and backward pass, the weights stay in fp32; fp16, with loss scaling, is for GPUs without bf16; auto: bf16 or fp32"""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """of encoder and head; default: as the base has it"""
    freeze_layers: Annotated[int, Field(ge=0)] | Literal["all"] | None = None
    """keep the embeddings and so many of the lowest layers as they are; all: learn the head alone; default: everything learns"""
    gradient_checkpointing: bool = False
    """compute each layer again in the backward pass: the same gradients, the activations of one layer in memory at a time, slower steps"""
    compile: bool = False
    """compile forward and backward pass with torch.compile: the first step takes a minute; for GPUs, needs a C++ compiler"""
    allow_pickle: bool = False
    """take pytorch_model.bin weights where there are no safetensors ones: only from a source you trust"""
    trust_remote_code: bool = False
    """run the Python files of the model's folder, on every node: only from a source you trust"""

    @property
    def trust(self) -> Trust:
        """What of the folder may be unpickled or run."""
        return Trust(pickle=self.allow_pickle, code=self.trust_remote_code)

    @property
    def windows(self) -> Windows | None:
        """How long texts are cut into windows, if they are."""
        if self.window_stride is None:
            return None
        return Windows(self.window_stride, self.max_windows, self.window_pooling)


class HeadSection(Section):
    """What is read of the encoder, and what is put on it. Without any of these the family's own classifier is taken."""

    pooling: Literal["first", "pooler", "mean", "max"] | None = None
    """of the tokens of a text: the first one, what the family's pooler makes of it, or the mean or largest of all"""
    layer: Annotated[int, Field(ge=1)] | Literal["last_4"] | None = None
    """the layer that is read, counted from the bottom (those above are left out), or the mean of the last four; default: the last"""
    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """sizes of hidden layers between the pooled text and the classes"""
    activation: Literal["gelu", "relu", "tanh"] = "gelu"
    """behind each hidden layer"""
    normalize: bool = False
    """scale what is pooled to length 1: with one layer, the head then sees the direction of a text alone"""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """before each layer of the head; only with pooling, layer, hidden_sizes or normalize"""

    @property
    def is_own(self) -> bool:
        """Whether it is another than the family's own."""
        return self.pooling is not None or self.layer is not None or bool(self.hidden_sizes) or self.normalize


class LoraSection(Section):
    """Low-rank adapters in place of the encoder's own weights (Hu et al. 2021), merged into them at the end; needs `peft`."""

    rank: int | None = Field(default=None, ge=1)
    """of the adapters: 8 to 32 is usual, with a higher learning rate; default: no adapters, the weights themselves learn"""
    alpha: int | None = Field(default=None, ge=1)
    """the adapters' share is alpha / rank; default: twice the rank"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """of what goes into the adapters"""
    target_modules: tuple[str, ...] = ()
    """names of the linear layers that get one; default: the queries and values of attention, in every family"""


class AugmentSection(Section):
    """Training rows changed anew at each step, word by word, their labels kept; validation and test rows never are."""

    drop: float = Field(default=0.0, ge=0, lt=1)
    """share of the words left out (Wei and Zou 2019: 0.1); of each text at least one word stays"""
    swap: float = Field(default=0.0, ge=0, lt=1)
    """share of the words that change places with the next one"""
    replace: float = Field(default=0.0, ge=0, lt=1)
    """share of the words replaced by what a masked-language model says in their place, drawn by its probabilities (Kobayashi 2018)"""
    model: str | None = None
    """the masked-language model that replaces words, such as an output of jobs.pretrain, with the tokenizer of model.base; default: model.base"""

    @property
    def is_wanted(self) -> bool:
        """Whether any row is changed."""
        return bool(self.drop or self.swap or self.replace)


class ContrastiveSection(Section):
    """Few labels (SetFit; Tunstall et al. 2022): pairs of rows tune the encoder, then a logistic regression is its head; in place of [optim]."""

    iterations: int | None = Field(default=None, ge=0)
    """pairs of the same and as many of different label drawn for each row (20 in the paper); 0: the logistic regression alone, on the
    encoder as it is; default: the ordinary training"""
    epochs: int = Field(default=1, ge=1)
    """passes over the pairs"""
    batch_size: int = Field(default=16, ge=1)
    """pairs of one optimizer step"""
    learning_rate: float = Field(default=2e-5, gt=0)
    """at the end of the warm-up; then down to zero in a line"""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """of all steps"""


class LossSection(Section):
    """What training makes small. Validation always gives the plain loss, so that runs can be compared."""

    kind: Literal["cross_entropy", "focal"] = "cross_entropy"
    """binary cross entropy of each label for multi-label; focal: what is known already counts less (Lin et al. 2017)"""
    focal_gamma: float = Field(default=2.0, ge=0)
    """how much less: 0 is cross entropy"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """so much of the truth is shared by all classes (Szegedy et al. 2015: 0.1)"""
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    """how much a row of each class counts, as {label = weight, ...}, 1 for the others; balanced: each class the same in all"""
    positive_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    """for multi-label, how much a row that has a label counts for it beside one that has it not; balanced: both the same in all"""


class OptimSection(Section):
    """AdamW with warm-up and decay."""

    learning_rate: float = Field(default=5e-5, gt=0)
    """at the end of the warm-up"""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """of the pooler and the head; default: learning_rate"""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """each layer learns at so much of the rate of the one above it, the embeddings at the least (Sun et al. 2019: 0.95)"""
    epochs: int = Field(default=4, ge=1)
    """passes over the training rows, at most"""
    batch_size: int = Field(default=32, ge=1)
    """rows of one optimizer step, over all workers together"""
    accumulation_steps: int = Field(default=1, ge=1)
    """forward passes that one worker's share of a step is cut into"""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """of all steps"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """of the rate after the warm-up: down to zero in a line or half a cosine, or as it is"""
    unfreeze_layers: int | None = Field(default=None, ge=1)
    """gradual unfreezing (Howard and Ruder 2018): the head alone in the first epoch, so many more layers from the top in each next one"""
    weight_decay: float = Field(default=0.01, ge=0)
    """not applied to biases and norms"""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """gradients are clipped to this norm"""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """evaluate and keep an exponential moving average of the weights: 0.99 spans about 100 steps; default: the weights"""
    rdrop: float = Field(default=0.0, ge=0)
    """weight of R-Drop: each row passes twice, and what dropout makes of the two answers is pulled together; a step takes 1.6 times as long"""
    seed: int = 0
    """of weights of the head, order and dropout"""


class DecisionSection(Section):
    """What the validation rows decide at the end, for training's metrics and for scoring."""

    temperature: bool = False
    """temperature scaling (Guo et al. 2017): scores that are right as often as they say; which class is likeliest stays"""
    thresholds: Literal["f1"] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """for multi-label, from which probability on each label is given: by its best F1, or its best recall at such a precision; default: 0.5"""
    abstain: float | None = Field(default=None, gt=0, lt=1)
    """for one label a row: the least sure rows get none, so many that of the others at least this part is right; default: all get one"""


class StoppingSection(Section):
    """Which checkpoint is best and when to give up."""

    metric: Literal["accuracy", "macro_f1", "micro_f1", "pearson", "spearman", "loss"] | None = None
    """on the validation rows; the checkpoint with the best one is kept; default: macro_f1, for regression loss"""
    keep: Literal["best", "last"] = "best"
    """last: the weights of the last step, without early stopping; on a few hundred validation rows the best one is chance"""
    average: int = Field(default=1, ge=1)
    """keep the mean of the weights of so many evaluations: the best ones, or with keep = "last" the last ones"""
    patience: int = Field(default=4, ge=1)
    """evaluations without a better value before training stops"""
    evaluations_per_epoch: int = Field(default=1, ge=1)
    """validation runs in each epoch"""


class TrainOutputSection(Section):
    """Where the checkpoint goes."""

    path: str
    """the checkpoint's folder: use it as model.path"""
    report_text: bool = False
    """add the texts of the worst errors to report.html and metrics.json, with captum their words marked by what they say for the answer:
    texts may be personal, so they are left out otherwise"""


class TrainResources(Section):
    """What the cluster gives."""

    num_workers: int = Field(default=1, ge=1)
    """training processes"""
    min_workers: int | None = Field(default=None, ge=1)
    """train with as few where nodes are lost, and with up to num_workers again when nodes come; default: wait for num_workers"""
    use_gpu: bool | None = None
    """one GPU for each worker; default: if the cluster has any"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each worker holds all weights; fsdp (FSDP2): a part of weights, gradients and optimizer, for encoders too large for a GPU"""


class TrackingSection(Section):
    """Where a run is shown beside others while it learns. Nothing of it decides the result."""

    to: Trackers = ()
    """mlflow, tensorboard, or both as a list: parameters, every evaluation, and the result; needs mlflow-skinny, tensorboard"""
    uri: str | None = None
    """of MLflow: a tracking server (http://host:5000) or a folder; default: MLFLOW_TRACKING_URI, else the folder mlruns beside output.path"""
    path: str | None = None
    """of TensorBoard: a folder on any fsspec URL; default: the folder tensorboard beside output.path"""
    experiment: str = Field(default="textsweep", min_length=1)
    """of MLflow: the runs that this one is shown with"""

    @field_validator("uri", "path")
    @classmethod
    def check_credentials(cls, found: str | None) -> str | None:
        """Refuse a URL with a password: the configuration is printed, and kept."""
        if found is not None and CREDENTIALS.search(found):
            raise ValueError(
                "credentials do not belong into a configuration, give them to every node as MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN"
            )
        return found


class TrainConfig(Section):
    """Everything `jobs.train` can be told."""

    train: TrainSection = TrainSection()
    valid: ValidSection = ValidSection()
    test: TestSection = TestSection()
    tasks: TasksSection = TasksSection()
    sampling: SamplingSection = SamplingSection()
    data: DataSection = DataSection()
    model: TrainModelSection
    head: HeadSection = HeadSection()
    augment: AugmentSection = AugmentSection()
    lora: LoraSection = LoraSection()
    contrastive: ContrastiveSection = ContrastiveSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    stopping: StoppingSection = StoppingSection()
    decision: DecisionSection = DecisionSection()
    output: TrainOutputSection
    tracking: TrackingSection = TrackingSection()
    resources: TrainResources = TrainResources()

    @model_validator(mode="after")
    def check_rows(self) -> "TrainConfig":
        """One labelled set, or several tasks."""
        names = list(self.tasks.named)
        usual = TrainSection()
        given = [f"train.{name}" for name, value in self.train if value != getattr(usual, name)]
        given += [f"{name}.path" for name in ("valid", "test") if getattr(self, name).path is not None]
        if not names and self.train.path is None:
            raise ValueError("train.path is required: give it as --set train.path=... or in the --config file")
        if not names and self.sampling != SamplingSection():
            raise ValueError(
                "sampling.temperature is set, but there are no tasks whose rows could be seen more or less often"
            )
        if names and given:
            raise ValueError(
                f"{given[0]} with tasks ({', '.join(names)}): each task has path, valid, test and columns of its own"
            )
        if len(names) == 1:
            raise ValueError(f"tasks: there is one, {names[0]!r}; give two or more, or train.path in its place")
        return self


class PretrainTrainSection(Section):
    """The texts to learn from."""

    path: str
    """Parquet with texts, labels are not looked at: a folder, a glob or one file, on any fsspec URL"""
    text_column: str | tuple[str, str] = "text"
    """the text's column in all sets; ["first", "second"]: each of the two is a text of its own"""


class PretrainValidSection(Section):
    """The texts that choose the best weights."""

    path: str | None = None
    """Parquet with texts; default: a part of the training texts, see fraction"""
    fraction: float = Field(default=0.05, gt=0, lt=1)
    """of the training texts, by a hash of each, if no path is given: equal texts are on the same side"""


class PretrainModelSection(Section):
    """What is trained on."""

    base: str
    """a pretrained encoder, with a masked-language head or without: a Hugging Face folder with safetensors weights, or package:NAME"""
    max_length: int = Field(default=128, ge=8)
    """tokens of a row, special ones included"""
    precision: TrainPrecisionChoice = "auto"
    """of the forward and backward pass, the weights stay in fp32; fp16, with loss scaling, is for GPUs without bf16; auto: bf16 or fp32"""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """of the encoder; default: as the base has it"""
    gradient_checkpointing: bool = False
    """compute each layer again in the backward pass: the same gradients, the activations of one layer in memory at a time, slower steps"""
    allow_pickle: bool = False
    """take pytorch_model.bin weights where there are no safetensors ones: only from a source you trust"""
    trust_remote_code: bool = False
    """run the Python files of the model's folder, on every node: only from a source you trust"""

    @property
    def trust(self) -> Trust:
        """What of the folder may be unpickled or run."""
        return Trust(pickle=self.allow_pickle, code=self.trust_remote_code)


class MlmSection(Section):
    """Masked-language modelling (Devlin et al. 2018): some tokens are hidden, and have to be told from those around them."""

    probability: float = Field(default=0.15, gt=0, lt=1)
    """of each token to be asked for; of these 80% are masked, 10% become another token, 10% stay; drawn anew at each step"""
    whole_words: bool = False
    """ask for all tokens of a word or for none (whole-word masking)"""
    packing: bool = True
    """fill rows with one text after the other, separators between them, longer texts going on in the next row; false: one text a row, cut"""


class PretrainStoppingSection(StoppingSection):
    """Which weights are best and when to give up."""

    metric: Literal["loss"] | None = None
    """there is only one: the masked cross entropy of the validation texts"""


class PretrainOutputSection(Section):
    """Where the encoder goes."""

    path: str
    """the encoder's folder, with its masked-language head: use it as model.base"""


class PretrainConfig(Section):
    """Everything `jobs.pretrain` can be told."""

    train: PretrainTrainSection
    valid: PretrainValidSection = PretrainValidSection()
    model: PretrainModelSection
    mlm: MlmSection = MlmSection()
    optim: OptimSection = OptimSection()
    stopping: PretrainStoppingSection = PretrainStoppingSection()
    output: PretrainOutputSection
    tracking: TrackingSection = TrackingSection()
    resources: TrainResources = TrainResources()


FitConfig = TrainConfig | PretrainConfig
"""Of a run on Ray Train."""


class ZeroShotLabelsSection(Section):
    """What is told apart."""

    file: str
    """a TOML file with one line a label: name = "a description", or several, ["one", "another"]; with a prompt.template words"""


class ZeroShotModelSection(Section):
    """The encoder, as it is."""

    base: str
    """a pretrained encoder: a Hugging Face folder with safetensors weights, on any fsspec URL, or package:NAME"""
    max_length: int = Field(default=128, ge=4)
    """tokens kept of each text, special ones and a template's included; scoring uses the same"""
    truncation: Truncation = "head"
    """which part of a longer text is kept; never the template is cut"""
    pooling: Literal["first", "pooler", "mean", "max"] = "mean"
    """of the tokens of texts and descriptions, as the encoder was trained; not with a template"""
    temperature: float = Field(default=0.05, gt=0)
    """cosine similarities are divided by it before they become probabilities; which label is likeliest stays; not with a template"""
    allow_pickle: bool = False
    """take pytorch_model.bin weights where there are no safetensors ones: only from a source you trust"""
    trust_remote_code: bool = False
    """run the Python files of the model's folder, on every node: only from a source you trust"""

    @property
    def trust(self) -> Trust:
        """What of the folder may be unpickled or run."""
        return Trust(pickle=self.allow_pickle, code=self.trust_remote_code)


class PromptSection(Section):
    """A masked prompt (Schick and Schuetze 2021), for encoders with a masked-language head."""

    template: str | None = None
    """such as "{text} It was [MASK].": the likeliest of the labels' words in place of [MASK] is the answer; default: descriptions"""


class ZeroShotTestSection(Section):
    """Labelled rows, if there are any, to say how good it is."""

    path: str | None = None
    """labelled Parquet: a folder, a glob or one file, on any fsspec URL"""
    text_column: str = "text"
    """the text's column"""
    label_column: str = "label"
    """the label's column: names as in labels.file"""


class ZeroShotOutputSection(Section):
    """Where the checkpoint goes."""

    path: str
    """the checkpoint's folder: use it as model.path"""


class ZeroShotConfig(Section):
    """Everything `jobs.zero_shot` can be told."""

    labels: ZeroShotLabelsSection
    model: ZeroShotModelSection
    prompt: PromptSection = PromptSection()
    test: ZeroShotTestSection = ZeroShotTestSection()
    output: ZeroShotOutputSection


class PublishOutputSection(Section):
    """Where predictions are."""

    path: str
    """the folder of all versions and runs, as jobs.score was given it"""
    single_writer: bool = False
    """a promise that nothing else writes here at once, for a store without atomic conditional writes"""


class PublishConfig(Section):
    """Everything `jobs.publish` can be told besides what to do."""

    output: PublishOutputSection


class FrozenTestSection(Section):
    """The labelled rows on which two checkpoints are compared."""

    path: str
    """labelled Parquet that neither has learned from: a folder, a glob or one file, on any fsspec URL"""
    text_column: str | tuple[str, str] = "text"
    """the text's column; ["first", "second"] for sentence pairs"""
    label_column: str = "label"
    """the label's column"""


class GateSection(Section):
    """When a challenger is accepted."""

    metric: Literal["macro_f1", "accuracy"] = "macro_f1"
    """what must not get worse"""
    margin: float = Field(default=0.002, ge=0, lt=1)
    """a loss of the metric that would not matter; 0.002 is 0.2 points"""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """with which a loss of the margin or more must be ruled out"""
    resamples: int = Field(default=2_000, ge=200)
    """of the bootstrap"""
    seed: int = 0
    """of the bootstrap"""


class CompareConfig(Section):
    """Everything `jobs.compare` can be told besides the two checkpoints."""

    test: FrozenTestSection
    gate: GateSection = GateSection()


class PredictConfig(Section):
    """Everything `jobs.predict` can be told besides its texts."""

    model: ModelSection


ConfigT = TypeVar("ConfigT", bound=Section)

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+=-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Command(Generic[ConfigT]):
    """A parsed command line."""

    config: ConfigT
    run_id: str
    arguments: argparse.Namespace


def parse_command(
    schema: type[ConfigT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    extra: argparse.ArgumentParser | None = None,
) -> Command[ConfigT]:
    """Parse `[--config FILE] [--set section.key=value ...] [--run-id ID]` into a validated configuration.

    `extra` adds a job's own arguments. Raises `UsageError` that names the key, the value and what was expected.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        epilog=describe_keys(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[extra] if extra else [],
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file with the keys below")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="one key, as TOML (a bare word is a string); wins over the file; may be repeated",
    )
    parser.add_argument(
        "--run-id", help="name of this run; an orchestrator passes its logical date (default: time and chance)"
    )
    arguments = parser.parse_args(argv)
    values = read_file(arguments.config) if arguments.config else {}
    for assignment in arguments.set:
        assign(values, assignment)
    run_id = arguments.run_id or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    if not RUN_ID.fullmatch(run_id):
        raise UsageError(
            f"--run-id {run_id!r}: expected 1 to 128 letters, digits and . _ : + = -, starting with a letter or digit"
        )
    command = Command(config=validate(schema, values), run_id=run_id, arguments=arguments)
    if ONLY_PARSE.get():
        raise CommandParsed(command)
    return command


ONLY_PARSE: ContextVar[bool] = ContextVar("ONLY_PARSE", default=False)
"""Whether `parse_command` ends the job that called it: see `parse_only`."""


class CommandParsed(Exception):
    """The way out of a job that was only asked to read its command line."""

    def __init__(self, command: Command[Any]) -> None:
        super().__init__("the command line was parsed")
        self.command = command


def parse_only(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> Command[Any]:
    """What a job's `main` makes of its arguments, without running it. Raises what the job itself would raise."""
    before = ONLY_PARSE.set(True)
    try:
        main(argv)
    except CommandParsed as parsed:
        return parsed.command
    finally:
        ONLY_PARSE.reset(before)
    raise AssertionError("a job that takes a configuration must read it first of all, by parse_command")


def read_file(path: str) -> dict[str, Any]:
    """Read a TOML configuration file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {path}: there is no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UsageError(f"--config {path}: not a file that can be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from None


def assign(values: dict[str, Any], assignment: str) -> None:
    """Put one `section.key=value` into `values`, in place."""
    key, sign, text = assignment.partition("=")
    parts = key.strip().split(".")
    depth = 4 if parts[:2] == ["search", "space"] else 3 if parts[0] == "tasks" and len(parts) > 2 else 2
    if not sign or len(parts) != depth or not all(parts):
        raise UsageError(
            f"--set {assignment!r}: expected section.key=value, such as --set input.path=s3://bucket/archive"
        )
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UsageError(f"--set {assignment!r}: {part!r} is a value in the file, expected a section")
    try:
        section[parts[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        section[parts[-1]] = text.strip()


def validate(schema: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Turn plain values into the job's record, or raise one `UsageError` that lists every mistake."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found = {
            describe_mistake(schema, tuple(map(str, item["loc"])), item["type"], item["msg"], item["input"])
            for item in error.errors()
        }
        raise UsageError("; ".join(sorted(found, key=lambda text: (not text.startswith("unknown"), text)))) from None


def describe_mistake(schema: type[Section], where: tuple[str, ...], kind: str, message: str, found: object) -> str:
    """Say in one sentence what is wrong with one key."""
    sections = {name: field.annotation for name, field in schema.model_fields.items()}
    if not where:
        return message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        section = TaskSection if len(where) == 3 else sections.get(where[0])
        if len(where) == 1 or section is None:
            return f"unknown section {where[0]!r}{nearest(where[0], sections)} (known: {', '.join(sections)})"
        names = list(section.model_fields)
        known = ".".join(where[:-1])
        return f"unknown key {'.'.join(where)!r}{nearest(where[-1], names)} (known in [{known}]: {', '.join(names)})"
    if kind == "missing":
        missing = (
            [key for key, _, required, _ in keys_of(schema) if required and key.startswith(where[0] + ".")]
            if len(where) == 1
            else [".".join(where)]
        )
        return "; ".join(f"{key} is required: give it as --set {key}=... or in the --config file" for key in missing)
    key = ".".join(where[: 3 if where[0] == "tasks" else 2])
    message = message.removeprefix("Value error, ")
    return f"{key} = {masked(json.dumps(found, default=str))}: {message[0].lower()}{message[1:]}"


def masked(text: str) -> str:
    """A text without the user names and passwords of its URLs."""
    return CREDENTIALS.sub("***@", text)


def keys_of(schema: type[Section]) -> Iterator[tuple[str, str, bool, str]]:
    """Yield `(section.key, default, required, help)` for every key of a job."""
    for name, field in schema.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        fields = section.model_fields if section is not TasksSection else TaskSection.model_fields
        prefix = f"{name}.NAME" if section is TasksSection else name
        for key, leaf in fields.items():
            default = "" if leaf.is_required() or leaf.default is None else json.dumps(leaf.default)
            yield f"{prefix}.{key}", default, leaf.is_required() and prefix == name, leaf.description or ""


def describe_keys(schema: type[Section]) -> str:
    """List all keys with their help and defaults, for `--help`."""
    lines = ["keys:"]
    for key, default, required, text in keys_of(schema):
        note = " (required)" if required else f" [{default}]" if default else ""
        lines.append(f"  {key}{note}\n      {text}")
    return "\n".join(lines)
