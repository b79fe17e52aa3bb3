"""Takes weights in NEPA's official layout into this project's, or into timm's.

FOLDER has config.json and model.safetensors (a pretraining model or a classifier; GELU or SwiGLU, any patch size).
Nothing in it is executed or unpickled, and nothing that is missing is filled in: where the two files disagree, the
tensor and the field are named.

  --to safetensors   OUTPUT is a file: float32 tensors under this project's parameter names (the default)
  --to timm          OUTPUT is a folder for timm: `import nepa_scale.interop.timm`, then
                     timm.create_model("local-dir:OUTPUT")

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
from nepa_scale.objectives import Classifier


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="in the official layout")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a file, or for timm a folder")
    parser.add_argument("--to", default="safetensors", choices=["safetensors", "timm"], help="default: safetensors")
    parser.add_argument("--json", metavar="FILE", help="also write what was done as one JSON object; - for stdout")
    arguments = parser.parse_args()
    try:
        facts = import_weights(arguments.folder, arguments.output, arguments.to)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.json == "-":
        print(json.dumps(facts))
        return 0
    print(f"{facts['task']}, {facts['parameters']:,} parameters -> {facts['output']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(facts) + "\n")
    return 0


def import_weights(folder: Path, output: Path, to: str) -> dict[str, Any]:
    task = load_official(folder).task
    if to == "timm":
        from nepa_scale.interop.timm import save_timm  # imports timm, which takes seconds

        save_timm(task, output)
    else:
        if output.is_dir():
            raise ConfigError(f"{output} is a folder: give the name of a file, such as {output / 'model.safetensors'}")
        part = output.with_name(f".{output.name}.part")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            save_file(task.state_dict(), part, metadata={"format": "pt"})
            part.replace(output)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot write {output}: {error}") from error
    return {
        "folder": str(folder),
        "task": "classifier" if isinstance(task, Classifier) else "pretraining model",
        "parameters": sum(parameter.numel() for parameter in task.parameters()),
        "output": str(output),
    }


if __name__ == "__main__":
    sys.exit(main())
