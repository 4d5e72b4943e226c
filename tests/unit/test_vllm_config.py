"""What may be asked of eigentrack.vllm, and what is refused before anything is loaded."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eigentrack.errors import EigenTrackError, MismatchError, ServingError
from eigentrack.vllm.config import VARIABLE, asked, resolve
from eigentrack.vllm.plugin import check_version, prepare, register

DEMO = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}


def engine(**changes: Any) -> Any:
    """As much of a VllmConfig as the plugin reads."""
    parts = {
        "additional_config": {},
        "compilation_config": SimpleNamespace(mode=0),
        "use_v2_model_runner": False,
        "speculative_config": None,
        "kv_transfer_config": None,
        "model_config": SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            dtype=torch.float32,
            hf_text_config=SimpleNamespace(**DEMO),
        ),
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            worker_cls="vllm.v1.worker.cpu_worker.CPUWorker",
        ),
        "scheduler_config": SimpleNamespace(scheduler_cls=None, async_scheduling=False, max_num_seqs=3),
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
    }
    for path, value in changes.items():
        *outer, name = path.split("__")
        if outer:
            setattr(parts[outer[0]], name, value)
        else:
            parts[name] = value
    return SimpleNamespace(**parts)


def test_nothing_is_asked_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert asked(engine()) is None
    monkeypatch.setenv(VARIABLE, '{"detector": "smollm2-135m"}')
    assert asked(engine()) == {"detector": "smollm2-135m"}
    file = tmp_path / "watch.json"
    file.write_text('{"descriptors": true}')
    monkeypatch.setenv(VARIABLE, str(file))
    assert asked(engine()) == {"descriptors": True}
    own = {"descriptors": True, "window": 16}
    assert asked(engine(additional_config={"eigentrack": own})) == own  # Python's word goes before the environment's


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{broken", "not JSON"),
        ("no/such/file.json", "path of a JSON file"),
        ("/proc/self/exe", "path of a JSON file"),
        ('{"window": ' + "[" * 100_000, "not JSON"),
        ('{"detektor": "x"}', "does not know 'detektor'; it knows detector"),
        ('{"window": 16}', "asks for nothing"),
        ('{"detector": 7}', "detector in EIGENTRACK_CONFIG must be of type str"),
        ('{"descriptors": 1}', "must be of type bool"),
        ('{"descriptors": true, "start": "prompt"}', "cached prefix"),
    ],
)
def test_what_cannot_be_understood_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ServingError, match=says):
        asked(engine())


def test_the_settings_are_the_detectors() -> None:
    watch = resolve({"detector": "smollm2-135m", "stop_above": "threshold"}, engine())
    assert watch.detector is not None and watch.detector.settings is not None
    assert watch.settings.names == watch.detector.settings.names
    assert watch.settings.layers == tuple(range(2, 30, 3))
    assert watch.stop_above == watch.detector.threshold
    assert resolve({"detector": "smollm2-135m", "stop_above": 1}, engine()).stop_above == 1
    assert (watch.slots, watch.width, watch.dtype, watch.descriptors) == (3, 576, torch.float32, False)


@pytest.mark.parametrize(
    ("given", "changes", "says"),
    [
        ({"detector": "smollm2-135m"}, {"hidden_size": 960}, "width 576 and 960"),
        ({"detector": "smollm2-135m", "window": 16}, {}, "windows of 32, the monitor's are 16"),
        ({"detector": "smollm2-135m", "stop_above": 2.0}, {}, "from 0 to 1"),
        ({"descriptors": True, "stop_above": 0.5}, {}, "needs a detector"),
        ({"descriptors": True, "layers": [30]}, {}, "30 blocks"),
        ({"descriptors": True, "spectra": "both"}, {}, "spectra must be one of"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(given: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    changed = engine(model_config__hf_text_config=SimpleNamespace(**{**DEMO, **changes}))
    with pytest.raises(EigenTrackError, match=says):
        resolve(given, changed)


def test_a_detector_of_another_model_is_a_mismatch() -> None:
    other = SimpleNamespace(**{**DEMO, "model_type": "qwen2"})
    with pytest.raises(MismatchError, match="architecture llama and qwen2"):
        resolve({"detector": "smollm2-135m"}, engine(model_config__hf_text_config=other))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compilation_config__mode": 3}, "--enforce-eager"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"model_config__runner_type": "pooling"}, "models that generate"),
        ({"model_config__is_encoder_decoder": True}, "models that generate"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_dbo": True}, "dual batch overlap"),
        ({"parallel_config__worker_cls": "my.Worker"}, "this one is my.Worker"),
        ({"scheduler_config__scheduler_cls": "my.Scheduler"}, "vLLM's own scheduler"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"additional_config": object()}, "additional_config must be"),
    ],
)
def test_an_engine_that_cannot_be_watched_is_refused_and_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr("eigentrack.vllm.plugin.installed_version", lambda: "0.32.0")
    config = engine(**changes)
    before = repr(config)
    with pytest.raises(ServingError, match=says):
        prepare(config, {"descriptors": True})
    assert repr(config) == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_worker_and_scheduler_are_named_and_every_process_is_told(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setattr("eigentrack.vllm.plugin.installed_version", lambda: "0.32.1")
    monkeypatch.setattr("eigentrack.vllm.frontend.install", lambda: None)
    config = engine(scheduler_config__async_scheduling=asynchronous, additional_config={"other": 1})
    prepare(config, {"detector": "smollm2-135m", "stop_above": "threshold"})
    assert config.parallel_config.worker_cls == "eigentrack.vllm.worker.WatchingWorker"
    assert config.scheduler_config.scheduler_cls.endswith("AsyncScheduler" if asynchronous else "WatchingScheduler")
    assert config.additional_config["other"] == 1
    assert 0 < config.additional_config["eigentrack"]["stop_above"] < 1
    assert json.loads(json.dumps(config.additional_config)) == config.additional_config


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.32.0", "unknown"])
def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("eigentrack.vllm.plugin.installed_version", lambda: version)
    with pytest.raises(ServingError, match=rf"vLLM is {version}.*tested with 0\.32"):
        prepare(engine(), {"descriptors": True})


def test_patch_releases_are_taken() -> None:
    check_version("0.32.4+cu130")


def test_a_vllm_to_come_is_left_alone_unless_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SimpleNamespace(EngineArgs=type("EngineArgs", (), {}))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(engine=SimpleNamespace(arg_utils=arguments)))
    monkeypatch.setitem(sys.modules, "vllm.engine", SimpleNamespace(arg_utils=arguments))
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", arguments)
    monkeypatch.setattr("eigentrack.vllm.plugin.installed_version", lambda: "9.0")
    monkeypatch.delenv(VARIABLE, raising=False)
    register()
    monkeypatch.setenv(VARIABLE, '{"descriptors": true}')
    with pytest.raises(ServingError, match=r"vLLM is 9\.0"):
        register()


def test_the_configuration_is_prepared_only_where_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class EngineArgs:
        def create_engine_config(self, given: Any) -> Any:
            return engine(additional_config=given)

    arguments = SimpleNamespace(EngineArgs=EngineArgs)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(engine=SimpleNamespace(arg_utils=arguments)))
    monkeypatch.setitem(sys.modules, "vllm.engine", SimpleNamespace(arg_utils=arguments))
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", arguments)
    monkeypatch.setattr("eigentrack.vllm.plugin.installed_version", lambda: "0.32.0")
    monkeypatch.setattr("eigentrack.vllm.frontend.install", lambda: None)
    monkeypatch.delenv(VARIABLE, raising=False)
    register()
    once = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is once
    assert EngineArgs().create_engine_config({}).scheduler_config.scheduler_cls is None
    watched = EngineArgs().create_engine_config({"eigentrack": {"descriptors": True}})
    assert watched.parallel_config.worker_cls == "eigentrack.vllm.worker.WatchingWorker"
