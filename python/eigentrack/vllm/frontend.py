"""Where reports reach the user: in the process that makes vLLM's request outputs."""

from contextvars import ContextVar
from functools import wraps
from typing import Any

from eigentrack.vllm import metrics
from eigentrack.vllm.report import KEY, Readings

# What the HTTP request that is being handled asks for: readings by the index of its choice.
CHOICES: ContextVar[dict[int, Readings] | None] = ContextVar("eigentrack_choices", default=None)


def install() -> None:
    """Wraps three methods of vLLM's output processor, in memory and once per process."""
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    if hasattr(OutputProcessor, KEY):
        return
    setattr(OutputProcessor, KEY, True)
    add_request, process_outputs = OutputProcessor.add_request, OutputProcessor.process_outputs
    new_completion_output = RequestState._new_completion_output

    @wraps(add_request)
    def watched_add_request(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, *rest: Any, **named: Any
    ) -> None:
        add_request(self, request, prompt, parent_req, request_index, *rest, **named)
        state = self.request_states.get(request.request_id)
        if state is not None and not hasattr(state, KEY):
            setattr(state, KEY, Readings())
            choices = CHOICES.get()
            if choices is not None:
                choices[_choice(state)] = getattr(state, KEY)

    @wraps(process_outputs)
    def watched_process_outputs(self: Any, engine_core_outputs: Any, *rest: Any, **named: Any) -> Any:
        carrier = engine_core_outputs[0] if engine_core_outputs else None
        if carrier is not None and carrier.request_id == KEY and carrier.ec_transfer_params:
            _take(self, engine_core_outputs.pop(0).ec_transfer_params)
        return process_outputs(self, engine_core_outputs, *rest, **named)

    @wraps(new_completion_output)
    def watched_completion_output(self: Any, token_ids: Any, finish_reason: Any, *rest: Any, **named: Any) -> Any:
        output = new_completion_output(self, token_ids, finish_reason, *rest, **named)
        setattr(output, KEY, getattr(self, KEY))
        if finish_reason is not None:
            metrics.finished(getattr(self, KEY))
        return output

    OutputProcessor.add_request = watched_add_request
    OutputProcessor.process_outputs = watched_process_outputs
    RequestState._new_completion_output = watched_completion_output


def _take(processor: Any, carried: dict[str, Any]) -> None:
    if "slots" in carried:  # where they have changed
        metrics.slots(carried["slots"], carried["slots_in_use"])
    for request, told in carried["told"].items():
        state = processor.request_states.get(request)  # None if it was aborted meanwhile
        if state is not None:
            getattr(state, KEY).add(**told)
    metrics.tokens(sum(len(told.get("risk", told.get("descriptors", ()))) for told in carried["told"].values()))


def _choice(state: Any) -> int:
    """Index of a choice in the server's response: completions of several prompts are numbered through."""
    name, _, prompt = state.external_req_id.rpartition("-")
    several = name.startswith("cmpl-") and prompt.isdecimal()
    each = 1 if state.parent_req is None else state.parent_req.n
    return state.request_index + (int(prompt) * each if several else 0)  # type: ignore[no-any-return]
