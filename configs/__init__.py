"""Hydra, and everything about it: `compose` a config from overrides, `launch` a command-line tool.

The road of a value: YAML or command line → Hydra → the dataclasses of `configs.schema` → the section's owner.
Hydra's own run folders, logging and working directory are off: a run folder is ours, and paths mean what they
mean in the shell.
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

from configs import schema
from configs.errors import INTERRUPTED_EXIT_CODE, PIPE_EXIT_CODE, UserError
from configs.interruption import ctrl_c_waits, hear_ctrl_c, sigterm_waits
from configs.interruption import end_on_ctrl_c as end_on_ctrl_c
from configs.messages import config_error, leaf_keys, schema_keys, unknown_key

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_FOLDER = Path(__file__).parent
LAUNCHER_FLAGS = ("--local_rank", "--local-rank", "--deepspeed", "--deepspeed_config")
PRINTING_FLAGS = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version")
"""What makes Hydra print something and end."""
SECTIONS: dict[str, type[schema.RunConfig]] = {
    "config": schema.RunConfig,
    "compare": schema.CompareRunConfig,
    "scaling": schema.ScalingRunConfig,
    "forecast": schema.ForecastRunConfig,
}
"""Primary config file → its schema: `config` for `train.py`, others for tools with a section of their own."""
SLURM_LAUNCHER = "hydra_plugins.flashtrain.SlurmLauncher"
"""`configs.slurm.SlurmLauncher`, as hydra/launcher/slurm.yaml names it."""

Config = TypeVar("Config", bound=schema.RunConfig)


def register() -> None:
    """Put the schema where Hydra finds it. May be called any number of times."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("first", lambda *values: next(v for v in values if v is not None), replace=True)
    store = ConfigStore.instance()
    for name, node in SECTIONS.items():
        store.store(name=f"{name}_schema", node=node)
    if importlib.util.find_spec("submitit") is not None:  # the extra `slurm`
        from hydra.core.plugins import Plugins

        from configs.slurm import SlurmLauncher

        # By a name in Hydra's own package: `Plugins.register` takes any class, but Hydra starts none from elsewhere.
        Plugins.instance().class_name_to_class[SLURM_LAUNCHER] = SlurmLauncher


def compose(overrides: Sequence[str] = (), config_name: str = "config") -> schema.RunConfig:
    """Compose `configs/<config_name>.yaml` with overrides as on a command line (`["experiment=gpt2_124m"]`).

    Raises `UserError` that names the key or the option that is wrong.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            composed = hydra_compose(config_name, overrides=list(overrides))
            return to_dataclass(composed, config_name)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise config_error(error, CONFIG_FOLDER, SECTIONS[config_name]) from error


def to_dataclass(composed: DictConfig, config_name: str) -> schema.RunConfig:
    """The composed config as its dataclass. Raises `UserError` for a key that `+key=value` adds."""
    from omegaconf import OmegaConf

    node = SECTIONS[config_name]
    unknown = set(leaf_keys(OmegaConf.to_container(composed))) - set(schema_keys(node))
    if unknown:
        raise UserError(unknown_key(min(unknown), node))
    return cast(schema.RunConfig, OmegaConf.to_object(composed))


def strip_launcher_flags(argv: Sequence[str]) -> list[str]:
    """Remove what the `deepspeed` launcher and old `torch.distributed.launch` append (`--local_rank=0`)."""
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        if skip_value and "=" not in argument and not argument.startswith("-"):
            skip_value = False
            continue
        skip_value = argument in LAUNCHER_FLAGS
        if not skip_value and argument.split("=")[0] not in LAUNCHER_FLAGS:
            kept.append(argument)
    return kept


def overrides_last(argv: Sequence[str]) -> list[str]:
    """Flags first: Hydra's parser takes overrides on one side of them only."""

    def is_override(argument: str) -> bool:
        return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))

    return sorted(argv, key=is_override)  # stable: the order within each kind stays


def only_prints(argv: Sequence[str]) -> bool:
    """Whether Hydra answers this command line by itself, and no task runs."""
    return any(argument.split("=")[0] in PRINTING_FLAGS for argument in argv if argument.startswith("-"))


