"""The configuration of what works with predictions: scoring and its forecast, a quick look, what was published; of a model without
training, and of comparing two."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lib.config import EngineChoice, PrecisionChoice, Resources, Section, TokenPooling, Truncation, Trust

Share = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]
"""A limit: a whole number counts, a number with a point (0.0 to 1.0) is a fraction."""


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
    """last: the run of this version that was published last and had new rows; or the id of one of its runs, or a path to a run.json of
    any version"""
    max_psi: float | None = Field(default=None, gt=0)
    """a population stability index over it, of labels, scores, text lengths or errors, keeps the run from being published; 0.1 is a
    small shift, 0.25 a large one; default: only reported"""


class ScoreResources(Resources):
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
    """jobs.plan: take the speed of this GPU or processor, by its name as run.json has it or a part of it that fits no other (H100)"""
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


class PredictConfig(Section):
    """Everything `jobs.predict` can be told besides its texts."""

    model: ModelSection


class PublishOutputSection(Section):
    """Where predictions are."""

    path: str
    """the folder of all versions and runs, as jobs.score was given it"""
    single_writer: bool = False
    """a promise that nothing else writes here at once, for a store without atomic conditional writes"""


class PublishConfig(Section):
    """Everything `jobs.publish` can be told besides what to do."""

    output: PublishOutputSection


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
    margin: float = Field(default=0.002, gt=0, lt=1)
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
