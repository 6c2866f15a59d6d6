"""Train a pretrained encoder further on texts without labels, before it is fine-tuned.

Reads   train.path, valid.path: Parquet with a text column, on any fsspec URL; model.base: a pretrained encoder in Hugging Face form
        with safetensors weights, with a masked-language head or without.
Writes  output.path: the encoder of the lowest validation loss with its masked-language head, its tokenizer, textsweep.json,
        metrics.json and README.md. It loads with plain transformers, and jobs.train takes it as model.base.

    python -m jobs.pretrain --set train.path=s3://bucket/texts --set model.base=/models/encoder --set output.path=s3://bucket/models/mine
    python -m jobs.train --set model.base=s3://bucket/models/mine --set train.path=...

Run it again with the same run id: a run that was killed goes on after its last evaluation, a finished one returns at once.
Exit codes: 0 done; 2 the command, the configuration or the data is wrong; 4 incomplete, safe to run again; 5 stopped on
request; 1 a bug.
"""

import sys
from collections.abc import Sequence

from lib.config import parse_command
from lib.errors import run_job
from lib.metrics import shown
from lib.pretrain_config import PretrainConfig
from lib.pretraining import pretrain
from lib.runtime import ray_session
from lib.toml import announcement


def main(argv: Sequence[str]) -> None:
    """Train, then say how well masked tokens are told and how to use the encoder."""
    command = parse_command(
        PretrainConfig, argv, prog="jobs.pretrain", description="Train an encoder further on texts without labels."
    )
    print(announcement(command.run_id, command.config), flush=True)
    with ray_session(command.config.resources) as cluster:
        print(f"cluster: {cluster}", flush=True)
        result = pretrain(command.config, command.run_id, cluster)
    best, history = result["best"], result["history"]
    print(f"\nbest of {len(history)} evaluations: step {best['step']}, in {result['seconds']:.0f} s of training")
    print(
        f"masked tokens of validation ({result['texts']['valid']:,} texts): {shown(best)}; first evaluation: {shown(history[0])}"
    )
    path = command.config.output.path
    print(
        f"\nencoder: {path}\nuse it:  python -m jobs.train --set model.base={path} --set train.path=... --set output.path=..."
    )


if __name__ == "__main__":
    sys.exit(run_job(main))
