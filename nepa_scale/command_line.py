"""What the command lines of the tools have in common: the model's options, and how results leave."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nepa_scale.config import CHOICES, EXIT_USAGE, ConfigError, ModelConfig, load_config, nearest
from nepa_scale.models import SIZES


class Parser(argparse.ArgumentParser):
    """Complains in one line, and names the nearest word to a mistaken choice."""

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(
            prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help explains the options)", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def choice(name: str, options: tuple[str, ...]) -> Callable[[str], str]:
    """An argparse type: one of `options`; the message for any other word names the nearest."""

    def convert(word: str) -> str:
        if word not in options:
            raise argparse.ArgumentTypeError(
                f"{name} {word} is not one of {', '.join(options)}{nearest(word, options)}"
            )
        return word

    return convert


def positive(word: str) -> int:
    """An argparse type: a whole number from 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} must be a whole number, at least 1")
    return int(word)


def sides(word: str) -> int | list[int]:
    """An argparse type: `224`, or `224x448`, which is [height, width]."""
    numbers = word.lower().split("x")
    if not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{word} must be a square's side (224) or HEIGHTxWIDTH (224x448)")
    return int(numbers[0]) if len(numbers) == 1 else [int(number) for number in numbers]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--size, --patch-size, --image-size, --mlp, and any other key of the model as section.key=value."""
    group = parser.add_argument_group("model")
    group.add_argument("--size", default="vit_b", metavar="SIZE", help=f"{', '.join(SIZES)} (default: vit_b)")
    group.add_argument("--patch-size", type=positive, default=14, metavar="P", help="pixels (default: 14)")
    group.add_argument(
        "--image-size", type=sides, default=224, metavar="S|HxW", help="pixels: 224, or 224x448 (default: 224)"
    )
    group.add_argument(
        "--mlp", type=choice("--mlp", CHOICES["model.mlp"]), default="gelu", help="gelu | swiglu (default: gelu)"
    )
    group.add_argument(
        "overrides",
        nargs="*",
        metavar="model.key=value",
        help="any other key of the model, as in a run's configuration: model.depth=6 model.qk_norm=affine ...",
    )


def model_of(arguments: argparse.Namespace, size: str | None = None) -> ModelConfig:
    """The model that the options describe; `size` in place of --size."""
    strangers = [override for override in arguments.overrides if not override.startswith("model.")]
    if strangers:
        raise ConfigError(f"'{strangers[0]}' is not a key of the model: write model.key=value")
    config = load_config(None, arguments.overrides).model
    config.size = size or arguments.size
    config.patch_size, config.image_size, config.mlp = arguments.patch_size, arguments.image_size, arguments.mlp
    return config


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """--json and --plot."""
    parser.add_argument("--json", metavar="FILE", help="write the same facts as one JSON object; - for stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")


def deliver(facts: dict[str, Any], text: str, where: str | None) -> None:
    """Prints `text` for people, or with `--json -` the JSON alone; with `--json FILE` both."""
    if where == "-":
        print(json.dumps(facts))
        return
    print(text)
    if where:
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n")


def run(main: Callable[[], int]) -> int:
    """`main()`; what the user has to mend becomes one line and exit status 2."""
    try:
        return main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:  # whoever read the output has seen enough
        return 0
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
