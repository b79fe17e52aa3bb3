"""Takes weights in NEPA's official layout into this project's, or into timm's.

FOLDER has config.json and model.safetensors, or its shards with their index (a pretraining model or a classifier; GELU
or SwiGLU, any patch size). Where the official trainer left its moving average there, too (pytorch_model_ema.bin), that
is taken unless --weights says otherwise. Nothing in FOLDER is executed, only tensors are unpickled, and nothing that is
missing is filled in: where the files disagree, the tensor and the field are named.

  --to safetensors   OUTPUT is a file: float32 tensors under this project's parameter names (the default)
  --to timm          OUTPUT is a folder for timm: `import nepa_scale.interop.timm`, then
                     timm.create_model("local-dir:OUTPUT")

The names of a classifier's classes travel along, and for timm how its images are prepared.
To fine-tune from an official folder no import is needed: finetune.weights=FOLDER.

examples:
  python tools/import_weights.py nepa_base_patch14 nepa_base.safetensors
  python tools/import_weights.py nepa_base_patch14_in1k nepa_base_timm --to timm
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from nepa_scale.config import EXIT_USAGE, ConfigError
from nepa_scale.interop import load_official
from nepa_scale.interop.official import has_average, weights_by_default
from nepa_scale.interop.preprocessing import Preprocessing
from nepa_scale.objectives import Classifier
from nepa_scale.training.exported import require_own_file, require_own_folder, write_origin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="in the official layout")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a file, or for timm a folder")
    parser.add_argument("--to", default="safetensors", choices=["safetensors", "timm"], help="default: safetensors")
    parser.add_argument(
        "--weights",
        choices=["raw", "ema"],
        help="as trained, or averaged (default: ema, where it is there)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write what was done as one JSON object; - for stdout")
    arguments = parser.parse_args()
    try:
        facts = import_weights(arguments.folder, arguments.output, arguments.to, arguments.weights)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.json == "-":
        print(json.dumps(facts))
        return 0
    print(f"{facts['task']}, {facts['parameters']:,} parameters ({facts['weights']}) -> {facts['output']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(facts) + "\n")
    return 0


def import_weights(folder: Path, output: Path, to: str, weights: str | None = None) -> dict[str, Any]:
    """What was written: folder, task, weights, parameters, output."""
    average = has_average(folder)
    weights = weights or weights_by_default(folder)
    if average:
        other = "raw" if weights == "ema" else "ema"
        print(
            f"{folder} holds raw weights and their moving average: the {weights} ones are taken, "
            f"--weights {other} takes the others",
            file=sys.stderr,
        )
    module, source = load_official(folder, weights), str(folder.resolve())
    task, names = module.task, module.class_names
    if to == "timm":
        from nepa_scale.interop.timm import save_timm  # imports timm, which takes seconds

        require_own_folder(output, source, to)
        save_timm(task, output, Preprocessing.from_hugging_face(module.preprocessor or {}), names)
        write_origin(output, {"run": source, "weights": weights, "to": to})
    else:
        if output.is_dir():
            raise ConfigError(f"{output} is a folder: give the name of a file, such as {output / 'model.safetensors'}")
        require_own_file(output, source)
        metadata = {"format": "pt", "weights": weights, "run": source}
        if names is not None:
            metadata["class_names"] = json.dumps(names)
        part = output.with_name(f".{output.name}.part")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            save_file(task.state_dict(), part, metadata=metadata)
            part.replace(output)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot write {output}: {error}") from error
    return {
        "folder": str(folder),
        "task": "classifier" if isinstance(task, Classifier) else "pretraining model",
        "weights": weights,
        "parameters": sum(parameter.numel() for parameter in task.parameters()),
        "output": str(output),
    }


if __name__ == "__main__":
    sys.exit(main())
