"""The command line, ``bsdp`` or ``python train.py``: the first word chooses what is done."""

import difflib
import importlib
import itertools
import linecache
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

TRAINER_WORDS = {
    "fit": "train, and prune if a callback says so",
    "validate": "measure a checkpoint on the validation images",
    "test": "measure a checkpoint on the test images",
    "predict": "write the predicted classes of the test images",
}
CONFIGS = Path(__file__).parent / "configs"
_NOISE = (
    "Does not validate against any",
    "Subtypes: ",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type: ",
    "Given value: Namespace",
    "Given value: NestedArg",
)


@dataclass(frozen=True)
class Command:
    """A word of the command line that is a plain function.

    Args:
        target: ``module:function``; its arguments become the options.
        help: One line for the overview.
        positional: Whether arguments without a default go without an option's name.
    """

    target: str
    help: str
    positional: bool = True


COMMANDS = {
    "export": Command(
        "bsdp.commands:export", "write the pruned network as ONNX, torch.export or safetensors file", False
    ),
    "compress": Command(
        "bsdp.compress_command:compress", "make a trained network smaller without training, in a minute", False
    ),
    "describe": Command(
        "bsdp.commands:describe", "show layers, ranks, parameters and MACs of a checkpoint or backbone"
    ),
    "benchmark": Command(
        "bsdp.commands:benchmark", "time the original and the pruned network side by side", positional=False
    ),
    "latency": Command(
        "bsdp.commands:latency", "time every layer by rank or width and save the table for budgets of latency"
    ),
}


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Words after the program's name; None takes them from ``sys.argv``.

    Returns:
        The exit code: 0, or 2 after a mistake of the user, which is explained on standard error.
    """
    args = list(sys.argv[1:] if args is None else args)
    word = args[0] if args else "--help"
    if word in ("-h", "--help", "help"):
        print(_overview())
        return 0 if args else 2
    if word == "--version":
        print(_versions())
        return 0
    try:
        _run(word, args[1:])
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        text = None if os.environ.get("BSDP_DEBUG") else _message_for_users(error)
        if text is None:
            raise
        print(f"bsdp {word}: error: {text} (BSDP_DEBUG=1 shows where this was raised.)", file=sys.stderr)
        return 2
    return 0


def _run(word: str, rest: list[str]) -> None:
    if word in TRAINER_WORDS:
        rest = _resolve_configs(rest)  # a wrong name is told before the slow imports
        from bsdp.trainer_cli import TransferCLI, silence_third_parties

        with warnings.catch_warnings():
            silence_third_parties(resume=word == "fit")
            TransferCLI([word, *_with_run_config(_files_first(rest))])
    elif word in COMMANDS:
        from bsdp.command_parser import call_with_words

        module, _, name = COMMANDS[word].target.partition(":")
        function = getattr(importlib.import_module(module), name)
        result = call_with_words(function, rest, name=word, positional=COMMANDS[word].positional)
        if result is not None:
            print(result)
    else:
        words = [*TRAINER_WORDS, *COMMANDS]
        near = difflib.get_close_matches(word, words, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown word {word!r}.{hint} The first word must be one of {', '.join(words)}; see --help.")


def _overview() -> str:
    lines = ["usage: bsdp WORD [options]", "", "Words:"]
    lines += [f"  {word:<10} {text}" for word, text in TRAINER_WORDS.items()]
    lines += [f"  {word:<10} {command.help}" for word, command in COMMANDS.items()]
    lines += [
        "",
        "bsdp WORD --help shows the options of a word. Later YAML files win over earlier ones, options win over all:",
        "  bsdp fit --config configs/base.yaml --config configs/data/cifar10.yaml --trainer.max_epochs 3",
        "A --config that does not exist is looked up among the packaged ones: bsdp fit --config quickstart",
        "  bsdp fit --config ... --ckpt_path last     continue the last run in its own folder",
        "  bsdp test --ckpt_path RUN/pruned.ckpt      measure the pruned model of a run with the run's own settings",
        "  bsdp export --ckpt RUN --format onnx       write the pruned network of a run for other programs",
    ]
    return "\n".join(lines)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("bsdp", "torch", "lightning"))


def _resolve_configs(args: list[str]) -> list[str]:
    """Point every ``--config`` that does not exist to the packaged file of that name."""
    resolved = list(args)
    for position, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option not in ("--config", "-c"):
            continue
        if equals:
            resolved[position] = f"{option}={resolve_config(value)}"
        elif position + 1 < len(args):
            resolved[position + 1] = resolve_config(args[position + 1])
    return resolved


def _files_first(args: list[str]) -> list[str]:
    """Put every ``--config`` before the other options, so that a file's ``ckpt_path: null`` does not hide one."""
    files: list[str] = []
    others: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, _ = word.partition("=")
        if option in ("--config", "-c"):
            files += [word] if equals else [word, *(value for value in [next(words, None)] if value is not None)]
        else:
            others.append(word)
    return files + others


