"""vLLM's schedulers, which pass on what the worker reports and apply the stop rule. Imported by vLLM, by name."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from eigentrack.vllm.report import KEY, Report


class _Watching:
    _slots_told = 0

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        report: Report | None = getattr(model_runner_output, KEY, None)
        known = self.requests  # type: ignore[attr-defined]
        clients = {name: known[name].client_index for name in report.told if name in known} if report else {}
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        if report is not None:
            self._stop_risky(report, clients, outputs)
            self._pass_on(report, clients, outputs)
        return outputs

    def _stop_risky(self, report: Report, clients: dict[str, int], outputs: dict[int, EngineCoreOutputs]) -> None:
        """Ends requests whose risk exceeds the limit; the token chosen in the same step is still part of the answer."""
        limit = self.vllm_config.additional_config[KEY].get("stop_above")  # type: ignore[attr-defined]
        if limit is None:
            return
        for name, client in clients.items():
            risk = report.told[name].get("risk", [None])[0]
            if risk is None or risk <= limit:
                continue
            if self.finish_requests(name, RequestStatus.FINISHED_STOPPED):  # type: ignore[attr-defined]
                report.told[name]["stopped"] = True
                of_client = outputs.setdefault(client, EngineCoreOutputs()).outputs
                output = next((one for one in of_client if one.request_id == name), None)
                if output is None:
                    output = EngineCoreOutput(name, [])
                    of_client.append(output)
                output.finish_reason, output.stop_reason = FinishReason.STOP, KEY

    def _pass_on(self, report: Report, clients: dict[str, int], outputs: dict[int, EngineCoreOutputs]) -> None:
        """An engine output of a name that no request has goes ahead of the others to each client that has news."""
        told: dict[int, dict[str, Any]] = {}
        for name, client in clients.items():
            told.setdefault(client, {})[name] = report.told[name]
        slots = {}
        if report.slots_in_use != self._slots_told:
            slots = {"slots": report.slots, "slots_in_use": report.slots_in_use}
            told.setdefault(0, {})
        self._slots_told = report.slots_in_use
        for client, requests in told.items():
            carried = {"told": requests, **slots}
            carrier = EngineCoreOutput(KEY, [], ec_transfer_params=carried)
            outputs.setdefault(client, EngineCoreOutputs()).outputs.insert(0, carrier)


class WatchingScheduler(_Watching, Scheduler):  # type: ignore[misc]
    """Without async scheduling."""


class WatchingAsyncScheduler(_Watching, AsyncScheduler):  # type: ignore[misc]
    """With async scheduling."""
