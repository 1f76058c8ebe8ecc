"""Session options of ONNX Runtime: a model opened in different ways, to race against itself.

An option is written ``KEY=VALUE``. A key with a dot in it is an entry of the session's configuration
(``session.disable_prepacking=1``), any other an attribute of ``onnxruntime.SessionOptions``
(``graph_optimization_level=basic``). Several with commas between hold together.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Tuple

from asymtrack_edge.errors import UsageError
from asymtrack_edge.manifest import BATCH_AXIS

_COMPARED = (
    "graph_optimization_level=extended",
    "graph_optimization_level=basic",
    "graph_optimization_level=disable_all",
    "enable_cpu_mem_arena=false",
    "enable_mem_pattern=false",
    "session.disable_prepacking=1",
)
#: Without effect on a session of one thread, or (parallel execution) with threads of its own beside it.
_COMPARED_WITH_THREADS = ("session.intra_op.allow_spinning=0", "execution_mode=parallel")
#: For the thread that runs a session ONNX Runtime takes it from the first session of the process.
_OF_THE_PROCESS = "session.set_denormal_as_zero"
_TRUTH = {"0": False, "false": False, "1": True, "true": True}


def compared(threads: int) -> Tuple[str, ...]:
    """The options that ``--compare-options`` tries one by one: those that differ from the defaults."""
    return _COMPARED if threads == 1 else _COMPARED + _COMPARED_WITH_THREADS


def parse_options(text: str) -> Dict[str, Any]:
    """Reads ``KEY=VALUE[,KEY=VALUE...]``.

    Args:
        text: truth values are ``0``, ``1``, ``false`` or ``true``; enumerators go without their prefix:
            ``disable_all``, ``basic``, ``extended``, ``all``; ``sequential``, ``parallel``.

    Returns:
        Keyword arguments of ``session``. Entries of the configuration are passed on as they are: ONNX
        Runtime ignores those that it does not know.

    Raises:
        UsageError: not of this form, no such attribute, or a value that it does not take.
    """
    import onnxruntime as ort

    defaults = ort.SessionOptions()
    options: Dict[str, Any] = {}
    config: Dict[str, str] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if not key or not value:
            raise UsageError(f"--option takes KEY=VALUE, or several with commas between, not {text!r}")
        if key == _OF_THE_PROCESS:
            raise UsageError(f"{key} holds for the whole process once it is set: it cannot be compared in one")
        if "." in key:
            config[key] = value
        else:
            options[key] = _value(key, value, getattr(defaults, key, None))
    return {**options, "config": config} if config else options


def _value(key: str, text: str, default: Any) -> Any:
    """``text`` as a value of the type of an attribute's default."""
    members = getattr(type(default), "__members__", None)
    if members is not None:
        choices = {name.lower().replace("ort_", "").replace("enable_", ""): value for name, value in members.items()}
    elif isinstance(default, bool):
        choices = _TRUTH
    elif isinstance(default, int) and text.isdigit():
        return int(text)
    elif isinstance(default, int):
        raise UsageError(f"--option {key} takes a whole number, not {text!r}")
    else:
        raise UsageError(
            f"--option: ONNX Runtime's sessions have no attribute {key} to set; entries of their "
            "configuration have a dot in their name"
        )
    if text.lower() not in choices:
        raise UsageError(f"--option {key} takes {', '.join(choices)}, not {text!r}")
    return choices[text.lower()]


def in_one_thread(options: Mapping[str, Any]) -> bool:
    """Whether a session of one thread stays one with these options."""
    mode = options.get("execution_mode")
    return options.get("intra_op_num_threads", 1) == 1 and (mode is None or not mode.name.endswith("PARALLEL"))


def session(model: str, threads: int, batch: int = 1, **options: Any) -> Any:
    """An ONNX Runtime session on the CPU, as ``runtime.ort.open_session`` opens it but for the options.

    Args:
        model: path of an ONNX file.
        threads: for one operator.
        batch: of a free batch axis.
        options: further attributes of ``onnxruntime.SessionOptions``; ``config`` is a dictionary of
            its configuration entries.

    Raises:
        UsageError: ONNX Runtime cannot open the model this way.
    """
    import onnxruntime as ort

    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 3
    chosen.add_free_dimension_override_by_name(BATCH_AXIS, batch)
    try:
        for key, value in options.pop("config", {}).items():
            chosen.add_session_config_entry(key, value)
        for key, value in options.items():
            setattr(chosen, key, value)
        return ort.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many unrelated types here
        first = str(error).splitlines()[0]
        raise UsageError(f"onnxruntime {ort.__version__} cannot open {model}: {first}") from None