def launch(task: Callable[[Config], int], config_name: str = "config") -> None:
    """Run `task(config)` for this process's command line and exit with what it returns.

    All of Hydra's command line works: overrides, `--multirun`, `--cfg job`, `--info`, `--help`. In a sweep
    each job gets a run folder of its own, named by its overrides. A wrong key, type or option ends with a
    short message and exit code 2; HYDRA_FULL_ERROR=1 shows where it came from. Where Hydra only prints and its reader
    has gone (`--cfg job | head`), SIGPIPE ends it.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    open_missing_streams()
    if only_prints(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it; Hydra's logging goes on without a reader
    register()
    want_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints and exits by itself, and lists a hundred options
    sys.argv[1:] = overrides_last(strip_launcher_flags(sys.argv[1:]))
    argv = [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]  # a job on another machine has a command line of its own
    trees: list[DictConfig] = []  # the task runs when Hydra is done: its errors are its own, and it may compose
    sweep_codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)
    def entry(tree: DictConfig) -> int:
        job = HydraConfig.get()
        if job.mode != RunMode.MULTIRUN:
            trees.append(tree)
            return 0
        config = to_dataclass(tree, config_name)
        sweep_codes.append(run_sweep_job(config, argv, list(job.overrides.task), job.job.num))
        return sweep_codes[-1]

    try:
        entry()
        composed = [cast(Config, to_dataclass(tree, config_name)) for tree in trees]
    except (HydraException, OmegaConfBaseException, ValueError, UserError) as error:
        if want_traceback:
            raise
        if not isinstance(error, UserError):
            error = config_error(error, CONFIG_FOLDER, SECTIONS[config_name])
        sys.exit(say(error))
    if not want_traceback:
        del os.environ["HYDRA_FULL_ERROR"]
    run_tool(lambda: task(composed[0]) if composed else sweep_exit_code(sweep_codes), want_traceback)


def run_tool(main: Callable[[], int | None], want_traceback: bool = False) -> NoReturn:
    """Exit with what `main` returns, with the code of a `UserError` after its message, or with 130 after Ctrl-C.

    Where the reader of the output has gone (`| head`) that is 141, without a word, as of a tool that SIGPIPE ends.
    """
    hear_ctrl_c()
    open_missing_streams()
    try:
        with reader_may_go():
            sys.exit(main())
    except UserError as error:
        if want_traceback:
            raise
        sys.exit(say(error))
    except KeyboardInterrupt:
        if want_traceback:
            raise
        print("Interrupted.", file=sys.stderr)  # noqa: T201 - there is no run's terminal here
        sys.exit(INTERRUPTED_EXIT_CODE)


@contextmanager
def reader_may_go() -> Iterator[None]:
    """Around what ends with SystemExit: with `PIPE_EXIT_CODE` instead once the reader of standard output has gone.

    `rich` makes a SystemExit of that, and what waits in a buffer Python would complain of only as it ends.
    """
    try:
        try:
            yield
        except SystemExit:
            flush_to_reader()
            raise
    except BrokenPipeError:
        if not reader_has_gone():  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
        sys.exit(PIPE_EXIT_CODE)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            sys.exit(PIPE_EXIT_CODE)
        raise


def flush_to_reader() -> None:
    """Write what standard output holds back. Raises BrokenPipeError; a full disk is told of by the interpreter."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        return


def reader_has_gone() -> bool:
    """Whether standard output is a pipe, or a socket, that nobody reads."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)  # errors are always told
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def open_missing_streams() -> None:
    """Standard streams that the program was started without (`>&-`, some service managers) lead nowhere, quietly: a
    file opened next would take such a descriptor, and get what is printed."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:  # below all others that are free, so as a rule it is
                os.dup2(nowhere, number)
                os.close(nowhere)
        setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the rest of the process


def run_sweep_job(config: schema.RunConfig, argv: Sequence[str], overrides: Sequence[str], number: int) -> int:
    """Run a job of the sweep `argv` in a fresh process, in a run folder of its own; returns its exit code.

    A process of its own, since a job leaves device memory, process groups and compiled code behind. Raises `UserError`
    under a launcher of several processes, whose rendezvous serves one job only. Ctrl-C reaches the job too, which
    finishes its step and saves; then the sweep ends, with SystemExit. SIGTERM, which reaches the sweep alone, is passed
    on to the same effect.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--multirun runs under one process; for several, call torchrun once for each setting.")
    place = sweep_folder(config, argv[1:], overrides, number)
    kept = [given for given in overrides if not given.startswith("run_dir=")]
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    command = [sys.executable, argv[0], *kept, override("run_dir", place)]
    with ctrl_c_waits(), sigterm_waits() as pass_on_to:
        child = subprocess.Popen(command, env=environment)
        pass_on_to(child.pid)
        return child.wait()


def sweep_exit_code(codes: Sequence[int]) -> int:
    """The worst of the jobs' codes; negative ones, of a job that a signal ended, as shells have them."""
    return max((code if code >= 0 else 128 - code for code in codes), default=0)


def override(key: str, value: object) -> str:
    """`key=value` for a command line, in Hydra's quotes if the value has characters that its grammar reads."""
    text = str(value)
    if re.fullmatch(r"[\w./:+-]+", text):
        return f"{key}={text}"
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    return f"{key}='{escaped}'"


def sweep_folder(config: schema.RunConfig, argv: Sequence[str], overrides: Sequence[str], number: int) -> Path:
    """`<run folder>/<number>_<what this job has of the swept keys>`; `argv` is the command line of the sweep.

    Where nothing is swept (one run, given to a cluster) it is the run folder itself.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = OverridesParser.create().parse_overrides([a for a in argv if "=" in a and not a.startswith("-")])
    swept = {o.key_or_group for o in given if o.is_sweep_override()}
    label = "_".join(o for o in overrides if o.split("=")[0].lstrip("+") in swept)
    label = re.sub(r"[^\w.]+", "-", label)[:120]  # nothing that the shell or Hydra would read
    place = Path(config.run_dir or f"runs/{config.name}")
    return place / f"{number}_{label}" if swept else place


def say(error: UserError) -> int:
    """Print the message, on the first rank only; returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - outside a run's terminal
    return error.exit_code
