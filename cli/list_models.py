"""gpt2.py --list_models: a table of the models in models_dir, for which no weights are read."""

import glob
import os
import sys

from cli.options import describe
from encoder import LAYOUTS
from utils import missing_files
from weights.errors import CorruptFile, UserError, printable
from weights.names import count_params, load_hparams
from weights.releases import CHECKPOINT_FILES, DATA_FILE, N_PARAMS
from weights.safetensors_file import WEIGHTS, map_tensors

COLUMNS = ("model", "parameters", "context", "vocabulary", "layout", "state")
OPENAI = {*LAYOUTS[0], *CHECKPOINT_FILES}
# Hugging Face's files that can replace OpenAI's; tokenizer.json can replace both of the vocabulary
COUNTERPARTS = {"hparams.json": "config.json", DATA_FILE: WEIGHTS} | dict(zip(*LAYOUTS[:2], strict=True))
FILES = OPENAI | {*COUNTERPARTS, *COUNTERPARTS.values(), *LAYOUTS[2]}


def run_list_models(options):
    """Print the table; raise UserError if models_dir is not a folder."""
    models_dir = options.models_dir
    if not os.path.isdir(models_dir):
        raise UserError(f"{models_dir} is not a folder; correct --models_dir")
    rows = [row(name, os.path.join(models_dir, name)) for name in model_names(models_dir)]
    if not rows:
        print(f"note: no models in {models_dir}; a run with --model_size 124M downloads one", file=sys.stderr)
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for cells in (COLUMNS, *rows):
        print("  ".join(map(str.ljust, cells, widths)).rstrip())


def model_names(models_dir):
    """Return the folders that have a file of a model, two levels deep, as --model_size names them."""
    found = [path for pattern in ("*", "*/*") for path in glob.glob(pattern, root_dir=models_dir)]
    return sorted(path for path in found if present_files(os.path.join(models_dir, path)))


def present_files(model_dir):
    return {name for name in FILES if os.path.isfile(os.path.join(model_dir, name))}


def row(name, model_dir):
    """Return the cells of a model."""
    layout, missing = layout_and_missing(model_dir)
    sizes, state = ("", "", ""), "complete"
    try:
        hparams = load_hparams(model_dir)
        sizes = f"{count_params(**hparams) / 1e6:.2f} M", str(hparams["n_ctx"]), str(hparams["n_vocab"])
        map_tensors(os.path.join(model_dir, WEIGHTS), hparams)
    except FileNotFoundError:
        pass  # one of the missing files, or weights that a run will import
    except (UserError, OSError) as error:
        state = error.fault if isinstance(error, CorruptFile) else describe(error)
    if missing:
        state = f"lacks {', '.join(missing)}{'; a run downloads them' if name in N_PARAMS else ''}"
    return tuple(printable(cell).replace("\n", " ") for cell in (name, *sizes, layout, state))


def layout_and_missing(model_dir):
    """Return the name of the layout, and the missing files: those of Hugging Face's layout if that has been begun."""
    files, missing = present_files(model_dir), missing_files(model_dir)
    if files & OPENAI or files <= {"hparams.json"}:
        return "imported" if WEIGHTS in files else "OpenAI's checkpoint", missing
    replacements = map(COUNTERPARTS.get, missing)
    return "Hugging Face's", [name for name in replacements if name and name not in files]
