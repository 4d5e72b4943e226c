"""vLLM's worker, with the windows of its requests. Imported by vLLM in the worker process, by name."""

from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from eigentrack.errors import ServingError
from eigentrack.vllm.beside import made_thread, most_rows
from eigentrack.vllm.config import asked, resolve
from eigentrack.vllm.report import KEY, Report
from eigentrack.vllm.slots import Push, Slots
from eigentrack.vllm.state import State, Turn
from eigentrack.vllm.taps import Taps

if current_platform.is_cpu():  # the CPU's worker replaces parts of torch.cuda when it is imported
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

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
        self._thread = made_thread() if runner.device.type == "cpu" else None
        vocabulary = config.vocab_size // vllm_config.parallel_config.tensor_parallel_size
        self._most = most_rows(torch.get_num_threads(), vocabulary, self._layers, watch.settings.window)
        self._under_way: Future[Turn] | None = None
        self._push, self._turn = Push(), None  # type: tuple[Push, Callable[[], Turn] | None]
        logger.info(
            "EigenTrack watches %d layers of up to %d requests; %.1f MiB of %s memory; %s",
            self._layers,
            watch.slots,
            self._state.nbytes / 2**20,
            runner.device.type,
            "in the engine's thread" if self._thread is None else f"in a thread of its own, up to {self._most} rows",
        )

    def begin(self, scheduler_output: Any) -> None:
        """Before the model runner looks at a step."""
        self._push, self._turn = Push(), None
        self._slots.end(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            prompt = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
            self._slots.begin(new.req_id, len(prompt))
        if scheduler_output.total_num_scheduled_tokens:
            self._taps.listen(lambda: self._begin_pass(scheduler_output), self._finish_pass)

    def _begin_pass(self, scheduler_output: Any) -> None:
        """When the model is called: the batch is in its final order by then."""
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        order = self._runner.input_batch.req_ids
        self._push = self._slots.push(order, scheduler_output.num_scheduled_tokens, computed)
        self._taps.listening = bool(self._push.rows)
        if self._push.rows:
            if self._under_way is not None:  # with async scheduling; its error is raised where its result is read
                self._under_way.exception()
            self._state.begin(self._push)

    def _finish_pass(self) -> None:
        """Behind the last block. What comes next, logits and sampling, does not wait for it."""
        if self._taps.collected != self._layers:
            raise ServingError(
                f"{self._taps.collected} of {self._layers} watched blocks ran in a pass of the model: its class does "
                "not call its blocks as modules, or runs a compiled graph"
            )
        if self._thread is not None and len(self._push.rows) <= self._most:
            self._under_way = self._thread.submit(self._state.finish)
            self._turn = self._under_way.result
        else:
            turn = self._state.finish()
            self._turn = lambda: turn

    def report_with(self, output: Any) -> Any:
        """The output with the step's report, which is written when the output is read."""
        push, turn = self._push, self._turn
        report = Report(self._slots.count, self._slots.in_use)
        if isinstance(output, AsyncModelRunnerOutput):
            return _Late(output, self, report, push, turn)
        return self.attach(output, report, push, turn)

    def attach(
        self, output: ModelRunnerOutput, report: Report, push: Push, turn: Callable[[], Turn] | None
    ) -> ModelRunnerOutput:
        report.told = {request: {"lost": True} for request in push.lost}
        if turn is not None:
            values = turn().wait().numpy()[push.slots].tolist()
            for request, (risk, *descriptors) in zip(push.requests, values, strict=True):
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
