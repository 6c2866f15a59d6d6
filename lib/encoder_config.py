"""The configuration of what else makes or judges a model: further pre-training, classification without labels, comparison."""

from typing import Literal

from pydantic import Field

from lib.config import Section, TrainPrecisionChoice, Truncation, Trust
from lib.train_config import OptimSection, StoppingSection, TrackingSection, TrainConfig, TrainResources


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
