"""The configuration of fine-tuning: a recipe is a key, and every key is off unless it is set."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lib.config import CREDENTIALS, Resources, Section, TrainPrecisionChoice, Truncation, Trust
from lib.windows import Windows

Trackers = Annotated[
    tuple[Literal["mlflow", "tensorboard"], ...],
    BeforeValidator(lambda found: (found,) if isinstance(found, str) else found),
]
"""One name or several."""


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

    of_each: ClassVar[type[Section] | None] = TaskSection
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
    """rows of training whose text is in validation or test, and of validation in test: kept with a warning, left out, or refused where
    they are over 0.1% of that set"""
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
    """of the encoder and the family's own head (another one has head.dropout); default: as the base has it"""
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
    """for multi-label, from which probability on each label is given: by the best F1 to expect, or its best recall at such a precision; default: 0.5"""
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


class TrainResources(Resources):
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