def resolve_config(value: str) -> str:
    """Find a configuration file: as given, else below the packaged ``configs``, also by its bare name."""
    if Path(value).expanduser().exists() or "\n" in value:
        return value
    name = value.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    packaged = sorted(CONFIGS.rglob("*.yaml"))
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in packaged}
    if name in names:
        return str(names[name])
    bare = [path for path in packaged if path.stem == name]
    if len(bare) == 1:
        return str(bare[0])
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    which = f"names several packaged ones ({', '.join(k for k in names if k.endswith(name))})" if bare else "is no file"
    raise FileNotFoundError(
        f"`config`: {value!r} {which}. Give the path of a YAML file, or the name of a packaged one, for example "
        f"{', '.join(near or list(names)[:3]) or 'none is packaged'}."
    )


def _with_run_config(args: list[str]) -> list[str]:
    """Without any ``--config``, take the one beside the checkpoint that is asked for."""
    from bsdp.runs import CONFIG_FILE, find_checkpoint, run_folder_of

    value = option_value(args, "--ckpt_path")
    if value in (None, "best", "hpc") or {"--config", "-c", "--help", "-h"} & {word.partition("=")[0] for word in args}:
        return args
    root = Path(option_value(args, "--trainer.default_root_dir") or "logs")
    folder = run_folder_of(find_checkpoint(value, root=root, name=option_value(args, "--name")))
    return args if folder is None else ["--config", str(folder / CONFIG_FILE), *args]


def option_value(args: list[str], name: str) -> str | None:
    """Read the value of an option before the options are parsed; None if it is not there."""
    for word, following in itertools.pairwise([*args, ""]):
        option, equals, value = word.partition("=")
        if option == name:
            return (value if equals else following) or None
    return None


def _message_for_users(error: BaseException) -> str | None:
    """Give the text that explains a mistake of the user; None for a fault in the program, which needs its traceback.

    The parser wraps what a constructor raises, so the chain of causes is followed to the first error that explains.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Exception) and _raised_on_purpose(cause):
            return str(cause).strip() or type(cause).__name__
        text = " ".join(str(cause).split())[:200]
        if isinstance(cause, UnicodeDecodeError):
            return f"a file that should be text is not ({text}): give a YAML file in UTF-8."
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator" in text or "CUDA out of memory" in text:
            return f"not enough memory ({text}): make the batch, the images or the network smaller."
        if isinstance(cause, TypeError) and "__init__() got an unexpected keyword argument" in text:
            return f"{text}. --help lists the options."
        if _restores(cause):
            reason = f"{type(cause).__name__}: {text}"
            return f"`ckpt_path` cannot be restored ({reason}): it is damaged, or of another model, trainer or version."
        cause = cause.__cause__ or cause.__context__
    if type(error).__name__ == "ArgumentError":
        lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
        text = " ".join(line for line in lines if line and not line.startswith(_NOISE))
        return re.sub(r"a (?:typing\.)?Literal\[(.*?)\]", r"one of \1", text) + ". --help lists the options."
    return str(error) if type(error).__name__ == "MisconfigurationException" else _without_class(str(error))


def _without_class(text: str) -> str | None:
    """What to say of a value, such as ``{}``, that the parser took for a class although it names none."""
    found = re.search(r"Cannot instantiate (typing\.\w+)", text)
    if found is None:
        return None
    option = re.search(rf"(\w+)=Namespace\(class_path='{re.escape(found[1])}'", text)
    name = "an option" if option is None else f"`{option[1]}`"
    return f"{name} has a value that names no class: give one of its words, or `class_path` and `init_args`."


def _restores(error: BaseException) -> bool:
    """Tell whether an error came up while the trainer, or a callback of ours, took its state from a checkpoint."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        ours = any(folder in Path(code.co_filename).resolve().parents for folder in _own_folders())
        if Path(code.co_filename).name == "checkpoint_connector.py" or (ours and code.co_name == "load_state_dict"):
            return True
        trace = trace.tb_next
    return False


def _own_folders() -> list[Path]:
    return [(Path(__file__).parent / part).resolve() for part in (".", "callbacks", "datamodules")]


def _raised_on_purpose(error: BaseException) -> bool:
    """Tell whether the innermost line of the traceback is a ``raise`` in this package or in the trainer."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, AssertionError):
        return False
    file = Path(trace.tb_frame.f_code.co_filename).resolve()
    folders = _own_folders()
    if "lightning" in sys.modules:
        folders.append(Path(str(sys.modules["lightning"].__file__)).resolve().parent)
    line = linecache.getline(str(file), trace.tb_lineno).strip()
    return line.startswith("raise") and any(folder in file.parents for folder in folders)
