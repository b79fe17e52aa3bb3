"""Takes the weights out of a checkpoint, for other programs.

CKPT is a checkpoint (RUN/checkpoints/step_00001000) or a run folder, whose newest checkpoint it then is. Any will do,
whatever strategy and number of ranks wrote it; one process on a CPU is enough.

  --to safetensors   OUTPUT is a file: float32 tensors under this project's parameter names. Takes the memory of one
                     block, however large the model
  --to official      OUTPUT is a folder in NEPA's official layout (config.json, model.safetensors). Takes the memory of
                     the whole model
  --to timm          OUTPUT is a folder for timm: `import nepa_scale.interop.timm`, then
                     timm.create_model("local-dir:OUTPUT"). Takes the memory of the whole model

  --to hf            the same as official, which is what Hugging Face's from_pretrained reads

The last two carry how the run prepares images in evaluation (for timm in config.json, else in
preprocessor_config.json) and, of a classifier, the names of its classes; a safetensors file has the names in its
metadata. Beside the weights lie README.md, a model card with configuration, data, measured quality and FLOPs, and
export.json, which names the run. An output that holds anything but an export of the same run is left as it is.

examples:
  python tools/export.py runs/demo --to safetensors demo.safetensors
  python tools/export.py runs/demo/checkpoints/step_00001000 --to official demo_official --weights ema
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from nepa_scale.config import EXIT_USAGE, ConfigError, config_from_dict
from nepa_scale.evaluation.model_card import write_model_card
from nepa_scale.interop import save_official
from nepa_scale.interop.preprocessing import Preprocessing
from nepa_scale.training.checkpoint import locate_checkpoint, read_meta
from nepa_scale.training.export import export_safetensors, load_task
from nepa_scale.training.exported import class_names, require_own_folder, run_of, write_origin
from nepa_scale.training.weights import KINDS, WEIGHTS_HELP, choose_weights

LAYOUTS = ("safetensors", "official", "timm", "hf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint, or a run folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a file (safetensors) or a folder")
    parser.add_argument("--to", required=True, choices=[*LAYOUTS], help="the layout of OUTPUT")
    parser.add_argument("--weights", choices=list(KINDS), help=WEIGHTS_HELP)
    parser.add_argument("--json", metavar="FILE", help="also write what was done as one JSON object; - for stdout")
    arguments = parser.parse_args()
    try:
        facts = export(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.json == "-":
        print(json.dumps(facts))
    else:
        print(f"{facts['parameters']:,} parameters ({facts['weights']}) of step {facts['step']} -> {facts['output']}")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(facts) + "\n")
    return 0


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was exported, as `export_safetensors` describes it."""
    checkpoint = locate_checkpoint(arguments.checkpoint)
    chosen = choose_weights(checkpoint, arguments.weights)
    if chosen.note:
        print(chosen.note, file=sys.stderr)
    if arguments.to == "safetensors":
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("export")
            return export_safetensors(
                checkpoint,
                arguments.output,
                chosen.weights,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
    layout = "official" if arguments.to == "hf" else arguments.to
    if layout != arguments.to:
        print("--to hf writes --to official, which Hugging Face's from_pretrained reads", file=sys.stderr)
    run = run_of(checkpoint)
    require_own_folder(arguments.output, run, layout)
    preprocessing = Preprocessing.of(config_from_dict(read_meta(checkpoint)["config"], str(checkpoint)))
    names = class_names(checkpoint)
    model = load_task(checkpoint, chosen.weights)
    if layout == "timm":
        from nepa_scale.interop.timm import save_timm  # imports timm, which takes seconds

        save_timm(model, arguments.output, preprocessing, names)
    else:
        save_official(model, arguments.output, preprocessing, names)
    write_model_card(arguments.output, checkpoint, model, layout=layout, weights=chosen.weights)
    origin = {"run": run, "checkpoint": checkpoint.name, "step": chosen.step, "weights": chosen.weights, "to": layout}
    write_origin(arguments.output, origin)
    return {
        "checkpoint": str(checkpoint),
        "step": chosen.step,
        "weights": chosen.weights,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(path.stat().st_size for path in arguments.output.iterdir() if path.is_file()),
        "output": str(arguments.output),
    }


if __name__ == "__main__":
    sys.exit(main())
