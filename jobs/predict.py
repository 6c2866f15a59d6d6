"""Classify a few texts with a checkpoint: the quick look. No cluster, no archive.

Reads   texts from the command line, one a line from standard input, or from a column of a CSV file.
Writes  CSV to standard output or to --output: the text (or the CSV's own columns), then label, score, tokens and error.

    python -m jobs.predict --set model.path=models/spam "you won a prize" "see you at eight"
    cat texts.txt | python -m jobs.predict --set model.path=s3://bucket/models/spam
    python -m jobs.predict --set model.path=models/spam --csv mails.csv --column body --output scored.csv
    python -m jobs.predict --set model.path=models/spam --explain --html why.html "you won a prize"

With --explain standard output says which words each answer comes from, in place of the CSV, which then goes to --output alone:
on a terminal the text with words that speak for the answer on blue and those against it underlined on orange, elsewhere (or with
NO_COLOR set) the strongest words with their values, which are parts of the answer's log-odds (regression: of the number).
A text takes about as long as scoring 100 of them. Needs `pip install captum`.

Exit codes: 0 done; 2 the command or configuration is wrong; 4 storage failed, run it again; 1 a bug.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lib import checkpoint
from lib.attribution import check_captum, explain_texts
from lib.config import parse_command
from lib.errors import UsageError, nearest, run_job
from lib.highlight import explanation_page, terminal_lines
from lib.predictor import Predictor
from lib.reading import check_texts
from lib.schema import PredictionSchema, RowError, to_results
from lib.score_config import PredictConfig

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")
"""A cell that starts like this is run as a formula by spreadsheets; written with an apostrophe before it, it is text."""

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def main(argv: Sequence[str]) -> None:
    """Read texts, score them, write CSV."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts to classify; none: one a line from standard input"
    )
    extra.add_argument("--csv", metavar="FILE", help="take the texts from this CSV file")
    extra.add_argument("--column", default="text", help="the CSV file's column of texts (default: text)")
    extra.add_argument("--output", metavar="FILE", help="write the CSV here (default: standard output)")
    extra.add_argument("--explain", action="store_true", help="say which words answers come from, in place of the CSV")
    extra.add_argument("--html", metavar="FILE", help="with --explain: write it here as an HTML page, too")
    command = parse_command(PredictConfig, argv, prog="jobs.predict", description=__doc__ or "", extra=extra)
    arguments, config = command.arguments, command.config

    if arguments.explain:
        check_captum("--explain")
    elif arguments.html:
        raise UsageError(f"--html {arguments.html}: it is a page of explanations; add --explain")
    table = read_texts(arguments.texts, arguments.csv, arguments.column)
    texts = table[arguments.column if arguments.csv else "text"]
    model = checkpoint.load(config.model.path, config.model.max_length, config.model.trust)
    predictor = Predictor(model, config.model.precision, config.model.engine)
    results, scores = predict(predictor, model, texts)
    scored = pd.concat([table, results], axis=1).map(as_plain_text).rename(columns=as_plain_text)
    if arguments.output or not arguments.explain:
        try:
            scored.to_csv(arguments.output or sys.stdout, index=False)
        except OSError as error:
            raise UsageError(f"--output {arguments.output}: cannot be written: {error}") from error
    if arguments.explain:
        explain(model, texts.tolist(), scores, arguments.html)


def read_texts(texts: Sequence[str], csv: str | None, column: str) -> pd.DataFrame:
    """Bring the texts together as one table."""
    if csv is None:
        return pd.DataFrame({"text": list(texts) or sys.stdin.read().splitlines()}, dtype="object")
    if texts:
        raise UsageError(f"{len(texts)} texts and --csv {csv} were given, expected one of them")
    try:
        table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UsageError(f"--csv {csv}: cannot be read: {error}") from None
    if column not in table.columns:
        raise UsageError(
            f"--csv {csv}: no column {column!r}{nearest(column, table.columns)} (there are: {', '.join(table.columns)})"
        )
    return table


def predict(
    predictor: Predictor, model: checkpoint.Checkpoint, texts: "pd.Series[str]"
) -> tuple[pd.DataFrame, npt.NDArray[np.float32]]:
    """Score texts: the columns of `jobs.score`, and all scores (N, C), NaN for rows with an error."""
    checked, errors = check_texts(pa.array(texts, pa.string()))
    good = errors == RowError.NONE
    tokens = checkpoint.tokenizer_of(model).encode(checked.filter(pa.array(good)))
    scores = np.full((len(errors), predictor.num_classes), np.nan, np.float32)
    scores[good] = predictor.probabilities(tokens.ids, tokens.offsets)
    lengths, truncated = np.zeros(len(errors), np.int32), np.zeros(len(errors), np.bool_)
    lengths[good], truncated[good] = tokens.lengths, tokens.truncated
    schema = PredictionSchema(heads=model.card.heads, prefix="", probabilities=False, keys=pa.schema([]))
    results = to_results(schema, scores, lengths, truncated, errors)
    for index, field in enumerate(results.schema):
        if pa.types.is_list(field.type):  # several labels: one cell, "joy; fear"
            joined = pc.binary_join(results[field.name].cast(pa.list_(pa.string())), "; ")
            results = results.set_column(index, field.name, joined)
    return results.to_pandas(types_mapper=pd.ArrowDtype), scores


def explain(model: checkpoint.Checkpoint, texts: list[str], scores: npt.NDArray[np.float32], page: str | None) -> None:
    """Print which words each answer comes from, text by text, and write all of it as a page."""
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    answers = []
    for number, found in enumerate(explain_texts(model, texts, scores), 1):
        answers.append(found)
        for one in found:
            print("\n".join(terminal_lines(number, one, colored)), flush=True)
        if not found:
            print(f"text {number}: no answer", flush=True)
    if page is not None:
        try:
            Path(page).write_text(explanation_page(model.url, answers, texts), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--html {page}: cannot be written: {error}") from error


def as_plain_text(value: object) -> object:
    """Keep a spreadsheet from running a text as a formula; numbers stay numbers.

    Line breaks become line feeds: pandas quotes no carriage return, and what stands behind one would start a new cell.
    """
    if not isinstance(value, str):
        return value
    plain = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{plain}" if plain.startswith(FORMULA_STARTS) and not NUMBER.fullmatch(plain) else plain


if __name__ == "__main__":
    sys.exit(run_job(main))
