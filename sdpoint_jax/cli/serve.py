"""Serves a sweep's artefact over HTTP: python -m sdpoint_jax serve runs/digits/sweep/artefact --objective-ms=100

Each request is answered on the most accurate instance that keeps the objective under the present load; what could not
be answered in time is refused at once. Needs the extra: pip install 'sdpoint_jax[serve]'. Latencies of this
device that the artefact lacks are measured first, quickly: python -m sdpoint_jax profile ARTEFACT measures more calls.
SIGTERM or Ctrl-C answers what was accepted, then ends with code 0.
"""

import argparse
import functools
import os
import signal
import sys

from sdpoint_jax.cli.parser import add_model_flag, comma_separated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    add_model_flag(parser)
    parser.add_argument("--objective-ms", type=float, default=100.0, help="time for an answer; 100 by default")
    parser.add_argument("--policy", default="headroom", help="how instances are chosen; see the controller")
    parser.add_argument("--instances", default="pareto", help="pareto (default), all, or names with commas between")
    parser.add_argument("--batch-sizes", default="", help="of those that were profiled; all by default")
    parser.add_argument("--max-queue", type=int, default=1024, help="requests that may wait; 1024 by default")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; this machine alone by default")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one; 8000 by default")
    parser.add_argument("--token", default="", help="allows PUT /budget to who sends it; without one there is no such")
    parser.add_argument("--max-upload-mb", type=float, default=16.0, help="largest body of a request")
    parser.add_argument("--device", help="whose profile to use; by default that of the device at hand")
    parser.add_argument(
        "--profile", default="auto", help="auto (default): first measure latencies that are missing; no: refuse instead"
    )
    parser.add_argument("--runtime", default="auto", help="xla, onnxruntime, or auto (default): the faster one")
    parser.add_argument("--ray", action="store_true", help="serve on Ray: on the cluster at RAY_ADDRESS, else here")
    parser.add_argument("--replicas", default="1", help="with --ray: a number, or the least and the most, as 1..4")


def run(args: argparse.Namespace) -> None:
    """Serves until it is told to stop."""
    settings = _settings(args)
    if args.ray:
        _run_on_ray(args, settings)
    else:
        _run_here(args, settings)


def _settings(args):
    try:
        from sdpoint_jax.serving.service import ServiceSettings
    except ImportError as error:
        raise ImportError(f"{error}: serving needs the extra, pip install 'sdpoint_jax[serve]'") from None
    return ServiceSettings(
        artefact=args.artefact,
        objective_ms=args.objective_ms,
        policy=args.policy,
        instances=args.instances,
        batch_sizes=tuple(comma_separated(args.batch_sizes, int, "batch-sizes")),
        max_queue=args.max_queue,
        max_upload_mb=args.max_upload_mb,
        device=args.device,
        runtime=args.runtime,
        model=args.model,
    )


def _run_here(args, settings):
    try:
        import uvicorn

        from sdpoint_jax.serving import server  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: serving needs the extra, pip install 'sdpoint_jax[serve]'") from None
    from sdpoint_jax.serving.service import make_app

    app = make_app(settings, swept=_measured(args, settings), token=args.token or None, on_ready=_show_ready)
    sys.setswitchinterval(0.0003)  # Of Python's 5 ms, the event loop would lose several for each image that is decoded.
    signal.signal(signal.SIGTERM, lambda *_: None)  # Uvicorn sends it again when it has ended in peace.
    signal.signal(signal.SIGINT, lambda *_: None)
    print(f"serving {args.artefact} at http://{args.host}:{args.port}", file=sys.stderr, flush=True)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        limit_concurrency=4096,
        timeout_keep_alive=10,
        server_header=False,
    )


def _measured(args, settings):
    """Return the artefact with the latencies that are missing, or None where `make_app` is to load it."""
    if args.profile not in ("auto", "no"):
        raise ValueError(f"--profile={args.profile}: valid are auto, no")
    if args.profile == "no" or settings.device:
        return None
    from sdpoint_jax.cli.profile import measure_missing
    from sdpoint_jax.serving.service import check_settings
    from sdpoint_jax.storage import artefact

    swept = artefact.load(args.artefact, args.model)
    check_settings(swept.rows, settings)  # Before minutes of measuring.
    say = functools.partial(print, file=sys.stderr, flush=True)
    return measure_missing(
        swept, args.artefact, settings.instances, settings.batch_sizes, runtime=settings.runtime, say=say
    )


def _run_on_ray(args, settings):
    try:
        from sdpoint_jax.serving import ray_cluster, ray_serve, service
    except ImportError as error:
        raise ImportError(f"{error}: --ray needs the extra, pip install 'sdpoint_jax[ray]'") from None
    from sdpoint_jax.storage import artefact

    if args.token:
        raise ValueError("--token with --ray: PUT /budget would reach one replica; set user_config in a Serve config")
    least, most = _replicas(args.replicas)
    path = os.path.abspath(settings.artefact)
    settings = ray_serve.RayServiceSettings(
        **settings.model_dump() | {"artefact": path}, min_replicas=least, max_replicas=most
    )
    print(f"serving {args.artefact} at http://{args.host}:{args.port} on Ray", file=sys.stderr, flush=True)
    with ray_cluster.connected():
        rows = artefact.load(path).rows  # Wrong settings are told before replicas start.
        devices = [latency.device for row in rows for latency in row.latencies] or [None]
        runtime = None if settings.runtime == "auto" else settings.runtime
        service.make_controller(rows, settings, device=settings.device or devices[-1], runtime=runtime)
        kind, _ = ray_cluster.count_devices()
        settings = settings.model_copy(update={f"num_{kind.lower()}s": 1.0})
        ray_serve.run(settings, host=args.host, port=args.port, on_ready=_show_replicas_ready)


def _replicas(text) -> tuple[int, int]:
    """Reads `3` or `1..4`."""
    least, _, most = text.partition("..")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise ValueError(f"--replicas={text}: give a number, or the least and the most, as 1..4") from None


def _show_ready(what):
    print(f"ready: {what}", file=sys.stderr, flush=True)


def _show_replicas_ready():
    print("ready", file=sys.stderr, flush=True)
