"""vLLM's worker, with the windows of its requests. Imported by vLLM in the worker process, by name."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from eigentrack.errors import ServingError
from eigentrack.vllm.beside import Beside, Job, most_rows, spare_cores
from eigentrack.vllm.config import asked, resolve
from eigentrack.vllm.report import KEY, Report
from eigentrack.vllm.slots import Push, Slots
from eigentrack.vllm.state import State
from eigentrack.vllm.taps import Taps

if current_platform.is_cpu():  # the CPU's worker replaces parts of torch.cuda when it is imported
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

Values = list[list[float]]  # of each request of a push: its risk, and the descriptors that were asked for
logger = init_logger(f"vllm.{__name__}")


class WatchingWorker(Worker):  # type: ignore[misc]
    """Watches on rank 0: behind the all-reduce, hidden states are equal on all ranks."""

    watcher: "Watcher | None" = None

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        if get_tp_group().rank_in_group == 0:
            self.watcher = Watcher(self.vllm_config, self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.watcher is None:
            return super().execute_model(scheduler_output)
        self.watcher.begin(scheduler_output)
        output = super().execute_model(scheduler_output)
        self.watcher.check()
        return output if output is None else self.watcher.report_with(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return output if self.watcher is None or output is None else self.watcher.report_with(output)


class Watcher:
    """Follows the scheduler's decisions and the model runner's batches."""

    def __init__(self, vllm_config: Any, runner: Any) -> None:
        given = asked(vllm_config)
        assert given is not None
        watch = resolve(given, vllm_config)
        self._runner = runner
        self._risky, self._describing = watch.detector is not None, watch.descriptors
        self._slots = Slots(watch.slots)
        self._state = State(watch, runner.device)
        config = vllm_config.model_config.hf_text_config
        self._layers = len(watch.settings.layers)
        self._taps = Taps(runner.get_model(), config.num_hidden_layers, watch.settings.layers, self._state, watch.width)
        cores = spare_cores() if runner.device.type == "cpu" else set()
        self._beside = Beside(cores) if cores else None
        vocabulary = config.vocab_size // vllm_config.parallel_config.tensor_parallel_size
        self._most = most_rows(torch.get_num_threads(), vocabulary, self._layers, watch.settings.window)
        self._under_way: Job[Values] | None = None
        self._push, self._read = Push(), None  # type: tuple[Push, Callable[[], Values] | None]
        logger.info(
            "EigenTrack watches %d layers of up to %d requests; %.1f MiB of %s memory; %s",
            self._layers,
            watch.slots,
            self._state.nbytes / 2**20,
            runner.device.type,
            "in the engine's thread" if self._beside is None else f"in a thread of its own, up to {self._most} rows",
        )

    def begin(self, scheduler_output: Any) -> None:
        """Before the model runner looks at a step."""
        self._push, self._read = Push(), None
        self._slots.end(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            prompt = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
            self._slots.begin(new.req_id, len(prompt))
        if scheduler_output.total_num_scheduled_tokens:
            self._taps.listen(lambda: self._begin_pass(scheduler_output), self._finish_pass)

    def _begin_pass(self, scheduler_output: Any) -> bool:
        """In the pass: the batch is in its final order by then. Says whether it brings any rows."""
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        order = self._runner.input_batch.req_ids
        self._push = self._slots.push(order, scheduler_output.num_scheduled_tokens, computed)
        if self._push.rows:
            if self._under_way is not None:  # with async scheduling
                self._under_way.wait()
            self._state.begin(self._push)
        return bool(self._push.rows)

    def _finish_pass(self) -> None:
        """Behind the last watched block. What comes next, logits and sampling, does not wait for it."""
        if self._beside is not None and len(self._push.rows) <= self._most:
            slots = self._push.slots
            self._under_way = self._beside.ask(lambda: self._state.finish().read(slots))
            self._read = self._under_way.result
        else:
            self._read = partial(self._state.finish().read, self._push.slots)

    def check(self) -> None:
        """After the pass."""
        if not self._taps.through:
            raise ServingError(
                f"{self._taps.collected} of {self._layers} watched blocks ran in a pass of the model: its class does "
                "not call its blocks as modules, or runs a compiled graph"
            )

    def report_with(self, output: Any) -> Any:
        """The output with the step's report, which is written when the output is read."""
        push, read = self._push, self._read
        report = Report(self._slots.count, self._slots.in_use)
        if isinstance(output, AsyncModelRunnerOutput):
            return _Late(output, self, report, push, read)
        return self.attach(output, report, push, read)

    def attach(
        self, output: ModelRunnerOutput, report: Report, push: Push, read: Callable[[], Values] | None
    ) -> ModelRunnerOutput:
        report.told = {request: {"lost": True} for request in push.lost}
        if read is not None:
            for request, (risk, *descriptors) in zip(push.requests, read(), strict=True):
                told = report.told.setdefault(request, {})
                if self._risky:
                    told["risk"] = [risk if risk == risk else None]
                if self._describing:
                    told["descriptors"] = [descriptors if descriptors[0] == descriptors[0] else None]
        if output is EMPTY_MODEL_RUNNER_OUTPUT:
            output = copy(output)
        setattr(output, KEY, report)
        return output


class _Late(AsyncModelRunnerOutput):  # type: ignore[misc]
    """With async scheduling: vLLM reads the step's output while the next one runs."""

    def __init__(self, output: Any, watcher: Watcher, *step: Any) -> None:
        self._output, self._watcher, self._step = output, watcher, step

    def get_output(self) -> ModelRunnerOutput:
        return self._watcher.attach(self._output.get_output(), *self._step)
