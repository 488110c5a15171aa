"""Serves a sweep's artefact over HTTP: python -m sdpoint_jax serve runs/digits/sweep/artefact --objective-ms=100

Each request is answered on the most accurate instance that keeps the objective under the present load; what could not
be answered in time is refused at once. Needs the extra: pip install 'sdpoint_jax[serve]'. Latencies of this
device that the artefact lacks are measured first, quickly: python -m sdpoint_jax profile ARTEFACT measures more calls.
SIGTERM or Ctrl-C answers what was accepted, then ends with code 0.
"""

import argparse
import dataclasses
import functools
import ipaddress
import math
import os
import signal
import socket
import sys

from sdpoint_jax.cli.parser import add_model_flag, comma_separated

_BACKLOG = 2048  # Connections that may be accepted at once, before one of them is closed for each that is too many.
_OTHER_FILES = 128


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
    parser.add_argument("--allowed-hosts", help="names of this service in the header Host, with commas; * for any")
    parser.add_argument(
        "--token-file", help="file with the bearer token for PUT /budget; else $SDPOINT_TOKEN, or no route"
    )
    parser.add_argument("--token", default="", help="the token itself, which all users of this machine can see")
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

        from sdpoint_jax.serving import connection, server  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: serving needs the extra, pip install 'sdpoint_jax[serve]'") from None
    from sdpoint_jax.serving.service import make_app

    token, (bounds, backlog) = _token(args), _bounds(connection.Bounds())
    listener = _bind(args.host, args.port)  # First of all: a port in use is known before the artefact is loaded.
    host, port = listener.getsockname()[:2]
    hosts = comma_separated(args.allowed_hosts or "", str, "allowed-hosts")
    anyone = "*" in hosts or not hosts and not ipaddress.ip_address(host).is_loopback
    door = connection.Door(bounds, None if anyone else hosts)
    try:
        swept = _measured(args, settings)
        app = make_app(settings, swept=swept, token=token, stop_seconds=bounds.stop_seconds, on_ready=_show_ready)
    except BaseException:
        listener.close()
        raise
    sys.setswitchinterval(0.0003)  # Of Python's 5 ms, the event loop would lose several to each call of a runtime.
    config = uvicorn.Config(
        app,
        http=functools.partial(connection.Connection, door=door),  # type: ignore[arg-type]
        ws="none",
        log_level="error",  # A warning is what a client has done wrong, and would fill the disk.
        access_log=False,
        backlog=backlog,
        server_header=False,
        # A header that anyone can send; uvicorn reads the addresses of trusted proxies from the same variable.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        timeout_keep_alive=math.ceil(bounds.idle_seconds),
        timeout_graceful_shutdown=math.ceil(bounds.stop_seconds) + 1,  # `Connection` ends at `stop_seconds`.
    )
    service = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # Uvicorn raises them again when it has stopped, then no one else.
        signal.signal(number, lambda *_: setattr(service, "should_exit", True))
    shown = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {args.artefact} at http://{shown}:{port}", file=sys.stderr, flush=True)
    service.run(sockets=[listener])
    if not app.state.service.has_stopped:  # A program that is being compiled, or a batch that hangs, would be awaited.
        sys.stderr.flush()
        os._exit(0)


def _token(args) -> str | None:
    if args.token and args.token_file:
        raise ValueError("--token and --token-file: give one of them")
    if not args.token_file:
        return args.token or os.environ.get("SDPOINT_TOKEN", "").strip() or None
    with open(args.token_file, encoding="utf-8") as file:
        token = file.read().strip()
    if not token:
        raise ValueError(f"--token-file={args.token_file}: the file is empty")
    return token


def _bounds(bounds):
    """Return the bounds that the limit of open files allows, which is raised as far as it may be, and the backlog."""
    try:
        import resource
    except ImportError:  # Not on Windows.
        return bounds, _BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return bounds, _BACKLOG
    wanted = bounds.connections + _BACKLOG + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft >= wanted:
        return bounds, _BACKLOG
    backlog = max(16, soft // 4)
    return dataclasses.replace(bounds, connections=max(16, soft - backlog - _OTHER_FILES)), backlog


def _bind(host, port) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port={port}: valid are 1 to 65535, and 0 for any free port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host={host}: not an address or a name of this machine ({error.strerror})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"--port={port} at --host={host}: {error.strerror or error}; choose another port, or 0 for any free one"
        ) from None
    return listener


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
    _bind(args.host, args.port).close()
    try:
        from sdpoint_jax.serving import ray_cluster, ray_serve, service
    except ImportError as error:
        raise ImportError(f"{error}: --ray needs the extra, pip install 'sdpoint_jax[ray]'") from None
    from sdpoint_jax.storage import artefact

    if args.token or args.token_file:
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
