"""The HTTP service on Ray Serve: each replica has its own predictor, controller and engine. Needs the extra `ray`.

    serve run sdpoint_jax.serving.ray_serve:build_app artefact=/shared/artefact objective_ms=100 max_replicas=4

Routes and answers are those of `server`. A replica takes requests when its programs are compiled. Ray's proxy deals
requests out to the replicas; each replica decides for itself on which instance it answers what it got.
"""

import signal
from collections.abc import Callable
from typing import Any

import pydantic
from ray import serve

from sdpoint_jax.serving.service import ServiceSettings, make_app

NAME = "sdpoint"  # Of the application, where the command starts it.
_STOP_SECONDS = 20.0  # For what a replica has accepted, besides the objective.
_DECODING = 64  # Requests of a replica whose images are read, besides those that wait in its queue.
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


class RayServiceSettings(ServiceSettings):
    """How an artefact is served on Ray.

    Attributes:
        artefact: path of the artefact, the same on all machines, or relative to Ray's `working_dir`.
        min_replicas: predictors, a process each, without load.
        max_replicas: the most.
        target_ongoing_requests: of a replica, on average; more start replicas, up to the most.
        num_cpus: that Ray reserves for a replica.
        num_gpus: likewise, and the replica sees no others.
        num_tpus: likewise, chips.
    """

    min_replicas: int = pydantic.Field(1, ge=1)
    max_replicas: int = pydantic.Field(1, ge=1)
    target_ongoing_requests: float = pydantic.Field(8.0, gt=0)
    num_cpus: float = pydantic.Field(1.0, ge=0)
    num_gpus: float = pydantic.Field(0.0, ge=0)
    num_tpus: float = pydantic.Field(0.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "RayServiceSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas}: at least min_replicas, {self.min_replicas}")
        return self


@serve.deployment
@serve.ingress()
class Service:
    """One replica."""

    def __init__(self, settings: ServiceSettings):
        """Loads the artefact and compiles; only then does the replica get requests."""
        from sdpoint_jax.programs.process import keep_compiled_programs

        keep_compiled_programs()
        self._app = make_app(settings, compile_first=True)

    def __serve_build_asgi_app__(self):
        return self._app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Limits the instances: takes what `PUT /budget` takes, from Serve's `user_config`, on every replica."""
        from sdpoint_jax.serving.server import BudgetChange

        self._app.state.service.limit(BudgetChange.model_validate(user_config))


def build_app(settings: RayServiceSettings) -> serve.Application:
    """Builds the application for `serve run` and for Serve's config files.

    Args:
        settings: as `artefact=PATH max_replicas=4`.
    """
    resources = {"TPU": settings.num_tpus} if settings.num_tpus else {}
    scaling: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
            }
        }
    service: Any = Service
    deployment = service.options(
        **scaling,
        logging_config=_LOGGING,
        graceful_shutdown_wait_loop_s=0.1,
        # A replica refuses by itself, with the time to try again, so Ray must not hold requests back from it.
        max_ongoing_requests=settings.max_queue + _DECODING,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=_STOP_SECONDS + settings.objective_ms / 1e3,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus, "resources": resources},
    )
    names = ServiceSettings.model_fields
    return deployment.bind(ServiceSettings(**{name: getattr(settings, name) for name in names}))


def run(settings: RayServiceSettings, *, host: str, port: int, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers what was accepted. The process is connected to Ray.

    Args:
        settings: of the service.
        host: address to listen at.
        port: likewise.
        on_ready: is called when all replicas that it starts with take requests.

    Raises:
        RuntimeError: the replicas could not be started.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own.
        signal.signal(number, _stop)
    http = {"host": host, "port": port, "request_timeout_s": _request_seconds(settings)}
    try:
        serve.start(http_options=http, logging_config=_LOGGING)
        serve.run(build_app(settings), name=NAME)
        on_ready()
        while True:
            signal.pause()
    except _Stop:
        pass
    finally:
        serve.delete(NAME)
        if not serve.status().applications:  # Of others, on a cluster that is shared.
            serve.shutdown()


class _Stop(BaseException):
    pass


def _stop(number, frame):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise _Stop


def _request_seconds(settings):
    """Returns after how long a request ends in any case, if its replica is gone and Ray does not notice."""
    return max(60.0, 10 * settings.objective_ms / 1e3)
