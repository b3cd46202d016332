"""What a process tells the outside: `/livez`, `/readyz` and `/metrics` on a local port.

Hot paths count with plain integers; a collector function copies them when a scrape comes.
"""

from collections.abc import Callable, Iterable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

NAMESPACE = "sluice"
Sample = tuple[dict[str, str], float]


def counter(name: str, help_text: str, samples: Iterable[Sample]) -> Metric:
    """Make a counter family of `sluice_<name>_total` from labelled values."""
    return _family(CounterMetricFamily, name, help_text, samples)


def gauge(name: str, help_text: str, samples: Iterable[Sample]) -> Metric:
    """Make a gauge family `sluice_<name>` from labelled values."""
    return _family(GaugeMetricFamily, name, help_text, samples)


def _family(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    help_text: str,
    samples: Iterable[Sample],
) -> Metric:
    values = list(samples)
    labels = list(values[0][0]) if values else []
    metric = family(f"{NAMESPACE}_{name}", help_text, labels=labels)
    for by_label, value in values:
        metric.add_metric([by_label[label] for label in labels], value)
    return metric


class _Scrape(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


class Health:
    """Whether the process is ready, and why not; the process sets it, `/readyz` reads it."""

    def __init__(self) -> None:
        self._waiting: dict[str, str] = {"start": "starting"}
        self._checks: dict[str, Callable[[], str]] = {}

    def wait_for(self, what: str, why: str) -> None:
        """Note that `what` is not ready, for a reason fit for an operator."""
        self._waiting[what] = why

    def ready(self, what: str) -> None:
        """Note that `what` is ready."""
        self._waiting.pop(what, None)

    def check(self, what: str, why: Callable[[], str]) -> None:
        """Ask each time why `what` is not ready; nothing means that it is."""
        self._checks[what] = why

    def reasons_for(self, what: str) -> str:
        """Give why `what` is not ready, or nothing."""
        return self._waiting.get(what, "")

    @property
    def is_ready(self) -> bool:
        """Whether nothing is waited for."""
        return not self.reasons

    @property
    def reasons(self) -> list[str]:
        """What is waited for, a line each."""
        checked = {what: text for what, why in self._checks.items() if (text := why())}
        return [f"{what}: {why}" for what, why in sorted((checked | self._waiting).items())]


async def serve_metrics(
    host: str, port: int, health: Health, collect: Callable[[], Iterable[Metric]]
) -> web.AppRunner:
    """Serve the three pages until the runner is cleaned up; raises OSError if the port is taken."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Scrape(collect))

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def ready(_: web.Request) -> web.Response:
        if health.is_ready:
            return web.Response(text="ready\n")
        return web.Response(text="\n".join(health.reasons) + "\n", status=503)

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes(
        [web.get("/livez", live), web.get("/readyz", ready), web.get("/metrics", metrics)]
    )
    # A client that does not finish its request must not hold up the end of the process.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
